"""`merit split`: another partition of a plan's mixture from the read-outs that the plan holds, without any gradient.

It is the planner with one step replaced, so that the result is the plan that `merit plan` would have made with these
settings. The data is read and tokenised again, since a group's steps and tokens are replayed from them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.groups import GRADIENT_SPLITS
from merit_hf.measure import check_sketches, stored_readouts
from merit_hf.mixture import PreparedDataset, check_against_plan, plan_specs
from merit_hf.overrides import apply_override
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.readouts import GradientReadout

# What of `plan` the read-outs were made with.
_MEASURED = (
    "num_samples", "sketch", "sketch_dim", "stride", "reduction", "tokens_per_batch", "seed", "precondition",
    "sketch_by_layer", "min_reliability", "max_num_samples",
    "optimizer_state", "precondition_batches", "split_oversized",
)  # fmt: skip
# What of `plan` names a file or folder.
_FILES = {"affinity", "embedding_model"}
_GIVEN_COUNT = ("joint", "by_tag")


def repartition(
    plan: PartitionPlan,
    output: str | Path,
    split: str | None = None,
    seed: int | None = None,
    num_groups: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> PartitionPlan:
    """Split the mixture of `plan` anew and save the plan that results in `output`.

    Args:
        split (`str`, *optional*): as `plan.split`. Default: the plan's own.
        seed (`int`, *optional*): as `plan.split_seed`: of random and k-means; samples and sketches keep theirs.
        num_groups (`int`, *optional*): K. Default: the plan's own.
        overrides: `plan.KEY=VALUE`, or `datasets.NAME.tag=VALUE` for a split by tag. Paths are of the current folder.

    Returns:
        A plan with its read-outs, as loaded from `output`. One of the same inputs that is there is returned as it is.

    Raises:
        ConfigError: an override that the read-outs would have to be measured again for, a split by gradients of a plan
            that has none, or data that is not on this machine.
        MeritError: base or data are not the planned ones any more, or the plan's sketches are damaged.
    """
    config = _config(plan, split, seed, num_groups, overrides)
    if config.plan.split in GRADIENT_SPLITS:
        check_sketches(plan)
    if config.plan.split in GRADIENT_SPLITS and plan.load_sketches() is None:
        raise ConfigError(
            f"plan.split={config.plan.split} looks at gradients, and the plan holds none, since "
            f"plan.split={plan.config['plan']['split']} needed none. Use merit plan, or --split random, by_tag, joint "
            "or kmeans_text."
        )
    return _Repartitioner(plan, config, progress).plan(output)


class _Repartitioner(MeritPlanner):
    """The planner of a plan's own mixture, which takes the read-outs from the plan."""

    def __init__(self, plan: PartitionPlan, config: MeritConfig, progress: Progress | None) -> None:
        super().__init__(config, progress)
        self.source = plan

    def _resolve_base(
        self, chat_template: str | None, images: bool
    ) -> tuple[Path, dict[str, Any], PreTrainedTokenizerBase]:
        folder, base, tokenizer = super()._resolve_base(self.source.base["chat_template"], images)
        for key in ("weights_sha256", "chat_template_sha256"):
            if base[key] != self.source.base[key]:
                raise MeritError(
                    f"{folder}: {key} is {base[key][:12]}, the plan's {self.source.base[key][:12]}: the base is not "
                    "the one that was planned with. Restore it, or plan again."
                )
        return folder, base, tokenizer

    def _cut_oversized(
        self,
        prepared: Sequence[PreparedDataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
    ) -> list[PreparedDataset]:
        """The plan's datasets stay as they are, parts too: each has a read-out of its own."""
        planned = {dataset.name: dataset for dataset in self.source.datasets}
        for dataset in prepared:
            check_against_plan(dataset, planned[dataset.name])
        return list(prepared)

    def _measure(self, prepared: Sequence[PreparedDataset], *context: object) -> tuple[list[GradientReadout], float]:
        if self.config.plan.split not in GRADIENT_SPLITS:
            return [], 0.0
        return stored_readouts(self.source, [dataset.name for dataset in prepared]), 0.0


def _config(
    plan: PartitionPlan, split: str | None, seed: int | None, num_groups: int | None, overrides: Sequence[str]
) -> MeritConfig:
    """The plan's CONFIG on this machine, its datasets pinned, with another `plan:` section."""
    content = copy.deepcopy(plan.config)
    specs, root = plan_specs(plan, plan.names)
    here = {spec.name: spec.model_dump(mode="json") for spec in specs}
    local = plan.local.get("datasets", {})
    # Datasets that were left out are left out again, where they are still here.
    content["datasets"] = [
        here.get(entry["name"], {**entry, **local.get(entry["name"], {})})
        for entry in content["datasets"]
        if entry["name"] in here or {**entry, **local.get(entry["name"], {})}["path"] is not None
    ]
    base = plan.base
    content["base"] = (
        {"model_name_or_path": str(plan.base_folder())}
        if base["repo_id"] is None
        else {"model_name_or_path": base["repo_id"], "revision": base["revision"]}
    ) | {"freeze": base.get("freeze", [])}
    content["sft"] |= plan.local.get("sft", {})
    if content["merge"]["weights"] == "file":
        content["merge"]["weights"] = plan.local.get("merge_weights") or "tokens"
    content["plan"] |= plan.local.get("plan", {})
    _change_section(content["plan"], split, seed, num_groups, overrides)
    for override in overrides:
        apply_override(content, override)
    # A file that is named on the command line is looked up from there, not beside the CONFIG of the plan.
    for key in {override.partition("=")[0].removeprefix("plan.") for override in overrides} & _FILES:
        value = content["plan"][key]
        # A model may be one of the Hub.
        if isinstance(value, str) and (key == "affinity" or Path(value).expanduser().exists()):
            content["plan"][key] = str(Path(value).expanduser().resolve())
    return MeritConfig.from_dict(content, source="merit split", root=root)


def _change_section(
    section: dict[str, Any], split: str | None, seed: int | None, num_groups: int | None, overrides: Sequence[str]
) -> None:
    """The new split into `section`, without what belonged to the old one alone."""
    changed = {}
    for override in overrides:
        key, _, value = override.partition("=")
        room, _, name = key.partition(".")
        if room == "datasets" and key.endswith(".tag"):
            continue
        if room != "plan" or name in _MEASURED:
            cure = "Use --seed or plan.split_seed for another split" if name == "seed" else "Use merit plan"
            raise ConfigError(
                f"override `{override}`: merit split keeps base, data, SFT settings and what gradients were measured "
                f"with. {cure}."
            )
        changed[name] = value
    if split is not None and "split" in changed:
        raise ConfigError(f"override `plan.split={changed['split']}` beside --split {split}. Give one of them.")
    old, new = section["split"], split or changed.get("split", section["split"])
    section["split"] = new
    if new in _GIVEN_COUNT or old in _GIVEN_COUNT or "group_shares" in changed:
        section["num_groups"] = None
    if num_groups is not None:
        section["num_groups"] = num_groups
    if num_groups is not None or "num_groups" in changed or new not in ("merit", "affinity", "random"):
        section["group_shares"] = None
    if new in _GIVEN_COUNT:
        section["max_imbalance"] = None
    for key, reader in (("affinity", "affinity"), ("embedding_model", "kmeans_text")):
        if new != reader:
            section[key] = None
    if seed is not None:
        section["split_seed"] = seed

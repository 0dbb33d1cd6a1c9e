"""CONFIG: the one YAML that names a base, the datasets, and how to plan, train and merge.

    config = MeritConfig.from_yaml("mixture.yaml", ["plan.num_groups=2", "sft.learning_rate=2e-5"])

Every mistake is a [`ConfigError`] of one line: file, key, value found, what is valid and the nearest valid choice.
"""

from __future__ import annotations

import re
import typing
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merit_hf.choices import (
    MAX_INTERPOLATION,
    check_adapters,
    check_choices,
    check_merge_method,
    check_part,
    check_rounds,
)
from merit_hf.errors import ConfigError as ConfigError
from merit_hf.errors import MeritError as MeritError
from merit_hf.fields import check_fields, nearest
from merit_hf.overrides import apply_override, read_mapping
from merit_hf.overrides import parse_value as parse_value

# Scores of an answer against its reference; beside them, every task of reasoning-gym has a scorer of its own.
METRICS = ("exact_match", "chrf", "rouge1", "rouge2", "rougeL", "none")
REASONING_GYM = "reasoning_gym."


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class BaseSection(_Section):
    """The merge-ready checkpoint that every group starts from.

    Args:
        model_name_or_path (`str`): a Hub id, or a folder relative to the CONFIG file.
        revision (`str`, *optional*): branch, tag or commit on the Hub; the commit found is pinned in the plan.
        freeze (`list[str]`, *optional*): modules that are not trained, by the beginning of their names in the model,
            such as `model.vision_tower`.
    """

    model_name_or_path: str
    revision: str | None = None
    freeze: list[str] = []


class DatasetSection(_Section):
    """One instruction dataset.

    Args:
        name (`str`): unique in the mixture; appears in every table.
        path (`str`): a Hub id, or a .json/.jsonl/.csv/.parquet file relative to the CONFIG file.
        config, split, revision (`str`, *optional*): as in `datasets.load_dataset`; split defaults to `"train"`.
        prompt, completion, messages, text (`str`, *optional*): the column that holds it, where its name differs.
        images (`str`, *optional*): the column that holds a row's image or images. Default: `images` or `image`, where
            there is one and the base reads images.
        chat (`bool`, *optional*, defaults to `False`): wrap plain prompt and completion strings as a user and an
            assistant turn, so that the chat template applies. TRL trains plain strings without a template.
        tag (`str`, *optional*): a label; `plan.split: by_tag` groups by it.
        eval_path, eval_split (`str`, *optional*): held-out rows, same columns. Otherwise `eval_fraction` of the rows.
        eval_fraction (`float`, *optional*, defaults to `0.05`): share of the rows that is held out of training.
        part (`str`, *optional*): `2/3` is the second of three equal parts of the rows, drawn by the dataset's name;
            the entry is then called `NAME#2`. `plan.split_oversized` makes such entries.
        metric (`str`, *optional*): what `merit evaluate` scores answers by: one of [`METRICS`], or
            `reasoning_gym.TASK`. Default: by the length of the references.
    """

    name: str = Field(min_length=1)
    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    images: str | None = None
    chat: bool = False
    tag: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    part: str | None = None
    metric: str | None = None


class PlanSection(_Section):
    """How the mixture is split.

    Args:
        split: `merit` (conflict-aware), `affinity` (the same cuts on a matrix of your own), or a baseline: `random`,
            `joint` (one group), `by_tag`, `kmeans` (on the gradients), `kmeans_text` (on text embeddings).
        num_groups (`int`, *optional*): K. Default 4, or the number of datasets where that is smaller; `joint` has one
            group, `by_tag` one a tag and `group_shares` one a share.
        group_shares (`list`, *optional*): what each group is to hold, in any unit, such as `[4, 2, 1, 1]` for GPUs.
        max_imbalance (`float`, *optional*): a group holds at most this many times its share; datasets move to keep it.
        split_oversized (`bool`, *optional*, defaults to `False`): a dataset larger than the largest group's share is
            cut into parts `NAME#1`, `NAME#2`, …, which are datasets of their own.
        affinity (`str`, *optional*): file of the symmetric matrix for `split: affinity`; .csv, .parquet, .npz or .npy.
        embedding_model (`str`, *optional*): Hub id or folder of a text encoder for `split: kmeans_text`, whose last
            hidden states are averaged. Default: TF-IDF and an SVD.
        precondition: `adam` divides every entry of a gradient by √v̂ + ε, Adam's second moment; default `none`.
        optimizer_state (`str`, *optional*): optimizer.pt, or the Trainer checkpoint with it, to take v̂ from. Default:
            measured at the base, on `precondition_batches` training batches of the mixture.
        precondition_batches (`int`, *optional*, defaults to `32`): how many.
        split_seed (`int`, *optional*): of `random` and k-means, which leaves samples and sketch as they are. Default:
            `seed`.
        num_samples (`int` or `"auto"`, *optional*, defaults to `200`): examples a dataset gradient is the mean of.
            `auto` adds examples until the two halves of the sample agree.
        min_reliability (`float`, *optional*, defaults to `0.8`): where `auto` stops: the share of a gradient's squared
            length that is not sampling noise. 0.8 is a cosine of about 0.89 with the gradient of all examples.
        max_num_samples (`int`, *optional*, defaults to `400`): where `auto` stops at the latest. By the method's own
            numbers a dataset reaches 0.8 at about 250 examples; twice its 200 leaves room for noisier ones.
        sketch: how a gradient is read out: `count_sketch`, `stride` (every `stride`-th parameter) or `exact`.
        sketch_dim (`int`, *optional*, defaults to `65536`): length of a count sketch.
        sketch_by_layer (`bool`, *optional*, defaults to `False`): a part of the count sketch for every layer, so that
            there is a conflict matrix of each ([`PartitionPlan.layer_matrices`]).
        reduction: `token_mean` (summed loss over all loss tokens) or `example_mean` (mean of the examples' means).
        center: PCA of the conflict matrix less its `column` mean, of it as it is (`none`), or centred `double`.
        balance: what the groups are balanced in: `tokens`, `examples` or `datasets`.
        axes: `global` (one PCA) or `local` (again inside each half).
        tokens_per_batch (`int`, *optional*, defaults to `2048`): largest micro-batch, padding included, in tokens.
        low_memory (`bool`, *optional*): read every gradient out and free it as soon as it is there. Default: where the
            gradients of all parameters would not fit beside the model.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): compute the layers twice and keep less of
            them, for examples that do not fit otherwise.
        debias: `split_half` divides the cosines by unbiased lengths of the gradients, from the halves of each sample,
            so that noise no longer pulls them towards 0; `none` leaves them as measured.
        seed (`int`, *optional*, defaults to `0`): of samples, sketch and random splits.
    """

    split: Literal["merit", "random", "joint", "by_tag", "kmeans", "kmeans_text", "affinity"] = "merit"
    num_groups: int | None = Field(default=None, ge=1)
    group_shares: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(default=None, min_length=1)
    max_imbalance: float | None = Field(default=None, ge=1)
    split_oversized: bool = False
    affinity: str | None = None
    embedding_model: str | None = None
    precondition: Literal["none", "adam"] = "none"
    optimizer_state: str | None = None
    precondition_batches: int = Field(default=32, ge=1)
    split_seed: int | None = Field(default=None, ge=0)
    num_samples: Annotated[int, Field(ge=1)] | Literal["auto"] = 200
    min_reliability: float = Field(default=0.8, gt=0, lt=1)
    max_num_samples: int = Field(default=400, ge=2)
    sketch: Literal["count_sketch", "stride", "exact"] = "count_sketch"
    sketch_dim: int = Field(default=65536, ge=16)
    sketch_by_layer: bool = False
    stride: int = Field(default=5, ge=1)
    reduction: Literal["token_mean", "example_mean"] = "token_mean"
    center: Literal["column", "none", "double"] = "column"
    balance: Literal["tokens", "examples", "datasets"] = "tokens"
    axes: Literal["global", "local"] = "global"
    tokens_per_batch: int = Field(default=2048, ge=1)
    low_memory: bool | None = None
    gradient_checkpointing: bool = False
    debias: Literal["none", "split_half"] = "none"
    seed: int = Field(default=0, ge=0)


class MergeSection(_Section):
    """How the groups become one model.

    Args:
        engine: `safetensors` (streaming, key-checked) or `mergekit`.
        weights (`str`, *optional*, defaults to `"tokens"`): `tokens`, `loss_tokens`, `uniform`, or a YAML file that
            maps group to weight.
        out_dtype (`str`, *optional*): of the merged weights. Default: the base's.
        adapters: of LoRA groups, `dense` (a full checkpoint), `concat` (an adapter of summed rank; both are exact) or
            `svd` (an adapter of rank `svd_rank`).
        svd_rank (`int`, *optional*): rank of the merged adapter; required with `svd`.
        method (`str`, *optional*, defaults to `"linear"`): one of mergekit's, where `engine` is `mergekit`: `ties`,
            `dare_ties`, `slerp`, `karcher`, …
        parameters (`dict`, *optional*): of the method, by mergekit's names, such as `density`.
        interpolate_to_init (`float`, *optional*, defaults to `1.0`): α of θ0 + α (θ̄ − θ0), as WARP has it: below 1 the
            merged model lies nearer to the base, above 1 (up to 2) beyond the mean.
    """

    engine: Literal["safetensors", "mergekit"] = "safetensors"
    weights: str = "tokens"
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    adapters: Literal["dense", "concat", "svd"] = "dense"
    svd_rank: int | None = Field(default=None, ge=1)
    method: str = "linear"
    parameters: dict[str, Any] = {}
    interpolate_to_init: float = Field(default=1.0, gt=0, le=MAX_INTERPOLATION, allow_inf_nan=False)


class RunSection(_Section):
    """How `merit run` goes; no part of any plan.

    Args:
        rounds (`int`, *optional*, defaults to `1`): plan, train and merge so many times; each round starts from what
            the one before has merged, and trains on its own share of the rows. Together they train what one does.
        replan (`bool`, *optional*, defaults to `False`): measure gradients and split anew at the base of every round
            after the first. Default: all rounds keep the groups of the first.
    """

    rounds: int = Field(default=1, ge=1)
    replan: bool = False


class HubSection(_Section):
    """Where `merit run` publishes what it made.

    Args:
        push (`bool`, *optional*, defaults to `False`): upload plan, groups and merged model when all are done.
        namespace (`str`, *optional*): user or organisation. Default: the token's owner.
        private (`bool`, *optional*, defaults to `True`): visibility of repos that do not exist yet.
        license (`str`, *optional*): of the merged model. Default: what follows from base and data; where that is not
            clear, the push is refused until this is given.
    """

    push: bool = False
    namespace: str | None = None
    private: bool = True
    license: str | None = None


class MeritConfig(_Section):
    """CONFIG as read. `root` is the folder that relative paths refer to; it is not part of CONFIG."""

    base: BaseSection
    datasets: list[DatasetSection] = Field(min_length=1)
    plan: PlanSection = PlanSection()
    sft: dict[str, Any] = {}
    peft: dict[str, Any] | None = None
    merge: MergeSection = MergeSection()
    run: RunSection = RunSection()
    hub: HubSection = HubSection()
    root: Path = Field(default=Path(), exclude=True)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: typing.Sequence[str] = ()) -> MeritConfig:
        """Read CONFIG, apply `key=value` overrides (`datasets.NAME.key=value` for a dataset) and check all of it.

        Raises:
            ConfigError: the file cannot be read as a mapping, a key is unknown, a value has the wrong type or is
                out of range, dataset names repeat, or there are more groups than datasets.
        """
        path = Path(path)
        content = read_mapping(path)
        for override in overrides:
            apply_override(content, override)
        config = cls.from_dict(content, source=str(path), root=path.resolve().parent)
        check_sft(config.sft, str(path))
        check_peft(config.peft, str(path))
        return config

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "config", root: Path = Path()) -> MeritConfig:
        """Check a mapping; [`~MeritConfig.from_yaml`] also asks TRL and PEFT about the values of `sft` and `peft`."""
        if "root" in content:
            raise ConfigError(f"{source}: unknown key `root`. {nearest('root', _keys(cls))}")
        try:
            config = cls.model_validate({**content, "root": root})
        except ValidationError as error:
            raise ConfigError(_explain(error, content, source)) from None
        config._check_across(source)
        return config

    @property
    def num_groups(self) -> int:
        """K, with the defaults of `plan.split` resolved."""
        if self.plan.split == "joint":
            return 1
        if self.plan.split == "by_tag":
            return len({dataset.tag for dataset in self.datasets})
        if self.plan.group_shares is not None:
            return len(self.plan.group_shares)
        return self.plan.num_groups or min(4, len(self.datasets))

    def _check_across(self, source: str) -> None:
        names = [dataset.name for dataset in self.datasets]
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated:
            places = [f"datasets[{i}]" for i, name in enumerate(names) if name == repeated[0]]
            raise ConfigError(
                f"{source}: {' and '.join(places)} are both named `{repeated[0]}`. Give each its own `name`."
            )
        wanted = self.plan.num_groups
        if wanted is not None and wanted > len(names):
            raise ConfigError(
                f"{source}: plan.num_groups={wanted}, but there are {len(names)} datasets and no group may be empty. "
                f"Set plan.num_groups to {len(names)} or less, or add datasets."
            )
        if wanted is not None and self.plan.split in ("joint", "by_tag") and wanted != self.num_groups:
            raise ConfigError(
                f"{source}: plan.num_groups={wanted}, but plan.split={self.plan.split} gives {self.num_groups}. "
                "Leave plan.num_groups out."
            )
        if self.plan.sketch_by_layer and self.plan.sketch != "count_sketch":
            raise ConfigError(
                f"{source}: plan.sketch_by_layer is for plan.sketch=count_sketch, which is {self.plan.sketch} here. "
                "Leave one of them out."
            )
        check_choices(self.plan, len(names), source)
        for dataset in self.datasets:
            if dataset.part is not None:
                check_part(dataset.name, dataset.part, source)
        merge = self.merge
        check_merge_method(merge.engine, merge.method, merge.parameters, source, merge.interpolate_to_init)
        check_rounds(self, source)
        for dataset in self.datasets:
            if dataset.metric is not None:
                check_metric(dataset.metric, f"{source}: datasets.{dataset.name}.metric")
        untagged = [dataset.name for dataset in self.datasets if dataset.tag is None]
        if self.plan.split == "by_tag" and untagged:
            raise ConfigError(f"{source}: plan.split=by_tag, but dataset `{untagged[0]}` has no `tag`. Give it one.")
        if self.peft is not None and self.base.freeze:
            raise ConfigError(
                f"{source}: base.freeze={self.base.freeze} with `peft:`, which trains nothing of the base. Leave "
                "base.freeze out, and keep adapters off modules with peft.exclude_modules."
            )
        check_adapters(self, source)


def check_metric(name: str, where: str) -> None:
    """Raises ConfigError where `name` is no metric of `merit evaluate`."""
    if name not in METRICS and not re.fullmatch(re.escape(REASONING_GYM) + r"\w+", name):
        choices = [*METRICS, f"{REASONING_GYM}TASK"]
        raise ConfigError(f"{where}={name!r} is not one of {', '.join(choices)}. {nearest(name, choices)}")


def _keys(model: Any) -> list[str]:
    return [name for name, field in model.model_fields.items() if not field.exclude]


def _section_of(location: tuple[int | str, ...]) -> type[BaseModel]:
    sections: dict[Any, type[BaseModel]] = {
        "base": BaseSection, "datasets": DatasetSection, "plan": PlanSection, "merge": MergeSection, "run": RunSection,
        "hub": HubSection,
    }  # fmt: skip
    return sections.get(location[0], MeritConfig) if len(location) > 1 else MeritConfig


def _explain(error: ValidationError, content: dict[str, Any], source: str) -> str:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    # Of a key that takes a number or a word, pydantic names the alternative behind the key.
    location, value = tuple(part for part in first["loc"] if part != "constrained-int"), first["input"]
    words = [
        f" or {other['ctx']['expected']}"
        for other in error.errors()[1:]
        if other["type"] == "literal_error" and other["loc"][:-1] == location
    ]
    entries = content.get("datasets")
    listed = entries if isinstance(entries, list) else []
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in listed]
    shown = [
        f"{names[part]}" if i == 1 and isinstance(part, int) and part < len(names) and names[part] else str(part)
        for i, part in enumerate(location)
    ]
    key = ".".join(shown)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return (
            f"{source}: unknown key `{key}` (value {value!r}). {nearest(location[-1], _keys(_section_of(location)))}"
        )
    if kind == "missing":
        return f"{source}: `{key}` is missing and has no default. Add it."
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{source}: {key}={value!r} is not one of {', '.join(choices)}. {nearest(value, choices)}"
    expected = first["msg"].replace("Input should be ", "").replace("a valid ", "")
    return f"{source}: {key}={value!r} ({type(value).__name__}): expected {expected}{''.join(words)}."


def check_sft(sft: dict[str, Any], source: str) -> None:
    """Names and types of `sft` against the installed TRL's SFTConfig (imported here: it brings torch)."""
    if not sft:
        return
    from trl import SFTConfig

    _check_fields(sft, "sft", SFTConfig, source)


def check_peft(peft: dict[str, Any] | None, source: str) -> None:
    """Names and types of `peft` against the installed PEFT's LoraConfig (imported here: it brings torch)."""
    if not peft:
        return
    from peft import LoraConfig

    _check_fields(peft, "peft", LoraConfig, source)


def _check_fields(values: dict[str, Any], section: str, kind: type, source: str) -> None:
    try:
        check_fields(values, section, kind)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None

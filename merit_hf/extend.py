"""`merit extend`: more datasets for a finished plan, in O(T·m).

    extended = extend_plan(plan, [{"name": "new", "path": "data/new.jsonl"}], "runs/extended")

`project` freezes axes and cuts, and trains the new datasets in branches of their own beside the finished groups;
`refit` plans again from the stored gradients and the new ones. Both measure the new datasets only.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.adapters import model_settings
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.conflict import cross_cosines
from merit_hf.extension import check_base, check_template, new_config, plan_config
from merit_hf.fields import nearest
from merit_hf.findings import planned_datasets
from merit_hf.groups import GRADIENT_SPLITS, plan_groups
from merit_hf.measure import check_sketches, measure_gradients
from merit_hf.mixture import PreparedDataset, name_images, plan_specs, prepare_mixture, read_mixture
from merit_hf.plan import PartitionPlan, PlannedDataset, PlannedGroup, canonical_sha256
from merit_hf.plan_files import holds_plan
from merit_hf.planner import MeritPlanner, save_plan
from merit_hf.progress import Progress
from merit_hf.projection import local_values, nearest_centroids, project_onto_axes, sides_of_cuts
from merit_hf.readouts import GradientReadout
from merit_hf.resolved import first_difference, local_settings, published_config
from merit_hf.sft import build_args, group_steps, identity_fields, load_model, load_tokenizer
from merit_hf.tables import MAX_ALL_PAIRS, ConflictPairs, all_pairs_matrix, extend_pairs
from merit_hf.versions import library_versions
from merit_hf.vision import takes_images
from merit_hf.workers import Worker

MODES = ("project", "refit")
BRANCHES = ("dataset", "group")


def extend_plan(
    plan: PartitionPlan,
    datasets: Sequence[dict[str, Any]],
    output: str | Path,
    mode: str = "project",
    branches: str | None = None,
    progress: Progress | None = None,
) -> PartitionPlan:
    """Add datasets to a finished plan and save the new plan in `output`.

    Work in progress lies in `OUTPUT.part`; the same call goes on with the datasets that are not measured yet.

    Args:
        plan ([`PartitionPlan`]): the plan to extend; it is left as it is.
        datasets (`Sequence[dict]`): entries as in CONFIG; local paths are absolute, or of the plan's own root.
        output (`str` or `Path`): the folder to make.
        mode (`str`, *optional*, defaults to `"project"`): `project` keeps every group of the plan as it is and adds
            branches from the same base; `refit` makes the axes and all groups again.
        branches (`str`, *optional*): with `project`, a branch for each new `dataset` (default), so that a later
            extension leaves the branches of this one alone, or one for all that fall to the same `group`.
        progress ([`Progress`], *optional*): where to show it.

    Raises:
        ConfigError: a name is taken, the plan holds no gradients, base or chat template are not the plan's, or
            `output` holds another plan. MeritError: data or base cannot be read, files of the plan are missing, or a
            gradient is not finite.
    """
    for option, value, choices in (("mode", mode, MODES), ("branches", branches or BRANCHES[0], BRANCHES)):
        if value not in choices:
            raise ConfigError(f"--{option} {value}: is not one of {', '.join(choices)}. {nearest(value, choices)}")
    if mode == "refit" and branches is not None:
        raise ConfigError("--branches is for --mode project: refit makes all groups again. Leave one of them out.")
    output, progress = Path(output), progress or Progress()
    holds_plan(output)
    check_sketches(plan)
    entries = [dict(entry) for entry in datasets]
    config = new_config(plan, entries, "datasets")
    folder = plan.base_folder()
    check_base(plan, folder, "the plan's base")
    if mode == "refit":
        return _refit(plan, entries, output, progress)
    _check_projectable(plan.config["plan"])
    if not plan.is_measured:
        raise MeritError(f"{plan.folder}: the plan's conflict matrix is missing. Restore data/conflict.parquet.")
    return _Projection(plan, config, folder, branches or BRANCHES[0], progress).make(output)


def _check_projectable(section: dict[str, Any]) -> None:
    """Raises ConfigError where new gradients cannot be set beside the stored ones as they are."""
    if section["split"] not in GRADIENT_SPLITS:
        raise ConfigError(
            f"plan.split={section['split']} stores no gradients to project on. Use --mode refit, which plans all "
            "datasets again."
        )
    if section.get("debias", "none") != "none":
        raise ConfigError(
            f"plan.debias={section['debias']} corrects the cosines of all datasets together. Use --mode refit."
        )
    if section.get("precondition", "none") != "none" and section.get("optimizer_state") is None:
        raise ConfigError(
            "plan.precondition=adam without plan.optimizer_state measures its second moments on the whole mixture, "
            "which new datasets change. Use --mode refit, which measures all gradients again."
        )
    if section.get("max_imbalance") is not None:
        raise ConfigError(
            "plan.max_imbalance moved datasets across the cuts, so no cut tells where a new dataset belongs. Use "
            "--mode refit."
        )


def changes(parent: PartitionPlan, extended: PartitionPlan) -> dict[str, Any]:
    """What an extension changed.

    Returns:
        `added`: {new dataset: its group}; `moved`: datasets that left the group that holds most of their old company;
        `to_train`: groups whose checkpoint is not one of the parent's; `kept`: those whose is.
    """
    old = {dataset.name: dataset.group for dataset in parent.datasets}
    new = {dataset.name: dataset.group for dataset in extended.datasets}
    overlap = np.zeros((parent.num_groups, extended.num_groups))
    for name in old.keys() & new.keys():
        overlap[old[name], new[name]] += 1
    home = dict(zip(*(indices.tolist() for indices in linear_sum_assignment(-overlap)), strict=True))
    finished = {(group.group, group.group_sha256) for group in parent.groups}
    kept = [group.group for group in extended.groups if (group.group, group.group_sha256) in finished]
    return {
        "added": {name: group for name, group in new.items() if name not in old},
        "moved": sorted(name for name in old.keys() & new.keys() if home.get(old[name]) != new[name]),
        "to_train": [group.group for group in extended.groups if group.group not in kept],
        "kept": kept,
    }


def _refit(plan: PartitionPlan, entries: list[dict[str, Any]], output: Path, progress: Progress) -> PartitionPlan:
    """The planner itself over old and new datasets; it finds the old ones measured."""
    specs, _ = plan_specs(plan, plan.names)
    section = plan.config["plan"]
    num_groups = None if section["split"] in ("joint", "by_tag") else section["num_groups"]
    config = plan_config(plan, [*(spec.model_dump() for spec in specs), *entries], "datasets", num_groups)
    if plan.base.get("chat_template") is not None:
        part = output.with_name(output.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        template = part.resolve() / "chat_template.jinja"
        template.write_text(plan.base["chat_template"], encoding="utf-8")
        config = config.model_copy(update={"sft": {**config.sft, "chat_template_path": str(template)}})
    return MeritPlanner(config, progress, parent=plan).plan(output)


class _Projection:
    """`project`: what stays, and what the new datasets add to it."""

    def __init__(
        self, plan: PartitionPlan, config: MeritConfig, folder: Path, branches: str, progress: Progress
    ) -> None:
        self.plan, self.config, self.folder, self.branches, self.progress = plan, config, folder, branches, progress
        # The datasets that axes and cuts were made of: those of earlier extensions are projected too.
        self.fitted = np.array([row.projected_group is None for row in plan.datasets])

    def make(self, output: Path) -> PartitionPlan:
        start = time.monotonic()
        plan, part = self.plan, output.with_name(output.name + ".part")
        args = build_args(dict(self.config.sft))
        given = {key: value for key, value in plan.sft.items() if key != "mixture_steps"}
        different = first_difference(given, identity_fields(args), "sft")
        if different:
            raise MeritError(
                f"this TRL resolves the plan's settings otherwise ({different}). Use the plan's versions."
            )
        tokenizer = load_tokenizer(self.folder, plan.base.get("chat_template"), plan.has_images)
        check_template(plan, tokenizer, "the plan's base")
        loaded, skipped = read_mixture(
            self.config.datasets, self.config.root, args, self.progress, lambda: takes_images(self.folder)
        )
        pictured = [dataset.name for dataset in loaded if dataset.images]
        if pictured and not plan.has_images:
            raise ConfigError(
                f"dataset `{pictured[0]}` holds images, and the plan was made without the base's image processor. Use "
                "--mode refit, or leave it out."
            )
        self.config = name_images(self.config, loaded, args)
        inputs = canonical_sha256(
            {
                "parent": plan.sha256,
                "datasets": {dataset.name: dataset.fingerprint for dataset in loaded},
                "branches": self.branches,
                **{f"weight of {dataset.name}": dataset.weight for dataset in loaded if dataset.weight != 1},
            }
        )
        if holds_plan(output):
            finished = PartitionPlan.from_pretrained(output)
            if finished.inputs_sha256 != inputs:
                raise ConfigError(
                    f"{output} holds the plan of other inputs. Give another --output, or delete that one."
                )
            shutil.rmtree(part, ignore_errors=True)
            return finished
        (part / "gradients").mkdir(parents=True, exist_ok=True)
        model = load_model(self.folder, args, self.config.peft, plan.base.get("freeze", ()))
        prepared, dropped = prepare_mixture(loaded, model, tokenizer, args, self.progress)
        if not prepared:
            raise ConfigError(f"no new dataset can be trained on ({'; '.join((skipped | dropped).values())}).")
        peft = model_settings(model) or {}
        readouts, seconds = measure_gradients(
            prepared, model, tokenizer, args, self.config.plan, plan.base["weights_sha256"], part / "gradients",
            Worker(), self.progress, peft, self.config.root, plan.base.get("freeze", ()),
        )  # fmt: skip
        matrix_start = time.monotonic()
        extended, sketches, pairs = self._extended(prepared, readouts, model, tokenizer, args)
        extended.skipped, extended.inputs_sha256 = plan.skipped | skipped | dropped, inputs
        extended.cost = {
            "gradient_seconds": round(seconds, 3),
            "matrix_seconds": round(time.monotonic() - matrix_start, 3),
            "total_seconds": round(time.monotonic() - start, 3),
            "tokens": sum(readout.num_input_tokens for readout in readouts),
            "num_batches": sum(readout.num_batches for readout in readouts),
            "world_size": 1,
        }
        return save_plan(extended, sketches, part, output, pairs, self._first_halves(extended, readouts, prepared))

    def _first_halves(
        self, extended: PartitionPlan, readouts: Sequence[GradientReadout], prepared: Sequence[PreparedDataset]
    ) -> list[np.ndarray]:
        """Those of all datasets, in the order of the extended plan; none where one of them has none."""
        stored = self.plan.load_first_halves()
        if stored is None or any(readout.first_half is None for readout in readouts):
            return []
        halves = dict(zip(self.plan.names, stored, strict=True))
        new = {dataset.name: readout.first_half for dataset, readout in zip(prepared, readouts, strict=True)}
        return [np.asarray(halves[name] if name in halves else new[name]) for name in extended.names]

    def _extended(
        self,
        prepared: Sequence[PreparedDataset],
        readouts: Sequence[GradientReadout],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
    ) -> tuple[PartitionPlan, list[np.ndarray], ConflictPairs]:
        plan = self.plan
        old_rows = list(np.asarray(plan.load_sketches()))
        new_rows = [np.asarray(readout.sketch) for readout in readouts]
        cosines = cross_cosines(old_rows, new_rows)
        coordinates, projected = self._place(old_rows, new_rows, cosines)
        groups = plan.num_groups + _branch_numbers(projected, self.branches)
        rows = planned_datasets(self.config, prepared, readouts, groups, coordinates)
        rows = [replace(row, projected_group=int(group)) for row, group in zip(rows, projected, strict=True)]
        branches = self._branches(rows, prepared, model, tokenizer, args)

        everything = [*plan.datasets, *rows]
        order = sorted(range(len(everything)), key=lambda index: everything[index].name)
        place = np.argsort(order)
        known = plan.conflict_pairs()
        assert known is not None
        among = cross_cosines(new_rows, new_rows)
        pairs = extend_pairs(known, cosines, among, place[: len(old_rows)], place[len(old_rows) :])
        config = {**plan.config, "datasets": plan.config["datasets"] + published_config(self.config)["datasets"]}
        bare = copy.copy(plan)
        # A `replace` of the plan itself would make the whole matrix.
        bare.conflict_matrix = None
        extended = replace(
            bare, config=config, datasets=[everything[index] for index in order],
            groups=_weighed([*plan.groups, *branches]), versions=library_versions(), parent_sha256=plan.sha256,
            local=self._local(), repo_id=None, revision=None, supplied={},
        )  # fmt: skip
        if len(everything) <= MAX_ALL_PAIRS:
            extended.conflict_matrix = all_pairs_matrix(pairs, len(everything))
        else:
            extended.conflict_matrix = lambda: None
        sketches = [*old_rows, *new_rows]
        return extended, [sketches[index] for index in order], pairs

    def _place(
        self, old_rows: list[np.ndarray], new_rows: list[np.ndarray], cosines: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of the new datasets, and the group on whose side of the frozen cuts each falls."""
        section = self.plan.config["plan"]
        fitted = [index for index, is_fitted in enumerate(self.fitted) if is_fitted]
        rows, cross = [old_rows[index] for index in fitted], cosines[fitted]
        old = np.array([self.plan.datasets[index].coordinates for index in fitted])
        groups = np.array([self.plan.datasets[index].group for index in fitted])
        new = project_onto_axes(rows, old, cross, section["center"])
        if section["split"] == "kmeans":
            return new, nearest_centroids(cross, rows, groups)
        if section["axes"] == "local":
            values = local_values(rows, new_rows, section["center"])
        else:
            values = lambda members, level: (old[members, level], new[:, level])  # noqa: E731
        return new, sides_of_cuts(groups, int(groups.max()) + 1, len(new_rows), values)

    def _branches(
        self,
        rows: Sequence[PlannedDataset],
        prepared: Sequence[PreparedDataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
    ) -> list[PlannedGroup]:
        """The new groups. Where `sft.max_steps` bounds the mixture, a branch gets steps at the rate of the plan's."""
        plan, branches = self.plan, []
        trains = {dataset.name: dataset.train for dataset in prepared}
        first = int(max(row.group for row, is_fitted in zip(plan.datasets, self.fitted, strict=True) if is_fitted))
        tokens = sum(group.num_input_tokens for group in plan.groups[: first + 1])
        steps_of_all = {key: value for key, value in plan.sft.items() if key == "mixture_steps"}
        for number in sorted({row.group for row in rows}):
            members = [row for row in rows if row.group == number]
            steps = args.max_steps
            if steps > 0:
                steps = max(1, round(steps * sum(row.num_input_tokens for row in members) / tokens))
            with group_steps(args, steps):
                branches += plan_groups(members, trains, model, tokenizer, args, plan.base, plan.peft, steps_of_all)
        return branches

    def _local(self) -> dict[str, Any]:
        mine, theirs = local_settings(self.config, self.folder), self.plan.local
        datasets = {**theirs.get("datasets", {}), **mine["datasets"]}
        return {**mine, **{key: value for key, value in theirs.items() if value is not None}, "datasets": datasets}


def _branch_numbers(projected: np.ndarray, branches: str) -> np.ndarray:
    """0, 1, … for each new dataset: one of its own, or one for all that fall to the same group."""
    if branches == "dataset":
        return np.arange(len(projected))
    return np.unique(projected, return_inverse=True)[1]


def _weighed(groups: Sequence[PlannedGroup]) -> list[PlannedGroup]:
    total = sum(group.train_input_tokens for group in groups)
    return [replace(group, weight=group.train_input_tokens / total) for group in groups]

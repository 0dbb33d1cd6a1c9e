"""PartitionPlan: the artifact between planning and training, as a folder or a Hub dataset repo.

plan = PartitionPlan.from_pretrained("runs/mixture/plan")     # or "org/name", revision="…"
plan.group(0).datasets

plan.json  data/{datasets,conflict,groups}.parquet  sketches.safetensors  figures/*.png  README.md
local.json      where this machine finds local data; never published
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from merit_hf import tables
from merit_hf.choices import whole_name
from merit_hf.config import ConfigError, MeritError
from merit_hf.conflict import conflict_matrix
from merit_hf.plan_files import LOCAL_NAME as LOCAL_NAME
from merit_hf.plan_files import PLAN_NAME as PLAN_NAME
from merit_hf.plan_files import SCHEMA_VERSION, locate_plan, read_content, read_local
from merit_hf.plan_identity import canonical_sha256 as canonical_sha256
from merit_hf.plan_identity import group_identity as group_identity
from merit_hf.readouts import SKETCHES_NAME, open_sketches
from merit_hf.reliability import debias_cosines
from merit_hf.sharing.untrusted import check_pinned, vet_plan
from merit_hf.tables import ConflictPairs, LazyMatrix
from merit_hf.tables import PlannedDataset as PlannedDataset
from merit_hf.tables import PlannedGroup as PlannedGroup

# What plan.json holds of a plan; the tables hold the rest.
_CONTENT = ("config", "base", "sft", "explained", "bounds", "skipped", "cost", "versions", "inputs_sha256")
_COUNTS = ("num_examples", "num_input_tokens", "num_loss_tokens")


def _sha256_of_groups(groups: Sequence[PlannedGroup]) -> str:
    keys = ("group_sha256", "num_steps", "train_input_tokens", "train_loss_tokens")
    return canonical_sha256(
        {
            "schema_version": SCHEMA_VERSION,
            "groups": [{key: getattr(group, key) for key in keys} for group in groups],
        }
    )


@dataclass
class PartitionPlan:
    """A finished plan.

    Attributes:
        config: CONFIG as resolved, without local paths.
        base: repo_id, revision, weights_sha256, chat_template_sha256, dtype; `freeze` where modules are not trained.
        datasets: sorted by name.
        groups: 0 … K−1.
        sft: the identity fields of the SFT settings.
        peft: LoRA settings as PEFT resolved them, valid as fields of LoraConfig; empty where all weights are trained.
        conflict_matrix: [T, T] in the order of `datasets`; None where the split needs no gradients. Of a loaded plan
            of more than 1,000 datasets it is made of the sketches when it is first asked for; see `is_measured`.
        explained: share of the variance of C on each axis. bounds: what can be trusted of the axes.
        layers: {layer: (start, stop)} in a sketch with a part for every layer; empty otherwise.
        trust: whether the plan is worth following, as [`~merit_hf.trust.assess`] says; empty where nothing is known.
        skipped: datasets left out, with the reason.
        inputs_sha256: of what the planner was given; the same inputs are not planned twice.
        parent_sha256: of the plan that `merit extend` made this one of.
        supplied: {dataset: file} as [`supply`] was told.
        local: {"base": folder, "datasets": {name: {"path", "eval_path"}}, "root": folder} on this machine.
    """

    config: dict[str, Any]
    base: dict[str, Any]
    datasets: list[PlannedDataset]
    groups: list[PlannedGroup]
    sft: dict[str, Any]
    peft: dict[str, Any] = field(default_factory=dict)
    conflict_matrix: LazyMatrix = LazyMatrix()  # noqa: RUF009 (a descriptor is shared by design)
    explained: list[float] = field(default_factory=list)
    bounds: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    trust: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    inputs_sha256: str = ""
    repo_id: str | None = None
    revision: str | None = None
    local: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    supplied: dict[str, str] = field(default_factory=dict)
    parent_sha256: str | None = None

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    @property
    def is_measured(self) -> bool:
        """Whether the plan has a conflict matrix; asking does not make it."""
        return self.__dict__[LazyMatrix.NAME] is not None

    def conflict_pairs(self) -> ConflictPairs | None:
        """The pairs that data/conflict.parquet lists, without the whole matrix where the plan lies in a folder."""
        if not self.is_measured:
            return None
        if callable(self.__dict__[LazyMatrix.NAME]) and self.folder is not None:
            return tables.read_conflict(self.folder, self.names)
        matrix = self.conflict_matrix
        assert matrix is not None
        return tables.conflict_pairs(matrix)

    @property
    def names(self) -> list[str]:
        return [dataset.name for dataset in self.datasets]

    @property
    def sha256(self) -> str:
        """The plan's identity: what determines training and merging, and nothing else."""
        return _sha256_of_groups(self.groups)

    def extends(self, sha256: str) -> int | None:
        """How many groups the plan with this identity has, where it is this one or one that this one extends.

        Extensions only add groups at the end, so every plan before is known by the groups of this one.
        """
        counts = range(self.num_groups, 0, -1)
        return next((count for count in counts if _sha256_of_groups(self.groups[:count]) == sha256), None)

    def group(self, number: int) -> PlannedGroup:
        """Raises ConfigError where there is no such group."""
        if not 0 <= number < self.num_groups:
            raise ConfigError(f"group {number}: the plan has groups 0 to {self.num_groups - 1}.")
        return self.groups[number]

    def members(self, number: int) -> list[PlannedDataset]:
        """The datasets of a group, in the order of names."""
        self.group(number)
        return [dataset for dataset in self.datasets if dataset.group == number]

    def group_sft(self, number: int) -> dict[str, Any]:
        """The identity fields of one group's training: `max_steps` is the mixture's, of which it takes its share."""
        if self.sft["max_steps"] <= 0:
            return self.sft
        return {**self.sft, "max_steps": self.group(number).num_steps}

    @property
    def has_images(self) -> bool:
        """Whether a dataset holds images: all of the mixture then goes through the base's processor."""
        return any(entry.get("images") for entry in self.config["datasets"])

    def sees_images(self, number: int) -> bool:
        """Whether a dataset of the group holds images."""
        members = self.group(number).datasets
        return any(entry.get("images") for entry in self.config["datasets"] if entry["name"] in members)

    def base_folder(self) -> Path:
        """The base on this machine: where it was planned from, or the pinned commit from the Hub.

        Raises:
            ConfigError: it was a local folder that is not here.
        """
        local = self.local.get("base")
        if local and Path(local).is_dir():
            return Path(local)
        if self.base["repo_id"] is None:
            raise ConfigError(
                f"the plan's base was a local folder (weights {self.base['weights_sha256'][:12]}) and is not on this "
                "machine. Plan from its own CONFIG here."
            )
        from merit_hf.hub import fetch_model

        return fetch_model(self.base["repo_id"], self.base["revision"])

    def save_pretrained(self, folder: str | Path, pairs: ConflictPairs | None = None) -> None:
        """Write plan.json, tables, local.json, figures and card. The planner puts the sketches beside them.

        The picture of a matrix that was not asked for is taken from the plan's own folder, where it is there.

        Args:
            pairs ([`~tables.ConflictPairs`], *optional*): what data/conflict.parquet lists, where that is known
                without the whole matrix.
        """
        from merit_hf.cards import plan_dataset_card
        from merit_hf.figures import save_plan_figures

        folder = Path(folder)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        tables.write_datasets(folder, self.datasets)
        tables.write_groups(folder, self.groups)
        pairs = pairs or self.conflict_pairs()
        if pairs is not None:
            tables.write_conflict(folder, self.names, pairs)
        picture = (self.folder or folder) / "figures" / "conflict.png"
        at_hand = callable(self.__dict__[LazyMatrix.NAME]) and picture.is_file() and picture.parent.parent != folder
        save_plan_figures(self, folder, with_matrix=not at_hand)
        if at_hand:
            shutil.copyfile(picture, folder / "figures" / "conflict.png")
        (folder / "README.md").write_text(plan_dataset_card(self, pairs), encoding="utf-8")
        self.save_settings(folder)

    def save_settings(self, folder: Path) -> None:
        """Write plan.json and local.json, each in one step; plan.json last, since it makes a folder a plan."""
        for name, content in ((LOCAL_NAME, self.local), (PLAN_NAME, self.to_dict())):
            part = folder / f"{name}.part"
            part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(part, folder / name)

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        section = self.config["plan"]
        return {
            "schema_version": SCHEMA_VERSION,
            "sha256": self.sha256,
            "config": self.config,
            "base": self.base,
            "seed": section["seed"],
            "sketch": {"kind": section["sketch"], "dim": section["sketch_dim"], "seed": section["seed"],
                       **({"layers": self.layers} if self.layers else {})},
            "sft": self.sft,
            **({"peft": self.peft} if self.peft else {}),
            "explained": self.explained,
            "bounds": self.bounds,
            "trust": self.trust,
            "skipped": self.skipped,
            "inputs_sha256": self.inputs_sha256,
            **({"parent_sha256": self.parent_sha256} if self.parent_sha256 else {}),
            "cost": self.cost,
            "versions": self.versions,
        }  # fmt: skip

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> PartitionPlan:
        """Load a plan from a folder or a Hub dataset repo (`org/name` or `org/name@revision`).

        Raises:
            ConfigError: no plan there. MeritError: its parts contradict each other or its recorded sha256.
        """
        folder, repo_id, sha = locate_plan(path, revision)
        content = read_content(folder)
        try:
            datasets = tables.read_datasets(folder)
            if repo_id is not None:
                content = vet_plan(content, repo_id)
                for dataset in datasets:
                    check_pinned(dataset.repo_id, dataset.revision, dataset.name, repo_id)
            plan = cls(
                datasets=datasets,
                groups=tables.read_groups(folder),
                # What lies in a repo under this name was written by somebody else about another machine.
                local=read_local(folder) if repo_id is None else {},
                repo_id=repo_id,
                revision=sha,
                folder=folder,
                peft=content.get("peft", {}),
                layers={k: (int(v[0]), int(v[1])) for k, v in content["sketch"].get("layers", {}).items()},
                parent_sha256=content.get("parent_sha256"),
                # Plans of before halves were kept have none.
                trust=content.get("trust", {}),
                **{key: content[key] for key in _CONTENT},
            )
            plan._find_conflicts(folder)
            plan._check_identity(content["sha256"], folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MeritError(f"{folder}: not a complete plan ({type(error).__name__}: {error}).") from error
        return plan

    def push_to_hub(self, repo_id: str, private: bool | None = None, create_pr: bool = False) -> str:
        """Upload the plan's folder as one commit of a dataset repo, without local.json; returns the commit's URL.

        Args:
            private (`bool`, *optional*): visibility of a repo that does not exist yet. Default: the Hub's own.
            create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.

        Raises:
            ConfigError: the plan was not saved, or the repo holds another plan that is in use.
            MeritError: the upload failed; it can be run again.
        """
        from merit_hf.sharing.publish import push_plan

        return push_plan(self, repo_id, private, create_pr).url

    def supply(self, paths: dict[str, str | Path]) -> None:
        """Say where datasets lie that were local where the plan was made: {name: file}. Their rows are checked later.

        Raises:
            ConfigError: no such dataset, or no such file.
        """
        for name, path in paths.items():
            parts = self._parts_of(name)
            if parts and name not in self.names:
                # The file of a dataset that was cut is the file of all its parts.
                self.supply(dict.fromkeys(parts, path))
                continue
            if name not in self.names:
                raise ConfigError(f"--data {name}: the plan has no such dataset. It has {', '.join(self.names)}.")
            if not Path(path).expanduser().exists():
                raise ConfigError(f"--data {name}={path}: no such file.")
            self.supplied[name] = str(Path(path).expanduser().resolve())
            self.local.setdefault("datasets", {})[name] = {"path": self.supplied[name]}

    def _parts_of(self, name: str) -> list[str]:
        """The datasets that dataset `name` was cut into."""
        parts = {entry["name"]: entry.get("part") for entry in self.config["datasets"]}
        return [part for part in self.names if parts[part] is not None and whole_name(part, parts[part]) == name]

    def load_sketches(self) -> np.ndarray | None:
        """The gradient read-outs, float32 [T, dim], memory-mapped; None where the split needed none."""
        return self._open("sketches")

    def load_first_halves(self) -> np.ndarray | None:
        """The read-outs of the first half of each sample, float32 [T, dim]; None where the plan kept none.

        The second half's is (sketch − w · first) / (1 − w), with w the dataset's `first_half_share`.
        """
        return self._open("first_half")

    def _open(self, name: str) -> np.ndarray | None:
        if self.folder is None:
            return None
        path = self.folder / SKETCHES_NAME
        if self.repo_id is not None and self.revision is not None and not path.exists():
            from merit_hf.hub import fetch_sketches

            fetch_sketches(self.repo_id, self.revision, SKETCHES_NAME)
        return open_sketches(path, name) if path.exists() else None

    def layer_matrices(self) -> dict[str, np.ndarray]:
        """The conflict matrix of every layer, float64 [T, T]: the cosines of the gradients of its parameters alone.

        Layers that a dataset's gradient does not reach are left out.

        Raises:
            ConfigError: the plan was not made with `plan.sketch_by_layer`.
        """
        sketches = self.load_sketches()
        if sketches is None or not self.layers:
            raise ConfigError("this plan has no sketches by layer. Plan with plan.sketch_by_layer=true.")
        parts = {layer: sketches[:, start:stop] for layer, (start, stop) in self.layers.items()}
        reached = {layer: part for layer, part in parts.items() if part.size and part.any(axis=1).all()}
        return {layer: conflict_matrix(part) for layer, part in reached.items()}

    def _find_conflicts(self, folder: Path) -> None:
        """Set the matrix: from its table, or, where that holds extreme pairs, from the sketches when asked for."""
        if len(self.datasets) > tables.MAX_ALL_PAIRS:
            if (folder / "data" / "conflict.parquet").exists():
                self.conflict_matrix = self._matrix_of_sketches
            return
        pairs = tables.read_conflict(folder, self.names)
        if pairs is not None:
            self.conflict_matrix = tables.all_pairs_matrix(pairs, len(self.datasets))

    def _matrix_of_sketches(self) -> np.ndarray | None:
        sketches = self.load_sketches()
        if sketches is None:
            return None
        cosines = conflict_matrix(sketches)
        if self.config["plan"].get("debias") != "split_half":
            return cosines
        return debias_cosines(cosines, [dataset.reliability for dataset in self.datasets])[0]

    def _check_identity(self, recorded: str, folder: Path) -> None:
        total = sum(group.train_input_tokens for group in self.groups)
        for group in self.groups:
            members = self.members(group.group)
            expected = group_identity(self.base, members, self.group_sft(group.group), self.peft)
            if group.group_sha256 != expected:
                raise MeritError(
                    f"{folder}: group {group.group} records {group.group_sha256[:12]}, its content gives "
                    f"{expected[:12]}. The plan was changed by hand; plan again."
                )
            sums = {count: sum(getattr(member, count) for member in members) for count in _COUNTS}
            found = {count: getattr(group, count) for count in _COUNTS}
            names = [member.name for member in members]
            if (group.datasets, found) != (names, sums) or abs(group.weight - group.train_input_tokens / total) > 1e-9:
                raise MeritError(
                    f"{folder}: groups.parquet says other things of group {group.group} than datasets.parquet. "
                    "The plan was changed by hand; plan again."
                )
        if recorded != self.sha256:
            raise MeritError(
                f"{folder}: plan.json records sha256 {recorded[:12]}, the tables give {self.sha256[:12]}. Plan again."
            )

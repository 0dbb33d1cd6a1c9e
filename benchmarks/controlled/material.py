"""What an experiment is made of, as files: examples, base checkpoint, and the CONFIGs that `merit` is given.

FOLDER/data/train/NAME.jsonl  FOLDER/data/val/NAME.jsonl     from the start
FOLDER/data/test/NAME.jsonl                                  from `unseal` on, when every choice has been made
FOLDER/base                                                  θ0
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from experiment import Arm, Cell, Experiment
from tasks import TASKS, make_examples, quickstart_makers

from merit_hf.config import ConfigError, MeritConfig, check_sft
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.reliability import debias_cosines

Pair = tuple[str, str]
TRAIN, VAL, TEST = "train", "val", "test"
SMOLLM2 = "smollm2"
# Fewer training rows than this are no dataset.
MIN_TRAIN = 8


def split_pairs(pairs: Sequence[Pair], val: int, test: int) -> dict[str, list[Pair]]:
    """Three parts that share no pair: the first `test` pairs, the next `val`, and the rest for training."""
    return {TEST: list(pairs[:test]), VAL: list(pairs[test : test + val]), TRAIN: list(pairs[test + val :])}


@dataclass(frozen=True)
class Material:
    """The files of one experiment in `folder`; `base_folder` is θ0's, where it is made here."""

    experiment: Experiment
    folder: Path
    base_folder: Path

    @property
    def base(self) -> str:
        """What `base.model_name_or_path` is to name."""
        named = self.experiment.base.model
        if named is None or named == SMOLLM2:
            return str(self.base_folder.resolve())
        return str(Path(named).resolve()) if Path(named).is_dir() else named

    @property
    def names(self) -> list[str]:
        return [*self.experiment.data.datasets, *self.experiment.data.held_out]

    def prepare(self, progress: Progress, excluded: Collection[str] = ()) -> None:
        """Write training and validation rows, and the base. Whatever is there already is kept.

        Args:
            excluded: prompts that a warm-up must not see, beside the validation and test rows here.

        Raises:
            ConfigError: no such task, a package that is missing, or too few examples.
        """
        from warmup import build_base, check_held_out

        self._write((TRAIN, VAL))
        base = self.experiment.base
        if base.warmup is not None:
            build_base(base.warmup, self.base_folder, self.excluded() | {*excluded}, progress)
        elif base.model == SMOLLM2:
            self.base_folder.parent.mkdir(parents=True, exist_ok=True)
            make_smollm2(self.base_folder)
        check_held_out(Path(self.base), self.excluded())

    def excluded(self) -> set[str]:
        """Prompts of validation and test rows, which a warm-up must not see."""
        return {prompt for name in self.names for split in (VAL, TEST) for prompt, _ in self.rows(name, split)}

    def unseal(self) -> None:
        """Write the test rows: after this nothing is chosen any more."""
        self._write((TEST,))

    @property
    def sealed(self) -> bool:
        return not (self.folder / "data" / TEST).exists()

    def rows(self, name: str, split: str) -> list[Pair]:
        data = self.experiment.data
        pairs = make_examples(name, data.train + data.val + data.test, data.seed, data.conflict)
        parts = split_pairs(pairs, data.val, data.test)
        if len(parts[TRAIN]) < MIN_TRAIN:
            raise ConfigError(
                f"task `{name}` has {len(pairs)} examples, and {data.val} + {data.test} are held out. Hold out fewer."
            )
        return parts[split]

    def _write(self, splits: Sequence[str]) -> None:
        for split in splits:
            folder = self.folder / "data" / split
            if folder.exists():
                continue
            part = folder.with_name(f"{split}.part")
            for name in self.names:
                write_rows(part / f"{name}.jsonl", self.rows(name, split))
            os.rename(part, folder)

    # ------------------------------------------------------------ CONFIGs

    def mixture(self, held_out: bool = False, split: str = VAL) -> list[dict[str, Any]]:
        """`datasets:` of a CONFIG: the mixture, with its held-out rows of one split."""
        names = self.names if held_out else self.experiment.data.datasets
        place = self.folder.resolve() / "data"
        return [
            {
                "name": name, "path": str(place / TRAIN / f"{name}.jsonl"),
                "eval_path": str(place / split / f"{name}.jsonl"), "tag": TASKS[name].family,
                "metric": "chrf" if TASKS[name].free_form else "exact_match",
            }
            for name in names
        ]  # fmt: skip

    def yardstick(self, split: str) -> MeritConfig:
        """The CONFIG that models are evaluated by: all tasks in one group, with the held-out rows of one split.

        In float32, as the lines are measured: differences of bfloat16 losses are rounding.
        """
        sft = {**self.experiment.sft, "bf16": False, "fp16": False}
        return self.config({"split": "joint"}, sft, self.mixture(held_out=True, split=split))

    def config(
        self,
        plan: Mapping[str, Any],
        sft: Mapping[str, Any],
        datasets: list[dict[str, Any]] | None = None,
        rounds: Mapping[str, Any] | None = None,
    ) -> MeritConfig:
        content = {
            "base": {"model_name_or_path": self.base},
            "datasets": datasets or self.mixture(),
            "plan": dict(plan),
            "sft": dict(sft),
            "merge": {"out_dtype": "float32"},
            "run": dict(rounds or {}),
        }
        config = MeritConfig.from_dict(copy.deepcopy(content), source=self.experiment.name, root=self.folder.resolve())
        check_sft(config.sft, self.experiment.name)
        return config

    def measured(self, plan_seed: int) -> MeritConfig:
        """The CONFIG of the plan whose gradients all splits of this plan seed are made of, whatever arms there are."""
        section = {**self.experiment.plan, "split": "merit", "num_groups": 2, "seed": plan_seed}
        return self.config(section, self.experiment.sft)

    def of_cell(self, cell: Cell, parent: PartitionPlan | None) -> list[MeritConfig]:
        """The CONFIGs of a cell's plans: one, but for the runs of a soup."""
        arm = self.experiment.arm(cell.arm)
        sft = self._sft(arm, cell)
        if arm.kind == "joint":
            return [self.config({"split": "joint"}, sft)]
        if arm.kind == "soup":
            epochs = sft.get("num_train_epochs", 1) / arm.groups
            return [
                self.config(
                    {"split": "joint"}, {**sft, "num_train_epochs": epochs, "seed": 1000 * (k + 1) + sft["seed"]}
                )
                for k in range(arm.groups)
            ]
        section = {**self.experiment.plan, "split": arm.split, "num_groups": arm.groups, "seed": cell.plan_seed}
        section |= arm.plan
        if arm.kind == "by_example":
            return [self.config({"split": "by_tag"}, sft, self._by_example(arm.groups, cell.plan_seed or 0))]
        if arm.affinity is not None:
            assert parent is not None
            section["affinity"] = str(self._negative_cosines(parent, cell.plan_seed or 0))
        return [self.config(section, sft, rounds={"rounds": arm.rounds, "replan": arm.replan})]

    def _sft(self, arm: Arm, cell: Cell) -> dict[str, Any]:
        sft = {**self.experiment.sft, **arm.sft, "learning_rate": cell.learning_rate, "seed": cell.order_seed}
        per_step = sft.get("per_device_train_batch_size", 8) * sft.get("gradient_accumulation_steps", 1)
        wanted = per_step * arm.batch
        if wanted != int(wanted) or wanted < 1:
            raise ConfigError(f"arm `{arm.name}`: {arm.batch:g} × a batch of {per_step} is no whole batch.")
        device = min(sft.get("per_device_train_batch_size", 8), int(wanted))
        if int(wanted) % device:
            raise ConfigError(f"arm `{arm.name}`: a batch of {wanted:g} is not made of batches of {device}.")
        return sft | {"per_device_train_batch_size": device, "gradient_accumulation_steps": int(wanted) // device}

    def _by_example(self, groups: int, seed: int) -> list[dict[str, Any]]:
        """The mixture's examples in `groups` equal random parts, each a dataset and a group of its own."""
        place = self.folder.resolve() / "data" / f"by_example-{groups}-p{seed}"
        if not place.exists():
            rows = [pair for name in self.experiment.data.datasets for pair in self.rows(name, TRAIN)]
            Random(f"by_example/{groups}/{seed}").shuffle(rows)
            part = place.with_name(f"{place.name}.part")
            for number in range(groups):
                write_rows(part / f"part_{number}.jsonl", rows[number::groups])
            os.rename(part, place)
        return [
            {"name": f"part_{k}", "path": str(place / f"part_{k}.jsonl"), "eval_fraction": 0, "tag": str(k)}
            for k in range(groups)
        ]

    def _negative_cosines(self, parent: PartitionPlan, seed: int) -> Path:
        """min(C, 0) of the cosines corrected for sampling noise: what agrees, or may, is left as it falls."""
        assert parent.conflict_matrix is not None
        matrix = debias_cosines(parent.conflict_matrix, [dataset.reliability for dataset in parent.datasets])[0]
        matrix = np.minimum(matrix, 0.0)
        np.fill_diagonal(matrix, 1.0)
        path = self.folder.resolve() / f"negative-p{seed}.npz"
        part = path.with_suffix(".part.npz")
        np.savez(part, names=np.array(parent.names), matrix=matrix)
        os.replace(part, path)
        return path


def make_smollm2(folder: Path) -> None:
    """The quickstart's base, made from its wheel.

    Raises:
        ConfigError: the wheel, or what reads it, is not installed.
    """
    place = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
    quickstart_makers()
    spec = importlib.util.spec_from_file_location("prepare", place / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    try:
        prepare.prepare_base(folder)
    except prepare.PrepareError as error:
        raise ConfigError(str(error)) from None


def write_rows(path: Path, pairs: Sequence[Pair]) -> None:
    """One user's prompt and one assistant's completion a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": a}]}
        for p, a in pairs
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

"""One cell of the matrix, by the stages of `merit`: plan, train, merge, evaluate, diagnose, and the line to it.

A cell works in a folder of its own, where every stage goes on if it was stopped, and ends as rows of the record.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiment import BASE, MEASURED_SPLITS, Cell, Experiment, seed_pairs
from lines import Line, Way, choose_by_layer, measure_line
from material import TEST, VAL, Material
from outcomes import within_group_cosine
from provenance import commit

from merit_hf.config import MeritConfig, MeritError
from merit_hf.diagnosis.diagnose import diagnose
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import read_manifest
from merit_hf.merge import merge_checkpoints
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.rounds import round_config, round_record
from merit_hf.training import train_group

Row = dict[str, Any]
LAYERS = "layers.json"
LEDGER = {"input": "num_input_tokens", "loss": "num_loss_tokens", "padding": "num_padding_tokens"}


@dataclass(frozen=True)
class Trained:
    """What a cell trained.

    Attributes:
        plans: one, but for a soup. groups: their checkpoints. model: the merged model, or the only checkpoint.
        tokens, steps, seconds: of all trainings, by the ledgers in the checkpoints; steps: of the longest one too.
    """

    plans: list[PartitionPlan]
    groups: list[Path]
    model: Path
    tokens: dict[str, int]
    steps: int
    longest: int
    seconds: float


class Stages:
    """Runs cells in `folder`; their models lie in `place` while they are worked on."""

    def __init__(self, experiment: Experiment, condition: str, material: Material, folder: Path) -> None:
        self.experiment, self.condition, self.material, self.folder = experiment, condition, material, folder
        self.place = folder / "work"
        self.progress, self.quiet = Progress(), Progress(quiet=True)

    def rows(
        self,
        cell: Cell | None,
        phase: str,
        values: Sequence[Row],
        trained: Trained | None = None,
        displacement: float | None = None,
    ) -> list[Row]:
        """Rows of the record: what they have in common, then a dataset, a split, a metric and a value each."""
        common = {
            "phase": phase,
            "condition": self.condition,
            "arm": cell.arm if cell else BASE,
            "plan_seed": cell.plan_seed if cell else None,
            "order_seed": cell.order_seed if cell else None,
            "learning_rate": cell.learning_rate if cell else None,
            "tokens": trained.tokens if trained else dict.fromkeys(LEDGER, 0),
            "steps": trained.steps if trained else 0,
            "longest": trained.longest if trained else 0,
            "displacement": displacement if cell else 0.0,
            "seconds": round(trained.seconds, 1) if trained else 0.0,
            "commit": commit(),
        }
        return [{**common, **value} for value in values]

    @functools.cache  # noqa: B019 (one object a run)
    def yardstick(self, split: str) -> PartitionPlan:
        return MeritPlanner(self.material.yardstick(split), self.quiet).plan(self.folder / "yardsticks" / split)

    @functools.cache  # noqa: B019
    def measured_plan(self, plan_seed: int) -> PartitionPlan:
        """The plan that holds the gradients of a plan seed; measured once, whatever arms split them."""
        self.progress.note(f"gradients of plan seed {plan_seed}")
        folder = self.folder / "plans" / f"measured-p{plan_seed}"
        return MeritPlanner(self.material.measured(plan_seed), self.progress).plan(folder)

    def parent_of(self, cell: Cell) -> PartitionPlan | None:
        """The plan whose gradients a cell's split is made of; None where it is made of none."""
        if self.experiment.arm(cell.arm).split in MEASURED_SPLITS and cell.plan_seed is not None:
            return self.measured_plan(cell.plan_seed)
        return None

    def matrix_of(self, cell: Cell) -> PartitionPlan:
        """The plan whose conflict matrix a split is looked at by; one for all splits that are made of no gradients."""
        first = seed_pairs(self.experiment, self.experiment.arm(self.experiment.gates.merit))[0][0]
        return self.parent_of(cell) or self.measured_plan(first or 0)

    def plans(self, cell: Cell) -> list[tuple[MeritConfig, PartitionPlan]]:
        """The CONFIGs of a cell and their plans, of all rows at θ0."""
        parent = self.parent_of(cell)
        place, found = self.place / cell.work, []
        for number, config in enumerate(self.material.of_cell(cell, parent)):
            plan = MeritPlanner(config, self.quiet, parent=parent).plan(place / f"plan-{number}")
            found.append((config, plan))
        return found

    def train(self, cell: Cell) -> Trained:
        """Plan, train every group and merge; what is there already is kept."""
        place, arm = self.place / cell.work, self.experiment.arm(cell.arm)
        configs = self.plans(cell)
        plans = [plan for _, plan in configs]
        if arm.rounds > 1:
            groups, model = self._train_rounds(cell, *configs[0])
        else:
            groups, model = list[Path](), place / "merged"
            for plan in plans:
                groups += self._train_groups(cell, plan, place / "groups", len(groups))
            if len(groups) == 1:
                model = groups[0]
            elif not model.exists() and arm.kind == "soup":
                merge_checkpoints(plans[0].base_folder(), groups, [1.0] * len(groups), model, "float32")
            elif not model.exists():
                merge_groups(plans[0], groups, model, **{"out_dtype": "float32", **arm.merge})
        if arm.layers:
            model = self._by_layer(cell, model)
        manifests = [read_manifest(folder) for folder in groups]
        tokens = {name: sum(manifest[key] for manifest in manifests) for name, key in LEDGER.items()}
        steps = [manifest["num_steps"] for manifest in manifests]
        return Trained(plans, groups, model, tokens, sum(steps), max(steps), sum(map(_seconds, groups)))

    def _by_layer(self, cell: Cell, merged: Path) -> Path:
        """The merged model with a λ for each layer, chosen on validation rows; λs are kept beside it."""
        section, output = self.experiment.evaluation, self.place / cell.work / "by-layer"
        if not (output / LAYERS).exists():
            chosen = choose_by_layer(
                self.yardstick(VAL), merged, self.experiment.arm(cell.arm).layers, self.experiment.data.datasets,
                section.val_samples, section.tokens_per_batch, self.quiet, output,
            )  # fmt: skip
            (output / LAYERS).write_text(json.dumps(chosen), encoding="utf-8")
        return output

    def _train_groups(self, cell: Cell, plan: PartitionPlan, folder: Path, first: int = 0) -> list[Path]:
        found = []
        for number, group in enumerate(plan.groups, first):
            self.progress.note(f"{cell.name}: group {number}, {group.num_steps} steps")
            found.append(train_group(plan, group.group, folder / str(number), progress=self.quiet))
        return found

    def _train_rounds(self, cell: Cell, config: MeritConfig, plan: PartitionPlan) -> tuple[list[Path], Path]:
        """As `merit run` with `run.rounds`: each round from what the one before has merged, on its share of the rows.

        Returns:
            The group checkpoints of all rounds, and what the last one has merged.
        """
        arm, groups = self.experiment.arm(cell.arm), []
        model: Path | None = None
        for number in range(1, arm.rounds + 1):
            place = self.place / cell.work / "rounds" / str(number)
            current = MeritPlanner(round_config(config, plan, number, model), self.quiet).plan(place / "plan")
            trained = self._train_groups(cell, current, place / "groups")
            model = place / "merged"
            if not model.exists():
                record = round_record(config, plan, number)
                merge_groups(current, trained, model, **{"out_dtype": "float32", **arm.merge}, round_of=record)
            groups += trained
        assert model is not None
        return groups, model

    def losses(self, models: Mapping[str, Path], split: str, answers: bool = False) -> dict[str, Any]:
        """`merit evaluate` on one split, without keeping anything."""
        section = self.experiment.evaluation
        samples = section.test_samples if split == TEST else section.val_samples
        content = evaluate_models(
            self.yardstick(split), models, samples, section.tokens_per_batch, self.quiet, generate=answers,
            max_new_tokens=section.max_new_tokens,
        )  # fmt: skip
        return dict(content["datasets"])

    def evaluated(self, models: Mapping[str, Path], split: str, answers: bool = False) -> list[Row]:
        """Loss, score and answer length of models on every dataset of a split; group-k is marked by its number."""
        found = []
        for name, entry in self.losses(models, split, answers).items():
            for label in models:
                group = int(label.removeprefix("group-")) if label.startswith("group-") else None
                for metric in ("loss", "score", "length_ratio"):
                    values = entry[metric]
                    if values is not None and values.get(label) is not None:
                        row = {"dataset": name, "split": split, "metric": metric, "value": values[label]}
                        found.append(row if group is None else {**row, "group": group})
        return found

    # ------------------------------------------------------------ cells

    def share(self, wanted: Sequence[Cell]) -> None:
        """Make what several of these cells would make each, and at the same place."""
        for split in (VAL,) if self.material.sealed else (VAL, TEST):
            self.yardstick(split)
        for cell in wanted:
            parent = self.parent_of(cell)
            if self.experiment.arm(cell.arm).kind == "split":
                self.matrix_of(cell)
            self.material.of_cell(cell, parent)

    def cell(self, cell: Cell) -> list[Row]:
        """The rows of a cell of the matrix, or of a learning rate that is tried."""
        self.progress.note(f"{cell.phase}: {cell.work}")
        return self.tuning_cell(cell) if cell.phase == "tune" else self.run_cell(cell)

    def base_cell(self) -> list[Row]:
        models = {BASE: self.yardstick(VAL).base_folder()}
        found = self.evaluated(models, VAL) + self.evaluated(models, TEST, self.experiment.evaluation.answers)
        return self.rows(None, "run", found)

    def tuning_cell(self, cell: Cell) -> list[Row]:
        """Validation losses; `failed` where the training diverged."""
        try:
            trained = self.train(cell)
            found = self.evaluated({cell.arm: trained.model}, VAL)
        except MeritError as error:
            return self._failed(cell, "tune", error)
        return self.rows(cell, "tune", found, trained)

    def run_cell(self, cell: Cell) -> list[Row]:
        """Everything that is measured of a cell on test rows, which nothing is chosen by, and lines on both parts."""
        section, arm = self.experiment.evaluation, self.experiment.arm(cell.arm)
        try:
            trained = self.train(cell)
            models = {cell.arm: trained.model}
            if section.groups and len(trained.groups) > 1 and arm.rounds == 1:
                models |= {f"group-{number}": folder for number, folder in enumerate(trained.groups)}
            found = self.evaluated(models, TEST, section.answers)
            lines = self.experiment.lines
            displacement = Way(self.yardstick(TEST), trained.model).displacement()
            for split in (VAL, TEST) if cell.arm in lines.of else ():
                line = self.line(cell, trained.model, split, lines.lambdas, self._answers_at(cell))
                found += [
                    {"dataset": name, "split": split, "metric": "loss", "value": value, "lambda": position}
                    for position, losses in line.losses.items()
                    for name, value in losses.items()
                ]
                for position, folder in line.saved.items():
                    answered = self.evaluated({"point": folder}, split, answers=True)
                    found += [{**row, "lambda": position} for row in answered if row["metric"] != "loss"]
            found += self.plan_facts(cell, trained)
            if arm.layers:
                chosen = json.loads((trained.model / LAYERS).read_text(encoding="utf-8"))
                found += [fact(f"lambda@{layer}", value, VAL) for layer, value in chosen.items()]
            if (cell.plan_seed, cell.order_seed) in seed_pairs(self.experiment, arm)[: arm.diagnose]:
                found += self.diagnosed(cell, trained)
        except MeritError as error:
            return self._failed(cell, "run", error)
        return self.rows(cell, "run", found, trained, displacement)

    def _answers_at(self, cell: Cell) -> Sequence[float]:
        """Where on a line models answer: on those that arms are held against."""
        return self.experiment.lines.answers_at if cell.arm in self.experiment.outcome.lines else ()

    def line(self, cell: Cell, model: Path, split: str, points: Sequence[float], answers_at: Sequence[float]) -> Line:
        section = self.experiment.evaluation
        samples = section.test_samples if split == TEST else section.val_samples
        scratch = self.place / cell.work / "points"
        return measure_line(
            self.yardstick(split), model, points, samples, section.tokens_per_batch, self.quiet,
            answers_at if split == TEST and section.answers else (), scratch,
        )  # fmt: skip

    def plan_facts(self, cell: Cell, trained: Trained) -> list[Row]:
        """How much the datasets of a group agree at θ0, by the gradients of the cell's plan seed."""
        arm, plan = self.experiment.arm(cell.arm), trained.plans[0]
        if arm.kind != "split" or cell.plan_seed is None:
            return []
        measured = self.matrix_of(cell)
        assert measured.conflict_matrix is not None
        groups = {dataset.name: dataset.group for dataset in plan.datasets}
        cosine = within_group_cosine(measured.conflict_matrix, [groups[name] for name in measured.names])
        found = {"within_group_cosine": cosine, "largest_share": max(group.weight for group in plan.groups)}
        # How stable groups are is known of the groups of a plan of gradients alone, and of its own number of them.
        found |= {key: value for key, value in plan_metrics(measured).items() if key in ("split_half", "eigengap")}
        found |= plan_metrics(plan)
        return [fact(name, value) for name, value in found.items() if value == value]

    def diagnosed(self, cell: Cell, trained: Trained) -> list[Row]:
        """`merit diagnose` on validation rows: gains, ρ, the highest barrier, displacements of the groups."""
        settings, plan = self.experiment.diagnosis, trained.plans[0]
        if len(trained.plans) > 1 or len(trained.groups) < 2 or not _has_held_out(plan):
            return []
        content = diagnose(
            plan, trained.groups, self.place / cell.work / "diagnosis", merged=trained.model,
            num_samples=settings.num_samples, epsilons=settings.epsilons, forward_only=True,
            tokens_per_batch=self.experiment.evaluation.tokens_per_batch, progress=self.quiet,
        )  # fmt: skip
        gain = content["overall"]["gain"]
        found = [fact("measured_gain", gain["measured"]["value"], VAL)]
        for step in gain["ladder"]:
            found.append(fact(f"predicted_gain@{step['epsilon']:g}", step["predicted"]["value"], VAL))
            if step["rho"] is not None:
                found.append(fact(f"rho@{step['epsilon']:g}", step["rho"]["value"], VAL))
        heights = [barrier["height"]["value"] for barrier in content["overall"]["barriers"]]
        found.append(fact("highest_barrier", max(heights), VAL))
        for number, row in enumerate(content["groups"]):
            found.append({**fact("group_displacement", row["displacement"]), "group": number})
        return found

    def _failed(self, cell: Cell, phase: str, error: MeritError) -> list[Row]:
        """A training that diverged is a result; anything else that goes wrong is not."""
        if "finite" not in str(error):
            raise error
        self.progress.note(f"{cell.name}: diverged: {error}")
        return self.rows(cell, phase, [{**fact("failed", 1.0), "note": str(error)}])

    def forget(self, cell: Cell) -> None:
        """Remove a cell's models; its rows are in the record."""
        shutil.rmtree(self.place / cell.work, ignore_errors=True)


def plan_metrics(plan: PartitionPlan) -> dict[str, float]:
    """Facts of a plan's own halves: `split_half`, `plan_agreement`, `half_agreement`, and the first eigengap."""
    cosines = sorted(d.split_half_cosine for d in plan.datasets if d.split_half_cosine is not None)
    found: dict[str, float] = {}
    if cosines:
        found["split_half"] = cosines[len(cosines) // 2]
    stability = plan.trust.get("stability")
    if stability:
        found["plan_agreement"] = stability["adjusted_rand_index"]
        found["half_agreement"] = stability["half_agreement"]
    gaps = plan.bounds.get("eigengaps") or []
    if gaps:
        found["eigengap"] = gaps[0]
    return found


def fact(metric: str, value: float, split: str | None = None) -> Row:
    """A value of no dataset."""
    return {"dataset": None, "split": split, "metric": metric, "value": value}


def _has_held_out(plan: PartitionPlan) -> bool:
    return any(entry.get("eval_path") for entry in plan.local.get("datasets", {}).values())


def _seconds(group: Path) -> float:
    """Of a training, as its Trainer says: the last call's, where it went on."""
    state = json.loads((group / "trainer_state.json").read_text(encoding="utf-8"))
    return sum(float(entry.get("train_runtime", 0.0)) for entry in state["log_history"])

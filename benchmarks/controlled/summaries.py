"""Rows of the record → the tables of RESULTS.md; verdicts.py makes sentences of them. No model, no file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from entries import ArmSummary, CellRows, Contrast, Outcome
from experiment import BASE, Arm, Experiment, seed_pairs
from gates import AFTER_TRAINING, BEFORE_TRAINING, Gate, gate_facts, judge
from material import TEST, VAL
from outcomes import (
    Curve,
    Estimate,
    Seeds,
    crossed_difference,
    crossed_mean,
    excess,
    match_displacement,
    match_forgetting,
    mean_rank_correlation,
    rank_correlation,
    won_and_lost,
)
from record import CHOICE, GATE, RUN, SETUP
from tasks import TASKS

MATCHES = ("displacement", "forgetting")
# What is known of a split, and from when on.
BEFOREHAND, TRAINED = "before training", "when the groups are trained"
PREDICTORS = {
    "within_group_cosine": BEFOREHAND, "largest_share": BEFOREHAND, "predicted_gain@1": TRAINED,
    "measured_gain": TRAINED, "displacement": TRAINED,
}  # fmt: skip


class Summary:
    """One condition of one experiment."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = list(rows)
        setups = [row for row in self.rows if row["phase"] == SETUP]
        # Seeds and arms may have grown: the last is the one that counts.
        self.setup = setups[-1]
        self.experiment = Experiment.model_validate(self.setup["experiment"])
        self.condition = self.setup["condition"]
        self.mixture = self.experiment.data.datasets
        self.held_out = self.experiment.data.held_out

    @property
    def title(self) -> str:
        return f"{self.experiment.name}, {self.condition}" if self.condition else self.experiment.name

    @cached_property
    def commits(self) -> list[str]:
        return sorted({row["commit"] for row in self.rows})

    @cached_property
    def gates(self) -> list[Gate]:
        rows = [row for row in self.rows if row["phase"] == GATE]
        facts = gate_facts(rows, self.experiment.gates, self.mixture)
        return judge(self.experiment.gates, facts, (*BEFORE_TRAINING, *AFTER_TRAINING))

    @cached_property
    def choices(self) -> list[dict[str, Any]]:
        """Learning rate by arm; `edge`: the best of the grid is its end, so that a better one may lie outside."""
        found = []
        for row in self.rows:
            if row["phase"] == CHOICE:
                rates = sorted(float(rate) for rate in row["grid"])
                edge = len(rates) > 1 and row["value"] in (rates[0], rates[-1])
                grid = {float(rate): loss for rate, loss in row["grid"].items()}
                found.append({"arm": row["arm"], "rate": row["value"], "grid": grid, "edge": edge})
        return found

    @cached_property
    def cells(self) -> dict[str, dict[Seeds, CellRows]]:
        """{arm: {seeds: cell}} of what was run and did not fail."""
        found: dict[str, dict[Seeds, CellRows]] = defaultdict(dict)
        failed = {row["cell"] for row in self.rows if row.get("metric") == "failed"}
        for row in self.rows:
            if row["phase"] != RUN or row["cell"] in failed:
                continue
            seeds = (row["plan_seed"], row["order_seed"])
            cell = found[row["arm"]].get(seeds)
            if cell is None:
                cell = CellRows(
                    row["arm"], seeds, row["displacement"], row["tokens"], row["steps"], row["longest"], row["seconds"]
                )
                found[row["arm"]][seeds] = cell
            if row.get("group") is not None:
                if (row["split"], row["metric"]) == (TEST, "loss"):
                    cell.groups[row["group"]][row["dataset"]] = row["value"]
                continue
            if row["dataset"] is None:
                cell.facts[row["metric"]] = row["value"]
            elif row.get("lambda") is None:
                cell.values[row["split"], row["metric"]][row["dataset"]] = row["value"]
            else:
                cell.points[row["split"], row["lambda"], row["metric"]][row["dataset"]] = row["value"]
        for arm in self.experiment.lines.of:
            if arm in found:
                found[f"{arm}·λ"] = {
                    seeds: self._best_point(cell) for seeds, cell in found[arm].items() if cell.points
                }
        return dict(found)

    def _best_point(self, cell: CellRows) -> CellRows:
        """The point of a cell's line with the lowest validation loss on the mixture, as an arm of its own."""
        losses = {
            key[1]: float(np.mean([values[name] for name in self.mixture]))
            for key, values in cell.points.items()
            if key[0] == VAL and key[2] == "loss"
        }
        best = min(losses, key=lambda position: losses[position])
        found = CellRows(
            f"{cell.arm}·λ", cell.seeds, best * cell.displacement, cell.tokens, cell.steps, cell.longest, cell.seconds
        )
        for split in (VAL, TEST):
            found.values[split, "loss"] = cell.points[split, best, "loss"]
        found.facts = {"lambda": best}
        return found

    def curve(self, arm: str, seeds: Seeds, split: str = TEST) -> Curve | None:
        """The line θ0 ↔ an arm's model of the same order seed; None where it was not measured."""
        at = self.cells.get(arm, {})
        cell = at.get(seeds) or at.get((None, seeds[1]))
        base = self.cells.get(BASE, {}).get((None, None))
        if cell is None or base is None:
            return None
        lambdas = sorted(key[1] for key in cell.points if key[0] == split and key[2] == "loss")
        if not lambdas:
            return None
        losses = {
            name: np.array(
                [base.values[split, "loss"][name], *(cell.points[split, at, "loss"][name] for at in lambdas)]
            )
            for name in (*self.mixture, *self.held_out)
        }
        return Curve(np.array([0.0, *lambdas]), cell.displacement, losses)

    def excesses(self, arm: str, line: str, match: str) -> tuple[dict[Seeds, dict[str, float]], int]:
        """{seeds: {dataset: excess}} on test rows of the mixture, and in how many cells no point of the line moved as
        far or kept as much: those are not in it, since there is nothing to hold them against.
        """
        found, clipped = {}, 0
        base = self.cells[BASE][None, None]
        for seeds, cell in self.cells.get(arm, {}).items():
            curve = self.curve(line, seeds)
            if curve is None:
                continue
            if match == "displacement":
                place = match_displacement(curve, self.mixture, cell.displacement)
            else:
                forgotten = cell.loss(self.held_out) - base.loss(self.held_out)
                place = match_forgetting(curve, self.mixture, self.held_out, forgotten)
            clipped += place.clipped
            if not place.clipped:
                found[seeds] = excess(curve, place, cell.values[TEST, "loss"], self.mixture)
        return found, clipped

    # ------------------------------------------------------------ tables

    @cached_property
    def arms(self) -> list[ArmSummary]:
        derived = [name for name in self.cells if name.endswith("·λ")]
        names = [BASE, *(arm.name for arm in self.experiment.arms), *derived]
        return [self._arm(name) for name in names]

    def _arm(self, name: str) -> ArmSummary:
        known: Arm | None = next((arm for arm in self.experiment.arms if arm.name == name), None)
        cells = self.cells.get(name, {})
        wanted = len(seed_pairs(self.experiment, known)) if known else max(1, len(cells))
        failed = len({row["cell"] for row in self.rows if row.get("metric") == "failed" and row["arm"] == name
                      and row["phase"] == RUN})  # fmt: skip
        if not cells or BASE not in self.cells:
            return ArmSummary(name, wanted, len(cells), failed)
        base = self.cells[BASE][None, None]
        exact = [task for task in self.mixture if not TASKS[task].free_form]
        return ArmSummary(
            name, wanted, len(cells), failed,
            mixture=crossed_mean({s: self._chosen(c, self.mixture) for s, c in cells.items()}),
            forgotten=crossed_mean({s: self._forgotten(c, base) for s, c in cells.items()}),
            exact_match=self._mean(cells.values(), "score", exact),
            length=self._mean(cells.values(), "length_ratio", self.held_out),
            groups_alone=self._groups_alone(cells.values()),
            displacement=float(np.mean([cell.displacement for cell in cells.values()])),
            tokens={key: float(np.mean([c.tokens[key] for c in cells.values()])) for key in base.tokens},
            steps=float(np.mean([cell.steps for cell in cells.values()])),
            longest=float(np.mean([cell.longest for cell in cells.values()])),
            seconds=float(np.mean([cell.seconds for cell in cells.values()])),
            families=self._families(cells.values()),
            outcomes=[] if name == BASE else self._outcomes(name),
        )  # fmt: skip

    def _chosen(self, cell: CellRows, names: Sequence[str]) -> dict[str, float]:
        return {name: cell.values[TEST, "loss"][name] for name in names}

    def _forgotten(self, cell: CellRows, base: CellRows) -> dict[str, float]:
        return {name: cell.values[TEST, "loss"][name] - base.values[TEST, "loss"][name] for name in self.held_out}

    def _mean(self, cells: Iterable[CellRows], metric: str, names: Sequence[str]) -> float | None:
        values = [
            cell.values[TEST, metric][name] for cell in cells for name in names if name in cell.values[TEST, metric]
        ]
        return float(np.mean(values)) if values else None

    def _groups_alone(self, cells: Iterable[CellRows]) -> float | None:
        """Mean loss on the mixture of the groups by themselves."""
        values = [losses[name] for cell in cells for losses in cell.groups.values() for name in self.mixture]
        return float(np.mean(values)) if values else None

    @cached_property
    def line_answers(self) -> list[dict[str, Any]]:
        """What models on the lines answer: exact match on the mixture, and answer length on the held-out tasks."""
        exact, found = [task for task in self.mixture if not TASKS[task].free_form], []
        for arm in self.experiment.lines.of:
            cells = list(self.cells.get(arm, {}).values())
            for position in sorted({key[1] for cell in cells for key in cell.points if key[2] == "score"}):
                score = [cell.points[TEST, position, "score"].get(name) for cell in cells for name in exact]
                length = [cell.points[TEST, position, "length_ratio"].get(n) for cell in cells for n in self.held_out]
                found.append(
                    {
                        "arm": arm, "lambda": position, "exact_match": _mean_of(score), "length": _mean_of(length),
                        "displacement": position * float(np.mean([cell.displacement for cell in cells])),
                    }
                )  # fmt: skip
        return found

    def _families(self, cells: Iterable[CellRows]) -> dict[str, float]:
        cells = list(cells)
        found = {}
        for family in self.families:
            members = [name for name in (*self.mixture, *self.held_out) if self.family(name) == family]
            value = self._mean(cells, "score", members)
            if value is not None:
                found[family] = value
        return found

    @cached_property
    def families(self) -> list[str]:
        return list(dict.fromkeys(self.family(name) for name in (*self.mixture, *self.held_out)))

    def family(self, name: str) -> str:
        return f"held out: {TASKS[name].family}" if name in self.held_out else TASKS[name].family

    def _outcomes(self, name: str) -> list[Outcome]:
        found = []
        for line in self.experiment.outcome.lines:
            for match in MATCHES:
                table, clipped = self.excesses(name, line, match)
                won, lost = won_and_lost(table) if table else (0, 0)
                found.append(Outcome(line, match, crossed_mean(table) if table else None, won, lost, clipped))
        return found

    @cached_property
    def contrasts(self) -> list[Contrast]:
        found = []
        for ours, theirs in self.experiment.outcome.compare:
            for line in self.experiment.outcome.lines:
                for match in MATCHES:
                    (first, beyond), (second, others) = (self.excesses(n, line, match) for n in (ours, theirs))
                    estimate = crossed_difference(first, second) if first and second else None
                    won, lost = won_and_lost(first, second) if estimate else (0, 0)
                    found.append(Contrast(ours, theirs, line, match, estimate, won, lost, beyond + others))
        return found

    @property
    def joint_tokens(self) -> float | None:
        """Input tokens of the gates' joint arm, by its ledger."""
        row = next(row for row in self.arms if row.name == self.experiment.gates.joint)
        return row.tokens["input"] if row.tokens else None

    @cached_property
    def equal_tokens(self) -> str:
        """The ledgers' input tokens over the arms, in words."""
        joint = self.joint_tokens
        if joint is None:
            return "No joint run to hold the arms' tokens against."
        trained = [row for row in self.arms if row.name != BASE and "·" not in row.name and row.done]
        ratios = {row.name: row.tokens["input"] / joint for row in trained if row.tokens}
        other = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 1e-9}
        if not other:
            return f"Every arm trained on {joint:,.0f} input tokens, by the ledgers in its checkpoints."
        told = ", ".join(f"`{name}` {ratio:.3f}" for name, ratio in other.items())
        return (
            f"{len(ratios) - len(other)} of {len(ratios)} trained on {joint:,.0f} input tokens, by the ledgers in the "
            f"checkpoints; multiples of it: {told}."
        )

    @cached_property
    def predictors(self) -> list[dict[str, Any]]:
        """Rank correlation of what is known of a split with its excess, over the random splits of one arm."""
        found = []
        for arm in self.experiment.arms:
            if arm.split == "random" and self.cells.get(arm.name):
                for metric, when in PREDICTORS.items():
                    x, y = self.known_and_came(arm.name, metric)
                    estimate = rank_correlation(x, y)
                    found.append(
                        {"arm": arm.name, "metric": metric, "when": when, "splits": len(x), "estimate": estimate}
                    )
        return found

    def known_and_came(self, arm: str, metric: str) -> tuple[list[float], list[float]]:
        """Of every split of an arm (mean over order seeds), what is known of it, and its excess over the first line at
        equal displacement.
        """
        table = self.excesses(arm, self.experiment.outcome.lines[0], MATCHES[0])[0]
        known: dict[int | None, list[tuple[float, float]]] = defaultdict(list)
        for seeds, values in table.items():
            cell = self.cells[arm][seeds]
            fact = cell.displacement if metric == "displacement" else cell.facts.get(metric)
            if fact is not None:
                known[seeds[0]].append((fact, float(np.mean(list(values.values())))))
        means = [np.mean(known[plan], axis=0) for plan in sorted(known, key=str)]
        return [float(x) for x, _ in means], [float(y) for _, y in means]

    @cached_property
    def eigengap(self) -> float | None:
        """Of the mixture's conflict matrix, mean over plan seeds."""
        return _mean_of(cell.facts.get("eigengap") for cells in self.cells.values() for cell in cells.values())

    @cached_property
    def diagnoses(self) -> list[dict[str, Any]]:
        """Means over the diagnosed cells of an arm."""
        found = []
        for arm in self.experiment.arms:
            cells = [cell for cell in self.cells.get(arm.name, {}).values() if "measured_gain" in cell.facts]
            if cells:
                keys = sorted({key for cell in cells for key in cell.facts if key.partition("@")[0] in
                               ("measured_gain", "predicted_gain", "rho", "highest_barrier")})  # fmt: skip
                means = {key: float(np.mean([c.facts[key] for c in cells if key in c.facts])) for key in keys}
                found.append({"arm": arm.name, "cells": len(cells), "facts": means})
        return found


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def across_conditions(found: Sequence[Summary]) -> Estimate | None:
    """Rank correlation over an experiment's conditions of the eigengap with the first pair's difference of the primary
    outcome.
    """
    found = [summary for summary in found if summary.condition]
    pairs = [
        (summary.eigengap, summary.contrasts[0].estimate.value)
        for summary in found
        if summary.eigengap is not None and summary.contrasts and summary.contrasts[0].estimate is not None
    ]
    return rank_correlation([x for x, _ in pairs], [y for _, y in pairs])


def predictors_across(found: Sequence[Summary]) -> list[dict[str, Any]]:
    """The predictors of every arm of random splits, over several mixtures: mean of their rank correlations."""
    arms = {arm.name for summary in found for arm in summary.experiment.arms if arm.split == "random"}
    told = []
    for arm in sorted(arms):
        for metric, when in PREDICTORS.items():
            with_it = [summary for summary in found if summary.cells.get(arm)]
            estimate = mean_rank_correlation([summary.known_and_came(arm, metric) for summary in with_it])
            if estimate is not None:
                told.append({"arm": arm, "metric": metric, "when": when, "estimate": estimate})
    return told


def summaries(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """A summary of each condition, in the order in which they were run."""
    by_condition: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_condition[row["condition"]].append(row)
    return [Summary(found) for found in by_condition.values()]

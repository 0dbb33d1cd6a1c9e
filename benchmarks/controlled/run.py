"""A controlled experiment: gates, learning rates, then every arm at every seed; one command, which can be killed.

    python benchmarks/controlled/run.py benchmarks/controlled/smoke.yaml --output runs/controlled/smoke

Raw results go to OUTPUT/results.jsonl, a cell at a time; running the same command again does what is missing.
`results.py` makes tables and figures of them. The order:

1. data (training and validation rows alone), base, the plan of the first seed; gates on the plan
2. every arm at every learning rate of the grid, at the first seeds; the best by the mixture's validation loss
3. gates on joint training and on the merged model; a mixture that fails stops here, unless --force
4. the test rows are written, and every cell of the matrix runs
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiment import (
    BASE,
    Arm,
    Cell,
    Experiment,
    cells,
    read_experiment,
    seed_pairs,
    tuning_cells,
)
from gates import AFTER_TRAINING, BEFORE_TRAINING, gate_facts, judge
from material import VAL, Material
from provenance import commit, digest, fixed_beforehand, machine
from record import CHOICE, GATE, RUN, SETUP, TUNE, Record, select
from stages import Row, Stages, fact, plan_metrics
from workers import rows_of_cells

from merit_hf.config import ConfigError, MeritError
from merit_hf.entry import exit_on_error
from merit_hf.planner import MeritPlanner
from merit_hf.quiet import quiet_libraries
from merit_hf.versions import library_versions

UNTIL = ("gates", "tune", "all")


class Run:
    """One condition of an experiment, in its folder, recorded in its record."""

    def __init__(
        self, experiment: Experiment, condition: str, folder: Path, base: Path, record: Record, workers: int
    ) -> None:
        self.experiment, self.condition, self.record, self.workers = experiment, condition, record, workers
        self.material = Material(experiment, folder, base)
        self.stages = Stages(experiment, condition, self.material, folder)
        self.say = self.stages.progress.note

    def key(self, name: str) -> str:
        return f"{self.condition}:{name}" if self.condition else name

    def known(self, **wanted: Any) -> list[Row]:
        return [dict(row) for row in select(self.record.rows, condition=self.condition, **wanted)]

    def measure(self, until: str, force: bool, excluded: Collection[str] = ()) -> None:
        """Everything up to `until`; `excluded` as in [`Material.prepare`].

        Raises:
            MeritError: the mixture fails a gate, and `force` is not set.
        """
        self._check_settings()
        self.material.prepare(self.stages.progress, excluded)
        self._setup()
        self._plan_gate()
        self._check(BEFORE_TRAINING, force)
        rates = self._tune()
        if until == "tune":
            return
        self._training_gates(rates)
        self._check(AFTER_TRAINING, force)
        if until == "gates":
            return
        self.material.unseal()
        self._matrix(rates)

    def _check_settings(self) -> None:
        """That the recorded results are of these settings: of what is measured, and of what was fixed beforehand."""
        found = self.known(phase=SETUP)
        if found and found[0]["digest"] != digest(self.experiment):
            raise ConfigError(
                f"{self.record.path}: holds results of other settings than {self.experiment.name}'s (data, base, "
                "plan, sft, evaluation or diagnosis). Give another --output, or delete it."
            )
        grid = sorted(f"{rate:g}" for rate in self.experiment.tune.learning_rates)
        if any(sorted(choice["grid"]) != grid for choice in self.known(phase=CHOICE)):
            raise ConfigError(
                f"{self.record.path}: a learning rate has been chosen, and tune.learning_rates was another. Put it "
                "back, or give another --output."
            )
        if found and self.known(phase=RUN):
            before, now = map(fixed_beforehand, (Experiment.model_validate(found[-1]["experiment"]), self.experiment))
            changed = [key for key, value in before.items() if now.get(key) != value]
            if changed:
                raise ConfigError(
                    f"{self.record.path}: cells have been run, and `{changed[0]}` was fixed before them. Put it back, "
                    "or give another --output."
                )

    def _setup(self) -> None:
        """What the results are of: the experiment, the base's weights, the machine."""
        content, weights = self.experiment.model_dump(mode="json"), self.stages.yardstick(VAL).base["weights_sha256"]
        found = self.known(phase=SETUP)
        # A warm-up need not give the same bits on another processor.
        if found and found[0].get("base_sha256", weights) != weights:
            raise ConfigError(
                f"{self.record.path}: holds results of another base (weights {found[0]['base_sha256'][:12]}) than "
                f"{self.material.base} (weights {weights[:12]}). Give another --output."
            )
        if not found or found[-1]["experiment"] != content:
            row = {
                "phase": SETUP, "condition": self.condition, "digest": digest(self.experiment), "experiment": content,
                "base_sha256": weights, "machine": machine(), "versions": library_versions(), "commit": commit(),
            }  # fmt: skip
            self.record.append(self.key(f"setup/{len(found)}"), [row])

    # ------------------------------------------------------------ gates

    def _gate(self, part: str, rows: Sequence[Row]) -> None:
        marked = [{**row, "part": part} for row in rows]
        self.record.append(self.key(f"gate/{part}"), marked)

    def _plan_gate(self) -> None:
        """The plan of the arm that the gates look at: its halves, and the stability of its groups."""
        if self.key("gate/plan") in self.record.cells:
            return
        cell = self._first(self.experiment.gates.merit)
        assert cell.plan_seed is not None
        parent = self.stages.measured_plan(cell.plan_seed)
        folder = self.stages.folder / "plans" / f"gate-{cell.arm}"
        plan = MeritPlanner(self.material.of_cell(cell, parent)[0], self.stages.quiet, parent=parent).plan(folder)
        found = [fact(name, value) for name, value in plan_metrics(plan).items()]
        self._gate("plan", self.stages.rows(cell, GATE, found))

    def _training_gates(self, rates: dict[str, float]) -> None:
        """Base and joint with their answers, the merged model with its diagnosis, and the same with more epochs."""
        gates, stages = self.experiment.gates, self.stages
        joint, merit = (self._first(name, rates[name]) for name in (gates.joint, gates.merit))
        if self.key(f"gate/{BASE}") not in self.record.cells:
            models = {BASE: stages.yardstick(VAL).base_folder()}
            self._gate(BASE, stages.rows(None, GATE, stages.evaluated(models, VAL)))
        if self.key(f"gate/{joint.arm}") not in self.record.cells:
            trained = stages.train(joint)
            found = stages.evaluated({joint.arm: trained.model}, VAL, answers=True)
            self._gate(joint.arm, stages.rows(joint, GATE, found, trained))
        if self.key(f"gate/{merit.arm}") not in self.record.cells:
            trained = stages.train(merit)
            found = stages.evaluated({merit.arm: trained.model}, VAL) + stages.diagnosed(merit, trained)
            self._gate(merit.arm, stages.rows(merit, GATE, found, trained))
        if self.key("gate/longer") not in self.record.cells:
            longer = self._longer(merit)
            trained = longer.train(merit)
            found = longer.evaluated({merit.arm: trained.model}, VAL)
            self._gate("longer", longer.rows(merit, GATE, found, trained))
            longer.forget(merit)

    def _longer(self, cell: Cell) -> Stages:
        """The stages of an experiment whose merged arm trains for more epochs."""
        arm = self.experiment.arm(cell.arm)
        epochs = {**self.experiment.sft, **arm.sft}.get("num_train_epochs", 1) * self.experiment.gates.more_epochs
        changed = arm.model_copy(update={"sft": {**arm.sft, "num_train_epochs": epochs}})
        arms = [changed if known.name == arm.name else known for known in self.experiment.arms]
        experiment = self.experiment.model_copy(update={"arms": arms})
        folder = self.stages.folder
        longer = Stages(experiment, self.condition, Material(experiment, folder, self.material.base_folder), folder)
        # The same gradients and yardsticks, but models of its own.
        longer.place = folder / "work" / "longer"
        return longer

    def _check(self, names: Sequence[str], force: bool) -> None:
        facts = gate_facts(self.known(phase=GATE), self.experiment.gates, self.experiment.data.datasets)
        found = judge(self.experiment.gates, facts, names)
        for gate in found:
            self.say(
                f"gate {gate.name}: {'passed' if gate.passed else 'FAILED'} ({_shown(gate.value)}, {gate.needed})"
            )
        failed = [gate for gate in found if not gate.passed]
        if failed and not force:
            where = f"{self.experiment.name}, condition {self.condition}" if self.condition else self.experiment.name
            told = " ".join(gate.sentence for gate in failed)
            raise MeritError(f"{where}: no seeds are spent on this mixture. {told} Or override with --force.")

    # ------------------------------------------------------------ learning rates

    def _first(self, name: str, rate: float | None = None) -> Cell:
        arm = self.experiment.arm(name)
        plan_seed, order_seed = seed_pairs(self.experiment, arm)[0]
        default = arm.learning_rate or self.experiment.tune.learning_rates[0]
        return Cell(name, plan_seed, order_seed, default if rate is None else rate)

    def _tune(self) -> dict[str, float]:
        """{arm: learning rate}; validation rows alone are looked at, and test rows do not exist yet."""
        self._record_cells(tuning_cells(self.experiment))
        rates = {}
        for arm in self.experiment.arms:
            source = self.experiment.rate_from(arm)
            rates[arm.name] = source.learning_rate or self._choose(source)
        return rates

    def _choose(self, arm: Arm) -> float:
        """The learning rate with the lowest mean validation loss over the mixture, as chosen once and for all."""
        name = self.key(f"choice/{arm.name}")
        if name not in self.record.cells:
            tuned = self.known(phase=TUNE, arm=arm.name)
            losses = {
                rate: _mixture_loss(tuned, rate, self.experiment.data.datasets)
                for rate in self.experiment.tune.learning_rates
            }
            best = min(losses, key=lambda rate: losses[rate])
            if math.isinf(losses[best]):
                raise MeritError(f"arm `{arm.name}` diverged at every learning rate of the grid. Give lower ones.")
            cell = self._first(arm.name, best)
            grid = {f"{rate:g}": None if math.isinf(loss) else loss for rate, loss in losses.items()}
            self.record.append(
                name, self.stages.rows(cell, CHOICE, [{**fact("learning_rate", best, VAL), "grid": grid}])
            )
            for rate in self.experiment.tune.learning_rates:
                if rate != best:
                    self.stages.forget(replace(cell, learning_rate=rate))
        return float(self.known(phase=CHOICE, arm=arm.name)[0]["value"])

    # ------------------------------------------------------------ the matrix

    def _matrix(self, rates: dict[str, float]) -> None:
        if self.key(BASE) not in self.record.cells:
            self.record.append(self.key(BASE), self.stages.base_cell())
        wanted = list(cells(self.experiment, rates))
        for cell in wanted:
            if self.key(cell.name) in self.record.cells:
                self.stages.forget(cell)
        self._record_cells(wanted)

    def _record_cells(self, wanted: Sequence[Cell]) -> None:
        missing = [cell for cell in wanted if self.key(cell.name) not in self.record.cells]
        done = len(wanted) - len(missing)
        for cell, rows in rows_of_cells(self.stages, missing, self.workers):
            self.record.append(self.key(cell.name), rows)
            done += 1
            self.say(f"recorded {done} of {len(wanted)}: {cell.name}")
            if cell.phase == "run":
                self.stages.forget(cell)


def _mixture_loss(rows: Sequence[Row], rate: float, names: Sequence[str]) -> float:
    """Mean over datasets; infinite where the training failed."""
    losses = [
        row["value"]
        for row in rows
        if row["learning_rate"] == rate and row["metric"] == "loss" and row["split"] == VAL and row["dataset"] in names
    ]
    return sum(losses) / len(losses) if losses else math.inf


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Kill it at any time; the same command goes on where it stopped."
    )
    parser.add_argument("experiment", type=Path, help="an experiment's YAML, such as benchmarks/controlled/smoke.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder for data, models and results.jsonl")
    parser.add_argument("--until", choices=UNTIL, default="all", help="stop after the gates, or after tuning")
    parser.add_argument("--only", metavar="CONDITION", help="one of the experiment's conditions")
    parser.add_argument("--force", action="store_true", help="go on with a mixture that fails a gate")
    parser.add_argument(
        "--workers", type=int, default=1, help="cells that are worked on at once; they share the cores"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    quiet_libraries()
    with exit_on_error(options.debug):
        experiments = read_experiment(options.experiment)
        if options.only not in (None, *experiments):
            raise ConfigError(f"--only {options.only}: no such condition. There are: {', '.join(experiments)}.")
        with Record(options.output) as record:
            run_all(experiments, record, options)
            sys.stderr.write(f"{record.path}: {len(record.rows):,} rows of {len(record.cells):,} cells.\n")


def run_all(experiments: Mapping[str, Experiment], record: Record, options: argparse.Namespace) -> None:
    """Every condition, or the one that is asked for.

    Raises:
        MeritError: mixtures that fail a gate, when all others are done.
    """
    output = options.output
    base, refused = output / "base", []
    folders = {name: output / name if name else output for name in experiments}
    # Conditions share their base, so it must have seen nothing that any of them holds out.
    excluded: set[str] = set()
    if not base.exists():
        excluded = set().union(*(Material(e, folders[name], base).excluded() for name, e in experiments.items()))
    for condition in experiments if options.only is None else [options.only]:
        run = Run(experiments[condition], condition, folders[condition], base, record, options.workers)
        try:
            run.measure(options.until, options.force, excluded)
        except MeritError as error:
            if len(experiments) == 1:
                raise
            # One condition's mixture may fail a gate where another's does not.
            refused.append(str(error))
    if refused:
        raise MeritError(" ".join(refused))


if __name__ == "__main__":
    main()

"""What RESULTS.md is made of: a measured cell, a row of the tables, a contrast of two arms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from material import TEST
from outcomes import Estimate, Seeds


@dataclass
class CellRows:
    """What was measured of a cell: {(split, metric): {dataset: value}}, {(split, λ, metric): {dataset: value}}, facts
    of the whole cell, and the groups' own losses on test rows.
    """

    arm: str
    seeds: Seeds
    displacement: float
    tokens: Mapping[str, int]
    steps: int
    longest: int
    seconds: float
    values: dict[tuple[str, str], dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    points: dict[tuple[str, float, str], dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    facts: dict[str, float] = field(default_factory=dict)
    groups: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def loss(self, names: Sequence[str], split: str = TEST) -> float:
        return float(np.mean([self.values[split, "loss"][name] for name in names]))


@dataclass(frozen=True)
class Outcome:
    """An arm's excess over one line. `clipped`: cells that moved farther, or kept more, than any point of the line;
    they are not in the estimate, which is None where no others are.
    """

    line: str
    match: str
    estimate: Estimate | None
    won: int
    lost: int
    clipped: int

    @property
    def sure(self) -> int:
        """1 above the line, −1 below, 0 where it cannot be told."""
        return self.estimate.sure if self.estimate else 0


@dataclass(frozen=True)
class ArmSummary:
    """A row of the tables; without cells everything is None, and the tables say `not run`."""

    name: str
    wanted: int
    done: int
    failed: int
    mixture: Estimate | None = None
    forgotten: Estimate | None = None
    exact_match: float | None = None
    length: float | None = None
    groups_alone: float | None = None
    displacement: float | None = None
    tokens: Mapping[str, float] | None = None
    steps: float | None = None
    longest: float | None = None
    seconds: float | None = None
    families: Mapping[str, float] = field(default_factory=dict)
    outcomes: Sequence[Outcome] = ()


@dataclass(frozen=True)
class Contrast:
    ours: str
    theirs: str
    line: str
    match: str
    estimate: Estimate | None
    won: int = 0
    lost: int = 0
    clipped: int = 0

    @property
    def sure(self) -> int:
        return self.estimate.sure if self.estimate else 0

    @property
    def sentence(self) -> str:
        what = f"`{self.ours}` − `{self.theirs}`, excess over the line to `{self.line}` at equal {self.match}"
        beyond = f" Left out: {self.clipped} beyond what the line reaches." if self.clipped else ""
        if self.estimate is None:
            return f"{what}: no cells to compare.{beyond}"
        verdict = {1: "better", -1: "worse", 0: "cannot be told from 0"}[self.estimate.sure]
        return (
            f"{what}: {shown(self.estimate)} nats ({self.estimate.seeds} cells of `{self.ours}`; {self.won} datasets "
            f"won, {self.lost} lost): {verdict}.{beyond}{self.estimate.caution}"
        )


def shown(estimate: Estimate | None, digits: int = 3, sign: str = "+") -> str:
    """`+0.123 [+0.045, +0.201]`; with another `sign`, plus signs are left out."""
    if estimate is None:
        return "–"
    form = f"{sign}.{digits}f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"

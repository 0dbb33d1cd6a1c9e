"""Statistics of a controlled experiment. Pure functions; what is resampled is said where it is.

An *excess* is by how many nats a model's loss on the mixture is lower than that of a point on a line θ0 + λ (θ − θ0)
which moved as far (equal displacement) or forgot as much (equal forgetting). Above 0: the model is better than what a
shorter step towards θ gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """Measured points of a line, λ ascending, with θ0 (λ = 0) as the first.

    Attributes:
        lambdas: [P]. displacements: [P], ‖θ(λ) − θ0‖.
        losses: {dataset: [P]}, of mixture and held-out datasets.
    """

    lambdas: np.ndarray
    displacements: np.ndarray
    losses: Mapping[str, np.ndarray]

    def mean(self, names: Sequence[str]) -> np.ndarray:
        """Mean loss over datasets, [P]."""
        return np.mean([self.losses[name] for name in names], axis=0)

    def at(self, position: float, name: str) -> float:
        """A dataset's loss at a λ between measured ones: linear between neighbours."""
        return float(np.interp(position, self.lambdas, self.losses[name]))


@dataclass(frozen=True)
class Match:
    """Where on a line a model is compared with it. `clipped`: the line ends before it is reached."""

    position: float
    clipped: bool


def match_displacement(curve: Curve, displacement: float) -> Match:
    """λ = D / ‖θ − θ0‖: the point that moved as far; the line's last one where none moved so far."""
    furthest = float(curve.displacements[-1])
    if displacement >= furthest:
        return Match(float(curve.lambdas[-1]), displacement > furthest * (1 + 1e-9))
    return Match(float(np.interp(displacement, curve.displacements, curve.lambdas)), False)


def match_forgetting(curve: Curve, mixture: Sequence[str], held_out: Sequence[str], forgotten: float) -> Match:
    """The best point that forgot no more: argmin over λ of the mixture's loss M(λ), where F(λ) ≤ F of the model.

    F is the mean held-out loss less that of θ0. Both are taken as linear between measured points, so the best point
    of a piece lies at an end of the part of it where F(λ) ≤ F; F need not be monotone. Where every point forgot more,
    the one that forgot least stands in, clipped: the line cannot do what the model does.
    """
    loss, forgetting = curve.mean(mixture), curve.mean(held_out)
    forgetting = forgetting - forgetting[0]
    candidates = [(loss[i], curve.lambdas[i]) for i in range(len(loss)) if forgetting[i] <= forgotten + 1e-12]
    for i in range(len(loss) - 1):
        low, high = forgetting[i], forgetting[i + 1]
        if (low - forgotten) * (high - forgotten) < 0:
            share = (forgotten - low) / (high - low)
            candidates.append(
                (
                    loss[i] + share * (loss[i + 1] - loss[i]),
                    curve.lambdas[i] + share * (curve.lambdas[i + 1] - curve.lambdas[i]),
                )
            )
    if not candidates:
        return Match(float(curve.lambdas[int(np.argmin(forgetting))]), True)
    return Match(float(min(candidates)[1]), False)


def excess(curve: Curve, match: Match, losses: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """{dataset: the line's loss at the match − the model's}; above 0 where the model is better."""
    return {name: curve.at(match.position, name) - losses[name] for name in names}


@dataclass(frozen=True)
class Estimate:
    """A mean with its percentile interval; None where fewer than two things could be drawn.

    `seeds`: how many cells it rests on. `drawn`: what the interval draws anew.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int
    drawn: str

    @property
    def sure(self) -> int:
        """1 above 0, −1 below, 0 where the interval holds 0 or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


# (plan seed or None, order seed).
Seeds = tuple[int | None, int]


def crossed_mean(table: Mapping[Seeds, Mapping[str, float]], seed: int = 0) -> Estimate:
    """Mean over cells and datasets, and its interval under a crossed bootstrap.

    Plan seeds, order seeds and datasets are crossed: each is drawn anew with replacement by itself, and a value counts
    the product of how often its plan seed, its order seed and its dataset were drawn. (Owen 2007: for crossed factors
    such intervals are at worst too wide.) A factor with one level is not drawn.

    Args:
        table: {seeds: {dataset: value}}, the same datasets in every cell.
    """
    cells = sorted(table, key=str)
    names = sorted(table[cells[0]])
    values = np.array([[table[cell][name] for name in names] for cell in cells], dtype=np.float64)
    plans, orders = _levels([cell[0] for cell in cells]), _levels([cell[1] for cell in cells])
    factors = {"plan seeds": int(plans.max()) + 1, "order seeds": int(orders.max()) + 1, "datasets": len(names)}
    drawn = [name for name, size in factors.items() if size > 1]
    point = float(values.mean())
    if not drawn:
        return Estimate(point, None, None, len(cells), "")
    rng = np.random.default_rng(seed)
    counts = {name: _counts(rng, size) for name, size in factors.items()}
    weights = counts["plan seeds"][:, plans] * counts["order seeds"][:, orders]
    total = np.einsum("dc,cn,dn->d", weights, values, counts["datasets"])
    mass = weights.sum(axis=1) * counts["datasets"].sum(axis=1)
    draws = total[mass > 0] / mass[mass > 0]
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(point, float(low), float(high), len(cells), ", ".join(drawn))


def _levels(labels: Sequence[int | None]) -> np.ndarray:
    order = {label: number for number, label in enumerate(sorted(set(labels), key=str))}
    return np.array([order[label] for label in labels])


def _counts(rng: np.random.Generator, size: int) -> np.ndarray:
    """How often each of `size` levels is drawn, [NUM_DRAWS, size]; once where there is one."""
    return rng.multinomial(size, np.full(size, 1 / size), NUM_DRAWS) if size > 1 else np.ones((NUM_DRAWS, 1), int)


def paired(
    ours: Mapping[Seeds, Mapping[str, float]], theirs: Mapping[Seeds, Mapping[str, float]]
) -> dict[Seeds, dict[str, float]]:
    """Ours − theirs, dataset by dataset, on cells of the same seeds; a cell without plan seed stands for every one."""
    found = {}
    for seeds, values in ours.items():
        other = theirs.get(seeds, theirs.get((None, seeds[1])))
        if other is not None:
            found[seeds] = {name: value - other[name] for name, value in values.items() if name in other}
    return found


def won_and_lost(table: Mapping[Seeds, Mapping[str, float]]) -> tuple[int, int]:
    """Datasets whose mean over the cells lies above 0, and below."""
    means = [np.mean([values[name] for values in table.values()]) for name in next(iter(table.values()))]
    return sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Estimate | None:
    """Spearman's ρ over splits, with the percentile interval of drawing splits anew; None of fewer than five, or
    where one of the two never changes.
    """
    from scipy.stats import rankdata

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 5 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    rows = np.random.default_rng(seed).integers(0, len(a), (NUM_DRAWS, len(a)))
    ranks = rankdata(a[rows], axis=1), rankdata(b[rows], axis=1)
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    draws = (centred[0] * centred[1]).sum(axis=1)[norm > 0] / norm[norm > 0]
    point = float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(point, float(low), float(high), len(a), "splits")


def within_group_cosine(matrix: np.ndarray, groups: Sequence[int]) -> float:
    """Mean cosine over all pairs of datasets that share a group; nan where none do."""
    labels = np.asarray(groups)
    inside = (labels[:, None] == labels[None, :]) & ~np.eye(len(labels), dtype=bool)
    return float(matrix[inside].mean()) if inside.any() else float("nan")

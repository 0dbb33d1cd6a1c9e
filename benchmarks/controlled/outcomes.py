"""Statistics of a controlled experiment. Pure functions; what is resampled is said where it is.

An *excess* is by how many nats a model's loss on the mixture is lower than that of a point on a line θ0 + λ (θ − θ0)
which moved as far (equal displacement) or forgot as much (equal forgetting). Above 0: the model is better than what a
shorter step towards θ gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import make_interp_spline

NUM_DRAWS = 5000
CONFIDENCE = 0.95
GRID = 3001  # points of a line that are looked at


@dataclass(frozen=True)
class Curve:
    """Measured points of a line, λ ascending, with θ0 (λ = 0) as the first.

    Between them a loss is a cubic spline through all points (of lower degree where there are fewer than four):
    straight pieces would lie above a convex loss, and credit every model that is held against them.

    Attributes:
        lambdas: [P]. length: ‖θ − θ0‖.
        losses: {dataset: [P]}, of mixture and held-out datasets.
    """

    lambdas: np.ndarray
    length: float
    losses: Mapping[str, np.ndarray]

    def at(self, positions: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Losses of datasets at λs within the measured range, [L, N]."""
        values = np.stack([self.losses[name] for name in names], axis=1)
        spline = make_interp_spline(self.lambdas, values, k=min(3, len(self.lambdas) - 1))
        return np.asarray(spline(positions))

    def mean(self, names: Sequence[str]) -> np.ndarray:
        """Mean loss over datasets at the measured points, [P]."""
        return np.mean([self.losses[name] for name in names], axis=0)


@dataclass(frozen=True)
class Match:
    """Where on a line a model is compared with it. `clipped`: the line ends before it is reached."""

    position: float
    clipped: bool


def match_displacement(curve: Curve, displacement: float) -> Match:
    """λ = D / ‖θ − θ0‖: the point that moved as far; the line's last one where it ends before."""
    position, end = displacement / curve.length, float(curve.lambdas[-1])
    return Match(min(position, end), position > end * (1 + 1e-9))


def match_forgetting(curve: Curve, mixture: Sequence[str], held_out: Sequence[str], forgotten: float) -> Match:
    """The best point that forgot no more: argmin over λ of the mixture's loss M(λ), where F(λ) ≤ F of the model.

    F is the mean held-out loss less that of θ0; it need not be monotone in λ. Where every point forgot more, the one
    that forgot least stands in, clipped: the line cannot do what the model does.
    """
    positions = np.linspace(0.0, float(curve.lambdas[-1]), GRID)
    loss, forgetting = (curve.at(positions, names).mean(axis=1) for names in (mixture, held_out))
    forgetting = forgetting - forgetting[0]
    allowed = np.flatnonzero(forgetting <= forgotten + 1e-9)
    if not allowed.size:
        return Match(float(positions[int(np.argmin(forgetting))]), True)
    return Match(float(positions[allowed[int(np.argmin(loss[allowed]))]]), False)


def excess(curve: Curve, match: Match, losses: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """{dataset: the line's loss at the match − the model's}; above 0 where the model is better."""
    there = curve.at(np.array([match.position]), names)[0]
    return {name: float(value) - losses[name] for name, value in zip(names, there, strict=True)}


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

    @property
    def caution(self) -> str:
        """A sentence where the interval knows nothing of other seeds; else nothing."""
        return " One pair of seeds: the interval knows the spread over datasets alone." if self.seeds == 1 else ""


# (plan seed, order seed); None where there is none.
Seeds = tuple[int | None, int | None]


def crossed_mean(table: Mapping[Seeds, Mapping[str, float]], seed: int = 0) -> Estimate:
    """Mean over cells and datasets, and its interval under a crossed bootstrap.

    Plan seeds, order seeds and datasets are crossed: each is drawn anew with replacement by itself, and a value counts
    the product of how often its plan seed, its order seed and its dataset were drawn. (Owen 2007: for crossed factors
    such intervals are at worst too wide.) A factor with one level is not drawn.

    Args:
        table: {seeds: {dataset: value}}, the same datasets in every cell.
    """
    return _estimate([table], seed)


def crossed_difference(
    ours: Mapping[Seeds, Mapping[str, float]], theirs: Mapping[Seeds, Mapping[str, float]], seed: int = 0
) -> Estimate | None:
    """Mean of ours − mean of theirs, on the order seeds and datasets that both have; None where they have none.

    Order seeds and datasets are drawn once for both, which pairs them. Plan seeds are drawn for each by itself: one
    arm's split at a plan seed has nothing to do with another arm's.
    """
    first, second = common_orders(ours, theirs)
    return _estimate([first, second], seed) if first and second else None


def common_orders(
    ours: Mapping[Seeds, Mapping[str, float]], theirs: Mapping[Seeds, Mapping[str, float]]
) -> tuple[dict[Seeds, Mapping[str, float]], dict[Seeds, Mapping[str, float]]]:
    """Both, without the cells whose order seed the other has not."""
    orders = {seeds[1] for seeds in ours} & {seeds[1] for seeds in theirs}
    first, second = ({s: v for s, v in table.items() if s[1] in orders} for table in (ours, theirs))
    return first, second


def _estimate(tables: Sequence[Mapping[Seeds, Mapping[str, float]]], seed: int) -> Estimate:
    """Mean of the first table, less that of the second where there is one."""
    names = sorted(next(iter(tables[0].values())))
    orders = sorted({cell[1] for table in tables for cell in table}, key=str)
    rng = np.random.default_rng(seed)
    by_name, by_order = _counts(rng, len(names)), _counts(rng, len(orders))
    levels = {"order seeds": len(orders), "datasets": len(names), "plan seeds": 1}
    point, draws = 0.0, np.zeros(NUM_DRAWS)
    for sign, table in zip((1, -1), tables, strict=False):
        values = np.array([[cell[name] for name in names] for cell in table.values()], dtype=np.float64)
        plans = _levels([cell[0] for cell in table])
        by_plan = _counts(rng, int(plans.max()) + 1)
        levels["plan seeds"] = max(levels["plan seeds"], int(plans.max()) + 1)
        weights = by_plan[:, plans] * by_order[:, [orders.index(cell[1]) for cell in table]]
        mass = (weights.sum(axis=1) * by_name.sum(axis=1)).astype(np.float64)
        total = np.einsum("dc,cn,dn->d", weights, values, by_name)
        # Where plan and order seeds are not fully crossed, a draw may take no cell at all.
        draws += sign * np.divide(total, mass, out=np.full(NUM_DRAWS, np.nan), where=mass > 0)
        point += sign * float(values.mean())
    drawn = [name for name, size in levels.items() if size > 1]
    if not drawn:
        return Estimate(point, None, None, len(tables[0]), "")
    low, high = np.nanquantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(point, float(low), float(high), len(tables[0]), ", ".join(drawn))


def _levels(labels: Sequence[int | None]) -> np.ndarray:
    order = {label: number for number, label in enumerate(sorted(set(labels), key=str))}
    return np.array([order[label] for label in labels])


def _counts(rng: np.random.Generator, size: int) -> np.ndarray:
    """How often each of `size` levels is drawn, [NUM_DRAWS, size]; once where there is one."""
    return rng.multinomial(size, np.full(size, 1 / size), NUM_DRAWS) if size > 1 else np.ones((NUM_DRAWS, 1), int)


def won_and_lost(
    ours: Mapping[Seeds, Mapping[str, float]], theirs: Mapping[Seeds, Mapping[str, float]] | None = None
) -> tuple[int, int]:
    """Datasets whose mean over the cells lies above 0 (or above theirs, at common order seeds), and below."""
    first, second = (ours, None) if theirs is None else common_orders(ours, theirs)
    gaps = []
    for name in next(iter(first.values())):
        mean = np.mean([values[name] for values in first.values()])
        gaps.append(mean - (np.mean([values[name] for values in second.values()]) if second else 0.0))
    return sum(bool(gap > 0) for gap in gaps), sum(bool(gap < 0) for gap in gaps)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Estimate | None:
    """Spearman's ρ over splits, with the percentile interval of drawing splits anew; None of fewer than five, or
    where one of the two never changes.
    """
    return mean_rank_correlation([(x, y)])


def mean_rank_correlation(
    samples: Iterable[tuple[Sequence[float], Sequence[float]]], seed: int = 0
) -> Estimate | None:
    """Mean over mixtures of Spearman's ρ over the splits of each; splits are drawn anew within their mixture.

    Args:
        samples: (x, y) of each mixture. One with fewer than five splits, or where x or y never changes, is left out.
    """
    known = [(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in samples]
    known = [(x, y) for x, y in known if len(x) >= 5 and np.ptp(x) > 0 and np.ptp(y) > 0]
    if not known:
        return None
    rng = np.random.default_rng(seed)
    # A draw that takes one split only, again and again, has no ranks; the other mixtures stand for it.
    draws = np.nanmean([_spearman(x, y, rng.integers(0, len(x), (NUM_DRAWS, len(x)))) for x, y in known], axis=0)
    point = float(np.mean([_spearman(x, y, np.arange(len(x))[None])[0] for x, y in known]))
    low, high = np.nanquantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(point, float(low), float(high), sum(len(x) for x, _ in known), "splits")


def _spearman(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of each row of indices, [D]; nan where one of the two does not change."""
    from scipy.stats import rankdata

    centred = [ranks - ranks.mean(axis=1, keepdims=True) for ranks in (rankdata(v[rows], axis=1) for v in (x, y))]
    norm = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    product = (centred[0] * centred[1]).sum(axis=1)
    return np.divide(product, norm, out=np.full(len(rows), np.nan), where=norm > 0)


def within_group_cosine(matrix: np.ndarray, groups: Sequence[int]) -> float:
    """Mean cosine over all pairs of datasets that share a group; nan where none do."""
    labels = np.asarray(groups)
    inside = (labels[:, None] == labels[None, :]) & ~np.eye(len(labels), dtype=bool)
    return float(matrix[inside].mean()) if inside.any() else float("nan")

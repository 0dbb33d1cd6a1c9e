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
    """Where on a line a model is compared with it. `clipped`: no point of the line moved as far, or kept as much."""

    position: float
    clipped: bool


def match_displacement(curve: Curve, mixture: Sequence[str], displacement: float) -> Match:
    """The best point that moved no farther: argmin over λ ≤ D / ‖θ − θ0‖ of the mixture's loss.

    That is the point which moved as far, but where the line has passed its lowest loss before. Clipped where the line
    ends before it has moved as far.
    """
    place, end = displacement / curve.length, float(curve.lambdas[-1])
    positions = np.linspace(0.0, min(place, end), GRID)
    loss = curve.at(positions, mixture).mean(axis=1)
    return Match(float(positions[int(np.argmin(loss))]), place > end * (1 + 1e-9))


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
    """A mean with its interval; None where fewer than two things could be drawn.

    `seeds`: how many cells it rests on. `drawn`: what the interval draws anew. `fixed`: seeds of which there is one.
    """

    value: float
    low: float | None
    high: float | None
    seeds: int
    drawn: tuple[str, ...]
    fixed: tuple[str, ...] = ()

    @property
    def sure(self) -> int:
        """1 above 0, −1 below, 0 where the interval holds 0 or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    @property
    def caution(self) -> str:
        """A sentence where the interval knows nothing of other seeds; else nothing."""
        return f" The interval knows nothing of other {' and '.join(self.fixed)}." if self.fixed else ""


# (plan seed, order seed); None where there is none.
Seeds = tuple[int | None, int | None]
Table = Mapping[Seeds, Mapping[str, float]]


def crossed_mean(table: Table, seed: int = 0) -> Estimate:
    """Mean over cells and datasets, and its interval by the bootstrap.

    Plan seeds, order seeds and datasets are crossed factors: each is drawn anew with replacement while the others
    stay, which gives its share of the variance, and the shares are added. (What two factors do together is then in
    both shares: on the wide side.) With few levels a normal quantile would be too small, so it is a t quantile. A
    factor with one level is not drawn.

    Args:
        table: {seeds: {dataset: value}}, the same datasets in every cell.
    """
    return _estimate([table], seed)


def crossed_difference(ours: Table, theirs: Table, seed: int = 0) -> Estimate | None:
    """Mean of ours − mean of theirs, on the order seeds and datasets that both have; None where they have none.

    Order seeds and datasets are drawn once for both, which pairs them. Plan seeds are drawn for each by itself: one
    arm's split at a plan seed has nothing to do with another arm's.
    """
    first, second = common_orders(ours, theirs)
    return _estimate([first, second], seed) if first and second else None


def common_orders(
    ours: Table, theirs: Table
) -> tuple[dict[Seeds, Mapping[str, float]], dict[Seeds, Mapping[str, float]]]:
    """Both, without the cells whose order seed the other has not."""
    orders = {seeds[1] for seeds in ours} & {seeds[1] for seeds in theirs}
    first, second = ({s: v for s, v in table.items() if s[1] in orders} for table in (ours, theirs))
    return first, second


def _estimate(tables: Sequence[Table], seed: int) -> Estimate:
    """Mean of the first table, less that of the second where there is one."""
    names = sorted(next(iter(tables[0].values())))
    orders = sorted({cell[1] for table in tables for cell in table}, key=str)
    values = [np.array([[cell[name] for name in names] for cell in table.values()], dtype=float) for table in tables]
    order_of = [np.array([orders.index(cell[1]) for cell in table]) for table in tables]
    plan_of = [_levels([cell[0] for cell in table]) for table in tables]
    sizes = {"order seeds": len(orders), "datasets": len(names)}
    # Each table's plan seeds are a factor of its own.
    sizes |= {f"plan seeds {number}": int(plans.max()) + 1 for number, plans in enumerate(plan_of)}
    rng, signs = np.random.default_rng(seed), (1, -1)
    variances = {}
    for factor, size in sizes.items():
        if size < 2:
            continue
        # One level fewer than there are: else few levels would look like less variance than they have.
        counts = rng.multinomial(size - 1, np.full(size, 1 / size), NUM_DRAWS)
        draws = np.zeros(NUM_DRAWS)
        for number, (sign, table) in enumerate(zip(signs, values, strict=False)):
            by_order = counts if factor == "order seeds" else np.ones((1, len(orders)))
            by_plan = counts if factor == f"plan seeds {number}" else np.ones((1, int(plan_of[number].max()) + 1))
            by_name = counts if factor == "datasets" else np.ones((1, len(names)))
            weights = by_order[:, order_of[number]] * by_plan[:, plan_of[number]]
            total = ((weights @ table) * by_name).sum(axis=1)
            mass = weights.sum(axis=1) * by_name.sum(axis=1)
            # Where plan and order seeds are not fully crossed, a draw may take no cell at all.
            draws += sign * np.divide(total, mass, out=np.full(len(total), np.nan), where=mass > 0)
        variances[factor] = float(np.nanvar(draws))
    point = float(sum(sign * table.mean() for sign, table in zip(signs, values, strict=False)))
    drawn = tuple(dict.fromkeys(name.rstrip(" 01") for name in variances))
    planned = any(cell[0] is not None for table in tables for cell in table)
    there = ("plan seeds", "order seeds") if planned else ("order seeds",)
    fixed = tuple(name for name in there if name not in drawn)
    if not variances:
        return Estimate(point, None, None, len(values[0]), drawn, fixed)
    half = _half_width(variances, sizes)
    return Estimate(point, point - half, point + half, len(values[0]), drawn, fixed)


def _half_width(variances: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """t · √ΣV, with the degrees of freedom of Satterthwaite 1946: (ΣV)² ÷ Σ V²/(levels − 1)."""
    from scipy.stats import t

    total = sum(variances.values())
    if total <= 0:
        return 0.0
    freedom = total**2 / sum(v**2 / (sizes[name] - 1) for name, v in variances.items())
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * total**0.5


def _levels(labels: Sequence[int | None]) -> np.ndarray:
    order = {label: number for number, label in enumerate(sorted(set(labels), key=str))}
    return np.array([order[label] for label in labels])


def won_and_lost(ours: Table, theirs: Table | None = None) -> tuple[int, int]:
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
    # Of one seed each: where splits are of the same plan seeds in every mixture, those are drawn once for all.
    rows = [np.random.default_rng(seed).integers(0, len(x), (NUM_DRAWS, len(x))) for x, _ in known]
    # A draw that takes one split only, again and again, has no ranks; the other mixtures stand for it.
    draws = np.nanmean([_spearman(x, y, drawn) for (x, y), drawn in zip(known, rows, strict=True)], axis=0)
    point = float(np.mean([_spearman(x, y, np.arange(len(x))[None])[0] for x, y in known]))
    low, high = np.nanquantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(point, float(low), float(high), sum(len(x) for x, _ in known), ("splits",))


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

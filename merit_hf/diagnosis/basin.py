"""Did the groups stay in one basin? Where to measure a loss, and what the measurements say. Pure arrays.

    survey = Survey({0: 0.6, 1: 0.4})
    for point in survey.points(): ...            # measure the loss of Σ c_j θ_j
    gain(survey, draws, [0.6, 0.4])              # predicted, measured, their ratio, with intervals

θ̄ = Σ w_k θ_k, d_k = θ_k − θ̄. Since Σ w_k d_k = 0, a loss expanded at θ̄ has no linear term:
Σ w_k L(θ_k) − L(θ̄) = ½ Σ w_k d_kᵀ H d_k + third order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Second differences of float32 losses are not known better than this share of the loss, over ε².
FLOAT32_NOISE = 2e-6


@dataclass(frozen=True, order=True)
class Point:
    """A place in weight space: Σ c_j θ_j over labelled checkpoints, plus noise of `sigma` × each tensor's RMS.

    Attributes:
        coefficients (`tuple[tuple[str, float], ...]`): sorted by label, without zeros; they sum to 1.
        noise (`tuple[float, int]`, *optional*): (sigma, seed).
    """

    coefficients: tuple[tuple[str, float], ...]
    noise: tuple[float, int] | None = None

    @classmethod
    def of(cls, coefficients: Mapping[str, float], noise: tuple[float, int] | None = None) -> Point:
        # Rounded, so that one place reached in two ways is measured once, and without what rounding leaves of a 0.
        rounded = {label: round(value, 12) for label, value in coefficients.items() if abs(value) > 1e-9}
        return cls(tuple(sorted(rounded.items())), noise)


def between(first: Point, second: Point, position: float) -> Point:
    """(1 − t) first + t second; t outside [0, 1] lies beyond an end."""
    mixed = {label: (1 - position) * value for label, value in first.coefficients}
    for label, value in second.coefficients:
        mixed[label] = mixed.get(label, 0.0) + position * value
    return Point.of(mixed)


@dataclass(frozen=True)
class Survey:
    """Where to measure.

    Attributes:
        weights: {group: w_k}, summing to 1; empty before training.
        epsilons: steps of the second differences. positions: inner points of every path.
        sigmas, num_noises: perturbations of the base.
        merged: a merged checkpoint is measured too. line_position: t on base → joint; None without a joint model.
    """

    weights: Mapping[int, float]
    epsilons: tuple[float, ...] = (0.25, 0.5, 1.0)
    positions: tuple[float, ...] = (0.5,)
    sigmas: tuple[float, ...] = (0.01, 0.05, 0.1)
    num_noises: int = 2
    merged: bool = False
    line_position: float | None = None

    @property
    def mean(self) -> Point:
        return Point.of({f"group-{k}": weight for k, weight in self.weights.items()})

    @property
    def several(self) -> bool:
        return len(self.weights) > 1

    def models(self) -> dict[str, Point]:
        """The points that have a name, in the order of a table."""
        alone = {label: Point.of({label: 1.0}) for label in ("base", "joint", "merged")}
        found = {"base": alone["base"]}
        if self.line_position is not None:
            found["joint"] = alone["joint"]
            found["line"] = between(alone["base"], alone["joint"], self.line_position)
        found |= {f"group-{k}": Point.of({f"group-{k}": 1.0}) for k in self.weights}
        if self.weights:
            found["mean"] = self.mean
        return found | ({"merged": alone["merged"]} if self.merged else {})

    def around(self, group: int, step: float) -> Point:
        """θ̄ + step · d_k."""
        return between(self.mean, Point.of({f"group-{group}": 1.0}), step)

    def without(self, group: int) -> Point:
        """The mean of the other groups: θ̄ − w_k / (1 − w_k) · d_k."""
        weight = self.weights[group]
        return self.around(group, -weight / (1 - weight))

    def paths(self) -> list[tuple[str, str]]:
        """Base to groups and mean, mean to groups, group to group."""
        groups = [f"group-{k}" for k in self.weights]
        found = [("base", group) for group in groups]
        if self.several:
            found += [("base", "mean")] + [("mean", group) for group in groups]
            found += [(one, two) for i, one in enumerate(groups) for two in groups[i + 1 :]]
        return found

    def on_path(self, ends: tuple[str, str]) -> list[Point]:
        """The points of a path, its ends included."""
        models = self.models()
        return [between(models[ends[0]], models[ends[1]], t) for t in (0.0, *self.positions, 1.0)]

    def noisy(self, sigma: float) -> list[Point]:
        return [Point.of({"base": 1.0}, (sigma, seed)) for seed in range(self.num_noises)]

    def points(self) -> list[Point]:
        """Every point once, in the order in which they are best measured: the named ones first."""
        wanted = list(self.models().values())
        if self.several:
            for group in self.weights:
                wanted += [self.around(group, sign * step) for step in self.epsilons for sign in (1, -1)]
                wanted.append(self.without(group))
        for ends in self.paths():
            wanted += self.on_path(ends)
        for sigma in self.sigmas:
            wanted += self.noisy(sigma)
        return list(dict.fromkeys(wanted))


class Draws:
    """Token-mean losses at every point, as measured and in bootstrap draws of the rows, the same draw at all points.

    Args:
        points (`Sequence[Point]`): P of them.
        losses (`np.ndarray`): float64 [1 + num_bootstrap, P]; row 0 is what was measured.
        resampled (`bool`): False where there is a single row, which has no draws to speak of.
    """

    def __init__(self, points: Sequence[Point], losses: np.ndarray, resampled: bool = True) -> None:
        self._column = {point: index for index, point in enumerate(points)}
        self.losses, self.resampled = losses, resampled

    def at(self, point: Point) -> np.ndarray:
        """Losses at a point, [1 + num_bootstrap]."""
        return self.losses[:, self._column[point]]

    def estimate(self, values: np.ndarray, confidence: float = 0.95) -> dict[str, float | None]:
        """{"value", "low", "high"}: what was measured, and the percentiles of the draws."""
        low = high = None
        if self.resampled:
            tail = 50 * (1 - confidence)
            low, high = (float(edge) for edge in np.percentile(values[1:], [tail, 100 - tail]))
        return {"value": float(values[0]), "low": low, "high": high}


def resample(nats: np.ndarray, tokens: np.ndarray, num_bootstrap: int, seed: int) -> np.ndarray:
    """Token means over draws of the rows, float64 [1 + num_bootstrap, P]; row 0 takes every row once.

    Args:
        nats (`np.ndarray`): [P, num_rows], a row's loss summed over its tokens. tokens: [num_rows], its loss tokens.
    """
    num_rows = len(tokens)
    draws = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), num_bootstrap)
    counts = np.vstack([np.ones((1, num_rows)), draws]).astype(np.float64)
    return (counts @ nats.T) / (counts @ tokens)[:, None]


def gain(survey: Survey, draws: Draws) -> dict[str, Any]:
    """Measured gain Σ w_k L(θ_k) − L(θ̄); predicted gain and ρ for every ε; each group's share of the prediction.

    Forward passes alone: d_kᵀ H d_k ≈ [L(θ̄ + ε d_k) + L(θ̄ − ε d_k) − 2 L(θ̄)] / ε², exact on a quadratic.
    """
    center = draws.at(survey.mean)
    alone = np.array([weight * draws.at(survey.around(k, 1.0)) for k, weight in survey.weights.items()])
    measured = alone.sum(axis=0) - center
    ladder = []
    for step in survey.epsilons:
        terms = _curvatures(survey, draws, step)
        predicted = np.sum(terms, axis=0)
        estimate = draws.estimate(predicted)
        known = estimate["value"] > FLOAT32_NOISE * abs(center[0]) / step**2
        known = known and (estimate["low"] is None or estimate["low"] > 0)
        rho = draws.estimate(measured / np.where(predicted == 0, np.nan, predicted)) if known else None
        ladder.append({"epsilon": step, "predicted": estimate, "rho": rho})
    parts = np.array([term[0] for term in _curvatures(survey, draws, min(survey.epsilons))])
    return {"measured": draws.estimate(measured), "ladder": ladder, "by_group": shares(parts)}


def _curvatures(survey: Survey, draws: Draws, step: float) -> list[np.ndarray]:
    """½ w_k d_kᵀ H d_k of every group."""
    center = draws.at(survey.mean)
    return [
        weight / 2 * (draws.at(survey.around(k, step)) + draws.at(survey.around(k, -step)) - 2 * center) / step**2
        for k, weight in survey.weights.items()
    ]


def barriers(survey: Survey, draws: Draws) -> list[dict[str, Any]]:
    """For every path the greatest height over the straight line between the losses at its ends (Frankle et al. 2020).

    Below 0 where the path sags everywhere, as in a convex basin.
    """
    found = []
    for ends in survey.paths():
        losses = np.stack([draws.at(point) for point in survey.on_path(ends)], axis=1)
        positions = np.array(survey.positions)
        line = (1 - positions) * losses[:, :1] + positions * losses[:, -1:]
        heights = losses[:, 1:-1] - line
        found.append(
            {
                "from": ends[0],
                "to": ends[1],
                "height": draws.estimate(heights.max(axis=1)),
                "position": float(positions[int(heights[0].argmax())]),
                "losses": [float(loss) for loss in losses[0]],
            }
        )
    return found


def changes(survey: Survey, draws: Draws) -> dict[str, Any]:
    """Estimates of L(first) − L(second) for the pairs that matter; `halfway` lies between base and mean."""
    models = survey.models()
    if survey.several:
        points = survey.on_path(("base", "mean"))
        models["halfway"] = points[len(points) // 2]
    pairs = [("mean", "base"), ("mean", "joint"), ("mean", "line"), ("merged", "mean"), ("joint", "base")]
    pairs += [("mean", "halfway")]
    pairs += [(f"group-{k}", "base") for k in survey.weights]
    return {
        f"{one}-{two}": draws.estimate(draws.at(models[one]) - draws.at(models[two]))
        for one, two in pairs
        if one in models and two in models
    }


def progress_of(survey: Survey, draws: Draws, group: int) -> dict[str, Any]:
    """Changes of the loss from the base to a group, over the first half of the way and over the second."""
    points = survey.on_path(("base", f"group-{group}"))
    base, half, end = (draws.at(points[index]) for index in (0, len(points) // 2, -1))
    return {
        "held_out": draws.estimate(end - base),
        "first_half": draws.estimate(half - base),
        "second_half": draws.estimate(end - half),
    }


def exclusions(survey: Survey, draws: Draws) -> dict[str, Any]:
    """Loss of the mean without a group − loss of the mean."""
    if not survey.several:
        return {}
    center = draws.at(survey.mean)
    return {str(k): draws.estimate(draws.at(survey.without(k)) - center) for k in survey.weights}


def perturbation(survey: Survey, draws: Draws) -> list[dict[str, Any]]:
    """By how much noise of each sigma raises the base's loss, averaged over the noises."""
    base = draws.at(survey.models()["base"])
    rows = []
    for sigma in survey.sigmas:
        noisy = np.mean([draws.at(point) for point in survey.noisy(sigma)], axis=0)
        rows.append({"sigma": sigma, "increase": draws.estimate(noisy - base)})
    return rows


def shares(parts: np.ndarray) -> list[float | None]:
    """Each part over their sum; None where the sum is not positive."""
    total = float(np.sum(parts))
    return [float(part) / total if total > 0 else None for part in parts]


def variance(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """w_k ‖d_k‖² of every group from the inner products of the displacements θ_k − θ0: [..., K, K] → [..., K]."""
    toward_mean = gram @ weights
    square_of_mean = toward_mean @ weights
    squares = np.diagonal(gram, axis1=-2, axis2=-1) - 2 * toward_mean + square_of_mean[..., None]
    # Rounding may leave a difference of equal numbers just below 0.
    return weights * np.maximum(squares, 0.0)


def with_mean(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The inner products [S, S], with those of the mean of the first K appended as row and column S."""
    mix = np.vstack([np.eye(len(gram)), np.concatenate([weights, np.zeros(len(gram) - len(weights))])])
    return mix @ gram @ mix.T


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines of vectors from their inner products; 0 with a vector of no length."""
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    outer = np.outer(norms, norms)
    return np.divide(gram, outer, out=np.zeros_like(gram), where=outer > 0).clip(-1.0, 1.0)


def more_than_chance(count: int, trials: int, probability: float = 0.025, level: float = 0.01) -> bool:
    """Whether `count` hits in `trials` are more than chance gives: binomial tail below `level`."""
    from scipy.stats import binom

    return count > 0 and float(binom.sf(count - 1, trials, probability)) < level

"""Differences between two models on the same examples, and paired bootstrap intervals of them. Pure arrays.

Every quantity here is a ratio of sums over examples: nats ÷ loss tokens, points ÷ answers, tokens of answers ÷ tokens
of references. The divisor belongs to the examples, so that both models share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
# Of fewer examples, resampling says next to nothing.
MIN_EXAMPLES = 8


@dataclass(frozen=True)
class Difference:
    """`difference` of two models; `low` and `high` of its interval, None under [`MIN_EXAMPLES`] examples.

    `draws`, float64 [NUM_RESAMPLES], are the differences of the resamples: empty without an interval.
    """

    difference: float
    low: float | None
    high: float | None
    draws: np.ndarray

    def to_dict(self) -> dict[str, float | None]:
        return {"difference": self.difference, "low": self.low, "high": self.high}


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], divisors: Sequence[float], seed: int
) -> Difference:
    """Σ(ours − theirs) ÷ Σ divisors, and the percentiles of that ratio when examples are drawn with replacement.

    Args:
        ours, theirs (`Sequence[float]`): [n] an amount an example, of either model.
        divisors (`Sequence[float]`): [n] positive.
        seed (`int`): the same seed draws the same examples, so that all comparisons on a dataset are of one kind.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    below = np.asarray(divisors, dtype=np.float64)
    point = float(gaps.sum() / below.sum())
    if len(gaps) < MIN_EXAMPLES:
        return Difference(point, None, None, np.empty(0))
    # How often each example is drawn is all that a resample needs to know.
    counts = np.random.default_rng(seed).multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), NUM_RESAMPLES)
    return _with_interval(point, (counts @ gaps) / (counts @ below))


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The unweighted mean over datasets; an interval where every dataset has one."""
    point = float(np.mean([d.difference for d in differences]))
    if any(d.low is None for d in differences):
        return Difference(point, None, None, np.empty(0))
    return _with_interval(point, np.mean([d.draws for d in differences], axis=0))


def _with_interval(point: float, draws: np.ndarray) -> Difference:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Difference(point, float(low), float(high), draws)

"""Is a plan worth following? What the halves of the samples say of it, and a verdict.

    trust = assess(readouts, names, groups, resplit, bounds, section)

The verdicts are `follow`, `weak` (more samples, or fewer groups), `random` (no better than random groups) and
`unknown` (too few datasets). Words for them are made in [`~merit_hf.trust_words`].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merit_hf.config import PlanSection
from merit_hf.conflict import sketch_error
from merit_hf.readouts import GradientReadout
from merit_hf.reliability import RELIABLE, debias_cosines, samples_needed
from merit_hf.stability import Bootstrap, HalfProducts, RandomTest, bootstrap_groups, compare_with_random

# Beyond so many datasets, a random choice of them is assessed.
MAX_DATASETS = 1000
SIGNIFICANT = 0.05
# Mean adjusted Rand index from which groups count as stable.
STABLE = 0.6
# Asking for more than so many times the sample is no advice.
MAX_FACTOR = 20

# The cosine matrix of these datasets (their indices) to the group of each.
ResplitSome = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Assessment:
    """What can be said of a plan.

    Attributes:
        facts: for plan.json; empty where there are no halves.
        probability: [T], how often each dataset stayed in its group under re-drawn samples; None where not known.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    probability: list[float | None] = field(default_factory=list)


def count_replicas(num_datasets: int, split: str) -> int:
    """200 up to 200 datasets, then falling with T², since a replica's split costs T² or more; at least 20.

    20 for k-means, which starts ten times over.
    """
    return 20 if split == "kmeans" else max(20, min(200, int(200 * (200 / max(1, num_datasets)) ** 2)))


def assess(
    readouts: Sequence[GradientReadout],
    names: Sequence[str],
    groups: np.ndarray,
    resplit: ResplitSome,
    bounds: dict[str, Any],
    section: PlanSection,
    all_sampled: bool = False,
) -> Assessment:
    """Reliability, stability under re-drawn samples, comparison with random groups, and what follows.

    Datasets with a single example have no halves: they are left out. Of more than [`MAX_DATASETS`] a seeded random
    choice is assessed, by its own split.

    Args:
        readouts: with halves, in the order of `names`; empty for a split without gradients: nothing is claimed.
        groups: of the plan, int [T].
        resplit: the plan's own split of some of the datasets.
        bounds: as `axis_bounds` gives them; the axes' angles are recorded next to those of sampling noise.
        section: of the plan: its seed, and whether the cosines that are split again are to be corrected too.
        all_sampled: no dataset has more examples than were sampled.
    """
    nothing: list[float | None] = [None] * len(names)
    used = np.array([i for i, readout in enumerate(readouts) if readout.reliability is not None], dtype=np.int64)
    if not used.size:
        return Assessment({}, nothing)
    chosen = used
    if used.size > MAX_DATASETS:
        chosen = np.sort(np.random.default_rng(section.seed).choice(used, MAX_DATASETS, replace=False))
    picked = [readouts[i] for i in chosen]

    corrected = section.debias == "split_half"

    def split(matrix: np.ndarray) -> np.ndarray:
        return resplit(debias_cosines(matrix, [r.reliability for r in picked])[0] if corrected else matrix, chosen)

    error = sketch_error(len(chosen), len(picked[0].sketch), section.sketch)
    stability, test = _statistics(picked, groups, chosen, split, section, error)
    everything = [readouts[i] for i in used]
    facts: dict[str, Any] = {
        "num_datasets": len(chosen),
        "reliability": _reliability(everything, [names[i] for i in used]),
        "stability": None,
        "random_test": None,
        "axes": _axes(bounds, stability),
    }
    if stability is not None:
        facts["stability"] = {
            "adjusted_rand_index": stability.adjusted_rand_index,
            "num_replicas": stability.num_replicas,
            "half_agreement": stability.half_agreement,
        }
    if test is not None:
        facts["random_test"] = {**vars(test)}
    index = None if stability is None else stability.adjusted_rand_index
    facts |= judge(facts["reliability"], index, test, all_sampled)
    probability = list(nothing)
    if stability is not None:
        for position, share in zip(chosen, stability.probability, strict=True):
            probability[position] = float(share)
    return Assessment(facts, probability)


def _statistics(
    readouts: Sequence[GradientReadout],
    groups: np.ndarray,
    chosen: np.ndarray,
    split: Callable[[np.ndarray], np.ndarray],
    section: PlanSection,
    readout_error: float | None,
) -> tuple[Bootstrap | None, RandomTest | None]:
    """Nothing where there is nothing to choose: one group, or one dataset a group."""
    if not 1 < len(np.unique(groups)) < len(groups) or len(np.unique(groups)) >= len(chosen):
        return None, None
    firsts = [readout.first_half for readout in readouts if readout.first_half is not None]
    products = HalfProducts.of(
        [readout.sketch for readout in readouts], firsts, [readout.first_share for readout in readouts]
    )
    own = groups if len(chosen) == len(groups) else split(products.replica(np.zeros(len(chosen))))
    return (
        bootstrap_groups(products, own, split, count_replicas(len(chosen), section.split), section.seed),
        compare_with_random(products, split, readout_error, seed=section.seed),
    )


def _reliability(readouts: Sequence[GradientReadout], names: Sequence[str]) -> dict[str, Any]:
    values = np.array([readout.reliability for readout in readouts], dtype=np.float64)
    samples = int(np.median([readout.num_samples for readout in readouts]))
    needed = samples_needed(samples, float(np.median(values)))
    lowest = int(np.argmin(values))
    return {
        "median": float(np.median(values)),
        "lowest": float(values[lowest]),
        "lowest_dataset": names[lowest],
        "num_samples": samples,
        "num_samples_needed": needed,
    }


def _axes(bounds: dict[str, Any], stability: Bootstrap | None) -> dict[str, Any]:
    """Davis–Kahan for both sources of error: sin(angle) ≤ ‖E‖₂ / eigengap."""
    error = None if stability is None else stability.matrix_error
    gaps = bounds.get("eigengaps", [])
    angles = None if error is None else [min(1.0, error / gap) if gap > 0 else 1.0 for gap in gaps]
    return {
        "eigengaps": gaps,
        "readout_error": bounds.get("operator_norm"),
        "readout_sin_angle": bounds.get("sin_angle"),
        "sampling_error": error,
        "sampling_sin_angle": angles,
    }


def judge(
    reliability: dict[str, Any], index: float | None, test: RandomTest | None, all_sampled: bool
) -> dict[str, Any]:
    """The verdict, and how many samples to ask for.

    - `follow`: better than random (p ≤ 0.05, by more than the read-out's error can make) and stable (adjusted Rand
      index ≥ 0.6).
    - `weak`: better than random but not stable, or not distinguishable from random while the gradients are still noisy
      and more samples are within reach.
    - `random`: not better than random although the gradients are reliable or all examples are used, or so noisy that
      no number follows.
    - `unknown`: no test was possible, or so few ways to group the datasets that it could not come out.

    Args:
        reliability: median, num_samples and num_samples_needed.
        all_sampled: there are no more examples to ask for.
    """
    if test is None or index is None or test.smallest_p > SIGNIFICANT:
        return {"verdict": "unknown", "advised_num_samples": None}
    samples, needed = reliability["num_samples"], reliability["num_samples_needed"]
    settled = reliability["median"] >= RELIABLE
    if is_better(test.p_value, test.within - test.random, test.readout_gain):
        if index >= STABLE:
            return {"verdict": "follow", "advised_num_samples": None}
        wanted = 2 * samples if settled or needed is None else max(needed, samples + 1)
        return {"verdict": "weak", "advised_num_samples": None if all_sampled else min(wanted, MAX_FACTOR * samples)}
    if settled or all_sampled or needed is None or needed > MAX_FACTOR * samples:
        return {"verdict": "random", "advised_num_samples": None}
    return {"verdict": "weak", "advised_num_samples": needed}


def is_better(p_value: float, gain: float, readout_gain: float | None) -> bool:
    """Better than random groups, by more than the error of the read-out could make by itself."""
    return p_value <= SIGNIFICANT and (readout_gain is None or gain > readout_gain)

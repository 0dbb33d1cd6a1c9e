"""What a plan says of itself in sentences: on the command line and in the report."""

from __future__ import annotations

import numpy as np

from merit_hf.conflict import cosine_statistics
from merit_hf.plan import PartitionPlan
from merit_hf.trust_words import trust_verdict


def cosine_sentence(plan: PartitionPlan) -> str:
    """The range of the cosines, and the mean inside groups against all pairs."""
    matrix = plan.conflict_matrix
    assert matrix is not None
    said = cosine_statistics(matrix, np.array([dataset.group for dataset in plan.datasets]))
    within = "none" if said["inside"] is None else f"{said['inside']:.2f}"
    return (
        f"Cosines between datasets: lowest {said['lowest']:.2f}, median {said['median']:.2f}, highest "
        f"{said['highest']:.2f}; mean inside groups {within}, over all pairs {said['mean']:.2f}."
    )


def verdict_sentence(plan: PartitionPlan) -> str:
    """In words: is the plan worth following? Where no halves were kept: is there structure, and do the axes stand."""
    if plan.trust.get("verdict") is not None:
        return trust_verdict(plan.trust)
    bounds = plan.bounds
    p_value, angles = bounds.get("structure_p_value"), bounds.get("sin_angle")
    if bounds.get("verdict") == "noise":
        first = f"The cosines show no more structure than their own shuffles (p = {p_value:.2f}): this may be noise."
    elif bounds.get("verdict") == "structure":
        first = f"The cosines have structure that shuffles of them do not reach (p = {p_value:.3f})."
    else:
        first = "Fewer than four datasets: too few to tell structure from noise."
    if plan.datasets[0].gradient_norm is not None and all(dataset.num_sampled == 1 for dataset in plan.datasets):
        first += (
            " One example a dataset has no halves to compare, so nothing is known of its noise: plan again with a "
            "larger plan.num_samples."
        )
    if angles is None:
        return first + " A stride read-out has no bound on its axes."
    return first + f" The read-out's error turns axis 1 by at most sin(angle) = {angles[0]:.2f}."


def is_noise(plan: PartitionPlan) -> bool:
    """The plan says that its groups are no better than random ones."""
    return plan.trust.get("verdict", plan.bounds.get("verdict")) in ("random", "noise")

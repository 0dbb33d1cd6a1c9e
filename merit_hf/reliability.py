"""How reproducible a gradient is, from the two halves of its sample. Pure arrays.

A gradient g is the weighted mean w₁h₁ + w₂h₂ of the gradients of two disjoint halves. Their noise is independent, so
⟨h₁, h₂⟩ estimates the squared length of the gradient that all examples would give, without bias, while ‖g‖² is larger
by the noise. What follows for reliability, sample size and correction is test theory (Spearman and Brown, 1910).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# From here on a gradient counts as settled: the cosine with that of all examples is about √0.8 = 0.89.
RELIABLE = 0.8
# Below this, the length of the noise-free gradient is not known well enough to divide by it.
MIN_DEBIAS_RELIABILITY = 0.1


def split_half(first: np.ndarray, second: np.ndarray, first_share: float) -> tuple[float, float]:
    """Cosine of the halves' gradients, and the reliability of the whole one.

    The reliability is ⟨h₁, h₂⟩ / ‖w₁h₁ + w₂h₂‖², in [0, 1]: the share of the squared length that is not noise, and the
    cosine to expect with the gradient of another sample of the same size. For halves of equal weight and length it is
    Spearman–Brown's 2c/(1+c) of their cosine c.

    Args:
        first, second: h₁ and h₂, or their read-outs, float [dim].
        first_share: w₁ = 1 − w₂.
    """
    a, b, product = _dot(first, first), _dot(second, second), _dot(first, second)
    if not (a > 0 and b > 0):
        return 0.0, 0.0
    other = 1.0 - first_share
    square = first_share**2 * a + other**2 * b + 2 * first_share * other * product
    cosine = min(1.0, max(-1.0, product / math.sqrt(a * b)))
    return cosine, min(1.0, max(0.0, product / square)) if square > 0 else 0.0


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    """In float64, in blocks: a read-out may be a memory-mapped whole gradient."""
    step = 1 << 22
    return sum(
        float(np.dot(a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64)))
        for i in range(0, len(a), step)
    )


def samples_needed(num_samples: int, reliability: float | None, target: float = RELIABLE) -> int | None:
    """Examples for a reliability of `target`, where `num_samples` gave `reliability`: noise falls as 1/n.

    n · target/(1 − target) · (1 − r)/r; None where r is 0 or not known: no number follows from halves that disagree.
    """
    if not reliability or reliability <= 0:
        return None
    return max(1, math.ceil(num_samples * target / (1 - target) * (1 - reliability) / reliability))


def next_sample_size(num_samples: int, reliability: float, target: float, cap: int) -> int:
    """How many examples to try next: what [`samples_needed`] foresees, but 16 more at least and twice at most."""
    needed = samples_needed(num_samples, reliability, target) or 2 * num_samples
    return min(cap, 2 * num_samples, max(num_samples + 16, needed))


def debias_cosines(matrix: np.ndarray, reliabilities: Sequence[float | None]) -> tuple[np.ndarray, list[int], int]:
    """Cosines whose denominators are the unbiased squared lengths ⟨h₁, h₂⟩ instead of ‖g‖².

    C_ij / √(r_i r_j): Spearman's correction for attenuation. The diagonal stays 1, and nothing leaves [−1, 1].

    Args:
        matrix: C, float [T, T].
        reliabilities: r, [T], as [`split_half`] gives them; None where there is only one half.

    Returns:
        The corrected matrix; the datasets whose r is unknown or below [`MIN_DEBIAS_RELIABILITY`], which keep their
        plain length (r = 1); and how many pairs i < j had to be clipped to [−1, 1].
    """
    plain = [i for i, r in enumerate(reliabilities) if r is None or r < MIN_DEBIAS_RELIABILITY]
    scale = np.array([1.0 if i in set(plain) else r for i, r in enumerate(reliabilities)], dtype=np.float64) ** -0.5
    corrected = matrix * np.outer(scale, scale)
    np.fill_diagonal(corrected, 1.0)
    clipped = int((np.abs(corrected) > 1).sum()) // 2
    return np.clip(corrected, -1.0, 1.0), plain, clipped

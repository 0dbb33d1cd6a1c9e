"""The conflict matrix: cosines between dataset gradients, and what can be said of its axes. Pure arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_BLOCK = 1 << 22


def conflict_matrix(sketches: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """C_ij = cos(s_i, s_j): float64 [T, T], symmetric, with a unit diagonal; high = same direction.

    Args:
        sketches: float [T, dim], one gradient read-out a row, or a list of rows. May be memory-mapped: columns are
            read in blocks.

    Raises:
        ValueError: a row is zero or not finite; its index is named.
    """
    num_datasets, dim = len(sketches), len(sketches[0])
    gram = np.zeros((num_datasets, num_datasets))
    step = max(1, _BLOCK // max(1, num_datasets))
    for start in range(0, dim, step):
        block = np.stack([sketch[start : start + step] for sketch in sketches]).astype(np.float64)
        gram += block @ block.T
    norms = np.sqrt(np.diagonal(gram))
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise ValueError(f"row {bad[0]} has norm {norms[bad[0]]}; a cosine needs a finite, non-zero gradient")
    cosines = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    cosines = (cosines + cosines.T) / 2
    np.fill_diagonal(cosines, 1.0)
    return cosines


def sketch_error(num_datasets: int, dim: int, kind: str) -> float | None:
    """‖E‖₂, the spectral norm of the error a read-out puts on C: about 2√(T/k) for a count sketch, 0 for `exact`.

    None for `stride`, which has no such bound: it depends on which parameters it happens to read.
    """
    if kind == "exact":
        return 0.0
    return 2.0 * (num_datasets / dim) ** 0.5 if kind == "count_sketch" else None


def axis_bounds(singular_values: np.ndarray, num_axes: int, error: float | None) -> dict[str, Any]:
    """How far a read-out error may turn the conflict axes: sin(angle) ≤ ‖E‖₂ / eigengap (Davis–Kahan).

    Args:
        singular_values: of the centred conflict matrix, descending, [T].
        num_axes: r, the number of axes in use.
        error: ‖E‖₂ or None where it is not known.
    """
    values = np.append(singular_values, 0.0)
    gaps = [float(values[axis] - values[axis + 1]) for axis in range(min(num_axes, len(singular_values)))]
    angles = None if error is None else [min(1.0, error / gap) if gap > 0 else (1.0 if error else 0.0) for gap in gaps]
    return {"operator_norm": error, "eigengaps": gaps, "sin_angle": angles}


def structure_p_value(matrix: np.ndarray, seed: int = 0, num_permutations: int = 199) -> float | None:
    """Is there more structure in C than in its own cosines, shuffled over the pairs?

    The share of symmetric shuffles of the off-diagonal cosines whose largest eigenvalue of C − mean reaches that of C.
    Isotropic noise in many dimensions gives a uniform p; large blocks give a small one. A necessary sign only: noise
    of few dimensions, or around one shared direction, gives small values too, and many blocks of two or three datasets
    do not. None below four datasets, where it says nothing.
    """
    num_datasets = len(matrix)
    if num_datasets < 4:
        return None
    upper = np.triu_indices(num_datasets, 1)
    cosines = matrix[upper] - matrix[upper].mean()
    rng = np.random.default_rng(seed)

    def largest(values: np.ndarray) -> float:
        shuffled = np.zeros_like(matrix)
        shuffled[upper] = values
        return float(np.linalg.eigvalsh(shuffled + shuffled.T)[-1])

    observed = largest(cosines)
    reached = sum(largest(rng.permutation(cosines)) >= observed - 1e-12 for _ in range(num_permutations))
    return (1 + reached) / (1 + num_permutations)

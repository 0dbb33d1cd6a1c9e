"""The conflict matrix: cosines between dataset gradients, and what can be said of its axes. Pure arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse.linalg import eigsh

# Up to so many datasets a matrix of theirs is float64 and decomposed whole; beyond, float32 and by its leading axes.
MANY_DATASETS = 1000
_BLOCK = 1 << 22
# Entries of the float32 panels that a large matrix is summed from (128 MB), and rows of one product.
_PANEL = 1 << 25
_TILE = 1024
# So many datasets stand for all in the permutation test of a large plan.
_TESTED_DATASETS = 500
# Below this size a dense decomposition is the faster way to a largest eigenvalue.
_LANCZOS_FROM = 400


def conflict_matrix(sketches: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """C_ij = cos(s_i, s_j): [T, T], symmetric, with a unit diagonal; high = same direction.

    float64 up to [`MANY_DATASETS`] datasets. Beyond, float32, since T² numbers are then most of the memory: unit rows
    are multiplied in float32, which puts an error of at most a few 1e-7 on a cosine.

    Args:
        sketches: float [T, dim], one gradient read-out a row, or a list of rows. May be memory-mapped: columns are
            read in blocks.

    Raises:
        ValueError: a row is zero or not finite; its index is named.
    """
    num_datasets, dim = len(sketches), len(sketches[0])
    if num_datasets > MANY_DATASETS:
        return _large_matrix(sketches)
    gram = np.zeros((num_datasets, num_datasets))
    step = max(1, _BLOCK // max(1, num_datasets))
    for start in range(0, dim, step):
        block = np.stack([sketch[start : start + step] for sketch in sketches]).astype(np.float64)
        gram += block @ block.T
    norms = np.sqrt(np.diagonal(gram))
    _check_norms(norms)
    cosines = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    cosines = (cosines + cosines.T) / 2
    np.fill_diagonal(cosines, 1.0)
    return cosines


def row_norms(sketches: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """‖s_i‖₂, float64 [T]. Raises ValueError where one is zero or not finite."""
    norms = np.array([np.linalg.norm(np.asarray(sketch, dtype=np.float64)) for sketch in sketches])
    _check_norms(norms)
    return norms


def row_blocks(count: int, size: int = _TILE) -> Iterator[slice]:
    """Slices that cover `count` rows, `size` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def cross_cosines(
    sketches: Sequence[np.ndarray] | np.ndarray, others: Sequence[np.ndarray] | np.ndarray
) -> np.ndarray:
    """cos(s_i, o_j), float64 [T, m]: what m new datasets add to a conflict matrix, in O(T·m) products.

    Raises:
        ValueError: a row is zero or not finite.
    """
    norms, other_norms = row_norms(sketches), row_norms(others)
    new = np.stack([np.asarray(other, dtype=np.float64) for other in others]) / other_norms[:, None]
    cosines = np.empty((len(sketches), len(new)))
    for block in row_blocks(len(sketches), 256):
        rows = np.stack([np.asarray(sketch, dtype=np.float64) for sketch in sketches[block]]) / norms[block, None]
        cosines[block] = rows @ new.T
    return np.clip(cosines, -1.0, 1.0)


def _large_matrix(sketches: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """The float32 matrix: the upper triangle in panels of columns, tile by tile, then mirrored. One copy of T²."""
    count, dim = len(sketches), len(sketches[0])
    inverse = 1.0 / row_norms(sketches)
    matrix = np.zeros((count, count), dtype=np.float32)
    width = max(1, _PANEL // count)
    for first in range(0, dim, width):
        panel = np.empty((count, min(width, dim - first)), dtype=np.float32)
        for index, sketch in enumerate(sketches):
            panel[index] = np.asarray(sketch[first : first + width], dtype=np.float64) * inverse[index]
        for rows in row_blocks(count):
            matrix[rows, rows.start :] += panel[rows] @ panel[rows.start :].T
    for rows in row_blocks(count):
        np.clip(matrix[rows], -1.0, 1.0, out=matrix[rows])
        corner = np.triu(matrix[rows, rows], 1)
        matrix[rows, rows] = corner + corner.T
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T
    np.fill_diagonal(matrix, 1.0)
    return matrix


def _check_norms(norms: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise ValueError(f"row {bad[0]} has norm {norms[bad[0]]}; a cosine needs a finite, non-zero gradient")


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
        singular_values: of the centred conflict matrix, descending: all, or the first r + 1.
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
    do not. None below four datasets, where it says nothing. Beyond [`MANY_DATASETS`] datasets it is asked of 500 of
    them, drawn by the seed: a decomposition of each shuffle of all would cost T³, and structure that 500 datasets do
    not show is not what a few axes would cut along.
    """
    num_datasets = len(matrix)
    if num_datasets < 4:
        return None
    if num_datasets > MANY_DATASETS:
        drawn = np.sort(np.random.default_rng(seed).choice(num_datasets, _TESTED_DATASETS, replace=False))
        matrix = matrix[np.ix_(drawn, drawn)].astype(np.float64)
        num_datasets = _TESTED_DATASETS
    upper = np.triu_indices(num_datasets, 1)
    cosines = matrix[upper] - matrix[upper].mean()
    rng = np.random.default_rng(seed)

    def largest(values: np.ndarray) -> float:
        shuffled = np.zeros_like(matrix)
        shuffled[upper] = values
        shuffled += shuffled.T
        if num_datasets < _LANCZOS_FROM or not values.any():
            return float(np.linalg.eigvalsh(shuffled)[-1])
        # From products alone. An eigenvalue's error is the square of the vector's, which the tolerance is of.
        start = np.ones(num_datasets)
        start[0] = 2.0
        return float(eigsh(shuffled, 1, which="LA", v0=start, tol=1e-7, return_eigenvectors=False)[0])

    observed = largest(cosines)
    reached = sum(largest(rng.permutation(cosines)) >= observed - 1e-12 for _ in range(num_permutations))
    return (1 + reached) / (1 + num_permutations)


def cosine_statistics(matrix: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    """lowest, median, highest and mean of the cosines between different datasets, and the mean inside groups.

    Args:
        matrix: C, [T ≥ 2, T]. groups: the group of each dataset, [T].
    """
    pieces, total, inside, num_inside = [], 0.0, 0.0, 0
    for row in range(len(matrix) - 1):
        right = matrix[row, row + 1 :]
        same = groups[row + 1 :] == groups[row]
        total += float(right.sum(dtype=np.float64))
        inside += float(right[same].sum(dtype=np.float64))
        num_inside += int(same.sum())
        pieces.append(right)
    cosines = np.concatenate(pieces)
    return {
        "lowest": float(cosines.min()), "median": float(np.median(cosines)), "highest": float(cosines.max()),
        "mean": total / len(cosines), "inside": inside / num_inside if num_inside else None,
    }  # fmt: skip

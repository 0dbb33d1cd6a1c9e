"""From the conflict matrix to balanced groups, and the baseline splits. Pure arrays, datasets sorted by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def principal_axes(matrix: np.ndarray, num_axes: int, center: str = "column") -> tuple[np.ndarray, np.ndarray]:
    """PCA of the conflict matrix.

    Args:
        matrix: C, float64 [T, T].
        num_axes: r.
        center: `column` subtracts C's column means, `double` its row means too, `none` nothing.

    Returns:
        Coordinates z = U_r S_r, [T, r] (columns beyond T are zero), and all singular values, [T], descending. Each
        axis' sign is fixed: its loading of largest magnitude is positive.
    """
    centred = matrix.copy()
    if center in ("column", "double"):
        centred -= centred.mean(axis=0, keepdims=True)
    if center == "double":
        centred -= centred.mean(axis=1, keepdims=True)
    left, singular_values, _ = np.linalg.svd(centred)
    # Rounding noise must not order datasets that the matrix holds to be equal, nor pick between equal loadings.
    scale = max(singular_values[0], 1.0)
    coordinates = np.zeros((len(matrix), num_axes))
    usable = min(num_axes, len(matrix))
    coordinates[:, :usable] = np.round(left[:, :usable] * singular_values[:usable] / scale, 10) * scale
    for axis in range(usable):
        if coordinates[np.argmax(np.abs(coordinates[:, axis])), axis] < 0:
            coordinates[:, axis] *= -1
    return coordinates + 0.0, singular_values


def num_axes_for(num_groups: int) -> int:
    """r with 2^r ≥ K: K = 2, 4, 8 are the paper's 1D, 2D and 3D."""
    return max(1, math.ceil(math.log2(num_groups)))


def split_by_conflict(
    matrix: np.ndarray, sizes: Sequence[float], num_groups: int, center: str = "column", axes: str = "global"
) -> np.ndarray:
    """Balanced conflict-aware partition: level ℓ cuts every group in two along axis ℓ.

    A group that is to become k groups is sorted by its coordinate (ties by position, so by name) and cut in ⌈k/2⌉ and
    ⌊k/2⌋ parts at the prefix whose size is closest to its share; each side keeps at least one dataset a group. The cut
    is therefore within half of the heaviest dataset at the boundary of an even one, wherever that leaves room.

    Args:
        matrix: C, [T, T]; sizes: what is balanced, [T]; num_groups: K ≤ T; axes: `global`, or `local` to take the
            first axis of each part's own submatrix.

    Returns:
        The group of every dataset, int [T], in 0 … K−1.
    """
    coordinates, _ = principal_axes(matrix, num_axes_for(num_groups), center)
    weights = np.asarray(sizes, dtype=np.float64)
    groups = np.zeros(len(matrix), dtype=np.int64)

    def cut(members: np.ndarray, count: int, first: int, level: int) -> None:
        if count == 1:
            groups[members] = first
            return
        if axes == "local":
            values = principal_axes(matrix[np.ix_(members, members)], 1, center)[0][:, 0]
        else:
            values = coordinates[members, level]
        ordered = members[np.argsort(values, kind="stable")]
        upper = count // 2
        lower = count - upper
        at = cut_position(weights[ordered], lower, upper)
        cut(np.sort(ordered[:at]), lower, first, level + 1)
        cut(np.sort(ordered[at:]), upper, first + lower, level + 1)

    cut(np.arange(len(matrix)), num_groups, 0, 0)
    return groups


def cut_position(weights: np.ndarray, lower: int, upper: int) -> int:
    """Length of the prefix whose share of the weight is closest to lower/(lower+upper), with room for every group."""
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    target = prefix[-1] * lower / (lower + upper)
    positions = np.arange(lower, len(weights) - upper + 1)
    return int(positions[np.argmin(np.abs(prefix[positions] - target))])


def split_at_random(sizes: Sequence[float], num_groups: int, seed: int) -> np.ndarray:
    """Datasets in random order, cut as evenly as `split_by_conflict` cuts along an axis."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    weights = np.asarray(sizes, dtype=np.float64)
    groups = np.zeros(len(sizes), dtype=np.int64)

    def cut(ordered: np.ndarray, count: int, first: int) -> None:
        if count == 1:
            groups[ordered] = first
            return
        upper = count // 2
        at = cut_position(weights[ordered], count - upper, upper)
        cut(ordered[:at], count - upper, first)
        cut(ordered[at:], upper, first + count - upper)

    cut(order, num_groups, 0)
    return groups


def split_by_tag(tags: Sequence[str]) -> np.ndarray:
    """One group a tag, in the order of the tags' names."""
    names = sorted(set(tags))
    return np.array([names.index(tag) for tag in tags], dtype=np.int64)


def split_by_kmeans(matrix: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    """k-means on the unit-normalised gradients (scikit-learn), as c-BTM does on embeddings; not balanced.

    `matrix`, the cosines, is the Gram matrix of the unit gradients: all that k-means sees of them. Groups are numbered
    by their first dataset.

    Raises:
        ValueError: fewer distinct gradients than groups.
    """
    from sklearn.cluster import KMeans

    values, vectors = np.linalg.eigh(matrix)
    points = vectors * np.sqrt(np.clip(values, 0, None))
    labels = KMeans(num_groups, n_init=10, random_state=seed).fit_predict(points)
    if len(set(labels.tolist())) < num_groups:
        raise ValueError(f"k-means found {len(set(labels.tolist()))} distinct groups of {num_groups}")
    first_seen = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([first_seen[label] for label in labels.tolist()], dtype=np.int64)

"""New datasets on the axes and in the cuts of a finished plan: nothing that was there moves. Pure arrays.

C = Ŝ Ŝᵀ for unit rows Ŝ, so that products with C are products with the sketches: m datasets are projected in O(T·m),
and no T × T matrix is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from merit_hf.conflict import conflict_matrix, cross_cosines, row_blocks, row_norms
from merit_hf.partition import principal_axes

# (members, level) → the positions of members, and of new datasets, along the axis that the members were cut on.
Positions = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
_ROWS = 256


def project_onto_axes(
    sketches: Sequence[np.ndarray], coordinates: np.ndarray, cosines: np.ndarray, center: str
) -> np.ndarray:
    """Coordinates of new datasets on the axes of the T datasets that the plan was made of, [m, r].

    A plan's coordinates are Z = U S of the centred matrix A = U S Vᵀ. A new row c of cosines, less the column means μ,
    has the coordinates (c − μ) V with V = Aᵀ Z / S², and S² is the squared norm of a column of Z: sketches and
    coordinates are all that is needed. A dataset of the plan, projected, lands where it is.

    Args:
        sketches: float [T, dim], or T rows; coordinates: Z, [T, r], in the same order.
        cosines: of the new datasets with the T, [T, m]. center: of the plan's PCA.
    """
    count = len(sketches)
    norms = row_norms(sketches)
    column_means = center in ("column", "double")
    vectors = np.column_stack([coordinates, np.full(count, 1.0 / count)])
    gathered: np.ndarray | float = 0.0
    for rows in row_blocks(count, _ROWS):
        gathered = gathered + _unit_rows(sketches, norms, rows).T @ vectors[rows]
    products = np.concatenate([_unit_rows(sketches, norms, rows) @ gathered for rows in row_blocks(count, _ROWS)])
    # Aᵀ Z = C H Z = C Z: the columns of Z sum to zero where C is centred by columns.
    images, means = products[:, :-1], products[:, -1]
    if center == "double":
        images = images - images.mean(axis=0)
    squares = (coordinates**2).sum(axis=0)
    loadings = np.divide(images, squares, out=np.zeros_like(images), where=squares > 1e-18 * count)
    placed = (cosines - (means[:, None] if column_means else 0.0)).T @ loadings
    # As coarse as the plan's own, so that how many come at a time makes no difference.
    scale = max(float(squares.max()) ** 0.5, 1.0)
    return np.round(placed / scale, 10) * scale + 0.0


def sides_of_cuts(
    groups: np.ndarray,
    num_groups: int,
    num_new: int,
    values: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Which group each new dataset falls to, int [m], by the cuts that made `groups`.

    The recursion of [`~partition.split_by_conflict`], with every cut where it was: halfway between the last dataset of
    the lower side and the first of the upper.

    Args:
        groups: of the plan's datasets, [T], in 0 … K−1.
        values: (members, level) → the members' positions along the axis that they were cut on, and the new datasets'.
    """
    assigned = np.zeros(num_new, dtype=np.int64)

    def cut(first: int, count: int, level: int, mine: np.ndarray) -> None:
        if count == 1 or not mine.size:
            assigned[mine] = first
            return
        lower = count - count // 2
        members = np.flatnonzero((groups >= first) & (groups < first + count))
        is_lower = groups[members] < first + lower
        old, new = values(members, level)
        below = new[mine] <= (old[is_lower].max() + old[~is_lower].min()) / 2
        cut(first, lower, level + 1, mine[below])
        cut(first + lower, count // 2, level + 1, mine[~below])

    cut(0, num_groups, 0, np.arange(num_new))
    return assigned


def local_values(sketches: Sequence[np.ndarray], new: Sequence[np.ndarray], center: str) -> Positions:
    """`values` for [`sides_of_cuts`] of a plan with `axes: local`: the first axis of each part's own matrix."""

    def values(members: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
        part = [sketches[index] for index in members]
        coordinates = principal_axes(conflict_matrix(part), 1, center)[0]
        return coordinates[:, 0], project_onto_axes(part, coordinates, cross_cosines(part, new), center)[:, 0]

    return values


def nearest_centroids(cosines: np.ndarray, sketches: Sequence[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """Which group's mean unit gradient each new dataset is nearest to, int [m]: k-means with its centroids frozen.

    Args:
        cosines: of the new datasets with the T, [T, m]. groups: [T], in 0 … K−1.
    """
    norms = row_norms(sketches)
    members = np.eye(int(groups.max()) + 1)[groups]
    shares = members / members.sum(axis=0)
    centroids = sum(
        (shares[rows].T @ _unit_rows(sketches, norms, rows) for rows in row_blocks(len(sketches), _ROWS)),
        start=np.zeros(()),
    )
    return np.argmin((centroids**2).sum(axis=1) - 2.0 * (cosines.T @ shares), axis=1)


def _unit_rows(sketches: Sequence[np.ndarray], norms: np.ndarray, rows: slice) -> np.ndarray:
    return np.stack([np.asarray(sketch, dtype=np.float64) for sketch in sketches[rows]]) / norms[rows, None]

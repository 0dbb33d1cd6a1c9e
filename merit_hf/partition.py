"""From the conflict matrix to balanced groups, and the baseline splits. Pure arrays, datasets sorted by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from merit_hf.conflict import MANY_DATASETS, row_blocks

# Vectors multiplied at once, and how many such blocks are tried, for the axes of a large matrix.
_BLOCK_VECTORS = 32
_MAX_BLOCKS = 24
# Of many datasets' cosines, what k-means looks at.
GRAM_AXES = 64


def principal_axes(matrix: np.ndarray, num_axes: int, center: str = "column") -> tuple[np.ndarray, np.ndarray]:
    """PCA of the conflict matrix.

    Up to [`MANY_DATASETS`] datasets by a dense SVD; beyond, the leading axes alone ([`leading_axes`]).

    Args:
        matrix: C, [T, T].
        num_axes: r.
        center: `column` subtracts C's column means, `double` its row means too, `none` nothing.

    Returns:
        Coordinates z = U_r S_r, float64 [T, r] (columns beyond T are zero), and singular values, descending: all T, or
        the first r + 1 of a large matrix. Each axis' sign is fixed: its loading of largest magnitude is positive.
    """
    usable = min(num_axes, len(matrix))
    if len(matrix) > MANY_DATASETS and 20 * (usable + 1) < len(matrix):
        left, singular_values = leading_axes(matrix, usable + 1, center)
    else:
        centred = matrix.astype(np.float64)
        if center in ("column", "double"):
            centred -= centred.mean(axis=0, keepdims=True)
        if center == "double":
            centred -= centred.mean(axis=1, keepdims=True)
        left, singular_values, _ = np.linalg.svd(centred)
    # Rounding noise must not order datasets that the matrix holds to be equal, nor pick between equal loadings.
    scale, decimals = max(singular_values[0], 1.0), 10 if matrix.dtype == np.float64 else 6
    coordinates = np.zeros((len(matrix), num_axes))
    coordinates[:, :usable] = np.round(left[:, :usable] * singular_values[:usable] / scale, decimals) * scale
    for axis in range(usable):
        if coordinates[np.argmax(np.abs(coordinates[:, axis])), axis] < 0:
            coordinates[:, axis] *= -1
    return coordinates + 0.0, singular_values


def leading_axes(matrix: np.ndarray, count: int, center: str = "column") -> tuple[np.ndarray, np.ndarray]:
    """The first `count` left singular vectors, [T, count], and singular values of the centred conflict matrix.

    Centring by columns makes C unsymmetric: A = H C with H = I − 11ᵀ/T. Its left singular vectors are the eigenvectors
    of the symmetric A Aᵀ = H C C H, which needs products with C alone; for `double`, A = H C H, and for `none`, A = C.
    Block Krylov iteration (Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
    singular value decomposition", 2015) from a fixed start: a product with 32 vectors costs hardly more than with
    one, and close singular values inside a block do not slow it down. It ends where ‖A Aᵀ u − σ² u‖ is rounding
    noise, or at 24 blocks, where the values that are wanted differ too little for their axes to mean anything.
    """
    left, right = center in ("column", "double"), center == "double"
    tolerance = 1e-13 if matrix.dtype == np.float64 else 1e-9

    def centred(vectors: np.ndarray, apply: bool) -> np.ndarray:
        return vectors - vectors.mean(axis=0) if apply else vectors

    def product(vectors: np.ndarray) -> np.ndarray:
        once = _times(matrix, centred(vectors, left))
        return centred(_times(matrix, centred(once, right)), left)

    size = len(matrix)
    start = np.random.default_rng(0).standard_normal((size, min(size, max(_BLOCK_VECTORS, 2 * count))))
    block = np.linalg.qr(start)[0]
    basis, images = block[:, :0], block[:, :0]
    for number in range(1, _MAX_BLOCKS + 1):
        image = product(block)
        basis, images = np.hstack([basis, block]), np.hstack([images, image])
        last = number == _MAX_BLOCKS or basis.shape[1] == size
        if number % 4 == 0 or last:
            projected = basis.T @ images
            values, mixes = np.linalg.eigh((projected + projected.T) / 2)
            values, mixes = values[: -count - 1 : -1], mixes[:, : -count - 1 : -1]
            vectors = basis @ mixes
            residual = np.linalg.norm(images @ mixes - vectors * values, axis=0).max()
            if last or residual <= tolerance * values[0]:
                break
        # Twice, since the first pass leaves the rounding of what cancels, which may be all of a column.
        for _ in range(2):
            image = np.linalg.qr(image - basis @ (basis.T @ image))[0]
        block = image[:, : size - basis.shape[1]]
    return vectors, np.sqrt(np.clip(values, 0.0, None))


def explained_shares(matrix: np.ndarray, singular_values: np.ndarray, num_axes: int, center: str) -> list[float]:
    """Each axis' share of the variance of C: σ² over the squared Frobenius norm of the centred matrix."""
    means = np.zeros(len(matrix))
    if center in ("column", "double"):
        means = matrix.mean(axis=0, dtype=np.float64)
    total = 0.0
    for rows in row_blocks(len(matrix)):
        block = matrix[rows] - means
        if center == "double":
            block -= block.mean(axis=1, keepdims=True)
        total += float((block**2).sum())
    return [float(value**2 / (total or 1.0)) for value in singular_values[:num_axes]]


def _times(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """C V, float64, without a float64 copy of C."""
    if matrix.dtype == np.float64:
        return matrix @ vectors
    return np.concatenate([matrix[rows].astype(np.float64) @ vectors for rows in row_blocks(len(matrix), 256)])


def num_axes_for(num_groups: int) -> int:
    """r with 2^r ≥ K: K = 2, 4, 8 are the paper's 1D, 2D and 3D."""
    return max(1, math.ceil(math.log2(num_groups)))


def split_by_conflict(
    matrix: np.ndarray,
    sizes: Sequence[float],
    num_groups: int,
    center: str = "column",
    axes: str = "global",
    shares: Sequence[float] | None = None,
    coordinates: np.ndarray | None = None,
) -> np.ndarray:
    """Balanced conflict-aware partition: level ℓ cuts every group in two along axis ℓ.

    A group that is to become k groups is sorted by its coordinate (ties by position, so by name) and cut in ⌈k/2⌉ and
    ⌊k/2⌋ parts at the prefix whose size is closest to its share; each side keeps at least one dataset a group. The cut
    is therefore within half of the heaviest dataset at the boundary of the wanted one, wherever that leaves room.

    Args:
        matrix: C, [T, T]; sizes: what is balanced, [T]; num_groups: K ≤ T; axes: `global`, or `local` to take the
            first axis of each part's own submatrix.
        shares: what each group is to hold, in the order of the groups, in any unit; None for equal shares.
        coordinates: of [`principal_axes`], [T, ≥ r], where they are known already.

    Returns:
        The group of every dataset, int [T], in 0 … K−1.
    """
    if coordinates is None:
        coordinates, _ = principal_axes(matrix, num_axes_for(num_groups), center)
    weights = np.asarray(sizes, dtype=np.float64)
    wanted = np.ones(num_groups) if shares is None else np.asarray(shares, dtype=np.float64)
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
        at = cut_position(weights[ordered], wanted[first : first + lower], wanted[first + lower : first + count])
        cut(np.sort(ordered[:at]), lower, first, level + 1)
        cut(np.sort(ordered[at:]), upper, first + lower, level + 1)

    cut(np.arange(len(matrix)), num_groups, 0, 0)
    return groups


def cut_position(weights: np.ndarray, lower: Sequence[float] | np.ndarray, upper: Sequence[float] | np.ndarray) -> int:
    """Length of the prefix whose weight is closest to its groups' share of all, with room for every group.

    Args:
        weights: of the ordered datasets.
        lower, upper: shares of the groups that the prefix, and the rest, will become.
    """
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    target = prefix[-1] * np.sum(lower) / (np.sum(lower) + np.sum(upper))
    positions = np.arange(len(lower), len(weights) - len(upper) + 1)
    return int(positions[np.argmin(np.abs(prefix[positions] - target))])


def split_at_random(
    sizes: Sequence[float], num_groups: int, seed: int, shares: Sequence[float] | None = None
) -> np.ndarray:
    """Datasets in random order, cut into `shares` as `split_by_conflict` cuts along an axis."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    weights = np.asarray(sizes, dtype=np.float64)
    wanted = np.ones(num_groups) if shares is None else np.asarray(shares, dtype=np.float64)
    groups = np.zeros(len(sizes), dtype=np.int64)

    def cut(ordered: np.ndarray, count: int, first: int) -> None:
        if count == 1:
            groups[ordered] = first
            return
        upper = count // 2
        lower = count - upper
        at = cut_position(weights[ordered], wanted[first : first + lower], wanted[first + lower : first + count])
        cut(ordered[:at], lower, first)
        cut(ordered[at:], upper, first + lower)

    cut(order, num_groups, 0)
    return groups


def imbalance(groups: np.ndarray, sizes: ArrayLike, shares: Sequence[float] | None = None) -> np.ndarray:
    """Every group's size over its share of the whole, [K]; 1 is exactly its share.

    Args:
        groups: int [T], every group in 0 … K−1 occurs; sizes: [T]; shares: [K] in any unit; None for equal ones.
    """
    held = np.bincount(groups, weights=np.asarray(sizes, dtype=np.float64))
    wanted = np.ones(len(held)) if shares is None else np.asarray(shares, dtype=np.float64)
    return held / held.sum() / (wanted / wanted.sum())


def rebalance(
    groups: np.ndarray,
    sizes: Sequence[float],
    limit: float,
    shares: Sequence[float] | None = None,
    matrix: np.ndarray | None = None,
) -> np.ndarray:
    """Move datasets out of groups that hold more than `limit` × their share, one at a time, until none does.

    A dataset of the fullest group moves to another one, or where no such move helps, changes places with a lighter
    one. A move helps that leaves both groups less full than the fullest was. Of those, the one is made whose datasets
    gain most in mean cosine with their company; without a matrix, the one after which the fuller of the two is least
    full. No move makes a group as full as the one it relieves, so it ends.

    Args:
        groups: int [T], all of 0 … K−1 occur; sizes: [T]; limit: ≥ 1; shares: [K]; matrix: C or an affinity, [T, T].

    Returns:
        The groups, int [T]; those that were given where none is over the limit.

    Raises:
        OverflowError: no move helps. Its arguments: how full the fullest group is, its number, its heaviest dataset.
    """
    groups, weights = groups.copy(), np.asarray(sizes, dtype=np.float64)
    while True:
        loads = imbalance(groups, weights, shares)
        source = int(np.argmax(loads))
        if loads[source] <= limit + 1e-9:
            return groups
        capacity = np.bincount(groups, weights=weights) / loads
        move = _best_move(groups, weights, capacity, source, matrix)
        if move is None:
            members = np.flatnonzero(groups == source)
            raise OverflowError(float(loads[source]), source, int(members[np.argmax(weights[members])]))
        for dataset, target in move:
            groups[dataset] = target


def _best_move(
    groups: np.ndarray, weights: np.ndarray, capacity: np.ndarray, source: int, matrix: np.ndarray | None
) -> list[tuple[int, int]] | None:
    """[(dataset, its new group), …] that relieves `source` best; None where nothing does."""
    held = np.bincount(groups, weights=weights)
    worst = held[source] / capacity[source]
    counts = np.bincount(groups)
    members, others = np.flatnonzero(groups == source), np.flatnonzero(groups != source)
    targets = np.flatnonzero(np.arange(len(held)) != source)
    # Sums of the cosines of every dataset with those of every group.
    sums = None if matrix is None else matrix @ np.eye(len(held))[groups]

    def best(delta: np.ndarray, to: np.ndarray, gain: np.ndarray | None) -> tuple[int, int] | None:
        """Row and column of the best move of `delta` [members, columns] weight into the groups `to`."""
        fuller = np.maximum((held[source] - delta) / capacity[source], (held[to] + delta) / capacity[to])
        # Rounding noise must not choose between moves that are equally good.
        score = np.round(-fuller if gain is None else gain, 10)
        score[fuller >= worst - 1e-12] = -np.inf
        row, column = np.unravel_index(np.argmax(score), score.shape)
        return None if np.isneginf(score[row, column]) else (int(row), int(column))

    def mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        return np.where(count > 0, total / np.maximum(count, 1), 0.0)

    left = None
    if matrix is not None and sums is not None:
        left = mean(sums[members, source] - matrix[members, members], counts[source] - 1)[:, None]
    if len(members) > 1 and len(targets):
        gain = None if sums is None else mean(sums[np.ix_(members, targets)], counts[targets]) - left
        found = best(np.repeat(weights[members][:, None], len(targets), axis=1), targets, gain)
        if found:
            return [(int(members[found[0]]), int(targets[found[1]]))]
    if not len(others):
        return None
    gain, homes = None, groups[others]
    if matrix is not None and sums is not None:
        between = matrix[np.ix_(members, others)]
        arrives = mean(sums[members][:, homes] - between, counts[homes] - 1)
        comes = mean(sums[others, source] - between, counts[source] - 1)
        gain = arrives - left + comes - mean(sums[others, homes] - matrix[others, others], counts[homes] - 1)
    found = best(weights[members][:, None] - weights[others], homes, gain)
    if not found:
        return None
    dataset, other = int(members[found[0]]), int(others[found[1]])
    return [(dataset, int(groups[other])), (other, source)]


def split_by_tag(tags: Sequence[str]) -> np.ndarray:
    """One group a tag, in the order of the tags' names."""
    names = sorted(set(tags))
    return np.array([names.index(tag) for tag in tags], dtype=np.int64)


def gram_points(matrix: np.ndarray, num_axes: int = GRAM_AXES) -> np.ndarray:
    """Points [T, T] whose inner products are `matrix`: all that k-means sees of unit gradients with these cosines.

    Beyond [`MANY_DATASETS`] datasets [T, num_axes]: the leading eigenvectors alone (scikit-learn's randomised SVD).
    What they leave out is close to noise that lies in all directions alike, which moves no centre.
    """
    if len(matrix) > MANY_DATASETS:
        from sklearn.utils.extmath import randomized_svd

        vectors, values, _ = randomized_svd(matrix, num_axes, n_iter=4, random_state=0)
        return np.asarray(vectors * np.sqrt(values), dtype=np.float64)
    values, vectors = np.linalg.eigh(matrix)
    points: np.ndarray = vectors * np.sqrt(np.clip(values, 0, None))
    return points


def split_by_kmeans(points: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    """k-means (scikit-learn) on one point a dataset, as c-BTM does on embeddings; not balanced.

    Groups are numbered by their first dataset.

    Args:
        points: float [T, dim]: [`gram_points`] of the cosines, or text embeddings.

    Raises:
        ValueError: fewer distinct points than groups.
    """
    from sklearn.cluster import KMeans

    labels = KMeans(num_groups, n_init=10, random_state=seed).fit_predict(points)
    if len(set(labels.tolist())) < num_groups:
        raise ValueError(f"k-means found {len(set(labels.tolist()))} distinct groups of {num_groups}")
    first_seen = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    return np.array([first_seen[label] for label in labels.tolist()], dtype=np.int64)

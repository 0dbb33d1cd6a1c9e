"""Partitions: deterministic, independent of listing order, complete, and balanced within half a dataset."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from merit_hf.conflict import conflict_matrix
from merit_hf.partition import (
    cut_position,
    gram_points,
    num_axes_for,
    principal_axes,
    split_at_random,
    split_by_conflict,
    split_by_kmeans,
    split_by_tag,
)

# The same examples on every run and machine.
steady = settings(derandomize=True, max_examples=80, deadline=None)
centers = st.sampled_from(["column", "none", "double"])


def matrix_of(count: int, seed: int) -> np.ndarray:
    return conflict_matrix(np.random.default_rng(seed).standard_normal((count, 12)))


@st.composite
def mixtures(draw: st.DrawFn, max_count: int = 14) -> tuple[np.ndarray, list[int], int]:
    """Conflict matrix, token counts (some datasets far heavier than all others) and a number of groups."""
    count = draw(st.integers(1, max_count))
    sizes = draw(st.lists(st.integers(1, 50) | st.integers(1, 100_000), min_size=count, max_size=count))
    return matrix_of(count, draw(st.integers(0, 10_000))), sizes, draw(st.integers(1, count))


def as_sets(names: list[str], groups: np.ndarray) -> set[frozenset[str]]:
    return {frozenset(n for n, g in zip(names, groups, strict=True) if g == group) for group in set(groups.tolist())}


@steady
@given(mixtures(), centers, st.sampled_from(["global", "local"]))
def test_covers_every_dataset_once_and_leaves_no_group_empty(
    mixture: tuple[np.ndarray, list[int], int], center: str, axes: str
) -> None:
    matrix, sizes, num_groups = mixture
    before = matrix.copy()
    groups = split_by_conflict(matrix, sizes, num_groups, center, axes)
    assert groups.shape == (len(sizes),)
    assert sorted(set(groups.tolist())) == list(range(num_groups))
    assert np.array_equal(groups, split_by_conflict(matrix, sizes, num_groups, center, axes))
    assert np.array_equal(matrix, before)


@steady
@given(mixtures(), st.sampled_from(["global", "local"]), st.randoms(use_true_random=False))
def test_independent_of_the_order_in_which_datasets_are_listed(
    mixture: tuple[np.ndarray, list[int], int], axes: str, rng: object
) -> None:
    """Rows are in the order of names, as the planner sorts them, whatever order CONFIG lists them in."""
    matrix, sizes, num_groups = mixture
    names = [f"set-{i:02d}" for i in range(len(sizes))]
    listed = list(range(len(sizes)))
    rng.shuffle(listed)  # type: ignore[attr-defined]
    back = np.argsort([names[i] for i in listed])
    order = np.array(listed)[back]
    groups = split_by_conflict(matrix, sizes, num_groups, axes=axes)
    again = split_by_conflict(matrix[np.ix_(order, order)], np.array(sizes)[order], num_groups, axes=axes)
    assert dict(zip(np.array(names)[order], again, strict=True)) == dict(zip(names, groups, strict=True))


@steady
@given(st.integers(4, 12), st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_renaming_datasets_moves_none_to_other_company(count: int, seed: int, rng: object) -> None:
    """Without ties, the rows' order itself does not matter: the method sees cosines and sizes only."""
    matrix = matrix_of(count, seed)
    sizes = np.random.default_rng(seed).permutation(np.arange(100, 100 + 37 * count, 37))
    order = list(range(count))
    rng.shuffle(order)  # type: ignore[attr-defined]
    names = [str(i) for i in range(count)]
    for num_groups in (2, 4):
        here = split_by_conflict(matrix, sizes, num_groups)
        there = split_by_conflict(matrix[np.ix_(order, order)], sizes[order], num_groups)
        assert as_sets([names[i] for i in order], there) == as_sets(names, here)


@steady
@given(mixtures(), st.booleans(), centers)
def test_every_cut_is_within_half_of_the_heavier_dataset_at_the_boundary(
    mixture: tuple[np.ndarray, list[int], int], power_of_two: bool, center: str
) -> None:
    """The bound of the method, at every level of the recursion, wherever the other groups leave room for the cut."""
    matrix, sizes, num_groups = mixture
    if power_of_two:
        num_groups = 1 << (num_groups.bit_length() - 1)
    weights = np.array(sizes, dtype=float)
    groups = split_by_conflict(matrix, sizes, num_groups, center)
    coordinates, _ = principal_axes(matrix, num_axes_for(num_groups), center)

    def check(first: int, count: int, level: int) -> None:
        if count == 1:
            return
        lower = count - count // 2
        members = np.flatnonzero((groups >= first) & (groups < first + count))
        ordered = members[np.argsort(coordinates[members, level], kind="stable")]
        is_lower = groups[ordered] < first + lower
        cut = int(is_lower.sum())
        assert is_lower[:cut].all(), "a side is a prefix along the axis"
        prefix = np.concatenate([[0.0], np.cumsum(weights[ordered])])
        distance = np.abs(prefix - prefix[-1] * lower / count)
        allowed = np.arange(lower, len(ordered) - (count - lower) + 1)
        assert distance[cut] <= distance[allowed].min() + 1e-6
        if distance[allowed].min() <= distance.min() + 1e-6:
            assert distance[cut] <= weights[ordered[cut - 1 : cut + 1]].max() / 2 + 1e-6
        check(first, lower, level + 1)
        check(first + lower, count - lower, level + 1)

    check(0, num_groups, 0)


@steady
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=20), st.integers(0, 10_000))
def test_two_groups_are_always_within_half_of_the_heaviest_dataset(sizes: list[int], seed: int) -> None:
    groups = split_by_conflict(matrix_of(len(sizes), seed), sizes, 2)
    weight = np.array(sizes, dtype=float)
    assert abs(weight[groups == 0].sum() - weight.sum() / 2) <= weight.max() / 2 + 1e-9


def test_cut_position() -> None:
    assert cut_position(np.array([1.0, 1, 1, 1]), [1], [1]) == 2
    assert cut_position(np.array([5.0, 1, 1, 1]), [1], [1]) == 1
    assert cut_position(np.array([1.0, 1, 1, 5]), [1], [1]) == 3
    assert cut_position(np.array([1.0, 1, 1, 1, 1, 1]), [1, 1], [1]) == 4
    assert cut_position(np.array([1.0, 1, 1, 1]), [3], [1]) == 3
    # One dataset outweighs all: its side still keeps a dataset for each of its groups.
    assert cut_position(np.array([100.0, 1, 1, 1]), [1, 1], [1, 1]) == 2
    assert cut_position(np.array([1.0, 1]), [1], [1]) == 1


def test_sizes_decide_the_cut() -> None:
    matrix = conflict_matrix(np.array([[1.0, 0.0], [0.9, 0.3], [0.3, 0.9], [0.0, 1.0]]))
    even = split_by_conflict(matrix, [1, 1, 1, 1], 2)
    assert as_sets(list("abcd"), even) == {frozenset("ab"), frozenset("cd")}
    heavy = split_by_conflict(matrix, [10, 1, 1, 1], 2)
    assert as_sets(list("abcd"), heavy) == {frozenset("a"), frozenset("bcd")}


def test_one_dataset_and_one_group() -> None:
    assert split_by_conflict(np.eye(1), [5], 1).tolist() == [0]
    assert split_by_conflict(matrix_of(5, 0), [1] * 5, 1).tolist() == [0] * 5
    assert split_by_conflict(np.ones((3, 3)), [1, 1, 1], 3).tolist() == [0, 1, 2]
    coordinates, values = principal_axes(np.eye(1), 2)
    assert coordinates.tolist() == [[0, 0]]
    assert values.tolist() == [0]


def test_datasets_that_the_matrix_holds_to_be_equal_are_cut_by_name() -> None:
    """Rounding in the decomposition must not order them."""
    twins = conflict_matrix(np.repeat(np.random.default_rng(0).standard_normal((2, 6)), 4, axis=0))
    groups = split_by_conflict(twins, [1] * 8, 4)
    assert [len(set(groups[i : i + 2].tolist())) for i in (0, 2, 4, 6)] == [1, 1, 1, 1]


@pytest.mark.parametrize("count", [2, 5, 12, 30])
@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_principal_axes_are_those_of_scikit_learn(count: int, num_axes: int) -> None:
    matrix = matrix_of(count, count)
    coordinates, singular_values = principal_axes(matrix, num_axes)
    reference = PCA(min(num_axes, count)).fit(matrix)
    expected = reference.transform(matrix)
    for axis in range(min(num_axes, count)):
        sign = np.sign(coordinates[:, axis] @ expected[:, axis]) or 1.0
        assert np.allclose(coordinates[:, axis], sign * expected[:, axis], atol=1e-8)
    assert np.allclose(singular_values[:num_axes], reference.singular_values_, atol=1e-10)
    assert not coordinates[:, count:].any()


def test_centering() -> None:
    matrix = matrix_of(8, 3)
    plain, values = principal_axes(matrix, 8, "none")
    assert np.allclose(plain @ plain.T, matrix @ matrix.T, atol=1e-8)
    assert np.allclose(values, np.linalg.svd(matrix, compute_uv=False))
    double, _ = principal_axes(matrix, 8, "double")
    centring = np.eye(8) - 1 / 8
    assert np.allclose(double @ double.T, (centring @ matrix @ centring) @ (centring @ matrix @ centring), atol=1e-8)
    column, _ = principal_axes(matrix, 8, "column")
    assert np.allclose(column.sum(axis=0), 0, atol=1e-8)


@steady
@given(st.integers(1, 12), st.integers(0, 10_000), centers)
def test_the_loading_of_largest_magnitude_is_positive(count: int, seed: int, center: str) -> None:
    matrix = matrix_of(count, seed)
    for sign in (1, -1):
        coordinates, _ = principal_axes(sign * matrix, min(3, count), center)
        for column in coordinates.T:
            assert column[np.argmax(np.abs(column))] >= 0
            assert not np.signbit(column[column == 0]).any()


def test_num_axes_for() -> None:
    assert [num_axes_for(k) for k in (1, 2, 3, 4, 5, 8, 9)] == [1, 1, 2, 2, 3, 3, 4]


@steady
@given(mixtures(), st.integers(0, 1000))
def test_random_splits_are_complete_and_seeded(mixture: tuple[np.ndarray, list[int], int], seed: int) -> None:
    _, sizes, num_groups = mixture
    groups = split_at_random(sizes, num_groups, seed)
    assert sorted(set(groups.tolist())) == list(range(num_groups))
    assert np.array_equal(groups, split_at_random(sizes, num_groups, seed))
    if num_groups == 2:
        weight = np.array(sizes, dtype=float)
        assert abs(weight[groups == 0].sum() - weight.sum() / 2) <= weight.max() / 2


def test_random_splits_differ_between_seeds() -> None:
    names = [str(i) for i in range(12)]
    splits = {frozenset(as_sets(names, split_at_random([1] * 12, 4, seed))) for seed in range(20)}
    assert len(splits) == 20
    assert {len(part) for split in splits for part in split} == {3}


def test_by_tag_has_a_group_for_every_tag_in_the_order_of_tags() -> None:
    assert split_by_tag(["math", "chat", "math", "code"]).tolist() == [2, 0, 2, 1]
    assert split_by_tag(["one"]).tolist() == [0]


def test_kmeans_finds_planted_clusters_and_numbers_them_by_their_first_dataset() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 0, 2, 1, 2, 0, 1])
    gradients = np.eye(3, 40)[labels] + 0.02 * rng.standard_normal((8, 40))
    for seed in range(5):
        groups = split_by_kmeans(gram_points(conflict_matrix(gradients)), 3, seed)
        assert groups.tolist() == labels.tolist()
    assert split_by_kmeans(gram_points(np.eye(1)), 1, 0).tolist() == [0]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_kmeans_refuses_more_groups_than_distinct_gradients() -> None:
    twins = conflict_matrix(np.repeat(np.eye(2, 5), 3, axis=0))
    with pytest.raises(ValueError, match="2 distinct groups of 3"):
        split_by_kmeans(gram_points(twins), 3, 0)

"""Plans of more datasets than are held whole: the same answers from less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs

from merit_hf import conflict, tables
from merit_hf.cards import plan_dataset_card
from merit_hf.conflict import conflict_matrix, cosine_statistics, cross_cosines, structure_p_value
from merit_hf.figures import averaged, display_order
from merit_hf.partition import (
    explained_shares,
    gram_points,
    leading_axes,
    principal_axes,
    split_by_conflict,
    split_by_kmeans,
)
from merit_hf.plan import PartitionPlan
from merit_hf.readouts import write_sketches
from merit_hf.sharing.publish import _with_places

COUNT = 1100


def planted(count: int, seed: int = 0, blocks: int = 8, dim: int = 96) -> np.ndarray:
    """Rows around a few directions of unequal weight."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(blocks, dim)) * np.linspace(1.6, 0.6, blocks)[:, None]
    return (directions[rng.integers(0, blocks, count)] + rng.normal(size=(count, dim))).astype(np.float32)


def whole(rows: np.ndarray) -> np.ndarray:
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return planted(COUNT)


@pytest.fixture(scope="module")
def matrix(rows: np.ndarray) -> np.ndarray:
    return conflict_matrix(rows)


def test_a_large_matrix_is_float32_and_within_a_few_roundings_of_the_exact_one(
    rows: np.ndarray, matrix: np.ndarray
) -> None:
    assert matrix.dtype == np.float32
    assert np.abs(matrix - whole(rows)).max() < 1e-6
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(np.diagonal(matrix), np.ones(COUNT))
    assert np.abs(matrix).max() <= 1.0
    assert conflict_matrix(rows[:1000]).dtype == np.float64


def test_rows_of_any_length_fit_the_panels(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own block sizes, made small: several panels of columns, several tiles of rows."""
    monkeypatch.setattr(conflict, "_PANEL", COUNT * 40)
    scaled = rows * np.logspace(-12, 12, COUNT, dtype=np.float32)[:, None]
    assert np.abs(conflict_matrix(list(scaled)) - whole(rows)).max() < 1e-6
    broken = rows.copy()
    broken[1050] = 0
    with pytest.raises(ValueError, match="row 1050 has norm 0"):
        conflict_matrix(broken)


@pytest.mark.parametrize("center", ["column", "none", "double"])
@pytest.mark.parametrize("noise", [False, True])
def test_leading_axes_are_those_of_the_dense_decomposition(center: str, noise: bool) -> None:
    values = np.random.default_rng(3).normal(size=(300, 200)) if noise else planted(300, seed=3)
    exact = conflict_matrix(values)
    dense, singular_values = principal_axes(exact, 3, center)
    vectors, leading = leading_axes(exact, 4, center)
    assert np.allclose(leading, singular_values[:4], rtol=1e-12, atol=0)
    coordinates = vectors[:, :3] * leading[:3]
    coordinates *= np.sign(np.take_along_axis(coordinates, np.abs(coordinates).argmax(axis=0)[None], axis=0))
    assert np.abs(coordinates - dense).max() < 1e-8 * max(1.0, singular_values[0])


def test_the_axes_of_a_large_matrix_have_signs_values_and_shares_as_ever(rows: np.ndarray, matrix: np.ndarray) -> None:
    coordinates, values = principal_axes(matrix, 3)
    centred = whole(rows) - whole(rows).mean(axis=0)
    left, all_values, _ = np.linalg.svd(centred)
    assert len(values) == 4, "the gap of the last axis needs the next value"
    assert np.allclose(values, all_values[:4], rtol=1e-6)
    for axis in range(3):
        assert coordinates[np.abs(coordinates[:, axis]).argmax(), axis] > 0
        agreement = abs(coordinates[:, axis] @ left[:, axis]) / np.linalg.norm(coordinates[:, axis])
        assert agreement > 1 - 1e-8
    shares = explained_shares(matrix, values, 3, "column")
    assert np.allclose(shares, all_values[:3] ** 2 / (all_values**2).sum(), rtol=1e-5)
    assert np.array_equal(coordinates, principal_axes(matrix, 3)[0])
    assert np.array_equal(
        split_by_conflict(matrix, [1] * COUNT, 8), split_by_conflict(matrix, [1] * COUNT, 8, coordinates=coordinates)
    )


@pytest.mark.parametrize("center", ["column", "none", "double"])
def test_shares_come_from_norms_not_from_all_singular_values(center: str) -> None:
    exact = conflict_matrix(planted(40))
    values = principal_axes(exact, 3, center)[1]
    assert np.allclose(explained_shares(exact, values, 3, center), (values**2 / (values**2).sum())[:3], rtol=1e-12)


def test_the_permutation_test_of_a_large_plan_tells_structure_from_noise(matrix: np.ndarray) -> None:
    assert structure_p_value(matrix) == 0.005
    values = np.random.default_rng(0).normal(size=(COUNT, COUNT))
    noise = (0.01 * (values + values.T) + np.diag(np.ones(COUNT))).astype(np.float32)
    assert structure_p_value(noise) > 0.02


def test_statistics_are_those_of_the_upper_triangle(matrix: np.ndarray) -> None:
    groups = np.arange(COUNT) % 3
    upper = np.triu_indices(COUNT, 1)
    same = (groups[:, None] == groups[None, :])[upper]
    expected = {
        "lowest": matrix[upper].min(), "median": np.median(matrix[upper]), "highest": matrix[upper].max(),
        "mean": matrix[upper].astype(float).mean(), "inside": matrix[upper][same].astype(float).mean(),
    }  # fmt: skip
    assert cosine_statistics(matrix, groups) == pytest.approx(expected, rel=1e-6)
    assert cosine_statistics(np.eye(2), np.array([0, 1]))["inside"] is None


def test_the_table_lists_each_datasets_fifty_lowest_and_highest(matrix: np.ndarray) -> None:
    twins = matrix.copy()
    # Cosines of exactly 1 with others must not push a row's own entry into the list.
    twins[5, 9] = twins[9, 5] = 1.0
    pairs = tables.conflict_pairs(twins)
    assert len(pairs.rows) == 100 * COUNT
    assert (pairs.rows != pairs.columns).all()
    for row in (0, 5, 9, 777):
        others = np.delete(twins[row], row)
        mine = pairs.cosines[pairs.rows == row]
        assert np.array_equal(mine, np.sort(others)[np.r_[:50, -50:0]])
        assert np.array_equal(mine, twins[row, pairs.columns[pairs.rows == row]])
    lowest, highest = pairs.most_extreme(5)
    upper = np.sort(twins[np.triu_indices(COUNT, 1)])
    assert [cosine for _, _, cosine in lowest] == upper[:5].tolist()
    assert [cosine for _, _, cosine in highest] == upper[:-6:-1].tolist()
    assert highest[0][:2] == (5, 9)


@pytest.mark.parametrize("old_count", [30, 990, 1080])
def test_pairs_grow_by_the_new_cosines_alone(rows: np.ndarray, old_count: int) -> None:
    """Below the limit, across it and above it: as if all had been there from the start."""
    count = old_count + 20
    rng = np.random.default_rng(1)
    order = rng.permutation(count)
    old, new = np.sort(order[:old_count]), order[old_count:]
    exact = conflict_matrix(rows[:count]).astype(np.float64)
    known = tables.conflict_pairs(exact[np.ix_(old, old)])
    grown = tables.extend_pairs(known, exact[np.ix_(old, new)], exact[np.ix_(new, new)], old, new)
    expected = tables.conflict_pairs(exact)
    assert np.array_equal(grown.rows, expected.rows)
    assert np.array_equal(grown.columns, expected.columns)
    assert np.array_equal(grown.cosines, expected.cosines)


def test_cross_cosines_are_the_missing_part_of_the_matrix(rows: np.ndarray) -> None:
    assert np.allclose(cross_cosines(rows[:300], rows[300:305]), whole(rows)[:300, 300:305], atol=1e-12)
    with pytest.raises(ValueError, match="row 1 has norm 0"):
        cross_cosines(rows[:5], np.stack([rows[0], 0 * rows[0]]))


def test_a_loaded_plan_makes_its_matrix_only_when_asked(rows: np.ndarray, tmp_path: Path) -> None:
    names = [f"d{index:04d}" for index in range(COUNT)]
    plan = runs.make_plan(tmp_path, names, 4)
    assert plan.is_measured
    assert plan.conflict_matrix is None, "its sketches are not there"
    write_sketches(tmp_path / "sketches.safetensors", list(rows))
    again = PartitionPlan.from_pretrained(tmp_path)
    card = plan_dataset_card(again)
    pairs = again.conflict_pairs()
    assert pairs is not None
    assert f"{pairs.most_extreme(1)[0][0][2]:.3f}" in card
    published = _with_places(again, again)
    assert published.to_dict() == again.to_dict()
    assert all(callable(p.__dict__[tables.LazyMatrix.NAME]) for p in (again, published)), "pairs alone are needed"
    assert np.array_equal(again.conflict_matrix, conflict_matrix(rows))


def test_a_large_heatmap_shows_means_of_blocks_without_the_diagonal() -> None:
    values = np.random.default_rng(0).normal(size=(25, 25))
    order = np.random.default_rng(1).permutation(25)
    means, width = averaged(values + values.T, order, 10)
    assert (means.shape, width) == ((9, 9), 3)
    sorted_matrix = (values + values.T)[np.ix_(order, order)]
    assert means[1, 2] == pytest.approx(sorted_matrix[3:6, 6:9].mean())
    block = sorted_matrix[3:6, 3:6]
    assert means[1, 1] == pytest.approx(block[~np.eye(3, dtype=bool)].mean())
    assert means[0, 8] == pytest.approx(sorted_matrix[0:3, 24].mean())
    unchanged, width = averaged(values, order, 25)
    assert (np.array_equal(unchanged, values[np.ix_(order, order)]), width) == (True, 1)


def test_members_of_a_large_group_stand_with_the_alike() -> None:
    kinds = np.random.default_rng(0).integers(0, 4, 2500)
    points = np.eye(4)[kinds]
    order = display_order(points @ points.T, [0] * 2500)
    assert sorted(order.tolist()) == list(range(2500))
    assert (np.diff(kinds[order]) != 0).sum() == 3


def test_kmeans_of_many_datasets_sees_the_same_clusters_in_few_axes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, COUNT)
    cosines = conflict_matrix(2 * rng.normal(size=(6, 96))[labels] + rng.normal(size=(COUNT, 96)))
    points = gram_points(cosines)
    assert points.shape == (COUNT, 64)
    first_seen = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
    assert split_by_kmeans(points, 6, 0).tolist() == [first_seen[label] for label in labels.tolist()]

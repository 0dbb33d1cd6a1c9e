"""The conflict matrix: what it is invariant to, what it refuses, and that planted structure is told from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from merit_hf.conflict import axis_bounds, conflict_matrix, sketch_error, structure_p_value
from merit_hf.partition import split_by_conflict
from merit_hf.sketch import CountSketch


def rows(count: int, dim: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def test_symmetric_with_a_unit_diagonal_and_within_bounds() -> None:
    values = rows(9)
    values[4] = 2 * values[3]
    values[5] = -values[3]
    matrix = conflict_matrix(values)
    assert matrix.dtype == np.float64
    assert matrix.shape == (9, 9)
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(np.diagonal(matrix), np.ones(9))
    assert np.abs(matrix).max() <= 1
    assert matrix[3, 4] == pytest.approx(1, abs=1e-12)
    assert matrix[3, 5] == pytest.approx(-1, abs=1e-12)


def test_planted_cosines() -> None:
    e = np.eye(4, 50, dtype=np.float32)
    matrix = conflict_matrix([e[0], e[0] + e[1], e[1], -e[0], e[2], 3 * e[0] + 4 * e[2]])
    r = 0.5**0.5
    expected = [
        [1, r, 0, -1, 0, 0.6],
        [r, 1, r, -r, 0, 0.6 * r],
        [0, r, 1, 0, 0, 0],
        [-1, -r, 0, 1, 0, -0.6],
        [0, 0, 0, 0, 1, 0.8],
        [0.6, 0.6 * r, 0, -0.6, 0.8, 1],
    ]
    assert np.allclose(matrix, expected, atol=1e-12)


def test_lengths_of_rows_do_not_matter() -> None:
    values = rows(6)
    scales = np.array([1e-12, 1e-3, 1, 7, 1e3, 1e12], dtype=np.float32)[:, None]
    assert np.allclose(conflict_matrix(values * scales), conflict_matrix(values), atol=1e-6)


def test_columns_beyond_one_block_count(tmp_path: Path) -> None:
    """Memory-mapped rows longer than a block of columns, and a list of maps, give what one product gives."""
    values = rows(3, dim=3_000_000)
    np.save(tmp_path / "rows.npy", values)
    expected = np.corrcoef(values.astype(np.float64))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert np.allclose(conflict_matrix(mapped), expected, atol=2e-6)
    assert np.array_equal(conflict_matrix([mapped[0], mapped[1], mapped[2]]), conflict_matrix(values))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_a_row_without_a_direction_is_refused_by_its_number(value: float) -> None:
    values = rows(4)
    values[2] = 0
    values[2, 7] = value
    with pytest.raises(ValueError, match="row 2"):
        conflict_matrix(values)


def test_one_dataset() -> None:
    assert conflict_matrix(rows(1)).tolist() == [[1.0]]


def planted(signs: np.ndarray, strengths: list[float], noise: float, seed: int, dim: int = 2000) -> np.ndarray:
    """Gradients Σ_level sign · strength · direction + isotropic noise of length `noise`, with lengths of their own."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.standard_normal((dim, signs.shape[1] + 1)))
    parts = signs * np.array(strengths) @ directions[:, 1:].T + 0.5 * directions[:, 0]
    parts += noise * rng.standard_normal(parts.shape) / dim**0.5
    return (parts * rng.uniform(0.1, 10, (len(parts), 1))).astype(np.float32)


def as_sets(groups: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == group).tolist()) for group in set(groups.tolist())}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("read_out", ["exact", "count_sketch"])
@pytest.mark.parametrize("num_groups", [2, 4])
def test_planted_blocks_are_recovered_exactly(num_groups: int, read_out: str, seed: int) -> None:
    """A strong and a weaker axis, datasets in random order, through noise and through a sketch."""
    rng = np.random.default_rng(100 + seed)
    blocks = rng.permutation(np.repeat(np.arange(4), 5))
    signs = np.stack([1 - 2.0 * (blocks // 2), 1 - 2.0 * (blocks % 2)], axis=1)
    gradients = planted(signs, [1.0, 0.6], noise=0.7, seed=seed)
    if read_out == "count_sketch":
        sketches = torch.zeros(len(gradients), 1024)
        for row, gradient in zip(sketches, gradients, strict=True):
            CountSketch(1024, seed).add(row, "w", torch.from_numpy(gradient))
        gradients = sketches.numpy()
    matrix = conflict_matrix(gradients)
    truth = blocks // 2 if num_groups == 2 else blocks
    for center in ("column", "double"):
        assert as_sets(split_by_conflict(matrix, np.ones(20), num_groups, center)) == as_sets(truth)
    assert structure_p_value(matrix, seed) == 0.005


@pytest.mark.parametrize("seed", range(5))
def test_blocks_whose_halves_differ_in_their_own_ways_need_local_axes(seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    blocks = rng.permutation(np.repeat(np.arange(4), 4))
    half, side = blocks // 2, 1 - 2.0 * (blocks % 2)
    signs = np.stack([1 - 2.0 * half, side * (half == 0), side * (half == 1)], axis=1)
    matrix = conflict_matrix(planted(signs, [1.2, 0.9, 0.5], noise=0.3, seed=seed))
    assert as_sets(split_by_conflict(matrix, np.ones(16), 4, axes="local")) == as_sets(blocks)


def test_isotropic_noise_is_called_noise() -> None:
    """p is uniform under noise in many dimensions: of 40 seeds about 2 lie below 0.05, and half below 0.5."""
    p = np.array([structure_p_value(conflict_matrix(rows(12, 10_000, seed)), seed) for seed in range(40)])
    assert (p <= 0.05).sum() <= 5
    assert 10 <= (p <= 0.5).sum() <= 30
    assert p.max() > 0.8


def test_two_blocks_are_structure() -> None:
    signs = np.repeat([[1.0], [-1.0]], 4, axis=0)
    for seed in range(10):
        p = structure_p_value(conflict_matrix(planted(signs, [1.0], noise=1.0, seed=seed)), seed)
        assert p is not None
        assert p <= 0.05


def test_one_dataset_against_all_others_is_structure() -> None:
    """Its eigenvalues are one large and one as small: the large one counts."""
    matrix = np.eye(10)
    matrix[0, 1:] = matrix[1:, 0] = -0.5
    assert structure_p_value(matrix) == 0.005


def test_structure_is_not_judged_below_four_datasets_and_is_the_same_every_time() -> None:
    assert structure_p_value(conflict_matrix(rows(3))) is None
    # Nothing to shuffle, for either way to the largest eigenvalue.
    for count in (5, 450):
        assert structure_p_value(np.ones((count, count)), num_permutations=9) == 1.0
    matrix = conflict_matrix(rows(8))
    before = matrix.copy()
    assert structure_p_value(matrix, seed=1) == structure_p_value(matrix, seed=1)
    assert np.array_equal(matrix, before)
    assert structure_p_value(np.ones((5, 5))) == 1.0


def test_sketch_error() -> None:
    assert sketch_error(100, 10_000, "count_sketch") == pytest.approx(0.2)
    assert sketch_error(100, 10_000, "exact") == 0
    assert sketch_error(100, 10_000, "stride") is None


def test_sketch_error_is_the_spectral_error_that_is_measured() -> None:
    values, k = rows(40, 4000), 512
    sketches = torch.zeros(40, k)
    for row, value in zip(sketches, values, strict=True):
        CountSketch(k, 0).add(row, "w", torch.from_numpy(value))
    error = np.linalg.norm(conflict_matrix(sketches.numpy()) - conflict_matrix(values), 2)
    bound = sketch_error(40, k, "count_sketch")
    assert bound is not None
    assert 0.5 * bound < error < 1.25 * bound


def test_axis_bounds() -> None:
    bounds = axis_bounds(np.array([3.0, 2.0, 0.5]), 2, 0.3)
    assert bounds["operator_norm"] == 0.3
    assert bounds["eigengaps"] == [1.0, 1.5]
    assert bounds["sin_angle"] == pytest.approx([0.3, 0.2])
    assert axis_bounds(np.array([3.0, 2.0]), 2, None)["sin_angle"] is None
    # The last axis' gap is to zero; there are no more axes than datasets; a bound above 1 says nothing.
    assert axis_bounds(np.array([3.0, 2.0]), 3, 0.5)["eigengaps"] == [1.0, 2.0]
    assert axis_bounds(np.array([3.0, 2.9]), 1, 0.5)["sin_angle"] == [1.0]
    assert axis_bounds(np.array([2.0, 2.0]), 1, 0.5)["sin_angle"] == [1.0]
    assert axis_bounds(np.array([2.0, 2.0]), 1, 0.0)["sin_angle"] == [0.0]

"""Shares, bounds on imbalance, and parts of datasets: what a split may choose besides the axes. Pure arrays."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partition import as_sets, matrix_of

from merit_hf.affinity import read_affinity
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.data import take_part
from merit_hf.oversized import oversized_parts, planned_parts, with_parts
from merit_hf.partition import imbalance, rebalance, split_at_random, split_by_conflict

steady = settings(derandomize=True, max_examples=80, deadline=None)
weights = st.integers(1, 50) | st.integers(1, 100_000)


@st.composite
def shared(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int]]:
    """Conflict matrix, sizes, and shares of up to as many groups as datasets."""
    count = draw(st.integers(1, 14))
    sizes = draw(st.lists(weights, min_size=count, max_size=count))
    shares = draw(st.lists(st.integers(1, 9), min_size=1, max_size=count))
    return matrix_of(count, draw(st.integers(0, 10_000))), sizes, shares


@steady
@given(shared(), st.sampled_from(["global", "local"]), st.integers(0, 99))
def test_shares_leave_no_group_empty_and_equal_ones_change_nothing(
    mixture: tuple[np.ndarray, list[int], list[int]], axes: str, seed: int
) -> None:
    matrix, sizes, shares = mixture
    count = len(shares)
    for split in (
        lambda given: split_by_conflict(matrix, sizes, count, axes=axes, shares=given),
        lambda given: split_at_random(sizes, count, seed, given),
    ):
        groups = split(shares)
        assert sorted(set(groups.tolist())) == list(range(count))
        assert np.array_equal(groups, split([7.5 * share for share in shares])), "the unit does not matter"
        assert np.array_equal(split(None), split([3.0] * count))


@steady
@given(st.lists(weights, min_size=2, max_size=20), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9999))
def test_two_groups_are_within_half_of_the_heaviest_dataset_of_their_shares(
    sizes: list[int], first: int, second: int, seed: int
) -> None:
    weight = np.array(sizes, dtype=float)
    target = weight.sum() * first / (first + second)
    for groups in (
        split_by_conflict(matrix_of(len(sizes), seed), sizes, 2, shares=[first, second]),
        split_at_random(sizes, 2, seed, [first, second]),
    ):
        at_an_end = min(np.sum(groups == 0), np.sum(groups == 1)) == 1
        distance = abs(weight[groups == 0].sum() - target)
        assert distance <= weight.max() / 2 + 1e-6 or at_an_end, "unless a side keeps its only dataset"


def test_shares_are_held_in_the_order_in_which_they_are_given() -> None:
    groups = split_by_conflict(matrix_of(160, 5), [1] * 160, 4, shares=[4, 2, 1, 1])
    assert np.bincount(groups).tolist() == [80, 40, 20, 20]
    groups = split_by_conflict(matrix_of(160, 5), [1] * 160, 4, shares=[1, 1, 2, 4])
    assert np.bincount(groups).tolist() == [20, 20, 40, 80]
    assert np.bincount(split_at_random([1] * 70, 3, 0, [4, 2, 1])).tolist() == [40, 20, 10]


def test_imbalance_is_size_over_share() -> None:
    assert imbalance(np.array([0, 0, 1, 1]), [3, 1, 2, 2]).tolist() == [1, 1]
    assert imbalance(np.array([0, 0, 1, 1]), [3, 3, 1, 1]).tolist() == [1.5, 0.5]
    assert imbalance(np.array([0, 0, 1, 1]), [3, 3, 1, 1], [3, 1]).tolist() == [1, 1]


@steady
@given(shared(), st.floats(1, 3), st.booleans())
def test_rebalancing_keeps_the_bound_or_says_why_not(
    mixture: tuple[np.ndarray, list[int], list[int]], limit: float, with_matrix: bool
) -> None:
    matrix, sizes, shares = mixture
    before = split_by_conflict(matrix, sizes, len(shares), shares=shares)
    given_matrix = matrix if with_matrix else None
    try:
        after = rebalance(before, sizes, limit, shares, given_matrix)
    except OverflowError as error:
        load, group, heaviest = error.args
        assert load > limit
        assert 0 <= group < len(shares)
        assert 0 <= heaviest < len(sizes)
        return
    assert sorted(set(after.tolist())) == list(range(len(shares)))
    assert imbalance(after, sizes, shares).max() <= limit + 1e-6
    assert np.array_equal(after, rebalance(before, sizes, limit, shares, given_matrix))
    if imbalance(before, sizes, shares).max() <= limit:
        assert np.array_equal(after, before), "what is balanced stays as it is"


def test_of_the_moves_that_help_the_one_that_fits_best_is_made() -> None:
    """Three datasets of one kind and one stray in the full group: the stray leaves, to the group of its own kind."""
    blocks = np.array([0, 0, 0, 1, 1, 2])
    matrix = np.where(blocks[:, None] == blocks, 0.9, 0.0)
    np.fill_diagonal(matrix, 1.0)
    groups = rebalance(np.array([0, 0, 0, 0, 1, 2]), [1] * 6, 1.5, matrix=matrix)
    assert groups.tolist() == [0, 0, 0, 1, 1, 2]
    swapped = rebalance(np.array([0, 0, 1, 1]), [9, 5, 1, 5], 1.01, matrix=np.eye(4))
    assert imbalance(swapped, [9, 5, 1, 5]).tolist() == [1, 1], "by an exchange where no dataset may just leave"


def test_a_dataset_that_is_too_heavy_is_named() -> None:
    with pytest.raises(OverflowError) as error:
        rebalance(np.array([0, 0, 1]), [100, 1, 1], 1.2)
    load, group, heaviest = error.value.args
    assert (round(load, 2), group, heaviest) == (1.96, 0, 0)


@steady
@given(st.lists(weights, min_size=1, max_size=10), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_parts_are_the_fewest_that_fit_into_the_largest_group(sizes: list[int], shares: list[int]) -> None:
    named = {f"set-{i}": float(size) for i, size in enumerate(sizes)}
    capacity = sum(sizes) * max(shares) / sum(shares)
    parts = oversized_parts(named, dict.fromkeys(named, 10**9), shares)
    for name, size in named.items():
        count = parts.get(name, 1)
        assert size / count <= capacity * (1 + 1e-6)
        assert count == 1 or size / (count - 1) > capacity * (1 - 1e-6)
    assert oversized_parts(named, dict.fromkeys(named, 1), shares) == {}, "one example cannot be cut"


@steady
@given(st.integers(0, 40), st.integers(1, 9))
def test_parts_hold_every_row_once(num_rows: int, count: int) -> None:
    rows = datasets.Dataset.from_dict({"row": list(range(num_rows))})
    parts = [take_part(rows, f"{k}/{count}", f"set#{k}")["row"] for k in range(1, count + 1)]
    assert sorted(row for part in parts for row in part) == list(range(num_rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(list(part) == sorted(part) for part in parts)


def config_of(*entries: dict[str, object], **plan: object) -> MeritConfig:
    content = [{"path": "x.jsonl", **entry} for entry in entries]
    return MeritConfig.from_dict({"base": {"model_name_or_path": "b"}, "datasets": content, "plan": plan})


def test_entries_of_parts() -> None:
    config = config_of({"name": "a"}, {"name": "big", "tag": "t"})
    cut = with_parts(config, {"big": 2})
    assert [(d.name, d.part, d.tag) for d in cut.datasets] == [
        ("a", None, None), ("big#1", "1/2", "t"), ("big#2", "2/2", "t")
    ]  # fmt: skip
    entries = cut.model_dump(mode="json")["datasets"]
    assert planned_parts(entries, config) == {"big": 2}
    assert planned_parts(entries, cut) == {}, "parts that CONFIG names itself are its own"
    with pytest.raises(ConfigError, match="called `big#2`"):
        with_parts(config_of({"name": "big"}, {"name": "big#2"}), {"big": 2})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "a", "part": "1/2"}, "call this one NAME#1"),
        ({"name": "a#2", "part": "1/2"}, "call this one NAME#1"),
        ({"name": "a#3", "part": "3/2"}, "expected k/n"),
        ({"name": "a#1", "part": "x"}, "expected k/n"),
    ],
)
def test_a_part_that_says_nothing_is_refused(entry: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(entry)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"group_shares": [1, 2, 3]}, "3 shares for 2 datasets"),
        ({"group_shares": [1, 2], "num_groups": 1}, "has 2 shares"),
        ({"group_shares": [1, 2], "split": "kmeans"}, "cut by size"),
        ({"group_shares": [1, 0]}, "greater than 0"),
        ({"max_imbalance": 0.5}, "greater than or equal to 1"),
        ({"max_imbalance": 2, "split": "joint"}, "does not choose"),
        ({"split": "affinity"}, "needs plan.affinity=FILE"),
        ({"affinity": "x.csv"}, "read by plan.split=affinity alone"),
        ({"embedding_model": "x"}, "read by plan.split=kmeans_text alone"),
        ({"optimizer_state": "x"}, "with plan.precondition=adam alone"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(plan: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of({"name": "a"}, {"name": "b"}, **plan)


def test_shares_imply_the_number_of_groups() -> None:
    assert config_of({"name": "a"}, {"name": "b"}, {"name": "c"}, group_shares=[4, 2.5]).num_groups == 2


NAMES = ["a", "b", "c,d"]
MATRIX = np.array([[1.0, 0.5, -0.25], [0.5, 1.0, 0.125], [-0.25, 0.125, 1.0]])


def write_affinity(folder: Path, form: str) -> Path:
    path = folder / f"affinity.{form.partition('-')[0]}"
    order = [2, 0, 1]
    square = {"dataset": [NAMES[i] for i in order], **{NAMES[i]: MATRIX[order, i].tolist() for i in range(3)}}
    upper = [(i, j) for i in range(3) for j in range(i)]
    pairs = {"dataset_a": [NAMES[i] for i, _ in upper], "dataset_b": [NAMES[j] for _, j in upper]}
    pairs["cosine"] = [MATRIX[i, j] for i, j in upper]
    table = pa.table(pairs if form.endswith("pairs") else square)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".npz":
        np.savez(path, names=np.array([NAMES[i] for i in order]), matrix=MATRIX[np.ix_(order, order)])
    else:
        np.save(path, MATRIX)
    return path


@pytest.mark.parametrize("form", ["csv", "csv-pairs", "parquet", "parquet-pairs", "npz", "npy"])
def test_an_affinity_is_read_by_name(form: str, tmp_path: Path) -> None:
    path = write_affinity(tmp_path, form)
    assert np.allclose(read_affinity(path, NAMES), MATRIX, atol=1e-12)
    if form != "npy":
        assert np.allclose(read_affinity(path, ["c,d", "a"]), MATRIX[np.ix_([2, 0], [2, 0])])
        with pytest.raises(ConfigError, match="no row for dataset `e`"):
            read_affinity(path, ["a", "e"])


def test_parts_take_the_row_of_the_whole(tmp_path: Path) -> None:
    path = write_affinity(tmp_path, "csv")
    found = read_affinity(path, ["a#1", "a#2", "b"], ["1/2", "2/2", None])
    assert found.tolist() == [[1, 1, 0.5], [1, 1, 0.5], [0.5, 0.5, 1]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dataset,a,b\na,1,0.5\nb,0.4,1\n", "not symmetric: 0.5 for `a` and `b`, 0.4"),
        ("dataset,a,b\na,1,\nb,,1\n", "no finite number for `a` and `b`"),
        ("dataset,a,c\na,1,0.5\nb,0.5,1\n", "`b` is a row or a column"),
        ("dataset_a,dataset_b,x\na,c,1\n", "no row for dataset `b`"),
        ("x,y\n1,2\n", "its columns are x, y"),
        ("dataset,a,b\na,1,one\nb,0.5,1\n", "not readable"),
        ("", "not readable"),
    ],
)
def test_an_affinity_that_cannot_be_used_is_told_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as error:
        read_affinity(path, ["a", "b"])
    assert "\n" not in str(error.value)


def test_a_matrix_of_another_size_or_no_file(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.eye(3))
    with pytest.raises(ConfigError, match="3 × 3 numbers for 2 datasets"):
        read_affinity(tmp_path / "m.npy", ["a", "b"])
    with pytest.raises(ConfigError, match="no such file"):
        read_affinity(tmp_path / "none.csv", ["a", "b"])


def test_an_affinity_decides_the_groups_as_the_cosines_would() -> None:
    groups = split_by_conflict(matrix_of(6, 1), [1] * 6, 2)
    assert as_sets(list("abcdef"), groups) != as_sets(list("abcdef"), np.array([0, 1, 0, 1, 0, 1]))
    affinity = np.where((np.arange(6)[:, None] - np.arange(6)) % 2 == 0, 1.0, -1.0)
    groups = split_by_conflict(affinity, [1] * 6, 2)
    assert as_sets(list("abcdef"), groups) == {frozenset("ace"), frozenset("bdf")}

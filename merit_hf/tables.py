"""The three tables of a plan: datasets, groups and conflicts, as rows in memory and as parquet files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merit_hf.conflict import MANY_DATASETS

# Beyond this many datasets conflict.parquet holds extreme pairs only; the whole matrix follows from the sketches.
MAX_ALL_PAIRS = MANY_DATASETS
EXTREME_PAIRS = 50


@dataclass(frozen=True)
class PlannedDataset:
    """A row of data/datasets.parquet. Token counts are of one pass over the data.

    Attributes:
        num_examples, num_input_tokens, num_loss_tokens: of the examples that SFT keeps.
        num_dropped, num_truncated: examples without a loss token after truncation; examples cut to `max_length`.
        num_sampled: examples behind the gradient; 0 where the split needs none.
        projected_group: of a dataset that `merit extend` added beside the finished groups, the group on whose side of
            the frozen cuts it falls; None for the datasets that the axes were made of.
        split_half_cosine, reliability: of the two halves of the sample, as [`~merit_hf.reliability.split_half`] has
            them; None without halves. first_half_share: the weight of the first half in the gradient.
        group_probability: how often the dataset stays in its group under re-drawn samples.
        fingerprint: sha256 of the rows. tokens_digest: of the token sequences and labels, whatever their order.
    """

    name: str
    group: int
    tag: str | None
    format: str
    fingerprint: str
    tokens_digest: str
    num_examples: int
    num_input_tokens: int
    num_loss_tokens: int
    num_dropped: int = 0
    num_truncated: int = 0
    num_sampled: int = 0
    gradient_norm: float | None = None
    base_loss: float | None = None
    coordinates: list[float] = field(default_factory=list)
    repo_id: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    projected_group: int | None = None
    split_half_cosine: float | None = None
    reliability: float | None = None
    first_half_share: float | None = None
    group_probability: float | None = None


@dataclass(frozen=True)
class PlannedGroup:
    """A row of data/groups.parquet.

    Attributes:
        num_examples, num_input_tokens, num_loss_tokens: of one pass over the group's data.
        num_steps, train_input_tokens, train_loss_tokens: of the whole training, replayed from the data and the SFT
            settings. Merge weights come from these.
        weight: share of `train_input_tokens`.
        group_sha256: identity of base, template, data and SFT settings that this group's checkpoint must have.
    """

    group: int
    datasets: list[str]
    num_examples: int
    num_input_tokens: int
    num_loss_tokens: int
    num_steps: int
    train_input_tokens: int
    train_loss_tokens: int
    weight: float
    group_sha256: str


def write_datasets(folder: Path, datasets: Sequence[PlannedDataset]) -> None:
    """data/datasets.parquet, a row a dataset."""
    rows = [dataclasses.asdict(dataset) for dataset in datasets]
    table = pa.Table.from_pylist([{"dataset": row.pop("name"), **row} for row in rows], schema=_DATASET_SCHEMA)
    pq.write_table(table, folder / "data" / "datasets.parquet")


def read_datasets(folder: Path) -> list[PlannedDataset]:
    """The rows of data/datasets.parquet."""
    rows = pq.read_table(folder / "data" / "datasets.parquet").to_pylist()
    return [PlannedDataset(name=row.pop("dataset"), **row) for row in rows]


def write_groups(folder: Path, groups: Sequence[PlannedGroup]) -> None:
    """data/groups.parquet, a row a group."""
    rows = [dataclasses.asdict(group) for group in groups]
    pq.write_table(pa.Table.from_pylist(rows, schema=_GROUP_SCHEMA), folder / "data" / "groups.parquet")


def read_groups(folder: Path) -> list[PlannedGroup]:
    """The rows of data/groups.parquet."""
    return [PlannedGroup(**row) for row in pq.read_table(folder / "data" / "groups.parquet").to_pylist()]


class LazyMatrix:
    """A plan's conflict matrix, which may be set to a function that is called when the matrix is first asked for."""

    NAME = "_conflict_matrix"

    def __get__(self, plan: Any, owner: type) -> np.ndarray | None:
        if plan is None:
            # The field's default.
            return None
        value = plan.__dict__[self.NAME]
        if callable(value):
            value = plan.__dict__[self.NAME] = value()
        return value

    def __set__(self, plan: Any, value: np.ndarray | Callable[[], np.ndarray | None] | None) -> None:
        plan.__dict__[self.NAME] = value


@dataclass(frozen=True)
class ConflictPairs:
    """What data/conflict.parquet lists: row and column indices, and the cosine of each pair, three arrays [N]."""

    rows: np.ndarray
    columns: np.ndarray
    cosines: np.ndarray

    def most_extreme(self, count: int) -> tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]:
        """The `count` lowest pairs and the `count` highest, each once; fewer where there are not twice as many."""
        first, second = np.minimum(self.rows, self.columns), np.maximum(self.rows, self.columns)
        _, unique = np.unique(first * (self.columns.max(initial=0) + 1) + second, return_index=True)
        order = unique[np.argsort(self.cosines[unique], kind="stable")]
        count = min(count, max(1, len(order) // 2))

        def listed(picked: np.ndarray) -> list[tuple[int, int, float]]:
            return [(int(first[i]), int(second[i]), float(self.cosines[i])) for i in picked]

        return listed(order[:count]), listed(order[::-1][:count])


def write_conflict(folder: Path, names: Sequence[str], pairs: ConflictPairs) -> None:
    """data/conflict.parquet: dataset_a, dataset_b, cosine."""
    labels = np.array(names, dtype=object)
    table = {
        "dataset_a": pa.array(labels[pairs.rows], pa.string()),
        "dataset_b": pa.array(labels[pairs.columns], pa.string()),
        "cosine": pa.array(pairs.cosines.astype(np.float64)),
    }
    pq.write_table(pa.table(table), folder / "data" / "conflict.parquet")


def read_conflict(folder: Path, names: Sequence[str]) -> ConflictPairs | None:
    """The pairs of data/conflict.parquet; None where the plan has none."""
    path = folder / "data" / "conflict.parquet"
    if not path.exists():
        return None
    position = {name: index for index, name in enumerate(names)}
    table = pq.read_table(path)
    rows, columns = (
        np.array([position[name] for name in table[key].to_pylist()], dtype=np.int64)
        for key in ("dataset_a", "dataset_b")
    )
    return ConflictPairs(rows, columns, table["cosine"].to_numpy())


def all_pairs_matrix(pairs: ConflictPairs, count: int) -> np.ndarray:
    """C, float64 [T, T], from all its pairs."""
    matrix = np.eye(count)
    matrix[pairs.rows, pairs.columns] = pairs.cosines
    return matrix


def conflict_pairs(matrix: np.ndarray) -> ConflictPairs:
    """What conflict.parquet lists: every ordered pair, or the lowest and the highest of each row for a large T."""
    count = len(matrix)
    if count <= MAX_ALL_PAIRS:
        rows, columns = np.nonzero(~np.eye(count, dtype=bool))
        return ConflictPairs(rows, columns, matrix[rows, columns])
    picked = np.empty((count, 2 * EXTREME_PAIRS), dtype=np.int64)
    others = np.arange(count)
    for row in range(count):
        picked[row] = _extremes(matrix[row], np.delete(others, row))
    rows, columns = np.repeat(np.arange(count), 2 * EXTREME_PAIRS), picked.ravel()
    return ConflictPairs(rows, columns, matrix[rows, columns])


def extend_pairs(
    pairs: ConflictPairs, cross: np.ndarray, among: np.ndarray, old: np.ndarray, new: np.ndarray
) -> ConflictPairs:
    """The pairs of a plan of T datasets after m more, from the m·T new cosines alone.

    Args:
        pairs: of the T datasets. cross: their cosines with the new ones, [T, m]. among: of the new ones, [m, m].
        old, new: the places of the T and of the m datasets among all, [T] and [m].
    """
    count = len(old) + len(new)
    if count <= MAX_ALL_PAIRS:
        matrix = np.eye(count)
        matrix[old[pairs.rows], old[pairs.columns]] = pairs.cosines
        matrix[np.ix_(old, new)], matrix[np.ix_(new, old)] = cross, cross.T
        matrix[np.ix_(new, new)] = among
        return conflict_pairs(matrix)
    # A row's extremes are among its old ones and the new cosines.
    listed = np.split(np.arange(len(pairs.rows)), np.searchsorted(pairs.rows, np.arange(1, len(old))))
    picked = np.empty((count, 2 * EXTREME_PAIRS), dtype=np.int64)
    values = np.empty(picked.shape)
    for row, mine in enumerate(listed):
        columns = np.concatenate([old[pairs.columns[mine]], new])
        cosines = np.concatenate([pairs.cosines[mine], cross[row]])
        chosen = _extremes(cosines, np.arange(len(columns)), columns)
        picked[old[row]], values[old[row]] = columns[chosen], cosines[chosen]
    for number, place in enumerate(new):
        columns = np.concatenate([old, np.delete(new, number)])
        cosines = np.concatenate([cross[:, number], np.delete(among[number], number)])
        chosen = _extremes(cosines, np.arange(len(columns)), columns)
        picked[place], values[place] = columns[chosen], cosines[chosen]
    return ConflictPairs(np.repeat(np.arange(count), 2 * EXTREME_PAIRS), picked.ravel(), values.ravel())


def _extremes(cosines: np.ndarray, candidates: np.ndarray, ties: np.ndarray | None = None) -> np.ndarray:
    """Of `candidates`, the places of the lowest and of the highest cosines, ascending; ties by `ties`, or place."""
    values = cosines[candidates]
    if len(values) > 4 * EXTREME_PAIRS:
        # All that may be chosen, ties included, so that the order of ties does not depend on the selection.
        edges = np.partition(values, (EXTREME_PAIRS - 1, len(values) - EXTREME_PAIRS))
        near = (values <= edges[EXTREME_PAIRS - 1]) | (values >= edges[len(values) - EXTREME_PAIRS])
        candidates, values = candidates[near], values[near]
    order = np.lexsort((candidates if ties is None else ties[candidates], values))
    return candidates[np.concatenate([order[:EXTREME_PAIRS], order[-EXTREME_PAIRS:]])]


_DATASET_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()), ("group", pa.int64()), ("tag", pa.string()), ("format", pa.string()),
        ("fingerprint", pa.string()), ("tokens_digest", pa.string()), ("num_examples", pa.int64()),
        ("num_input_tokens", pa.int64()), ("num_loss_tokens", pa.int64()), ("num_dropped", pa.int64()),
        ("num_truncated", pa.int64()), ("num_sampled", pa.int64()), ("gradient_norm", pa.float64()),
        ("base_loss", pa.float64()), ("coordinates", pa.list_(pa.float64())), ("repo_id", pa.string()),
        ("config", pa.string()), ("split", pa.string()), ("revision", pa.string()), ("projected_group", pa.int64()),
        ("split_half_cosine", pa.float64()), ("reliability", pa.float64()), ("first_half_share", pa.float64()),
        ("group_probability", pa.float64()),
    ]
)  # fmt: skip
_GROUP_SCHEMA = pa.schema(
    [
        ("group", pa.int64()), ("datasets", pa.list_(pa.string())), ("num_examples", pa.int64()),
        ("num_input_tokens", pa.int64()), ("num_loss_tokens", pa.int64()), ("num_steps", pa.int64()),
        ("train_input_tokens", pa.int64()), ("train_loss_tokens", pa.int64()), ("weight", pa.float64()),
        ("group_sha256", pa.string()),
    ]
)  # fmt: skip

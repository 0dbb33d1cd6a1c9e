"""The three tables of a plan: datasets, groups and conflicts, as rows in memory and as parquet files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merit_hf.conflict import conflict_matrix
from merit_hf.reliability import debias_cosines

# Beyond this many datasets conflict.parquet holds extreme pairs only; the whole matrix follows from the sketches.
MAX_ALL_PAIRS = 1000
EXTREME_PAIRS = 50


@dataclass(frozen=True)
class PlannedDataset:
    """A row of data/datasets.parquet. Token counts are of one pass over the data.

    Attributes:
        num_examples, num_input_tokens, num_loss_tokens: of the examples that SFT keeps.
        num_dropped, num_truncated: examples without a loss token after truncation; examples cut to `max_length`.
        num_sampled: examples behind the gradient; 0 where the split needs none.
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


def write_conflict(folder: Path, names: Sequence[str], matrix: np.ndarray) -> None:
    """data/conflict.parquet: dataset_a, dataset_b, cosine for the pairs of [`conflict_pairs`]."""
    rows, columns = conflict_pairs(matrix)
    labels = np.array(names, dtype=object)
    pairs = {"dataset_a": pa.array(labels[rows], pa.string()), "dataset_b": pa.array(labels[columns], pa.string())}
    pq.write_table(
        pa.table({**pairs, "cosine": pa.array(matrix[rows, columns])}), folder / "data" / "conflict.parquet"
    )


def read_conflict(
    folder: Path,
    names: Sequence[str],
    load_sketches: Callable[[], np.ndarray | None],
    debias: Sequence[float | None] | None = None,
) -> np.ndarray | None:
    """C, float64 [T, T]; from the sketches where the file holds extreme pairs only; None where the plan has none.

    Args:
        debias: the datasets' reliabilities where the plan's cosines are corrected for them.
    """
    path = folder / "data" / "conflict.parquet"
    if not path.exists():
        return None
    if len(names) > MAX_ALL_PAIRS:
        sketches = load_sketches()
        if sketches is None:
            return None
        cosines = conflict_matrix(sketches)
        return cosines if debias is None else debias_cosines(cosines, debias)[0]
    position = {name: index for index, name in enumerate(names)}
    table = pq.read_table(path).to_pydict()
    matrix = np.eye(len(names))
    for a, b, cosine in zip(table["dataset_a"], table["dataset_b"], table["cosine"], strict=True):
        matrix[position[a], position[b]] = cosine
    return matrix


def conflict_pairs(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column indices that conflict.parquet lists: every ordered pair, or each row's extremes for a large T."""
    count = len(matrix)
    if count <= MAX_ALL_PAIRS:
        rows, columns = np.nonzero(~np.eye(count, dtype=bool))
        return rows, columns
    # The diagonal is 1, so every row's own entry is the last of the sorted order.
    order = np.argsort(matrix, axis=1, kind="stable")
    picked = np.concatenate([order[:, :EXTREME_PAIRS], order[:, -EXTREME_PAIRS - 1 : -1]], axis=1)
    return np.repeat(np.arange(count), 2 * EXTREME_PAIRS), picked.ravel()


_DATASET_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()), ("group", pa.int64()), ("tag", pa.string()), ("format", pa.string()),
        ("fingerprint", pa.string()), ("tokens_digest", pa.string()), ("num_examples", pa.int64()),
        ("num_input_tokens", pa.int64()), ("num_loss_tokens", pa.int64()), ("num_dropped", pa.int64()),
        ("num_truncated", pa.int64()), ("num_sampled", pa.int64()), ("gradient_norm", pa.float64()),
        ("base_loss", pa.float64()), ("coordinates", pa.list_(pa.float64())), ("repo_id", pa.string()),
        ("config", pa.string()), ("split", pa.string()), ("revision", pa.string()),
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

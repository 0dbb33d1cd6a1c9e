"""A dataset that is too large to be read whole: a seeded sample of its rows, and about how many rows it has.

The order is made here, of the seed and the order of the rows alone: a library's own shuffle may be another one with
its next release, and a plan's rows are the same for everybody.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq

# Files that are read side by side, so that a dataset sorted by file is not known by one of them.
_FILES_AT_A_TIME = 8
DEFAULT_BUFFER = 10_000
# What is looked at of a file, and of how many files, to say how many rows there are.
_HEAD_BYTES, _NUM_LOOKED_AT = 1 << 20, 8


@dataclass(frozen=True)
class RowCount:
    """How many rows a dataset has: `exact`, or by the bytes of some. `source` says what it was read from."""

    number: int
    exact: bool
    source: str


def sample_stream(
    stream: datasets.IterableDataset, num_examples: int, buffer_size: int, seed: int, identity: Sequence[object]
) -> datasets.Dataset:
    """The first `num_examples` rows of [`shuffled`] (all, where there are fewer), kept in the cache of `datasets`.

    Args:
        identity: what the stream is read from, such as repo, commit and split; with the other arguments it names the
            sample in the cache.

    Raises:
        datasets.exceptions.DatasetGenerationError: a row cannot be read; its cause says why.
    """
    features = stream.features
    if features is None:
        # Of the first rows, as a file that is read whole has them.
        table = next(iter(stream.with_format("arrow").iter(batch_size=1000)), None)
        if table is None:
            return datasets.Dataset.from_dict({})
        features = datasets.Features.from_arrow_schema(table.schema)
    plain = stream if stream.features is None else stream.decode(False)

    def rows() -> Iterator[dict[str, Any]]:
        yield from itertools.islice(shuffled(plain, seed, buffer_size), num_examples)

    key = hashlib.sha256(json.dumps([*identity, num_examples, buffer_size, seed]).encode()).hexdigest()[:32]
    return datasets.Dataset.from_generator(rows, features=features, fingerprint=key)


def shuffled(stream: datasets.IterableDataset, seed: int, buffer_size: int) -> Iterator[dict[str, Any]]:
    """The rows in an order that depends on the seed, each once; no more are read ahead than the buffer holds.

    Files in shuffled order, eight at a time, a row of each in turn; of the `buffer_size` rows at hand one is drawn,
    and the next one read takes its place.
    """
    draws = np.random.default_rng(seed)
    order = draws.permutation(stream.num_shards)
    buffer: list[dict[str, Any]] = []
    for row in _in_turn(iter(stream.shard(len(order), int(number))) for number in order):
        if len(buffer) < buffer_size:
            buffer.append(row)
            continue
        place = int(draws.integers(buffer_size))
        drawn, buffer[place] = buffer[place], row
        yield drawn
    yield from (buffer[place] for place in draws.permutation(len(buffer)))


def _in_turn(files: Iterator[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A row of each file in turn, `_FILES_AT_A_TIME` of them open; one that ends makes room for the next."""
    opened = deque(itertools.islice(files, _FILES_AT_A_TIME))
    while opened:
        file = opened.popleft()
        row = next(file, None)
        if row is None:
            opened.extend(itertools.islice(files, 1))
            continue
        yield row
        opened.append(file)


def count_rows(files: Sequence[str], stated: int | None = None) -> RowCount | None:
    """How many rows `files` hold, from the ends of parquet files, or the beginnings of others and their sizes.

    Args:
        files: paths or URLs that fsspec opens. stated: what the repo's card says, which is then believed.

    Returns:
        None where it cannot be told: compressed files, and JSON that is one list.
    """
    if stated is not None:
        return RowCount(stated, True, "its card")
    looked_at = files[:: max(1, -(-len(files) // _NUM_LOOKED_AT))]
    found = [_rows_in(file) for file in looked_at]
    rows, size = sum(rows for rows, _ in found), sum(size for _, size in found)
    if not rows:
        return None
    total = sum(_size(file) for file in files)
    if len(files) == len(looked_at) and size == total:
        return RowCount(rows, True, "its files")
    return RowCount(round(total * rows / size), False, f"{size:,} of {total:,} bytes")


def _size(file: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(file)
    return int(filesystem.info(path)["size"])


def _rows_in(file: str) -> tuple[int, int]:
    """Rows of a file, or of its beginning, and the bytes they take; (0, 0) where it cannot be told."""
    with fsspec.open(file, "rb") as content:
        if file.endswith(".parquet"):
            return pq.read_metadata(content).num_rows, _size(file)
        head = content.read(_HEAD_BYTES)
    whole = len(head) < _HEAD_BYTES
    head = head if whole else head[: head.rfind(b"\n") + 1]
    if file.endswith(".csv"):
        # Of a cell that the cut has split, no more than its row is lost.
        rows = csv.reader(io.StringIO(head.decode("utf-8-sig", errors="replace")))
        return max(0, sum(map(bool, rows)) - 1), len(head)
    if file.endswith((".jsonl", ".json")) and not head.lstrip().startswith(b"["):
        return sum(map(bool, map(bytes.strip, head.split(b"\n")))), len(head)
    return 0, 0

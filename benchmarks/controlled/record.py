"""The raw results: one JSON object a line, appended a cell at a time, never rewritten but for a torn end."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from merit_hf.config import ConfigError

SETUP, TUNE, CHOICE, GATE, RUN = "setup", "tune", "choice", "gate", "run"
NAME = "results.jsonl"


class Record:
    """An append-only file of rows; a cell's rows are there altogether or not at all.

    Every row says how many rows its cell has (`of`), and cells do not overlap: what a kill cuts short is the last
    cell, which is cut off when the file is opened again.

    Raises:
        ConfigError: another run holds the file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.path}: another run is writing to it. Wait for it, or give another --output."
            ) from None
        self._file.seek(0)
        whole, self.rows = _complete(self._file.read())
        self._file.truncate(whole)
        self.cells = {row["cell"] for row in self.rows}

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, cell: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a cell's rows in one step and wait until the disk has them."""
        assert cell not in self.cells, cell
        full = [{"cell": cell, "of": len(rows), **row} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in full)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += full
        self.cells.add(cell)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of complete cells; the file may be compressed (.gz).

    Raises:
        ConfigError: no such file.
    """
    try:
        raw = path.read_bytes()
        return _complete(gzip.decompress(raw) if path.suffix == ".gz" else raw)[1]
    except OSError:
        raise ConfigError(f"{path}: no results there. Give a {NAME} that run.py wrote.") from None


def _complete(raw: bytes) -> tuple[int, list[dict[str, Any]]]:
    """Up to which byte the cells are complete, and their rows."""
    rows: list[dict[str, Any]] = []
    cell: list[dict[str, Any]] = []
    end = position = 0
    for line in raw.splitlines(keepends=True):
        position += len(line)
        row = _parsed(line)
        if row is None:
            break
        cell.append(row)
        if len(cell) == row["of"]:
            rows, cell, end = rows + cell, [], position
    return end, rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and "of" in row else None


def select(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Iterator[Mapping[str, Any]]:
    """Rows whose fields are as wanted."""
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))

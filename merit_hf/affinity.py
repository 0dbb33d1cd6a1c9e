"""A matrix of one's own in place of the gradients' cosines: read from a file and held against the datasets' names."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from merit_hf.choices import whole_name
from merit_hf.errors import ConfigError

_FORMS = "a table with a column `dataset` and one for each dataset, or one of dataset_a, dataset_b and a value"
_TOLERANCE = 1e-6


def read_affinity(
    path: Path,
    names: Sequence[str],
    parts: Sequence[str | None] | None = None,
    orders: Sequence[Sequence[str]] = (),
) -> np.ndarray:
    """The affinity between `names`, float64 [T, T]: high = train together.

    .csv and .parquet hold a square table or a list of pairs (such as a plan's conflict.parquet), .npz the arrays
    `names` and `matrix`, .npy the matrix alone, whose rows are then taken to be the datasets of CONFIG in the order of
    their names. Datasets of the file that are not asked for are passed over. A missing diagonal is 1.

    Args:
        parts: of datasets that were cut, their part; where a part has no row of its own, that of the whole stands in.
        orders: names that the rows of an .npy may be of; the first as long as the matrix is taken. Default: `names`.

    Raises:
        ConfigError: no such file, another form, a dataset without a row, a gap, or two halves that differ.
    """
    where = f"plan.affinity={str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{where}: no such file. Give a .csv, .parquet, .npz or .npy.")
    try:
        found, matrix = _read(path, [*orders, sorted(names)])
    except (OSError, ValueError, KeyError, pa.ArrowException, zipfile.BadZipFile) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{where}: not readable as an affinity matrix ({said}). Expected {_FORMS}.") from error
    if matrix.shape != (len(found), len(found)):
        raise ConfigError(f"{where}: {' × '.join(map(str, matrix.shape))} numbers for {len(found)} datasets.")
    if len(set(found)) < len(found):
        raise ConfigError(f"{where}: dataset `{next(n for n in found if found.count(n) > 1)}` has two rows. Keep one.")
    place = {name: row for row, name in enumerate(found)}
    rows = []
    for name, part in zip(names, parts or [None] * len(names), strict=True):
        row = place.get(name, place.get(whole_name(name, part)))
        if row is None:
            raise ConfigError(f"{where}: no row for dataset `{name}`. It has {', '.join(found[:8])}.")
        rows.append(row)
    chosen = matrix[np.ix_(rows, rows)]
    bad = np.argwhere(~np.isfinite(chosen))
    if len(bad):
        a, b = map(int, bad[0])
        raise ConfigError(f"{where}: no finite number for `{names[a]}` and `{names[b]}`. Fill it in.")
    apart = np.abs(chosen - chosen.T)
    if apart.max(initial=0.0) > _TOLERANCE * max(1.0, float(np.abs(chosen).max(initial=0.0))):
        a, b = divmod(int(np.argmax(apart)), len(apart))
        raise ConfigError(
            f"{where}: not symmetric: {chosen[a, b]:g} for `{names[a]}` and `{names[b]}`, {chosen[b, a]:g} the other "
            "way. Average the two halves."
        )
    return np.asarray((chosen + chosen.T) / 2)


def _read(path: Path, orders: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    if path.suffix == ".npy":
        matrix = np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
        fitting = (list(order) for order in orders if matrix.shape == (len(order), len(order)))
        return next(fitting, list(orders[0])), matrix
    if path.suffix == ".npz":
        arrays = np.load(path, allow_pickle=False)
        return [str(name) for name in arrays["names"]], np.asarray(arrays["matrix"], dtype=np.float64)
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"`{path.suffix}` is none of .csv, .parquet, .npz, .npy")
    table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    columns = table.column_names
    if columns[:2] == ["dataset_a", "dataset_b"] and len(columns) == 3:
        return _from_pairs(*(table.column(name).to_pylist() for name in columns))
    if columns[:1] != ["dataset"]:
        raise ValueError(f"its columns are {', '.join(columns[:4])}")
    rows = [str(name) for name in table.column("dataset").to_pylist()]
    missing = set(rows) ^ set(columns[1:])
    if missing:
        raise ValueError(f"`{min(missing)}` is a row or a column, not both")
    values = [np.asarray(table.column(name).to_numpy(), dtype=np.float64) for name in rows]
    return rows, np.stack(values, axis=1)


def _from_pairs(first: list[str], second: list[str], values: list[float]) -> tuple[list[str], np.ndarray]:
    names = sorted({*map(str, first), *map(str, second)})
    place = {name: row for row, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for a, b, value in zip(first, second, values, strict=True):
        matrix[place[str(a)], place[str(b)]] = value
    # One order of a pair is enough.
    return names, np.where(np.isnan(matrix), matrix.T, matrix)

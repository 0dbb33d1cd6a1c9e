"""A dataset entry of CONFIG → the rows in its file or Hub repo, of a stream those that are drawn."""

from __future__ import annotations

import csv
import difflib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from merit_hf.choices import whole_name
from merit_hf.config import ConfigError, DatasetSection
from merit_hf.fields import nearest
from merit_hf.hub import HTTPError, HubUnavailableError, arrived_whole, hub_errors, is_unavailable, pin_revision
from merit_hf.seeds import seed_of
from merit_hf.streams import DEFAULT_BUFFER, RowCount, count_rows, sample_stream

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# What `datasets.load_dataset` takes for a file format, and would then read the files of the current folder.
_BUILDERS = frozenset(datasets.packaged_modules._PACKAGED_DATASETS_MODULES)


def is_local(path: str, root: Path) -> bool:
    """True where `path` names something on this machine: an existing path, or one that cannot be a Hub id."""
    return (root / path).exists() or Path(path).suffix in _LOADERS or path.startswith((".", "/", "~"))


def approximate_rows(spec: DatasetSection, root: Path) -> RowCount | None:
    """About how many rows a dataset has before any is held out, without reading it whole; see [`count_rows`].

    None where `where` chooses among them, too.
    """
    if spec.where is not None:
        return None
    if is_local(spec.path, root):
        return count_rows([str((root / spec.path).expanduser())])
    commit = pin_revision(spec.path, spec.revision, repo_type="dataset", where=spec.name)
    with hub_errors(f"counting the rows of `{spec.path}`"):
        builder = datasets.load_dataset_builder(spec.path, spec.config, data_files=spec.data_files, revision=commit)
        # What a card states is of all files of the repo.
        stated = None if spec.data_files else (builder.info.splits or {}).get(spec.split)
        files = (builder.config.data_files or {}).get(spec.split, [])
        return count_rows([str(file) for file in files], stated.num_examples if stated else None)


def _read_from_hub(spec: DatasetSection, path: str, split: str, revision: str | None, where: str) -> datasets.Dataset:
    data_files = spec.data_files if path == spec.path else None

    def load(again: bool) -> datasets.Dataset:
        if spec.streaming:
            stream = datasets.load_dataset(
                path, spec.config, data_files=data_files, split=split, revision=revision, streaming=True
            )
            return _sample(stream, spec, [path, spec.config, data_files, split, revision])
        mode = datasets.DownloadMode.FORCE_REDOWNLOAD if again else None
        return datasets.load_dataset(
            path, spec.config, data_files=data_files, split=split, revision=revision, download_mode=mode
        )

    try:
        whole = revision is not None and not spec.streaming
        return arrived_whole(path, str(revision), "dataset", load) if whole else load(False)
    except (ValueError, OSError, HTTPError, HubUnavailableError, datasets.exceptions.DatasetGenerationError) as error:
        said = " ".join(str(error).split())
        if is_unavailable(error) or is_unavailable(error.__cause__ or error):
            raise HubUnavailableError(f"{where}: cannot be loaded now: {said}. Run the command again.") from error
        raise ConfigError(f"{where}: cannot be loaded from the Hub: {said}") from error


def _sample(stream: datasets.IterableDataset, spec: DatasetSection, identity: list[object]) -> datasets.Dataset:
    assert spec.num_examples is not None
    if spec.where is not None:
        _check_columns(spec, list(next(iter(stream), {})))
        stream = stream.filter(_matcher(spec.where), batched=True, input_columns=list(spec.where))
        identity = [*identity, spec.where]
    seed = seed_of("stream", whole_name(spec.name, spec.part))
    return sample_stream(stream, spec.num_examples, spec.shuffle_buffer or DEFAULT_BUFFER, seed, identity)


def _read(spec: DatasetSection, path: str, split: str, root: Path, revision: str | None) -> datasets.Dataset:
    where = f"datasets.{spec.name}.path={path!r}"
    if not is_local(path, root):
        if Path(path).exists() or path in _BUILDERS:
            # `datasets` would take the files of this folder for the repo.
            raise ConfigError(
                f"{where}: is meant as a Hub id, and names a folder here or a file format. Run it from another folder."
            )
        if spec.streaming and revision is None:
            # A sample is kept under the commit that it is of.
            revision = pin_revision(path, None, repo_type="dataset", where=spec.name)
        return _read_from_hub(spec, path, split, revision, where)
    file = (root / path).expanduser()
    if not file.exists():
        near = difflib.get_close_matches(
            file.name, [p.name for p in file.parent.glob("*")] if file.parent.exists() else [], n=1
        )
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"{where}: no such file (looked for {file}).{hint}")
    if file.suffix not in _LOADERS:
        raise ConfigError(f"{where}: expected one of {', '.join(_LOADERS)}, found `{file.suffix or 'a folder'}`.")
    try:
        if _has_no_rows(file):
            return datasets.Dataset.from_dict({})
        options: dict[str, Any] = {}
        if file.suffix == ".csv":
            # Cells are text: the answers 007, 1.50, NA and None are not numbers or gaps.
            columns = {column: datasets.Value("string") for column in _csv_header(file)}
            options = {"features": datasets.Features(columns), "keep_default_na": False}
        options |= {"path": _LOADERS[file.suffix], "data_files": str(file), "split": "train"}
        if spec.streaming:
            state = file.stat()
            identity = [str(file.resolve()), state.st_size, state.st_mtime_ns]
            return _sample(datasets.load_dataset(**options, streaming=True), spec, identity)
        return datasets.load_dataset(**options)
    except (ValueError, OSError, csv.Error, pa.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise ConfigError(
            f"{where}: not readable as {file.suffix}: {' '.join(str(error.__cause__ or error).split())}"
        ) from error


def _has_no_rows(file: Path) -> bool:
    """True for the files without rows that `datasets` would refuse."""
    if file.stat().st_size == 0:
        return True
    if file.suffix == ".parquet":
        return pq.read_metadata(file).num_rows == 0
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            return next(filter(None, itertools.islice(csv.reader(lines), 1, None)), None) is None
        return lines.read(64).strip() in ("", "[]")


def _csv_header(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        return next(csv.reader(lines))


def _matcher(where: dict[str, Any]) -> Callable[..., list[bool]]:
    """Of a batch of the columns in `where`: which of its rows are asked for."""
    accepted = [value if isinstance(value, list) else [value] for value in where.values()]

    def matches(*columns: list[Any]) -> list[bool]:
        return [
            all(value in values for value, values in zip(row, accepted, strict=True))
            for row in zip(*columns, strict=True)
        ]

    return matches


def _check_columns(spec: DatasetSection, found: list[str]) -> None:
    for column in spec.where or {}:
        if found and column not in found:
            raise ConfigError(
                f"datasets.{spec.name}.where.{column}: no such column. Found: {', '.join(found)}. "
                f"{nearest(column, found)}"
            )


def _matching(rows: datasets.Dataset, spec: DatasetSection) -> datasets.Dataset:
    """The rows that `where` asks for."""
    if spec.where is None or not rows.column_names:
        return rows
    _check_columns(spec, rows.column_names)
    # A mapping of row numbers: the table is not copied.
    chosen = rows.filter(_matcher(spec.where), batched=True, input_columns=list(spec.where))
    if len(chosen) or not len(rows):
        return chosen
    for column, asked in spec.where.items():
        values, held = asked if isinstance(asked, list) else [asked], rows[column][:]
        if not any(value in values for value in held):
            shown = sorted({repr(value) for value in held})
            near = difflib.get_close_matches(repr(values[0]), shown[:10_000], n=1, cutoff=0.0)
            raise ConfigError(
                f"datasets.{spec.name}.where.{column}={asked!r}: no row holds that. Of the {len(shown)} "
                f"values found, {near[0]} is the nearest."
            )
    raise ConfigError(f"datasets.{spec.name}.where={spec.where}: no row holds all of that.")


def read_rows(spec: DatasetSection, path: str, split: str, root: Path, revision: str | None) -> datasets.Dataset:
    """The rows of one file or repo that an entry asks for, all columns as they are.

    Raises:
        ConfigError: it cannot be read; `where` names a column that is not there, or asks for what no row holds.
    """
    return _matching(_read(spec, path, split, root, revision), spec)

"""A dataset entry of CONFIG → the rows TRL is given, and what identifies and counts them.

`load_rows` reads and checks columns without any model; `count_tokens` measures what TRL made of the rows.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from merit_hf.choices import check_selection, part_of, whole_name
from merit_hf.config import REASONING_GYM, ConfigError, DatasetSection
from merit_hf.fields import nearest
from merit_hf.hub import HTTPError, HubUnavailableError, arrived_whole, hub_errors, is_unavailable, pin_revision
from merit_hf.images import IMAGES, image_column, image_digests, undecoded, with_images
from merit_hf.streams import DEFAULT_BUFFER, RowCount, count_rows, sample_stream

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# What `datasets.load_dataset` takes for a file format, and would then read the files of the current folder.
_BUILDERS = frozenset(datasets.packaged_modules._PACKAGED_DATASETS_MODULES)
_MAPPED = ("prompt", "completion", "messages", "text")
_EXTRA = ("tools", "chat_template_kwargs")
# What a task's own scorer needs beside the answer; of held-out rows only, so that it is no part of what is trained on.
METADATA = "metadata"
_DIGEST_MODULUS = 1 << 256


@dataclass(frozen=True)
class LoadedDataset:
    """A dataset as read: the columns TRL needs, nothing tokenised.

    Attributes:
        name: as in CONFIG.
        train, eval: rows to train on and held-out rows (None where there are none). Held-out rows also keep a column
            `metadata` where the dataset's metric reads it.
        format: TRL's name of the format, such as `conversational prompt-completion`.
        fingerprint: sha256 over the canonical JSON of the train rows, in which an image is the sha256 of its file.
        repo_id, revision: on the Hub; None for a local file.
        images: the column of the file or repo that became `images`; None where the rows have none.
        weight: how often an epoch passes over the rows.
        source: where in the file or split each row of `train` stands, int64.
    """

    name: str
    train: datasets.Dataset
    eval: datasets.Dataset | None
    format: str
    fingerprint: str
    repo_id: str | None
    revision: str | None
    images: str | None = None
    weight: float = 1.0
    source: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def is_local(path: str, root: Path) -> bool:
    """True where `path` names something on this machine: an existing path, or one that cannot be a Hub id."""
    return (root / path).exists() or Path(path).suffix in _LOADERS or path.startswith((".", "/", "~"))


def load_rows(
    spec: DatasetSection, root: Path, text_field: str = "text", takes_images: Callable[[], bool] = lambda: False
) -> LoadedDataset:
    """Read one dataset, keep and name its columns as TRL expects, and hold rows out.

    Args:
        takes_images: whether the base reads images. Without it, only a column that `spec.images` names is one of
            images; a plan's entries name it.

    Raises:
        ConfigError: no such file or repo, a column that is not there, a format TRL does not know; or a stream without
            `num_examples`.
    """
    # A plan from elsewhere has entries too.
    check_selection(spec.name, spec.data_files, spec.where, "CONFIG")
    if spec.streaming and spec.num_examples is None:
        raise ConfigError(
            f"datasets.{spec.name}.streaming=true without num_examples: nothing less than all of its rows says how "
            "many tokens they have, which groups and merge weights are made of. Set num_examples to the rows to take; "
            "`merit plan --dry-run` says about how many there are."
        )
    local = is_local(spec.path, root)
    if local and spec.data_files is not None:
        raise ConfigError(
            f"datasets.{spec.name}.data_files are files of a Hub repo, and path={spec.path!r} is a file here. Leave "
            "data_files out."
        )
    revision = None if local else pin_revision(spec.path, spec.revision, repo_type="dataset", where=spec.name)

    def read(path: str, split: str, commit: str | None) -> tuple[datasets.Dataset, str | None]:
        rows = _matching(_read(spec, path, split, root, commit), spec)
        images = image_column(rows.column_names, spec.images, takes_images, f"datasets.{spec.name}") if rows else None
        rows = _columns(rows, spec, text_field, images)
        if images is None:
            return rows, None
        folder = (root / path).expanduser().parent if is_local(path, root) else None
        return with_images(rows, images, folder, f"datasets.{spec.name}"), images

    train, images = read(spec.path, spec.split, revision)
    # Goes through the same selections as the rows.
    places = datasets.Dataset.from_dict({"row": np.arange(len(train))})
    if spec.eval_path is not None:
        held_out = read(spec.eval_path, spec.eval_split or spec.split, None)[0]
    elif spec.eval_split is not None:
        held_out = read(spec.path, spec.eval_split, revision)[0]
    else:
        whole = whole_name(spec.name, spec.part)
        places = hold_out(places, spec.eval_fraction, whole)[0]
        train, held_out = hold_out(train, spec.eval_fraction, whole)
    if spec.part is not None:
        train, places = (take_part(rows, spec.part, spec.name) for rows in (train, places))
        held_out = None if held_out is None else take_part(held_out, spec.part, spec.name)
    if METADATA in train.column_names:
        train = train.remove_columns(METADATA)
    if held_out is not None and len(held_out) == 0:
        held_out = None
    return LoadedDataset(
        name=spec.name,
        train=train,
        eval=held_out,
        format=format_name(train) if len(train) else "empty",
        fingerprint=fingerprint(train),
        repo_id=None if local else spec.path,
        revision=revision,
        images=images,
        weight=spec.weight,
        source=np.array(places["row"], dtype=np.int64),
    )


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


def hold_out(rows: datasets.Dataset, fraction: float, name: str) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Split off `round(fraction · n)` rows, chosen by the dataset's name alone; never the last row of a dataset."""
    count = min(round(fraction * len(rows)), max(0, len(rows) - 1))
    if count == 0:
        return rows, None
    order = np.random.default_rng(seed_of("hold-out", name)).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def take_part(rows: datasets.Dataset, part: str, name: str) -> datasets.Dataset:
    """Part k/n of the rows, in their order. The n parts hold each row once, and are equally many rows within one."""
    number, count = part_of(part)
    order = np.random.default_rng(seed_of("part", whole_name(name, part))).permutation(len(rows))
    return rows.select(np.sort(order[number - 1 :: count]))


def weighted_rows(input_tokens: np.ndarray, weight: float, name: str) -> np.ndarray:
    """Which rows an epoch takes of a dataset with `weight`, int64 indices: whole passes, then a part of one.

    The part holds rows, drawn by the dataset's name, whose tokens come closest to its share; at least one row in all.
    """
    count, passes = len(input_tokens), int(weight)
    order = np.random.default_rng(seed_of("weight", name)).permutation(count)
    reached = np.concatenate([[0], np.cumsum(input_tokens[order])])
    taken = int(np.abs(reached - (weight - passes) * reached[-1]).argmin())
    if passes == 0:
        taken = max(1, taken)
    return np.concatenate([np.tile(np.arange(count), passes), np.sort(order[:taken])]).astype(np.int64)


def seed_of(*parts: object) -> int:
    """A 64-bit seed from any values, the same in every process and session."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def fingerprint(rows: datasets.Dataset) -> str:
    """sha256 over the rows' canonical JSON, one line a row, in order; an image is the sha256 of its file."""
    digest = hashlib.sha256()
    for row in undecoded(rows):
        if IMAGES in row:
            row = {**row, IMAGES: image_digests(row[IMAGES])}
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def format_name(rows: datasets.Dataset) -> str:
    """TRL's name for the rows' format, read from the first row as TRL does."""
    first = next(undecoded(rows))
    kind = "prompt-completion" if "prompt" in first else "language modeling"
    value = first.get("prompt", first.get("messages", first.get("conversations")))
    return f"conversational {kind}" if isinstance(value, list) else kind


@dataclass(frozen=True)
class TokenCounts:
    """What a tokenised dataset holds.

    Attributes:
        input_tokens, loss_tokens: int64 arrays, one entry a row. A sequence's first token bears no loss, since nothing
            predicts it.
        digest: sum modulo 2²⁵⁶ of every sequence's sha256 over input_ids, labels and the hashes of its images,
            so that it does not depend on the order of the sequences and that a group's digest is the sum of its
            datasets'.
    """

    input_tokens: np.ndarray
    loss_tokens: np.ndarray
    digest: int

    @property
    def num_examples(self) -> int:
        return len(self.input_tokens)

    @property
    def num_input_tokens(self) -> int:
        return int(self.input_tokens.sum())

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_tokens.sum())


def count_tokens(rows: datasets.Dataset) -> TokenCounts:
    """Count and digest tokenised rows (`input_ids`, `labels`, and `seq_lengths` where several are packed in a row)."""
    input_tokens, loss_tokens, digest = [], [], 0
    for row in undecoded(rows):
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        labels = np.asarray(row["labels"], dtype=np.int64)
        seen = "".join(image_digests(row.get(IMAGES) or [])).encode()
        row_loss = 0
        start = 0
        for length in row.get("seq_lengths") or [len(ids)]:
            piece_ids, piece_labels = ids[start : start + length], labels[start : start + length]
            row_loss += int((piece_labels[1:] != -100).sum())
            digest += int.from_bytes(
                hashlib.sha256(piece_ids.tobytes() + piece_labels.tobytes() + seen).digest(), "big"
            )
            start += length
        input_tokens.append(len(ids))
        loss_tokens.append(row_loss)
    counts = np.array(input_tokens, dtype=np.int64), np.array(loss_tokens, dtype=np.int64)
    return TokenCounts(*counts, digest % _DIGEST_MODULUS)


def add_digests(digests: list[str]) -> str:
    """The digest of the union of several tokenised datasets, in hexadecimal."""
    return format_digest(sum(int(digest, 16) for digest in digests))


def format_digest(digest: int) -> str:
    return f"{digest % _DIGEST_MODULUS:064x}"


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
        first = next(iter(stream), {})
        _check_columns(spec, list(first))
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


def _columns(rows: datasets.Dataset, spec: DatasetSection, text_field: str, images: str | None) -> datasets.Dataset:
    """Only the columns TRL reads, under TRL's names, and the column of the images."""
    if not rows.column_names:
        return rows
    found = rows.column_names
    mapping = {target: getattr(spec, target) for target in _MAPPED if getattr(spec, target) is not None}
    for target, column in mapping.items():
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1, cutoff=0.0)
            raise ConfigError(
                f"datasets.{spec.name}.{target}={column!r}: no such column. Found: {', '.join(found)}. "
                f"Did you mean `{near[0]}`?"
            )
    if not mapping:
        mapping = _natural_columns(found, spec.name, text_field)
    if ("prompt" in mapping) != ("completion" in mapping):
        missing = "completion" if "prompt" in mapping else "prompt"
        raise ConfigError(
            f"datasets.{spec.name}: `prompt` and `completion` go together, but `{missing}` is not given. Found: "
            f"{', '.join(found)}."
        )
    if "text" in mapping:
        mapping[text_field] = mapping.pop("text")
    wanted = (*_EXTRA, METADATA) if (spec.metric or "").startswith(REASONING_GYM) else _EXTRA
    extra = [column for column in (*wanted, *([images] if images else ())) if column in found]
    extra = [column for column in extra if column not in mapping.values()]
    rows = rows.select_columns([*mapping.values(), *extra])
    rows = rows.rename_columns({column: target for target, column in mapping.items() if column != target})
    return rows.map(_as_chat, desc=None) if spec.chat and "prompt" in mapping else rows


def _natural_columns(found: list[str], name: str, text_field: str) -> dict[str, str]:
    for wanted in (("messages",), ("conversations",), ("prompt", "completion"), (text_field,)):
        if set(wanted) <= set(found):
            return {("text" if column == text_field else column): column for column in wanted}
    raise ConfigError(
        f"datasets.{name}: no column that SFT knows (messages, prompt and completion, or {text_field}). "
        f"Found: {', '.join(found)}. Map them with `prompt:` and `completion:`, `messages:` or `text:`."
    )


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row["prompt"], list):
        return row
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }

"""A dataset entry of CONFIG → the rows TRL is given, and what identifies and counts them.

`load_rows` reads and checks columns without any model; `count_tokens` measures what TRL made of the rows.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from merit_hf.choices import check_selection, part_of, whole_name
from merit_hf.config import REASONING_GYM, ConfigError, DatasetSection
from merit_hf.hub import pin_revision
from merit_hf.images import IMAGES, image_column, image_digests, undecoded, with_images
from merit_hf.reading import is_local, read_rows
from merit_hf.seeds import seed_of

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
        rows = read_rows(spec, path, split, root, commit)
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

"""SFT's loss row by row, on held-out and training rows of a plan's datasets, and a store of what was measured.

Intervals need the loss of each row; SFT's loss is a sum over a batch. TRL's own forward returns the log-probabilities
that it sums, so they are taken from there and held against the sum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from merit_hf.config import ConfigError, MeritError
from merit_hf.data import LoadedDataset
from merit_hf.gradients import batch_by_tokens, sample_indices, trained_model
from merit_hf.images import IMAGES, image_digests, undecoded
from merit_hf.loss import loss_sum
from merit_hf.mixture import plan_specs, read_mixture
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.progress import Progress
from merit_hf.seeds import seed_of
from merit_hf.sft import collate, tokenize_rows


@dataclass(frozen=True)
class LossRows:
    """Tokenised rows of several datasets, one after another.

    Attributes:
        rows: columns `input_ids` and `labels`; every row has a loss token.
        row_digests: sha256 over the tokens and labels of each row, and over the hashes of its images.
        spans: {dataset: slice of its rows}.
        num_loss_tokens: int64 [num_rows].
        lengths: tokens of each row.
    """

    rows: datasets.Dataset
    spans: dict[str, slice]
    num_loss_tokens: np.ndarray
    lengths: list[int]
    row_digests: list[str]

    @classmethod
    def of(cls, parts: Mapping[str, datasets.Dataset]) -> LossRows:
        spans, start = {}, 0
        for name, part in parts.items():
            spans[name] = slice(start, start + len(part))
            start += len(part)
        rows = datasets.concatenate_datasets(list(parts.values()))
        counts = np.array([_num_loss_tokens(labels) for labels in rows["labels"]], dtype=np.int64)
        digests = [_row_digest(row) for row in undecoded(rows)]
        return cls(rows, spans, counts, [len(ids) for ids in rows["input_ids"]], digests)

    def indices(self, names: Sequence[str]) -> list[int]:
        """The row numbers of some datasets, in order."""
        return [index for name in names for index in range(self.spans[name].start, self.spans[name].stop)]

    def digest(self, indices: Sequence[int]) -> str:
        """sha256 over the tokens and labels of some rows."""
        return canonical_sha256([self.row_digests[index] for index in indices])


def read_loss_rows(
    plan: PartitionPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    num_samples: int,
    progress: Progress,
) -> tuple[dict[str, datasets.Dataset], dict[str, datasets.Dataset], dict[str, str]]:
    """Held-out rows, training rows, and {dataset: why it has no held-out rows}.

    The held-out rows are those of `merit evaluate` with the same `num_samples`. Training rows of a dataset whose rows
    are not the planned ones any more are left out.

    Raises:
        ConfigError: no dataset has held-out rows.
    """
    specs, root = plan_specs(plan, plan.names)
    loaded, skipped = read_mixture(specs, root, args, progress)
    planned = {dataset.name: dataset.fingerprint for dataset in plan.datasets}
    held_out, training = {}, {}
    with progress.stage("Tokenising", total=len(loaded)) as stage:
        for number, dataset in enumerate(loaded, 1):
            stage.item(f"{dataset.name} ({number} of {len(loaded)})")
            if dataset.eval is None:
                skipped[dataset.name] = "it has no held-out rows"
            else:
                rows = _tokenise(dataset, dataset.eval, model, tokenizer, args)
                chosen = sample_indices(len(rows), num_samples, seed_of("evaluate", dataset.name))
                held_out[dataset.name] = _with_loss(rows.select(chosen))
            if dataset.fingerprint == planned[dataset.name]:
                chosen = sample_indices(len(dataset.train), num_samples, seed_of("diagnose", dataset.name))
                rows = _tokenise(dataset, dataset.train.select(chosen), model, tokenizer, args)
                training[dataset.name] = _with_loss(rows)
            else:
                progress.note(f"{dataset.name}: its training rows are not the planned ones, and are not measured")
            stage.advance()
    for name in [name for name, rows in held_out.items() if not len(rows)]:
        del held_out[name]
        skipped[name] = "none of its held-out rows has a loss token"
    if not held_out:
        raise ConfigError("no dataset has held-out rows. Give `eval_path`, `eval_split` or `eval_fraction`.")
    return held_out, {name: rows for name, rows in training.items() if len(rows) and name in held_out}, skipped


def float32_settings(plan: PartitionPlan) -> dict[str, Any]:
    """The plan's SFT settings with weights and arithmetic in float32: second differences drown in bfloat16."""
    settings = {**plan.config["sft"], **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), False)}
    kwargs = dict(settings.pop("model_init_kwargs", None) or {})
    for name in ("dtype", "torch_dtype"):
        kwargs.pop(name, None)
    return {**settings, **({"model_init_kwargs": kwargs} if kwargs else {})}


class RowLosses:
    """Measures rows with an open trainer (see `sft.open_loss`), whose model may be changed between calls."""

    def __init__(self, trainer: SFTTrainer, rows: LossRows, tokens_per_batch: int) -> None:
        self._trainer, self._rows, self._budget = trainer, rows, tokens_per_batch
        self._by_log_probs = True

    @torch.no_grad()
    def measure(self, indices: Sequence[int], on_batch: Callable[[int], None] = lambda tokens: None) -> np.ndarray:
        """The loss of each row at `indices`, summed over its tokens, in nats; float64, in their order.

        Raises:
            MeritError: a loss is not finite.
        """
        nats: dict[int, float] = {}
        for batch in self._batches(indices):
            nats |= dict(zip(batch, self._batch_losses(batch), strict=True))
            on_batch(sum(self._rows.lengths[index] for index in batch))
        losses = np.array([nats[index] for index in indices])
        if not np.isfinite(losses).all():
            raise MeritError("a loss is not finite: a model on the way has diverged. Leave its group out.")
        return losses

    def backward(self, parts: Sequence[Sequence[int]], on_batch: Callable[[int], None] = lambda tokens: None) -> None:
        """Leave in the model the gradient of the mean over `parts` of each part's token-mean loss."""
        trained_model(self._trainer).zero_grad(set_to_none=True)
        for indices in parts:
            total = float(self._rows.num_loss_tokens[list(indices)].sum()) * len(parts)
            for batch in self._batches(indices):
                (loss_sum(self._trainer, collate(self._trainer, self._rows.rows, batch)) / total).backward()
                on_batch(sum(self._rows.lengths[index] for index in batch))

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        grouped = batch_by_tokens([self._rows.lengths[index] for index in indices], self._budget)
        return [[indices[i] for i in batch] for batch in grouped]

    def _batch_losses(self, batch: list[int]) -> list[float]:
        if self._by_log_probs and len(batch) > 1:
            losses = self._from_log_probs(batch)
            if losses is not None:
                return losses
            # A loss that is not the sum of its tokens' (DFT, label smoothing, a router's) is measured row by row.
            self._by_log_probs = False
        return [float(loss_sum(self._trainer, collate(self._trainer, self._rows.rows, [index]))) for index in batch]

    def _from_log_probs(self, batch: list[int]) -> list[float] | None:
        """Row sums of the log-probabilities that TRL's forward returns; None where their sum is not the loss."""
        kept: list[Any] = []
        model = trained_model(self._trainer)
        handle = model.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            total = float(loss_sum(self._trainer, collate(self._trainer, self._rows.rows, batch)))
        finally:
            handle.remove()
        values = getattr(kept[-1], "log_probs", None) if kept else None
        if values is None or values.dim() != 2 or len(values) != len(batch):
            return None
        losses = [float(value) for value in -values.to(torch.float64).sum(dim=1)]
        return losses if abs(sum(losses) - total) <= 1e-4 * abs(total) + 1e-6 else None


class Store:
    """Arrays on disk by the inputs they were measured from.

    Args:
        folder (`Path`): made when first written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_reused = 0

    def load(self, inputs: Mapping[str, Any]) -> np.ndarray | None:
        """What was saved for the same inputs, or None; an unreadable file counts as none."""
        try:
            found: np.ndarray = np.load(self._path(inputs), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        self.num_reused += 1
        return found

    def has(self, inputs: Mapping[str, Any]) -> bool:
        return self._path(inputs).exists()

    def save(self, inputs: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
        """Write in one step, so that a killed run leaves no half a file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(inputs)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, values)
        os.replace(part, path)
        return values

    def _path(self, inputs: Mapping[str, Any]) -> Path:
        return self._folder / f"{canonical_sha256(inputs)[:32]}.npy"


def under_other_prompts(rows: datasets.Dataset) -> datasets.Dataset | None:
    """Every answer under the prompt of the next row; where prompts tell the answers, that costs loss.

    None where it means nothing: fewer than two rows, a row without a prompt or with loss tokens before its end, or
    one prompt for all, images included.
    """
    ids, labels = list(rows["input_ids"]), list(rows["labels"])
    if IMAGES in rows.column_names and "prompt" not in rows.column_names:
        return None
    starts = [next((i for i, label in enumerate(row) if label != -100), 0) for row in labels]
    prompts = [tuple(row[:start]) for row, start in zip(ids, starts, strict=True)]
    seen = [tuple(image_digests(row.get(IMAGES, []))) for row in undecoded(rows)]
    distinct = set(zip(prompts, seen, strict=True))
    whole = all(-100 not in row[start:] for row, start in zip(labels, starts, strict=True))
    if not whole or not all(starts) or len(distinct) < 2:
        return None
    others = [*prompts[1:], prompts[0]]
    crossed = datasets.Dataset.from_dict(
        {
            "input_ids": [[*other, *row[start:]] for other, row, start in zip(others, ids, starts, strict=True)],
            "labels": [
                [-100] * len(other) + row[start:] for other, row, start in zip(others, labels, starts, strict=True)
            ],
        }
    )
    if IMAGES not in rows.column_names:
        return crossed
    # A prompt's images go with it; TRL's collator makes the tokens anew.
    asked = rows.select([*range(1, len(rows)), 0]).select_columns(["prompt", IMAGES])
    return datasets.concatenate_datasets([asked, rows.select_columns(["completion"]), crossed], axis=1)


def _row_digest(row: Mapping[str, Any]) -> str:
    parts = [row["input_ids"], row["labels"]]
    parts += [image_digests(row[IMAGES])] if IMAGES in row else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenise(
    dataset: LoadedDataset,
    rows: datasets.Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
) -> datasets.Dataset:
    try:
        return tokenize_rows(model, tokenizer, args, rows).rows
    except ConfigError as error:
        raise ConfigError(f"dataset `{dataset.name}` ({dataset.format}): {error}") from error


def _with_loss(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.select([i for i, labels in enumerate(rows["labels"]) if _num_loss_tokens(labels)])


def _num_loss_tokens(labels: Sequence[int]) -> int:
    return sum(label != -100 for label in labels[1:])

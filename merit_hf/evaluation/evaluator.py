"""What one model does on held-out examples: its losses and its answers, each kept as soon as a dataset is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.evaluation.comparison import Measured
from merit_hf.evaluation.generate import greedy_answers, stop_tokens
from merit_hf.evaluation.held_out import HeldOut, beside_prompts
from merit_hf.gradients import batch_by_tokens
from merit_hf.loss import loss_sums
from merit_hf.manifest import MANIFEST_NAME
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.progress import Progress, Stage
from merit_hf.sft import TokenizedRows, collate, load_checkpoint, open_loss, tokenize_rows
from merit_hf.vision import text_tokenizer

# Raised where what a kept result means has changed.
_CACHE_VERSION = 1


@dataclass
class Evaluator:
    """Measures one model after another on the same examples, and keeps what it measured.

    Args:
        held_out (`Sequence[HeldOut]`): the examples, and what is asked.
        max_new_tokens (`int`, *optional*): None where nothing is generated.
        context (`int`, *optional*): positions the base knows.
        cache (`Path`, *optional*): where results are kept, a file a model, dataset and kind.
    """

    plan: PartitionPlan
    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    held_out: Sequence[HeldOut]
    tokens_per_batch: int
    max_new_tokens: int | None
    context: int | None
    cache: Path | None
    progress: Progress

    def __post_init__(self) -> None:
        self._tokenized: dict[str, TokenizedRows] = {}

    def measure(self, label: str, folder: Path) -> dict[str, Measured]:
        """What one model does on every dataset; it is loaded only if some of that is not known yet."""
        identity = model_identity(folder)
        asked = [dataset for dataset in self.held_out if dataset.questions and self.max_new_tokens is not None]
        losses = {d.name: self._known("loss", identity, d) for d in self.held_out}
        answers = {d.name: self._known("answers", identity, d) for d in asked}
        if None in losses.values() or None in answers.values():
            model = load_checkpoint(folder, self.plan.base_folder(), self.args)
            missing = [dataset for dataset in self.held_out if losses[dataset.name] is None]
            losses |= self._losses(label, model, identity, missing)
            answers |= self._answers(label, model, identity, [d for d in asked if answers[d.name] is None])
        return {d.name: _measured(d, losses[d.name] or {}, answers.get(d.name)) for d in self.held_out}

    def _losses(
        self, label: str, model: PreTrainedModel, identity: str, missing: Sequence[HeldOut]
    ) -> dict[str, dict[str, Any]]:
        found = {}
        for dataset in missing:
            if dataset.name not in self._tokenized:
                self._tokenized[dataset.name] = tokenize_rows(model, self.tokenizer, self.args, dataset.rows)
        total = sum(sum(map(len, self._tokenized[d.name].rows["input_ids"])) for d in missing)
        if not missing:
            return {}
        with self.progress.stage(f"Evaluating {label}", total=total, unit="tokens") as stage:
            for number, dataset in enumerate(missing, 1):
                stage.item(f"{dataset.name} ({number} of {len(missing)})")
                tokenized = self._tokenized[dataset.name]
                found[dataset.name] = _losses(
                    model, self.tokenizer, self.args, tokenized, self.tokens_per_batch, stage
                )
                self._keep("loss", identity, dataset, found[dataset.name])
        return found

    def _answers(
        self, label: str, model: PreTrainedModel, identity: str, missing: Sequence[HeldOut]
    ) -> dict[str, dict[str, Any]]:
        if not missing or self.max_new_tokens is None:
            return {}
        found, tokens, answered = {}, 0, 0
        questions = sum(len(dataset.questions) for dataset in missing)
        torch.nn.Module.to(model, self.args.device)
        limit = questions * self.max_new_tokens
        with self.progress.stage(f"Answering as {label}", total=limit, unit="tokens") as stage:
            for number, dataset in enumerate(missing, 1):
                stage.item(f"{dataset.name} ({number} of {len(missing)})")
                found[dataset.name], made = self._ask(model, dataset, stage)
                self._keep("answers", identity, dataset, found[dataset.name])
                tokens, answered = tokens + made, answered + len(dataset.questions)
                # Most answers end before the limit: what is left is told by those that are there.
                stage.update(tokens, tokens / answered * questions)
        return found

    def _ask(self, model: PreTrainedModel, dataset: HeldOut, stage: Stage) -> tuple[dict[str, Any], int]:
        """The answers to a dataset's questions, and how many tokens were made."""
        assert self.max_new_tokens is not None
        closing = {token for question in dataset.questions for token in question.closing_ids}
        stop_ids = stop_tokens(model, text_tokenizer(self.tokenizer), closing)
        pad_id = text_tokenizer(self.tokenizer).pad_token_id
        answers = greedy_answers(
            model,
            [question.prompt_ids for question in dataset.questions],
            stop_ids,
            min(stop_ids, default=0) if pad_id is None else pad_id,
            self.max_new_tokens,
            self.context,
            self.tokens_per_batch,
            stage.advance,
            lambda numbers: beside_prompts(dataset, self.tokenizer, numbers),
        )
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        return {
            "answers": texts,
            "num_tokens": [len(answer.token_ids) for answer in answers],
            "hit_max_new_tokens": [answer.hit_max_new_tokens for answer in answers],
        }, sum(len(answer.token_ids) + (not answer.hit_max_new_tokens) for answer in answers)

    def _file(self, kind: str, identity: str, dataset: HeldOut) -> Path | None:
        """Where a result is kept: named by all that decides it."""
        if self.cache is None:
            return None
        key = {
            "version": _CACHE_VERSION,
            "kind": kind,
            "model": identity,
            "model_init_kwargs": str(self.plan.config["sft"].get("model_init_kwargs")),
            "rows": dataset.fingerprint,
            "chat_template": self.plan.base["chat_template_sha256"],
            "settings": self.plan.sft if kind == "loss" else {"max_new_tokens": self.max_new_tokens},
        }
        return self.cache / f"{kind}-{canonical_sha256(key)[:32]}.json"

    def _known(self, kind: str, identity: str, dataset: HeldOut) -> dict[str, Any] | None:
        file = self._file(kind, identity, dataset)
        try:
            found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file is not None else None
        except (OSError, ValueError):
            return None
        return found

    def _keep(self, kind: str, identity: str, dataset: HeldOut, result: dict[str, Any]) -> None:
        file = self._file(kind, identity, dataset)
        if file is not None:
            write_text(file, json.dumps(result, ensure_ascii=False))


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    tokenized: TokenizedRows,
    tokens_per_batch: int,
    stage: Stage,
) -> dict[str, Any]:
    rows = tokenized.rows
    lengths = [len(ids) for ids in rows["input_ids"]]
    parts: dict[int, float] = {}
    total = 0.0
    if len(rows):
        with open_loss(model, tokenizer, args, rows) as trainer:
            for indices in batch_by_tokens(lengths, tokens_per_batch):
                nats, by_row = loss_sums(trainer, collate(trainer, rows, indices))
                total += nats
                parts.update(zip(indices, by_row or [], strict=False))
                stage.advance(sum(lengths[i] for i in indices))
    return {
        "kept": tokenized.indices,
        "num_loss_tokens": [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]],
        "total_nats": total,
        "nats": [parts[i] for i in range(len(rows))] if len(parts) == len(rows) else None,
    }


def _measured(dataset: HeldOut, losses: Mapping[str, Any], answers: Mapping[str, Any] | None) -> Measured:
    if answers is None:
        return Measured(**losses)
    scores = None
    if dataset.scorer is not None:
        pairs = zip(dataset.questions, answers["answers"], strict=True)
        scores = [dataset.scorer(answer, q.reference, q.prompt, q.metadata) for q, answer in pairs]
    return Measured(
        **losses, answers=answers["answers"], num_answer_tokens=answers["num_tokens"],
        hit_max_new_tokens=answers["hit_max_new_tokens"], scores=scores,
    )  # fmt: skip


def model_identity(folder: Path) -> str:
    """What tells a model from another one, or from itself before it was trained again, without reading its weights."""
    files = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (MANIFEST_NAME, "README.md") and not path.name.startswith(".")
    ]
    return canonical_sha256({"folder": str(folder.resolve()), "files": files})


def write_text(path: Path, text: str) -> None:
    """Write a file in one step, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)

"""Greedy answers to many prompts at once: left-padded batches of prompts of like length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from merit_hf.gradients import batch_by_tokens


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        token_ids: up to, and without, the token that stopped it.
        hit_max_new_tokens: nothing stopped it but the limit.
    """

    token_ids: list[int]
    hit_max_new_tokens: bool


def stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, closing: Iterable[int] = ()
) -> frozenset[int]:
    """The tokens that end an answer.

    Those of the model's generation config, the tokenizer's end-of-sequence token, which TRL puts behind plain
    completions, and `closing`: what the chat template puts behind an answer. A base whose generation config knows
    only its end of text would otherwise never stop in a chat.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = configured if isinstance(configured, Collection) else [configured]
    return frozenset(token for token in (*found, tokenizer.eos_token_id, *closing) if token is not None)


def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    context: int | None = None,
    tokens_per_batch: int = 4096,
    on_tokens: Callable[[int], None] = lambda tokens: None,
    beside: Callable[[list[int]], dict[str, torch.Tensor]] = lambda rows: {},
) -> list[Answer]:
    """The most likely token again and again, for every prompt, in the order of `prompts`.

    Args:
        model ([`~transformers.PreTrainedModel`]): its generation config is not used: no sampling, no penalties.
        prompts (`Sequence[Sequence[int]]`): tokens; none may be empty.
        stop_ids, pad_id: see [`stop_tokens`]; any token for the padding, which is masked.
        max_new_tokens (`int`): limit of an answer; less where a prompt leaves less of the `context` positions.
        tokens_per_batch (`int`): rows × (longest prompt + its limit) in a batch; does not change the answers, but for
            tokens that are tied within rounding.
        on_tokens: told the number of tokens after each step of a batch.
        beside: what else the model reads of the prompts at these rows, such as their images.
    """
    limits = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
    answers: dict[int, Answer] = {}
    # Prompts of one limit only: a row that goes on past its own would leave the positions that the model knows.
    for limit in sorted(set(limits), reverse=True):
        rows = [row for row, own in enumerate(limits) if own == limit]
        lengths = [len(prompts[row]) + limit for row in rows]
        for batch in batch_by_tokens(lengths, tokens_per_batch):
            numbers = [rows[index] for index in batch]
            made = _generate(
                model, [prompts[row] for row in numbers], stop_ids, pad_id, limit, on_tokens, beside(numbers)
            )
            answers.update(zip(numbers, made, strict=True))
    return [answers[row] for row in range(len(prompts))]


class _Counter(StoppingCriteria):
    """Stops nothing; tells how many rows were still being answered at each step."""

    def __init__(self, stop_ids: Collection[int], num_rows: int, on_tokens: Callable[[int], None]) -> None:
        self._stop = torch.tensor(sorted(stop_ids))
        self._open = torch.ones(num_rows, dtype=torch.bool)
        self._on_tokens = on_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self._on_tokens(int(self._open.sum()))
        self._open &= ~torch.isin(input_ids[:, -1].cpu(), self._stop)
        stop: torch.BoolTensor = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[assignment]
        return stop


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: Collection[int],
    pad_id: int,
    limit: int,
    on_tokens: Callable[[int], None],
    beside: dict[str, torch.Tensor],
) -> list[Answer]:
    longest = max(len(ids) for ids in prompts)
    padded = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=sorted(stop_ids) or None, pad_token_id=pad_id
    )
    was, training = model.generation_config, model.training
    # What a call leaves open, `generate` takes from the model's own settings, penalties among them.
    model.generation_config = settings
    model.eval()
    try:
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                **{name: value.to(model.device) for name, value in beside.items()},
                stopping_criteria=StoppingCriteriaList([_Counter(stop_ids, len(prompts), on_tokens)]),
            )
    finally:
        model.generation_config = was
        model.train(training)
    return [_until_stop(ids, stop_ids) for ids in output[:, longest:].tolist()]


def _until_stop(ids: Sequence[int], stop_ids: Collection[int]) -> Answer:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Answer(list(ids[:position]), False)
    return Answer(list(ids), True)

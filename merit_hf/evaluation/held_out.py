"""The held-out examples that models are compared on: rows for the loss, prompts and references for the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from merit_hf.config import REASONING_GYM, ConfigError
from merit_hf.data import METADATA, LoadedDataset, fingerprint, seed_of
from merit_hf.evaluation.metrics import Scorer, default_metric, load_scorer, parse_metadata
from merit_hf.gradients import sample_indices

# The share of points that a scorer must give the references themselves.
_MIN_REFERENCE_SCORE = 0.9


@dataclass(frozen=True)
class Question:
    """A prompt that a model answers.

    Attributes:
        row: which of the sampled rows it is.
        prompt, prompt_ids: the prompt with its template, as text and as tokens.
        reference: the answer in the data. num_reference_tokens: of its text.
        closing_ids: the special tokens that the template puts behind an answer.
    """

    row: int
    prompt: str
    prompt_ids: list[int]
    reference: str
    num_reference_tokens: int
    closing_ids: frozenset[int] = frozenset()
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class HeldOut:
    """The held-out examples of a dataset that are evaluated.

    Attributes:
        rows: as read, not tokenised. indices: where each stands in the dataset's held-out rows.
        fingerprint: sha256 of `rows`.
        questions: the rows that can be asked; empty where nothing is generated, or the data has no prompts.
        metric: its name; None without questions. metric_from: `config`, `call` or `data`. scorer: None for `none`.
        num_unasked: rows without a prompt and a reference, or with a prompt that fills the context.
    """

    name: str
    rows: datasets.Dataset
    indices: list[int]
    fingerprint: str
    questions: list[Question] = field(default_factory=list)
    metric: str | None = None
    metric_from: str | None = None
    scorer: Scorer | None = None
    num_unasked: int = 0


def sample_held_out(loaded: Sequence[LoadedDataset], num_samples: int) -> list[HeldOut]:
    """At most `num_samples` held-out rows of every dataset that has any, the same in every call.

    Raises:
        ConfigError: no dataset has held-out rows.
    """
    sampled = []
    for dataset in loaded:
        if dataset.eval is not None:
            indices = sample_indices(len(dataset.eval), num_samples, seed_of("evaluate", dataset.name)).tolist()
            rows = dataset.eval.select(indices)
            sampled.append(HeldOut(dataset.name, rows, indices, fingerprint(rows)))
    if not sampled:
        raise ConfigError("no dataset has held-out rows. Give `eval_path`, `eval_split` or `eval_fraction`.")
    return sampled


def with_questions(
    held_out: HeldOut, tokenizer: PreTrainedTokenizerBase, metric: str | None, metric_from: str, context: int | None
) -> HeldOut:
    """`held_out` with what is asked of the models, and how their answers are scored.

    Args:
        metric (`str`, *optional*): its name; chosen by the references where it is None.
        context (`int`, *optional*): positions the base has; a prompt that fills them is not asked.

    Raises:
        ConfigError: see [`load_scorer`]; or a task's scorer does not accept the references themselves.
    """
    asked = [_question(number, row, tokenizer, held_out.name) for number, row in enumerate(held_out.rows)]
    questions = [q for q in asked if q is not None and (context is None or len(q.prompt_ids) < context)]
    num_unasked = len(asked) - len(questions)
    if not questions:
        return replace(held_out, num_unasked=num_unasked)
    name = metric or default_metric([question.reference for question in questions])
    where = f"datasets.{held_out.name}.metric"
    scorer = load_scorer(name, where)
    if scorer is not None and name.startswith(REASONING_GYM):
        _check_scorer(scorer, questions, where, name)
    return replace(
        held_out, questions=questions, metric=name, metric_from=metric_from if metric else "data", scorer=scorer,
        num_unasked=num_unasked,
    )  # fmt: skip


def _check_scorer(scorer: Scorer, questions: Sequence[Question], where: str, name: str) -> None:
    """Several of reasoning-gym's scorers answer a missing `metadata` with a low score instead of an error."""
    scores = [scorer(q.reference, q.reference, q.prompt, q.metadata) for q in questions]
    mean = sum(scores) / len(scores)
    if mean < _MIN_REFERENCE_SCORE:
        raise ConfigError(
            f"{where}={name!r}: the scorer gives the references themselves {mean:.2f} of 1. Either the dataset is "
            "another task's, or its rows lack the column `metadata` that this scorer reads."
        )


def _question(number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> Question | None:
    """The prompt tokens are those that TRL trains the completion behind."""
    row = maybe_convert_to_chatml(row)
    prompt, reference = _split(row)
    if not prompt or not isinstance(reference, str):
        return None
    closing: frozenset[int] = frozenset()
    if isinstance(prompt, str):
        text = prompt
        prompt_ids = tokenizer(prompt)["input_ids"]
    else:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options: dict[str, Any] = dict(row.get("chat_template_kwargs") or {}, tools=tools)
        text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options))
        prompt_ids = _ids(tokenizer, text)
        answered = [*prompt, {"role": "assistant", "content": reference}]
        whole = _ids(tokenizer, str(tokenizer.apply_chat_template(answered, tokenize=False, **options)))
        closing = _closing(tokenizer, whole[len(prompt_ids) :])
    try:
        metadata = parse_metadata(row.get(METADATA))
    except ValueError as error:
        raise ConfigError(f"dataset `{name}`: held-out row {number}: `metadata` cannot be read: {error}.") from error
    length = len(tokenizer(reference, add_special_tokens=False)["input_ids"])
    return Question(number, text, list(prompt_ids), reference, length, closing, metadata) if prompt_ids else None


def _split(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Prompt (text or messages) and reference; (None, None) where the row asks nothing that one text can answer."""
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, str):
            return prompt, completion
        return (prompt, completion[0]["content"]) if len(completion) == 1 else (None, None)
    messages = row.get("messages") or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None, None
    return messages[:-1], messages[-1]["content"]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has put every special token that belongs there.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _closing(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> frozenset[int]:
    """The last special token of a completion where it ends it, but for a line break."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found = [token for token in completion[-2:] if token in special]
    return frozenset(found[-1:])

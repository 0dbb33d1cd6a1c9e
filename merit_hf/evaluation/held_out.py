"""The held-out examples that models are compared on: rows for the loss, prompts and references for the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase
from trl import maybe_convert_to_chatml

from merit_hf import vision
from merit_hf.config import REASONING_GYM, ConfigError
from merit_hf.data import METADATA, LoadedDataset, fingerprint
from merit_hf.evaluation.metrics import Scorer, default_metric, load_scorer, parse_metadata
from merit_hf.gradients import sample_indices
from merit_hf.images import IMAGES
from merit_hf.seeds import seed_of

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
    rows = vision.vision_rows(held_out.rows, tokenizer) if vision.is_processor(tokenizer) else held_out.rows
    metadata = held_out.rows[METADATA] if METADATA in held_out.rows.column_names else [None] * len(rows)
    asked = [
        _question(number, vision.read_row(rows, number), metadata[number], tokenizer, held_out.name)
        for number in range(len(rows))
    ]
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


def beside_prompts(held_out: HeldOut, processing: Any, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """What a model reads of the questions `numbers` beside their tokens: their images; nothing in a text mixture."""
    if not vision.is_processor(processing):
        return {}
    questions = [held_out.questions[number] for number in numbers]
    rows = held_out.rows
    images = [vision.read_row(rows, q.row)[IMAGES] if IMAGES in rows.column_names else [] for q in questions]
    inputs = vision.prompt_inputs(processing, [question.prompt for question in questions], images)
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def _question(
    number: int, row: dict[str, Any], metadata: Any, tokenizer: PreTrainedTokenizerBase, name: str
) -> Question | None:
    """The prompt tokens are those that TRL trains the completion behind."""
    row = maybe_convert_to_chatml(row)
    prompt, answer = _split(row)
    reference = answer if isinstance(answer, str) else _text_of(answer)
    if not prompt or reference is None:
        return None
    closing: frozenset[int] = frozenset()
    plain = vision.text_tokenizer(tokenizer)
    if isinstance(prompt, str):
        text = prompt
        prompt_ids = plain(prompt)["input_ids"]
    else:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options: dict[str, Any] = dict(row.get("chat_template_kwargs") or {}, tools=tools)
        text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options))
        prompt_ids = _ids(plain, text)
        whole = _ids(plain, str(tokenizer.apply_chat_template([*prompt, answer], tokenize=False, **options)))
        closing = _closing(plain, whole[len(prompt_ids) :])
        if vision.is_processor(tokenizer):
            # In a model's input an image stands for many tokens.
            prompt_ids = vision.prompt_inputs(tokenizer, [text], [row[IMAGES]])["input_ids"][0].tolist()
    try:
        metadata = parse_metadata(metadata)
    except ValueError as error:
        raise ConfigError(f"dataset `{name}`: held-out row {number}: `metadata` cannot be read: {error}.") from error
    length = len(plain(reference, add_special_tokens=False)["input_ids"])
    return Question(number, text, list(prompt_ids), reference, length, closing, metadata) if prompt_ids else None


def _split(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Prompt and answer, both text or messages and a message; (None, None) where no one message answers."""
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, str):
            return prompt, completion
        return (prompt, _answer(completion[0])) if len(completion) == 1 else (None, None)
    messages = row.get("messages") or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None, None
    return messages[:-1], _answer(messages[-1])


def _answer(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": message["content"]}


def _text_of(message: Mapping[str, Any] | None) -> str | None:
    """The text of a message, whether its content is a string or blocks; None where there is none."""
    content = message["content"] if message else None
    if isinstance(content, list):
        texts = [block["text"] for block in content if block["type"] == "text"]
        return "".join(texts) if len(texts) == len(content) else None
    return content if isinstance(content, str) else None


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has put every special token that belongs there.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _closing(tokenizer: PreTrainedTokenizerBase, completion: Sequence[int]) -> frozenset[int]:
    """The last special token of a completion where it ends it, but for a line break."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    found = [token for token in completion[-2:] if token in special]
    return frozenset(found[-1:])

"""The held-out examples: prompts are those of training, references are what is trained, and losses have parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import as_chat, task_rows, write_jsonl
from transformers import PreTrainedTokenizerBase

from merit_hf.config import ConfigError, DatasetSection
from merit_hf.data import load_rows
from merit_hf.evaluation.held_out import sample_held_out, with_questions
from merit_hf.loss import loss_sums
from merit_hf.loss import trl_loss_sum as loss_sum
from merit_hf.sft import build_args, collate, load_model, load_tokenizer, open_loss, tokenize_rows


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base_dir)


def test_the_parts_of_a_loss_are_those_of_sft(
    base_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_model(base_dir)
    write_jsonl(tmp_path / "rows.jsonl", [as_chat(row) for row in task_rows("repeat", 6)])
    loaded = load_rows(DatasetSection(name="set", path="rows.jsonl", eval_fraction=0.0), tmp_path)
    for sft, has_parts in (({}, True), ({"loss_type": "dft"}, False), ({"label_smoothing_factor": 0.2}, False)):
        args = build_args(sft)
        rows = tokenize_rows(model, tokenizer, args, loaded.train).rows
        with open_loss(model, tokenizer, args, rows) as trainer, torch.no_grad():
            expected = float(loss_sum(trainer, collate(trainer, rows, [0, 3, 5])))
            total, parts = loss_sums(trainer, collate(trainer, rows, [0, 3, 5]))
            alone = [float(loss_sum(trainer, collate(trainer, rows, [i]))) for i in (0, 3, 5)]
        assert total == pytest.approx(expected, rel=1e-6)
        assert (parts is not None) == has_parts
        if parts is not None:
            assert parts == pytest.approx(alone, rel=1e-5)


CHAT = [as_chat(row) for row in task_rows("copy", 5)]
FORMATS = {
    "prompt and completion": task_rows("copy", 5),
    "conversations": CHAT,
    "a system prompt": [{**r, "prompt": [{"role": "system", "content": "red"}, *r["prompt"]]} for r in CHAT],
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_is_what_the_completion_is_trained_behind(
    name: str, base_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", FORMATS[name])
    loaded = load_rows(DatasetSection(name="set", path="rows.jsonl", eval_path="rows.jsonl"), tmp_path)
    args = build_args({"completion_only_loss": True})
    held_out = with_questions(sample_held_out([loaded], 4)[0], tokenizer, None, "config", 256)
    rows = tokenize_rows(load_model(base_dir), tokenizer, args, held_out.rows).rows
    assert len(held_out.questions) == len(rows) == 4
    for question, row in zip(held_out.questions, rows, strict=True):
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)
        assert question.prompt_ids == list(row["input_ids"][:first])
        trained = tokenizer.decode(row["input_ids"][first:], skip_special_tokens=True)
        assert trained == question.reference
        assert question.num_reference_tokens == len(tokenizer(trained)["input_ids"])
        # The template's own end of a turn.
        assert question.closing_ids == (set() if name == "prompt and completion" else {tokenizer.eos_token_id})


def test_the_last_turn_of_a_chat_is_the_reference(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}, {"messages": turns[:3]}, {"messages": turns[1:2]}])
    write_jsonl(tmp_path / "text.jsonl", [{"text": "red blue"}] * 3)
    loaded = [
        load_rows(DatasetSection(name=name, path=f"{name}.jsonl", eval_path=f"{name}.jsonl"), tmp_path)
        for name in ("chat", "text")
    ]
    chat, text = (with_questions(h, tokenizer, None, "config", 256) for h in sample_held_out(loaded, 9))
    assert [q.reference for q in chat.questions] == ["four"]
    assert chat.questions[0].prompt == "<|user|>one<|end|><|assistant|>two<|end|><|user|>three<|end|><|assistant|>"
    assert (chat.num_unasked, chat.metric, chat.metric_from) == (2, "exact_match", "data")
    assert (text.questions, text.metric) == ([], None)


def test_a_prompt_that_fills_the_context_is_not_asked(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = task_rows("copy", 4)
    write_jsonl(tmp_path / "rows.jsonl", [{**rows[0], "prompt": "red " * 50}, *rows[1:]])
    loaded = load_rows(DatasetSection(name="set", path="rows.jsonl", eval_path="rows.jsonl"), tmp_path)
    held_out = with_questions(sample_held_out([loaded], 9)[0], tokenizer, "none", "config", 50)
    assert [q.row for q in held_out.questions] == [1, 2, 3]
    assert (held_out.num_unasked, held_out.scorer) == (1, None)


def test_the_scorer_must_know_the_references(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """This scorer swallows the missing metadata; the score would only look low."""
    pytest.importorskip("reasoning_gym", exc_type=ImportError)
    answer = {"prompt": "Simplify 2/4", "completion": "1/2"}
    numbers = {"numerator": 2, "denominator": 4, "simplified_numerator": 1, "simplified_denominator": 2}
    write_jsonl(tmp_path / "bare.jsonl", [answer] * 3)
    write_jsonl(tmp_path / "full.jsonl", [{**answer, "metadata": numbers}] * 3)
    write_jsonl(tmp_path / "json.jsonl", [{**answer, "metadata": json.dumps(numbers)}] * 3)
    metric = "reasoning_gym.fraction_simplification"
    prints = set()
    for name in ("bare", "full", "json"):
        spec = DatasetSection(name=name, path=f"{name}.jsonl", eval_path=f"{name}.jsonl", metric=metric)
        loaded = load_rows(spec, tmp_path)
        prints.add(loaded.fingerprint)
        assert loaded.train.column_names == ["prompt", "completion"]
        held_out = sample_held_out([loaded], 9)[0]
        if name == "bare":
            with pytest.raises(ConfigError, match=r"datasets\.bare\.metric.*0\.01 of 1.*`metadata`"):
                with_questions(held_out, tokenizer, metric, "config", 256)
        else:
            scorer = with_questions(held_out, tokenizer, metric, "config", 256).scorer
            assert scorer is not None
            assert scorer("1/2", "1/2", "", numbers) == 1
    assert len(prints) == 1, "metadata is no part of what is trained on"

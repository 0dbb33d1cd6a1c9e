"""Greedy answers: the most likely token again and again, whatever else is in the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import make_base
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from merit_hf.evaluation.generate import Answer, greedy_answers, stop_tokens
from merit_hf.sft import load_model, load_tokenizer

PAD = 0
LIMIT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A model whose answers vary: with larger weights, what comes next depends on what came before."""
    base = make_base(tmp_path_factory.mktemp("generate") / "base", initializer_range=0.6)
    return load_model(base)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of very different lengths, two of them equal."""
    rng = random.Random(0)
    made = [[rng.randrange(5, 300) for _ in range(length)] for length in (1, 2, 3, 7, 7, 20, 33, 60)]
    return [*made, made[2]]


def one_by_one(model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop: set[int], limit: int) -> list[Answer]:
    """The oracle: no batch, no padding, no cache, no `generate`."""
    answers = []
    for prompt in prompts:
        ids, made = list(prompt), []
        while len(made) < limit:
            with torch.no_grad():
                made.append(int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
            if made[-1] in stop:
                break
        stopped = made[-1] in stop
        answers.append(Answer(made[:-1] if stopped else made, not stopped))
    return answers


@pytest.fixture(scope="module")
def stop(model: PreTrainedModel, prompts: list[list[int]]) -> set[int]:
    """Tokens that the model does say, so that some answers stop early and others do not."""
    said = one_by_one(model, prompts, set(), LIMIT)
    return {said[3].token_ids[2], said[6].token_ids[5]}


@pytest.mark.parametrize("tokens_per_batch", [1, 90, 10_000])
def test_answers_do_not_depend_on_the_batch(
    tokens_per_batch: int, model: PreTrainedModel, prompts: list[list[int]], stop: set[int]
) -> None:
    expected = one_by_one(model, prompts, stop, LIMIT)
    lengths = {len(answer.token_ids) for answer in expected}
    assert len(lengths) > 1
    assert LIMIT in lengths, "some answers stop, others are cut"
    assert len({tuple(answer.token_ids) for answer in expected}) > 4
    found = greedy_answers(model, prompts, stop, PAD, LIMIT, tokens_per_batch=tokens_per_batch)
    assert found == expected
    assert [answer.hit_max_new_tokens for answer in found] == [len(a.token_ids) == LIMIT for a in expected]
    assert not any(set(answer.token_ids) & stop for answer in found)


def test_a_stop_token_at_the_limit_is_no_cut(model: PreTrainedModel) -> None:
    said = one_by_one(model, [[7, 8, 9]], set(), 3)[0].token_ids
    last = {said[2]} - set(said[:2])
    assert last, "the third token is a new one"
    assert greedy_answers(model, [[7, 8, 9]], last, PAD, 3) == [Answer(said[:2], False)]
    assert greedy_answers(model, [[7, 8, 9]], last, PAD, 2) == [Answer(said[:2], True)]


def test_a_stop_token_may_be_the_padding(model: PreTrainedModel, prompts: list[list[int]], stop: set[int]) -> None:
    """As in many tokenizers."""
    pad = min(stop)
    assert greedy_answers(model, prompts, stop, pad, LIMIT) == one_by_one(model, prompts, stop, LIMIT)


def test_the_models_own_sampling_and_penalties_are_not_used(
    model: PreTrainedModel, prompts: list[list[int]], stop: set[int]
) -> None:
    expected = greedy_answers(model, prompts, stop, PAD, LIMIT)
    was = model.generation_config
    own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=1.9, no_repeat_ngram_size=1, num_beams=3, max_length=4,
        eos_token_id=11,
    )  # fmt: skip
    try:
        model.generation_config = own
        assert greedy_answers(model, prompts, stop, PAD, LIMIT) == expected
        assert model.generation_config is own
    finally:
        model.generation_config = was


def test_no_answer_leaves_the_context() -> None:
    """With learned positions, one token more is an error; a row near the end must not shorten the others."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=20, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6)
    model = GPT2LMHeadModel(config).eval()
    prompts = [[3] * 17, [4, 5], list(range(19)), [6] * 17]
    found = greedy_answers(model, prompts, [], PAD, LIMIT, context=20)
    assert [len(answer.token_ids) for answer in found] == [3, 12, 1, 3]
    expected = [one_by_one(model, [p], set(), n)[0] for p, n in zip(prompts, (3, 12, 1, 3), strict=True)]
    assert found == expected


def test_progress_counts_the_tokens_of_open_answers(
    model: PreTrainedModel, prompts: list[list[int]], stop: set[int]
) -> None:
    told: list[int] = []
    found = greedy_answers(model, prompts, stop, PAD, LIMIT, on_tokens=told.append)
    # A stopping token is made too.
    assert sum(told) == sum(len(a.token_ids) + (not a.hit_max_new_tokens) for a in found)
    assert len(told) == LIMIT


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    config = model.generation_config
    greedy_answers(model, [[5, 6]], [1], PAD, 2)
    assert model.training
    assert model.generation_config is config
    model.eval()


def test_what_stops_an_answer(base_dir: Path) -> None:
    model, tokenizer = load_model(base_dir), load_tokenizer(base_dir)
    eos = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    assert stop_tokens(model, tokenizer) == {7, 9, eos}
    assert stop_tokens(model, tokenizer, closing=[12]) == {7, 9, 12, eos}
    model.generation_config = GenerationConfig(eos_token_id=7)
    assert stop_tokens(model, tokenizer) == {7, eos}
    model.generation_config = GenerationConfig()
    assert stop_tokens(model, tokenizer) == {eos}

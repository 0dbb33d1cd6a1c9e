"""From what was measured to numbers, words and tables, on values that can be checked by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import datasets
import pytest
from rich.console import Console

from merit_hf.config import ConfigError
from merit_hf.evaluation.comparison import Measured, compare
from merit_hf.evaluation.comparison_table import answer_tables, evaluation_table, evaluation_words, harness_table
from merit_hf.evaluation.held_out import HeldOut, Question

LABELS = ["base", "joint", "group-0", "group-1", "group-2", "group-3", "merged"]


def held_out(name: str, count: int, reference_tokens: int, questions: bool = True) -> HeldOut:
    asked = [Question(i, "p", [1], "r", reference_tokens) for i in range(count)] if questions else []
    rows = datasets.Dataset.from_dict({"text": ["x"] * count})
    metric = ("chrf", "data") if questions else (None, None)
    return HeldOut(name, rows, list(range(count)), "f", asked, *metric)


def measured(count: int, nats: float, score: float | None = None, tokens: int = 0, cut: int = 0) -> Measured:
    losses = Measured(list(range(count)), [2] * count, nats * count, [nats] * count)
    if score is None:
        return losses
    return replace(
        losses, answers=["a"] * count, num_answer_tokens=[tokens] * count,
        hit_max_new_tokens=[i < cut for i in range(count)], scores=[score] * count,
    )  # fmt: skip


def evaluation() -> dict[str, Any]:
    """`essay` is free-form, `word` is not, `few` has few examples, `text` has no prompts."""
    sets = [held_out("essay", 10, 40), held_out("word", 10, 2), held_out("few", 3, 20), held_out("text", 10, 0, False)]
    values = {
        "essay": {"base": (4, 0.5, 50), "joint": (1, 0.75, 12), "merged": (2, 0.625, 30)},
        "word": {"base": (4, 0.0, 30), "joint": (2, 1.0, 1), "merged": (3, 0.5, 0)},
        "few": {"base": (4, 0.5, 20), "joint": (2, 0.5, 20), "merged": (5, 0.25, 20)},
        "text": {"base": (4, None, 0), "joint": (2, None, 0), "merged": (2, None, 0)},
    }
    by_model = {
        label: {
            h.name: measured(
                len(h.indices),
                *values[h.name].get(label, values[h.name]["merged"]),
                cut=5 if (label, h.name) == ("base", "word") else 0,
            )
            for h in sets
        }
        for label in LABELS
    }
    groups = {"essay": 0, "word": 1, "few": 2, "text": 3}
    settings = {"num_samples": 10, "generate": True, "max_new_tokens": 30}
    return compare("p" * 64, groups, sets, by_model, settings, {"merit_hf": "0"})


def test_the_numbers_by_hand() -> None:
    found = evaluation()
    json.dumps(found, allow_nan=False)
    essay, word, text = (found["datasets"][name] for name in ("essay", "word", "text"))
    assert essay["loss"] == {"base": 2, "joint": 0.5, **dict.fromkeys(LABELS[2:], 1)}
    assert (essay["free_form"], word["free_form"], text["free_form"]) == (True, False, None)
    assert [essay["length_ratio"][k] for k in ("base", "joint", "merged")] == [50 / 40, 12 / 40, 30 / 40]
    assert word["hit_max_new_tokens"]["base"] == 0.5
    assert found["mean"]["base"] == 2
    assert found["mean"]["merged"] == (1 + 1.5 + 2.5 + 1) / 4
    assert found["mean_score"]["joint"] == 0.75
    assert found["mean_length_ratio"]["merged"] == (30 / 40 + 1) / 2
    merged = found["differences"]["merged"]
    assert merged["joint"]["loss"] == {"difference": (0.5 + 0.5 + 1.5 + 0) / 4, "low": None, "high": None}
    assert merged["base"]["length_ratio"]["difference"] == pytest.approx((-20 / 40 + 0) / 2)
    assert essay["differences"]["merged"]["joint"]["score"] == {"difference": -0.125, "low": -0.125, "high": -0.125}
    assert found["datasets"]["few"]["differences"]["merged"]["base"]["loss"]["low"] is None
    assert set(found["differences"]["joint"]) == {"base"}


def test_short_answers_are_told_where_the_references_are_long() -> None:
    found = evaluation()
    assert found["short_answers"] == [
        {"model": "joint", "dataset": "essay", "length_ratio": 0.3, "base_length_ratio": 1.25}
    ]
    assert found["notes"] == [
        "base: answers cut at 30 tokens, so longer than told, on word (50%).",
        "joint answers shortly: less than half of the reference's tokens on essay (0.30, base 1.25).",
        "No answers on text: the rows have no prompt with a reference behind it.",
        "Under 8 held-out examples, and so no intervals, on 1 of 4 datasets.",
    ]


def test_winners_and_losers_in_words() -> None:
    words = evaluation_words(evaluation())
    assert words[0] == (
        "joint against base, loss: -1.125 on the mean; better on 4 (most: essay -1.500, word -1.000, few -1.000), "
        "worse on 0; on 3 of 4 the interval excludes zero."
    )
    scores = next(line for line in words if line.startswith("merged against joint, score"))
    assert "worse on 3 (word -0.500, few -0.250, essay -0.125)" in scores
    assert words[-1].startswith("Under 8")


def rendered(table: Any, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit_the_window(width: int) -> None:
    found = evaluation()
    tables = [evaluation_table(found, width), *answer_tables(found, width)]
    assert len(tables) == 3
    for table in tables:
        text = rendered(table, width)
        assert "…" not in text
        assert "merged" in text
        assert ("own group" in text) == ("group-3" not in text)
        rows = [line for line in text.splitlines() if line.startswith("│")]
        assert max(map(len, rows)) <= width
    assert "group-3" in rendered(tables[0], 200) or width < 200
    losses = rendered(tables[0], width)
    assert "0.500*" in losses
    assert "1.500*" not in losses
    # All equal: nothing to mark.
    same = dict.fromkeys(LABELS, 1.0)
    found["datasets"]["essay"]["loss"] = same
    line = next(line for line in rendered(evaluation_table(found), 200).splitlines() if "essay" in line)
    assert "*" not in line


def test_a_benchmark_without_a_number_or_an_error() -> None:
    values = {"base": {"value": None, "stderr": None}, "merged": {"value": 0.51234, "stderr": 0.012}}
    table = harness_table({"name": "lm-eval", "version": "1", "tasks": {"arc": {"acc": values}}}, ["base", "merged"])
    line = next(line for line in rendered(table, 100).splitlines() if "arc" in line)
    assert "–" in line
    assert "0.5123 ± 0.012" in line


def test_rows_without_a_loss() -> None:
    sets = [held_out("a", 2, 4, False), held_out("b", 2, 4, False)]
    nothing = Measured([], [], 0.0, [])
    found = compare(
        "p", {"a": 0, "b": 0}, sets, {"base": {"a": measured(2, 1), "b": nothing}}, {"generate": False}, {}
    )
    assert list(found["datasets"]) == ["a"]
    assert found["notes"][0] == "Left out, since no held-out row has a loss token: b."
    with pytest.raises(ConfigError, match="no held-out row has a loss token"):
        compare("p", {"b": 0}, sets[1:], {"base": {"b": nothing}}, {"generate": False}, {})


def test_a_loss_without_parts_has_no_differences() -> None:
    whole = replace(measured(9, 1), nats=None)
    found = compare(
        "p", {"a": 0}, [held_out("a", 9, 4, False)], {k: {"a": whole} for k in ("base", "x")}, {"generate": False}, {}
    )
    assert found["datasets"]["a"]["loss"] == {"base": 0.5, "x": 0.5}
    assert found["datasets"]["a"]["differences"] == {}

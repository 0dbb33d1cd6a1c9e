"""What several models did on the same held-out examples → the content of evaluation.json and of predictions.jsonl.

No model, no file: [`compare`] and [`predictions`] take what was measured and return plain values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merit_hf.config import ConfigError
from merit_hf.evaluation.held_out import HeldOut
from merit_hf.evaluation.paired import (
    CONFIDENCE,
    MIN_EXAMPLES,
    NUM_RESAMPLES,
    Difference,
    mean_difference,
    paired_difference,
)
from merit_hf.seeds import seed_of

SCHEMA_VERSION = 1
# What the others are held against, where it is there.
AGAINST = ("base", "joint")
# References of so many tokens on average are free-form text, and answers of less than this share of them are short.
FREE_FORM_TOKENS = 16
SHORT_ANSWERS = 0.5
_MANY_CUT = 0.1


@dataclass(frozen=True)
class Measured:
    """What one model did on one dataset.

    Attributes:
        kept: which of the sampled rows bear a loss. num_loss_tokens, nats: [len(kept)]; nats is None for a loss that
            has no parts. total_nats: their sum.
        answers, num_answer_tokens, hit_max_new_tokens: [questions]; None where nothing was generated.
        scores: [questions]; None without a metric.
    """

    kept: list[int]
    num_loss_tokens: list[int]
    total_nats: float
    nats: list[float] | None
    answers: list[str] | None = None
    num_answer_tokens: list[int] | None = None
    hit_max_new_tokens: list[bool] | None = None
    scores: list[float] | None = None


@dataclass(frozen=True)
class _Amounts:
    """A quantity as a ratio of sums: [n] amounts by model, over [n] divisors that all models share."""

    by_model: Mapping[str, Sequence[float]]
    divisors: Sequence[float]

    def value(self, label: str) -> float:
        return float(np.sum(self.by_model[label]) / np.sum(self.divisors))


@dataclass
class _Compared:
    entry: dict[str, Any]
    differences: dict[tuple[str, str, str], Difference] = field(default_factory=dict)


def compare(
    plan_sha256: str,
    groups: Mapping[str, int],
    held_out: Sequence[HeldOut],
    measured: Mapping[str, Mapping[str, Measured]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of evaluation.json, as docs/evaluate.md describes it.

    Args:
        groups (`Mapping[str, int]`): {dataset: number of its group}.
        measured (`Mapping[str, Mapping[str, Measured]]`): {model: {dataset: what it did}}, the models in the order of
            the columns.
        settings (`Mapping[str, Any]`): num_samples, generate, max_new_tokens.

    Raises:
        ConfigError: no row of any dataset bears a loss.
    """
    labels = list(measured)
    first = measured[labels[0]]
    whole, held_out = held_out, [dataset for dataset in held_out if first[dataset.name].kept]
    if not held_out:
        raise ConfigError("no held-out row has a loss token. Look at `eval_path` and sft.max_length.")
    compared = {
        h.name: _compare_dataset(h, groups[h.name], {k: measured[k][h.name] for k in labels}) for h in held_out
    }
    entries = {name: dataset.entry for name, dataset in compared.items()}
    free_form = [entry for entry in entries.values() if entry["free_form"] and entry["length_ratio"]]
    content = {
        "schema_version": SCHEMA_VERSION,
        "metric": "held-out SFT loss, nats a token",
        "plan_sha256": plan_sha256,
        "models": labels,
        "settings": {**settings, "num_resamples": NUM_RESAMPLES, "confidence": CONFIDENCE},
        "datasets": entries,
        "mean": _means(labels, [entry["loss"] for entry in entries.values()]),
        "mean_score": _means(labels, [entry["score"] for entry in entries.values() if entry["score"]]),
        "mean_length_ratio": _means(labels, [entry["length_ratio"] for entry in free_form]),
        "differences": _mean_differences(labels, compared),
        "short_answers": _short_answers(labels, entries),
        "notes": [],
        "harness": None,
        "versions": dict(versions),
    }
    content["notes"] = _notes(content, whole)
    return content


def predictions(
    groups: Mapping[str, int], held_out: Sequence[HeldOut], measured: Mapping[str, Mapping[str, Measured]]
) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl: all answers to a question stand together."""
    for dataset in held_out:
        for number, question in enumerate(dataset.questions):
            for label, by_dataset in measured.items():
                found = by_dataset[dataset.name]
                if found.answers is None or found.num_answer_tokens is None or found.hit_max_new_tokens is None:
                    continue
                loss, num_loss_tokens = _loss_of(found, question.row)
                yield {
                    "dataset": dataset.name,
                    "group": groups[dataset.name],
                    "example": dataset.indices[question.row],
                    "model": label,
                    "prompt": question.prompt,
                    "reference": question.reference,
                    "answer": found.answers[number],
                    "score": None if found.scores is None else found.scores[number],
                    "num_reference_tokens": question.num_reference_tokens,
                    "num_answer_tokens": found.num_answer_tokens[number],
                    "hit_max_new_tokens": found.hit_max_new_tokens[number],
                    "loss": loss,
                    "num_loss_tokens": num_loss_tokens,
                }


def _loss_of(found: Measured, row: int) -> tuple[float | None, int]:
    """Nats a token of one row; None where SFT drops it, or where the loss has no parts."""
    if row not in found.kept:
        return None, 0
    place = found.kept.index(row)
    tokens = found.num_loss_tokens[place]
    return None if found.nats is None else found.nats[place] / max(1, tokens), tokens


def _compare_dataset(held_out: HeldOut, group: int, measured: Mapping[str, Measured]) -> _Compared:
    labels = list(measured)
    first = measured[labels[0]]
    quantities = _quantities(held_out, measured)
    length = quantities.get("length_ratio")
    answered = length is not None or "score" in quantities or bool(held_out.questions)
    mean_reference = float(np.mean([q.num_reference_tokens for q in held_out.questions])) if answered else None
    entry = {
        "group": group,
        "num_examples": len(first.kept),
        "num_loss_tokens": sum(first.num_loss_tokens),
        "loss": {k: measured[k].total_nats / max(1, sum(first.num_loss_tokens)) for k in labels},
        "metric": held_out.metric,
        "metric_from": held_out.metric_from,
        "num_answers": len(held_out.questions),
        "score": _values(quantities.get("score"), labels),
        "free_form": None if mean_reference is None else mean_reference >= FREE_FORM_TOKENS,
        "reference_tokens": mean_reference,
        "answer_tokens": _by_model(measured, "num_answer_tokens") if answered else None,
        "length_ratio": _values(length, labels),
        "hit_max_new_tokens": _by_model(measured, "hit_max_new_tokens") if answered else None,
    }
    differences = {}
    seed = seed_of("bootstrap", held_out.name)
    for quantity, amounts in quantities.items():
        for label, other in _pairs(labels):
            ours, theirs = amounts.by_model[label], amounts.by_model[other]
            differences[label, other, quantity] = paired_difference(ours, theirs, amounts.divisors, seed)
    entry["differences"] = _nested(differences)
    return _Compared(entry, differences)


def _quantities(held_out: HeldOut, measured: Mapping[str, Measured]) -> dict[str, _Amounts]:
    first = next(iter(measured.values()))
    found = {}
    nats = {label: m.nats for label, m in measured.items() if m.nats is not None}
    if len(nats) == len(measured) and first.num_loss_tokens:
        found["loss"] = _Amounts(nats, first.num_loss_tokens)
    scores = {label: m.scores for label, m in measured.items() if m.scores is not None}
    if scores:
        found["score"] = _Amounts(scores, [1] * len(held_out.questions))
    lengths = {label: m.num_answer_tokens for label, m in measured.items() if m.num_answer_tokens is not None}
    references = [question.num_reference_tokens for question in held_out.questions]
    # An empty reference would be divided by where a resample draws nothing else.
    if lengths and references and min(references) > 0:
        found["length_ratio"] = _Amounts(lengths, references)
    return found


def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Every model but the base, against the base and against joint."""
    return [
        (label, other) for label in labels for other in AGAINST if other in labels and label not in ("base", other)
    ]


def _nested(differences: Mapping[tuple[str, str, str], Difference]) -> dict[str, dict[str, dict[str, Any]]]:
    nested: dict[str, dict[str, dict[str, Any]]] = {}
    for (label, other, quantity), difference in differences.items():
        nested.setdefault(label, {}).setdefault(other, {})[quantity] = difference.to_dict()
    return nested


def _mean_differences(labels: Sequence[str], compared: Mapping[str, _Compared]) -> dict[str, Any]:
    means = {}
    for label, other in _pairs(labels):
        for quantity in ("loss", "score", "length_ratio"):
            key = (label, other, quantity)
            # The mean length is that of free-form datasets, as in `mean_length_ratio`.
            parts = [
                dataset.differences[key]
                for dataset in compared.values()
                if key in dataset.differences and (quantity != "length_ratio" or dataset.entry["free_form"])
            ]
            if parts:
                means[key] = mean_difference(parts)
    return _nested(means)


def _values(amounts: _Amounts | None, labels: Sequence[str]) -> dict[str, float] | None:
    return None if amounts is None else {label: amounts.value(label) for label in labels}


def _by_model(measured: Mapping[str, Measured], name: str) -> dict[str, float]:
    return {label: float(np.mean(getattr(found, name))) for label, found in measured.items()}


def _means(labels: Sequence[str], rows: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    return {label: float(np.mean([row[label] for row in rows])) for label in labels} if rows else None


def _short_answers(labels: Sequence[str], entries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": label,
            "dataset": name,
            "length_ratio": entry["length_ratio"][label],
            "base_length_ratio": entry["length_ratio"].get("base"),
        }
        for label in labels
        for name, entry in entries.items()
        if entry["free_form"] and entry["length_ratio"] and entry["length_ratio"][label] < SHORT_ANSWERS
    ]


def _notes(content: Mapping[str, Any], held_out: Sequence[HeldOut]) -> list[str]:
    """What a reader of the numbers must know, in words."""
    entries, notes = content["datasets"], []
    lost = [dataset.name for dataset in held_out if dataset.name not in entries]
    if lost:
        notes.append(f"Left out, since no held-out row has a loss token: {', '.join(lost)}.")
    for label in content["models"]:
        short = [found for found in content["short_answers"] if found["model"] == label]
        if short:
            told = ", ".join(f"{f['dataset']} ({f['length_ratio']:.2f}, base {_ratio(f)})" for f in short)
            notes.append(f"{label} answers shortly: less than half of the reference's tokens on {told}.")
        cut = [
            f"{name} ({entry['hit_max_new_tokens'][label]:.0%})"
            for name, entry in entries.items()
            if entry["hit_max_new_tokens"] and entry["hit_max_new_tokens"][label] > _MANY_CUT
        ]
        if cut:
            limit = content["settings"]["max_new_tokens"]
            notes.append(f"{label}: answers cut at {limit} tokens, so longer than told, on {', '.join(cut)}.")
    if content["settings"]["generate"]:
        silent = [dataset.name for dataset in held_out if not dataset.questions]
        if silent:
            notes.append(f"No answers on {', '.join(silent)}: the rows have no prompt with a reference behind it.")
        for dataset in held_out:
            if dataset.questions and dataset.num_unasked:
                notes.append(
                    f"{dataset.name}: {dataset.num_unasked} of {len(dataset.rows)} rows were not asked: no prompt "
                    "with one text behind it, or a prompt that fills the context."
                )
    few = [name for name, entry in entries.items() if entry["num_examples"] < MIN_EXAMPLES]
    if few:
        notes.append(
            f"Under {MIN_EXAMPLES} held-out examples, and so no intervals, on {len(few)} of {len(entries)} datasets."
        )
    return notes


def _ratio(found: Mapping[str, Any]) -> str:
    return "–" if found["base_length_ratio"] is None else f"{found['base_length_ratio']:.2f}"

"""How an answer is held against its reference: one number from 0 to 1 an example.

    score = load_scorer("chrf", where="datasets.chat")
    score(answer, reference, prompt, metadata)

Scores are by example, so that differences between models can be paired.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from merit_hf.config import REASONING_GYM, ConfigError, check_metric

# A median reference up to this many characters is a word, a number, a date: something to be matched exactly.
MAX_EXACT_CHARACTERS = 40
Scorer = Callable[[str, str, str, Mapping[str, Any] | None], float]


def default_metric(references: Sequence[str]) -> str:
    """`exact_match` where the median reference has at most [`MAX_EXACT_CHARACTERS`] characters, else `chrf`."""
    return "exact_match" if np.median([len(text) for text in references]) <= MAX_EXACT_CHARACTERS else "chrf"


def load_scorer(name: str, where: str) -> Scorer | None:
    """The function of (answer, reference, prompt, metadata) behind a metric's name; None for `none`.

    Raises:
        ConfigError: no such metric or task, or its library is not installed.
    """
    check_metric(name, where)
    if name == "none":
        return None
    if name == "exact_match":
        return exact_match
    try:
        if name == "chrf":
            return _chrf()
        if name.startswith("rouge"):
            return _rouge(name)
        return _reasoning_gym(name.removeprefix(REASONING_GYM), where)
    except ImportError as error:
        extra = "reasoning-gym" if name.startswith(REASONING_GYM) else "eval"
        raise ConfigError(
            f"{where}={name!r} needs a library that cannot be imported ({error}). pip install 'merit_hf[{extra}]', "
            "name another metric, or measure losses only (--no-generate)."
        ) from error


def exact_match(answer: str, reference: str, prompt: str = "", metadata: Mapping[str, Any] | None = None) -> float:
    """1 where both are equal once white space is collapsed and characters are composed (NFC)."""
    return float(_plain(answer) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _chrf() -> Scorer:
    from sacrebleu.metrics import CHRF

    chrf = CHRF()

    def score(answer: str, reference: str, prompt: str, metadata: Mapping[str, Any] | None) -> float:
        return float(chrf.sentence_score(answer, [reference]).score) / 100

    return score


def _rouge(name: str) -> Scorer:
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer([name])

    def score(answer: str, reference: str, prompt: str, metadata: Mapping[str, Any] | None) -> float:
        return float(rouge.score(reference, answer)[name].fmeasure)

    return score


def _reasoning_gym(task: str, where: str) -> Scorer:
    import reasoning_gym

    try:
        scorer = reasoning_gym.get_score_answer_fn(task)
    except ValueError as error:
        raise ConfigError(f"{where}: reasoning-gym has no task `{task}`. Its README lists them.") from error
    return functools.partial(_reasoning_gym_score, scorer, task, where)


def _reasoning_gym_score(
    scorer: Callable[..., float],
    task: str,
    where: str,
    answer: str,
    reference: str,
    prompt: str,
    metadata: Mapping[str, Any] | None,
) -> float:
    entry = {"question": prompt, "answer": reference, "metadata": metadata or {}}
    try:
        return float(scorer(answer.strip(), entry))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: the scorer of reasoning-gym's `{task}` needs metadata that the held-out rows do not hold "
            f"({type(error).__name__}: {error}). Keep the task's `metadata` as a column, or name another metric."
        ) from error


def parse_metadata(value: Any) -> Mapping[str, Any] | None:
    """A row's `metadata` as a mapping: JSON text is read, and the gaps with which a table fills a struct are left out.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        value = json.loads(value)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return None if value is None else {key: part for key, part in value.items() if part is not None}

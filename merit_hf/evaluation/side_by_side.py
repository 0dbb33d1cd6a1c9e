"""`merit evaluate`: what the command does between its call and its tables."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from merit_hf.checkpoint import check_output_folder
from merit_hf.config import ConfigError, check_metric
from merit_hf.evaluation.comparison_table import answer_tables, evaluation_table, evaluation_words, harness_table
from merit_hf.evaluation.evaluate import (
    CACHE_NAME,
    PREDICTIONS_NAME,
    evaluate_models,
    merged_models,
    save_evaluation,
    update_card,
)
from merit_hf.evaluation.harness import HarnessCall, run_harness
from merit_hf.plan import PartitionPlan
from merit_hf.summary import label_models, split_label


def evaluate_side_by_side(
    plan: PartitionPlan,
    models: Sequence[str],
    find: Callable[[str], Path],
    output: Path,
    show: Callable[..., None],
    *,
    num_samples: int,
    generate: bool,
    max_new_tokens: int,
    metrics: Sequence[str],
    tokens_per_batch: int,
    benchmarks: HarnessCall | None,
    card: bool,
) -> None:
    """Evaluate, write the files, and show the tables.

    Args:
        models (`Sequence[str]`): as in the call, `[LABEL=]MODEL`.
        find, show: a model's name → its folder; prints tables and lines.
        metrics (`Sequence[str]`): `NAME=METRIC`.
        benchmarks ([`HarnessCall`], *optional*): tasks of a harness to run besides.
        card (`bool`): write the numbers into the card of the merged model among `models`.
    """
    check_output_folder(output)
    named = [split_label(text) for text in models]
    labelled = label_models([(label, text, find(text)) for label, text in named], plan)
    cards = merged_models(plan, labelled) if card else []
    everything = {"base": plan.base_folder(), **labelled}
    evaluation = evaluate_models(
        plan, everything, num_samples, tokens_per_batch, generate=generate, max_new_tokens=max_new_tokens,
        metrics=_metrics(metrics), output=output,
    )  # fmt: skip
    if benchmarks is not None:
        evaluation["harness"] = run_harness(plan, everything, benchmarks, tokens_per_batch, cache=output / CACHE_NAME)
    path = save_evaluation(evaluation, output)
    for folder in cards:
        update_card(plan, folder, evaluation)
    _show(evaluation, show)
    show(f"The numbers are in {path}." + (f" The answers are in {output / PREDICTIONS_NAME}." if generate else ""))
    for folder in cards:
        show(f"The card is in {folder / 'README.md'}.")


def _show(evaluation: dict[str, Any], show: Callable[..., None]) -> None:
    width = shutil.get_terminal_size((120, 40)).columns
    show(evaluation_table(evaluation, width), *answer_tables(evaluation, width))
    if evaluation["harness"]:
        show(harness_table(evaluation["harness"], evaluation["models"]))
    show(*evaluation_words(evaluation))


def _metrics(texts: Sequence[str]) -> dict[str, str]:
    metrics = {}
    for text in texts:
        name, equals, metric = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--metric {text}: expected NAME=METRIC, such as gsm8k=exact_match.")
        check_metric(metric, f"--metric {name}")
        metrics[name] = metric
    return metrics

"""What an evaluation says in a merged model's card: tables for people, a `model-index` for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult

from merit_hf.text import Markdown, markdown_table, public_text

if TYPE_CHECKING:
    from merit_hf.plan import PartitionPlan


def evaluation_table(evaluation: Mapping[str, Any]) -> Markdown:
    labels = evaluation["models"]
    rows = [
        [name, str(row["group"]), *(f"{row['loss'][label]:.3f}" for label in labels)]
        for name, row in evaluation["datasets"].items()
    ]
    rows.append(["mean", "", *(f"{evaluation['mean'][label]:.3f}" for label in labels)])
    return markdown_table(("dataset", "group", *labels), rows)


def answer_table(evaluation: Mapping[str, Any]) -> Markdown:
    """Score and length of the answers, without the groups by themselves."""
    labels = [label for label in evaluation["models"] if not label.startswith("group-")]
    rows = [
        [name, row["metric"], *(f"{row['score'][k]:.3f}" for k in labels), *(_length(row, k) for k in labels)]
        for name, row in evaluation["datasets"].items()
        if row["score"]
    ]
    rows.append(["mean", "", *(f"{evaluation['mean_score'][label]:.3f}" for label in labels), *[""] * len(labels)])
    return markdown_table(("dataset", "metric", *labels, *(f"length, {label}" for label in labels)), rows)


def _length(row: Mapping[str, Any], label: str) -> str:
    return f"{row['length_ratio'][label]:.2f}" if row["length_ratio"] else "–"


def harness_table(evaluation: Mapping[str, Any]) -> Markdown:
    labels = evaluation["models"]
    rows = [
        [task, metric, *("–" if by_model[k]["value"] is None else f"{by_model[k]['value']:.4g}" for k in labels)]
        for task, metrics in evaluation["harness"]["tasks"].items()
        for metric, by_model in metrics.items()
    ]
    return markdown_table((f"{evaluation['harness']['name']} task", "metric", *labels), rows)


def eval_results(plan: PartitionPlan, evaluation: Mapping[str, Any]) -> list[EvalResult]:
    """The merged model's held-out loss on every dataset, as a model card's `model-index` wants it."""
    if "merged" not in evaluation["models"]:
        return []
    repos = {dataset.name: dataset for dataset in plan.datasets}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=repos[name].repo_id or "local",
            dataset_name=public_text(name),
            dataset_config=repos[name].config,
            dataset_revision=repos[name].revision,
            metric_type="loss",
            metric_name="held-out SFT loss (nats a token)",
            metric_value=round(float(row["loss"]["merged"]), 6),
        )
        for name, row in evaluation["datasets"].items()
        if name in repos
    ]

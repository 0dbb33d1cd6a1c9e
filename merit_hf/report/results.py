"""The facts of the report's section on `merit evaluate`, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merit_hf.report import charts
from merit_hf.report.blocks import (
    Cell,
    Table,
    change,
    count,
    decimals,
    estimate,
    group_cell,
    listed,
    number,
    plural,
    signed,
    text,
)
from merit_hf.report.run_folder import RunFolder
from merit_hf.text import public_text

# Below this many held-out examples a dataset's numbers say little by themselves.
FEW_EXAMPLES = 30


def evaluation_facts(run: RunFolder) -> dict[str, Any] | None:
    """Losses, scores and answer lengths side by side, winners and losers; None without an evaluation."""
    evaluation = run.evaluation
    if evaluation is None:
        return None
    rows = compared_losses(evaluation, run.merged)
    models = list(evaluation["models"])
    pair = ("merged", "base") if {"merged", "base"} <= set(models) else None
    facts: dict[str, Any] = {
        "metric": evaluation["metric"],
        "table": _loss_table(evaluation, rows),
        "all": _models_table(evaluation),
        "sentences": _sentences(rows),
        "fewest": min((row["num_examples"] for row in evaluation["datasets"].values()), default=0),
        "few_examples": FEW_EXAMPLES,
        "scores": _score_table(evaluation),
        "notes": list(evaluation.get("notes") or []),
        "harness": _harness_table(evaluation),
        "charts": [charts.comparison_chart(rows, pair)] if rows else [],
        "shown_rows": charts.MAX_ROWS if len(rows) > charts.MAX_ROWS else None,
    }
    return facts


def compared_losses(evaluation: Mapping[str, Any], merged: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """{dataset: {"base", "joint", "merged", "own group", "groups' mean": loss}}, those that are there.

    The dataset that gained most against the base comes first.

    Args:
        merged: merit.json of the merged model, whose weights make the groups' mean.
    """
    entries = merged["groups"] if merged else []
    weights = {entry["group"]: entry["weight"] for entry in entries if entry["weight"] is not None}
    rows = {name: _losses(row, weights) for name, row in evaluation["datasets"].items()}
    if _all_have(rows, "merged") and _all_have(rows, "base"):
        rows = dict(sorted(rows.items(), key=lambda item: item[1]["merged"] - item[1]["base"]))
    return rows


def _losses(row: Mapping[str, Any], weights: Mapping[int, float]) -> dict[str, float]:
    """{model: loss} under the names of the figure: `own group` is the dataset's, `groups' mean` the weighted mean."""
    losses = row["loss"]
    found = {label: float(losses[label]) for label in ("base", "joint", "merged") if label in losses}
    own = losses.get(f"group-{row['group']}")
    if own is not None:
        found["own group"] = float(own)
    groups = {group: losses.get(f"group-{group}") for group in weights}
    if weights and all(loss is not None for loss in groups.values()):
        found["groups' mean"] = sum(weights[group] * groups[group] for group in weights)
    return found


def _loss_table(evaluation: Mapping[str, Any], rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Every model beside the merged one, the winners on top."""
    shown = [model for model in ("base", "merged", "joint", "groups' mean", "own group") if _all_have(rows, model)]
    against = [model for model in ("base", "joint", "groups' mean") if model in shown and "merged" in shown]
    columns = [("dataset", "text"), ("group", "number")]
    columns += [(f"merged − {model}", "number") for model in against] + [(model, "number") for model in shown]
    columns.append(("held-out examples", "number"))

    def losses(values: Mapping[str, float], of: Mapping[str, Any]) -> list[Cell]:
        found = ((of.get("differences") or {}).get("merged") or {}).get
        changes = [_change(values["merged"] - values[model], (found(model) or {}).get("loss")) for model in against]
        return [*changes, *(number(values[model]) for model in shown)]

    body = []
    for name in rows:
        row = evaluation["datasets"][name]
        body.append([Cell(name), group_cell(row["group"]), *losses(rows[name], row), count(row["num_examples"])])
    means = {model: sum(row[model] for row in rows.values()) / len(rows) for model in shown}
    last = [Cell("mean"), text(None), *losses(means, evaluation), text(None)]
    return Table("losses-table", "Held-out loss of every dataset", columns, body, last)


def _change(value: float, interval: Mapping[str, Any] | None) -> Cell:
    """With its interval where there is one; then it is good or bad only where the interval leaves zero out."""
    if not interval or interval.get("low") is None:
        return change(value)
    return estimate({"value": value, "low": interval["low"], "high": interval["high"]}, lower_is_better=True)


def _all_have(rows: Mapping[str, Mapping[str, float]], model: str) -> bool:
    return bool(rows) and all(model in row for row in rows.values())


def _models_table(evaluation: Mapping[str, Any]) -> Table:
    models = list(evaluation["models"])
    columns = [("dataset", "text"), ("group", "number"), *((label, "number") for label in models)]
    rows = []
    for name, row in evaluation["datasets"].items():
        lowest = min(row["loss"][label] for label in models)
        rows.append([Cell(name), group_cell(row["group"]),
                     *(number(row["loss"][label], tone="note" if row["loss"][label] == lowest else "")
                       for label in models)])  # fmt: skip
    last = [Cell("mean"), text(None), *(number(evaluation["mean"][label]) for label in models)]
    return Table("models-table", "Held-out loss under every model", columns, rows, last)


def _sentences(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The merged model against each of the others, and who gained and lost."""
    if not _all_have(rows, "merged"):
        return []
    sentences = []
    for model, called in (
        ("base", "the base"),
        ("groups' mean", "the groups are on average"),
        ("joint", "one model trained on everything"),
    ):
        if _all_have(rows, model):
            before, after = (sum(row[key] for row in rows.values()) / len(rows) for key in (model, "merged"))
            wins = sum(round(row["merged"] - row[model], 3) < 0 for row in rows.values())
            better = "better" if after < before else "worse"
            sentences.append(
                f"Merged is {better} than {called}: mean held-out loss {decimals(after)} against {decimals(before)}, "
                f"lower on {wins} of {plural(len(rows), 'dataset')}."
            )
    if _all_have(rows, "base"):
        changes = {name: row["merged"] - row["base"] for name, row in rows.items()}
        order = sorted(changes, key=lambda name: changes[name])

        def told(names: Sequence[str]) -> str:
            return listed([f"{public_text(name, 40)} ({signed(changes[name])})" for name in names[:3]])

        won = [name for name in order if round(changes[name], 3) < 0]
        lost = [name for name in order[::-1] if round(changes[name], 3) > 0]
        if won:
            sentences.append(f"It gained most on {told(won)}.")
        if lost:
            sentences.append(f"It lost on {plural(len(lost), 'dataset')}, most on {told(lost)}.")
        else:
            sentences.append("It is worse than the base on no dataset.")
    return sentences


def _score_table(evaluation: Mapping[str, Any]) -> Table | None:
    """The task's own metric and the answer length; None where nothing was generated."""
    models = list(evaluation["models"])
    answered = {name: row for name, row in evaluation["datasets"].items() if row.get("num_answers")}
    if not answered:
        return None
    columns = [("dataset", "text"), ("metric", "text"), ("answers", "number"), ("tokens of a reference", "number")]
    columns += [(f"{label}: score", "number") for label in models]
    columns += [(f"{label}: length", "number") for label in models]
    rows = []
    for name, row in answered.items():
        scores, ratios = row.get("score") or {}, row.get("length_ratio") or {}
        rows.append(
            [
                Cell(name), text(row.get("metric")), count(row["num_answers"]), number(row.get("reference_tokens"), 0),
                *(number(scores.get(label), 2) for label in models),
                *(number(ratios.get(label), 2, "bad" if _is_short(row, ratios.get(label)) else "")
                  for label in models),
            ]
        )  # fmt: skip
    means, lengths = evaluation.get("mean_score") or {}, evaluation.get("mean_length_ratio") or {}
    last = [Cell("mean"), text(None), text(None), text(None), *(number(means.get(label), 2) for label in models),
            *(number(lengths.get(label), 2) for label in models)]  # fmt: skip
    return Table("scores-table", "Scores and answer lengths", columns, rows, last)


def _is_short(row: Mapping[str, Any], ratio: float | None) -> bool:
    return bool(row.get("free_form")) and ratio is not None and ratio < 0.5


def _harness_table(evaluation: Mapping[str, Any]) -> Table | None:
    harness = evaluation.get("harness")
    if not harness:
        return None
    models = list(evaluation["models"])
    columns = [("task", "text"), ("metric", "text"), *((label, "number") for label in models)]
    rows = [
        [Cell(task), text(metric), *(number((values.get(label) or {}).get("value")) for label in models)]
        for task, metrics in harness["tasks"].items()
        for metric, values in metrics.items()
    ]
    name = f"{public_text(harness['name'])} {public_text(harness.get('version') or '')}".strip()
    return Table("harness-table", f"Tasks of {name}", columns, rows)

"""evaluation.json as tables for a terminal, and who won and lost in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# {column: label of the model in a row}; a row is a dataset's entry, or None for the means.
_Columns = dict[str, Callable[[Mapping[str, Any]], str]]
_MAX_NAMED = 3


def evaluation_table(evaluation: Mapping[str, Any], width: int | None = None) -> Table:
    """Losses: datasets down, models across; `*` and bold mark the lowest, underlined is the dataset's own group.

    Where that is wider than `width`, the groups become one column, `own group`.
    """
    title = f"{evaluation['metric']} (lower is better; *: lowest, underlined: the dataset's group)"
    return _fitted(evaluation, title, "loss", "mean", min, width)


def answer_tables(evaluation: Mapping[str, Any], width: int | None = None) -> list[Table]:
    """Scores, and lengths of the answers, where models answered."""
    tables = []
    if evaluation["mean_score"]:
        title = "Score of the answers, by each dataset's metric, 0 to 1 (higher is better; *: highest)"
        tables.append(_fitted(evaluation, title, "score", "mean_score", max, width))
    if any(entry["length_ratio"] for entry in evaluation["datasets"].values()):
        title = "Tokens of the answers ÷ tokens of the references (mean: free-form datasets only)"
        tables.append(_fitted(evaluation, title, "length_ratio", "mean_length_ratio", None, width))
    return tables


def harness_table(harness: Mapping[str, Any], labels: Sequence[str]) -> Table:
    """The harness's numbers as it gives them, ± its own standard error."""
    table = Table(title=f"{harness['name']} {harness['version']}", title_justify="left")
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for label in labels:
        table.add_column(label, justify="right", no_wrap=True)
    for task, metrics in harness["tasks"].items():
        for metric, by_model in metrics.items():
            cells = []
            for label in labels:
                value, stderr = by_model[label]["value"], by_model[label]["stderr"]
                spread = "" if stderr is None else f" ± {stderr:.2g}"
                cells.append("–" if value is None else f"{value:.4g}{spread}")
            table.add_row(Text(task), Text(metric), *cells)
    return table


def evaluation_words(evaluation: Mapping[str, Any]) -> list[str]:
    """Merged and joint (or the last model) against base and joint: how many datasets won and lost, the largest of
    each, and the notes."""
    labels = [label for label in ("joint", "merged") if label in evaluation["differences"]]
    labels = labels or evaluation["models"][1:][-1:]
    lines = []
    for label in labels:
        for other, means in evaluation["differences"].get(label, {}).items():
            for quantity in ("loss", "score"):
                if quantity in means:
                    lines.append(_outcome(evaluation, label, other, quantity))
    return lines + list(evaluation["notes"])


def _outcome(evaluation: Mapping[str, Any], label: str, other: str, quantity: str) -> str:
    sign = -1 if quantity == "loss" else 1
    found = {
        name: entry["differences"][label][other][quantity]
        for name, entry in evaluation["datasets"].items()
        if quantity in entry["differences"].get(label, {}).get(other, {})
    }
    gains = {name: sign * value["difference"] for name, value in found.items()}
    better = sorted((name for name in gains if gains[name] > 0), key=lambda name: -gains[name])
    worse = sorted((name for name in gains if gains[name] < 0), key=lambda name: gains[name])
    sure = sum(v["low"] is not None and (v["low"] > 0 or v["high"] < 0) for v in found.values())
    mean = evaluation["differences"][label][other][quantity]
    interval = "" if mean["low"] is None else f" [{mean['low']:+.3f}, {mean['high']:+.3f}]"
    text = f"{label} against {other}, {quantity}: {mean['difference']:+.3f}{interval} on the mean"
    text += f"; better on {len(better)}{_named(better, found)}, worse on {len(worse)}{_named(worse, found)}"
    if any(value["low"] is not None for value in found.values()):
        text += f"; on {sure} of {len(found)} the interval excludes zero"
    return text + "."


def _named(names: Sequence[str], found: Mapping[str, Mapping[str, float]]) -> str:
    if not names:
        return ""
    told = ", ".join(f"{name} {found[name]['difference']:+.3f}" for name in names[:_MAX_NAMED])
    return f" ({'most: ' if len(names) > _MAX_NAMED else ''}{told})"


def _fitted(
    evaluation: Mapping[str, Any],
    title: str,
    key: str,
    mean_key: str,
    best: Callable[..., float] | None,
    width: int | None,
) -> Table:
    labels = evaluation["models"]
    table = _table(evaluation, title, key, mean_key, best, {label: _always(label) for label in labels})
    groups = [label for label in labels if label.startswith("group-")]
    wide = Console(width=10_000)
    if width is None or len(groups) < 2 or Measurement.get(wide, wide.options, table).maximum <= width:
        return table
    columns: _Columns = {}
    for label in labels:
        if label not in groups:
            columns[label] = _always(label)
        elif label == groups[0]:
            columns["own group"] = lambda entry: f"group-{entry['group']}"
    return _table(evaluation, title, key, mean_key, best, columns)


def _always(label: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda entry: label


def _table(
    evaluation: Mapping[str, Any],
    title: str,
    key: str,
    mean_key: str,
    best: Callable[..., float] | None,
    columns: _Columns,
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("dataset", no_wrap=True)
    table.add_column("group", justify="right", no_wrap=True)
    if key == "score":
        table.add_column("metric", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, entry in evaluation["datasets"].items():
        values = entry[key]
        if not values:
            continue
        shown = {column: values.get(label(entry)) for column, label in columns.items()}
        present = [value for value in shown.values() if value is not None]
        mark = _best(present, best)
        cells = []
        for column, value in shown.items():
            own = column == "own group" or column == f"group-{entry['group']}"
            cells.append(_cell(value, value is not None and value == mark, own and len(columns) > 1))
        metric = [Text(entry["metric"])] if key == "score" else []
        table.add_row(Text(name), str(entry["group"]), *metric, *cells)
    means = evaluation[mean_key]
    if means:
        table.add_section()
        mark = _best([means[column] for column in columns if column in means], best)
        cells = [
            _cell(means[column], means[column] == mark, False) if column in means else Text("") for column in columns
        ]
        table.add_row("mean", "", *([""] if key == "score" else []), *cells)
    return table


def _best(values: Sequence[float], best: Callable[..., float] | None) -> float | None:
    """The value to mark; none where all are equal."""
    return best(values) if best is not None and len(set(values)) > 1 else None


def _cell(value: float | None, is_best: bool, is_own: bool) -> Text:
    if value is None:
        return Text("– ")
    cell = Text(f"{value:.3f}", ("bold " if is_best else "") + ("underline" if is_own else ""))
    return cell.append("*" if is_best else " ")

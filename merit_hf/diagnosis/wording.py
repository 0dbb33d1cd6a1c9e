"""A diagnosis for people: one screen on the terminal, and README.md beside diagnosis.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from merit_hf.report.blocks import estimate, signed
from merit_hf.text import escape_markdown

_MARKS = {"problem": "PROBLEM", "caution": "CAUTION", "healthy": "HEALTHY"}
_NUM_LAYERS = 3
_MAX_TEXT = 10_000  # characters: a verdict on many groups is long


def diagnosis_lines(content: Mapping[str, Any]) -> list[Any]:
    """Tables and sentences, the verdict last."""
    lines: list[Any] = [_table(content, *_dataset_table(content))]
    if content["kind"] == "groups":
        lines.append(_table(content, *_group_table(content)))
        lines.append(_where(content))
    verdict = content["verdict"]
    lines += [f"- {finding['text']}" for finding in verdict["findings"]]
    lines.append(f"{_MARKS[verdict['status']]}: {verdict['summary']}")
    lines.append(f"Remedy: {verdict['remedy']}")
    return lines


def diagnosis_readme(content: Mapping[str, Any]) -> str:
    """README.md of a diagnosis: verdict, remedy, what was seen, the tables."""
    verdict = content["verdict"]
    parts = [
        f"# Diagnosis: {verdict['status']}",
        escape_markdown(verdict["summary"], _MAX_TEXT),
        f"**Remedy.** {escape_markdown(verdict['remedy'], _MAX_TEXT)}",
        "\n".join(f"- {item['severity']}: {escape_markdown(item['text'], _MAX_TEXT)}" for item in verdict["findings"]),
        _markdown(*_dataset_table(content)),
    ]
    if content["kind"] == "groups":
        parts += [_markdown(*_group_table(content)), escape_markdown(_where(content), _MAX_TEXT)]
    cost = content["cost"]
    parts.append(
        f"{cost['num_points']} points in weight space, {cost['num_rows']} held-out rows "
        f"({cost['tokens_per_point']:,} tokens) at each; intervals are 95 % bootstrap intervals over rows. "
        "All numbers: `diagnosis.json`."
    )
    return "\n\n".join(parts) + "\n"


def _dataset_table(content: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings, rows: a dataset a row, their mean last."""
    entries = [*content["datasets"].items(), ("mean over datasets", content["overall"])]
    if content["kind"] == "base":
        sigmas = content["settings"]["sigmas"]
        rows = [
            [name, f"{entry['loss']['base']:.3f}", *(estimate(row["increase"]).text for row in entry["perturbation"])]
            for name, entry in entries
        ]
        title = "Loss of the base (nats), and what noise of σ × each tensor's root mean square adds"
        return title, ["dataset", "base", *(f"σ = {sigma:g}" for sigma in sigmas)], rows
    compared = [label for label in ("base", "joint", "line", "mean", "merged") if label in content["models"]]
    rows = []
    for name, entry in entries:
        step = entry["gain"]["ladder"][0] if entry["gain"] else None
        ridge = max(entry["barriers"], key=lambda barrier: barrier["height"]["value"])
        rows.append(
            [
                name,
                str(entry.get("group", "")),
                *(f"{entry['loss'][label]:.3f}" for label in compared),
                estimate(entry["gain"]["measured"]).text if entry["gain"] else "–",
                estimate(step["rho"]).text if step else "–",
                f"{signed(ridge['height']['value'])} {ridge['from']}–{ridge['to']}",
            ]
        )
    title = "Held-out loss (nats); gain of the mean over its groups, ρ = gain ÷ prediction, highest barrier"
    return title, ["dataset", "group", *compared, "gain", "ρ", "highest barrier"], rows


def _group_table(content: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = [
        [
            str(row["group"]), f"{row['weight']:.3f}", f"{row['displacement']:.3g}", _percent(row["variance_share"]),
            _percent(row["curvature_share"]), estimate(row["own"]["held_out"]).text,
            estimate(row["own"]["training"]).text, estimate(row["exclude"]).text,
            f"{len(row['left_basin_on'])} of {len(content['datasets'])}",
        ]
        for row in content["groups"]
    ]  # fmt: skip
    headings = [
        "group", "weight", "displacement", "variance", "curvature", "own held-out", "own training", "mean without it",
        "left the basin on",
    ]  # fmt: skip
    return "Groups: shares, change of loss on their own rows, change of the mean's loss without them", headings, rows


def _where(content: Mapping[str, Any]) -> str:
    """Which layers the disagreement sits in."""
    key = "variance_share" if content["layers"][0]["curvature_share"] is None else "curvature_share"
    what = "variance" if key == "variance_share" else "curvature-weighted variance"
    top = sorted(content["layers"], key=lambda row: -(row[key] or 0.0))[:_NUM_LAYERS]
    named = ", ".join(f"{row['layer']} ({_percent(row[key])})" for row in top)
    return f"Most of the {what} of the groups about their mean sits in {named}; {len(content['layers'])} parts in all."


def _table(content: Mapping[str, Any], title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if row[0] == "mean over datasets" and number == len(rows) - 1:
            table.add_section()
        table.add_row(*(Text(cell) for cell in row))
    return table


def _markdown(title: str, headings: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += [f"| {' | '.join(escape_markdown(cell) for cell in row)} |" for row in rows]
    return "\n".join([title + ".", "", *lines])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"

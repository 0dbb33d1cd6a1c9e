"""The report's interactive figures, as Plotly specifications: plain data, drawn in the reader's browser.

A `color` is the name of a CSS variable (`--g0`), which the page resolves for a light or a dark screen. Text that came
from elsewhere is escaped, since Plotly reads some HTML in its labels.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from merit_hf.figures import display_order
from merit_hf.text import public_text

# A chart of rows shows so many from each end; the table beside it has them all.
MAX_ROWS = 60
MAX_POINTS = 400
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
_DASHES = ("solid", "dash", "dot", "dashdot")
# How a model is drawn next to the others: colour, symbol, whether the symbol is open.
_MODELS = {
    "base": ("--muted", "circle-open"),
    "joint": ("--g1", "square"),
    "own group": ("--g2", "triangle-up"),
    "merged": ("--g0", "circle"),
}

Chart = dict[str, Any]


def unique_labels(names: Sequence[str], max_length: int = 40) -> list[str]:
    """Names as a picture shows them: one line, no local path, cut, and still told apart; not yet escaped."""
    labels: list[str] = []
    seen: set[str] = set()
    for name in names:
        label = text = public_text(name, max_length) or "…"
        number = 2
        while label in seen:
            label, number = f"{text} ({number})", number + 1
        seen.add(label)
        labels.append(label)
    return labels


def inert(label: str) -> str:
    """`label` as text to Plotly, which reads some HTML, and formulas between dollar signs."""
    return html.escape(label, quote=False).replace("$", "&#36;")


def conflict_chart(matrix: np.ndarray, names: Sequence[str], groups: Sequence[int]) -> Chart:
    """Heatmap of C; the page fills in the rows in the order that the reader picks, and escapes the labels.

    Args:
        matrix: C, [T, T]. It travels as int8 hundredths, which is what the labels show: T² bytes.
        groups: the group of each dataset, [T].
    """
    count = len(matrix)
    upper = matrix[np.triu_indices(count, 1)]
    limit = float(np.clip(np.ceil(10 * np.abs(upper).max()) / 10, 0.1, 1.0)) if upper.size else 1.0
    hundredths = np.clip(np.round(100 * matrix), -100, 100).astype(np.int8)
    trace = {
        "type": "heatmap", "zmin": -limit, "zmax": limit, "colorscale": "--diverging", "xgap": 0, "ygap": 0,
        "hovertemplate": "%{y}<br>%{x}<br>cosine %{z:.2f}<extra></extra>",
        "textfont": {"size": 10, "color": "--ink"},
        "colorbar": {"thickness": 12, "title": {"text": "cosine", "side": "top"}, "outlinewidth": 0},
    }  # fmt: skip
    axis = {"type": "category", "automargin": True, "tickfont": {"size": 10}, "showgrid": False, "zeroline": False}
    layout = {
        "xaxis": {**axis, "tickangle": -90, "constrain": "domain"},
        "yaxis": {**axis, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    }
    return {
        "id": "conflict", "data": [trace], "layout": layout,
        "matrix": base64.b64encode(hundredths.tobytes()).decode("ascii"),
        "labels": unique_labels(names, 28), "groups": [int(g) for g in groups],
        "orders": {
            "groups": display_order(matrix, groups).tolist(),
            "clusters": display_order(matrix, [0] * count).tolist(),
            "names": list(range(count)),
        },
    }  # fmt: skip


def axes_chart(
    coordinates: np.ndarray,
    names: Sequence[str],
    groups: Sequence[int],
    explained: Sequence[float],
    num_input_tokens: Sequence[int],
) -> Chart:
    """Datasets on the axes of conflict, a trace a group, area by tokens; the page picks two of the r axes.

    Args:
        coordinates: [T, r ≥ 1]. explained: share of the variance of each axis, [≥ r].
    """
    labels = [inert(label) for label in unique_labels(names)]
    sizes = np.asarray(num_input_tokens, dtype=float)
    diameters = 9 + 17 * np.sqrt(sizes / max(sizes.max(), 1.0))
    shares = [f" ({explained[axis]:.0%} of the variance)" if axis < len(explained) else "" for axis in range(3)]
    titles = [f"axis {axis + 1}{shares[axis]}" for axis in range(min(coordinates.shape[1], 3))]
    data = []
    for group in sorted(set(groups)):
        members = [index for index, of in enumerate(groups) if of == group]
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": f"group {group}",
                "x": _rounded(coordinates[members, 0]),
                "y": _rounded(coordinates[members, 1]) if len(titles) > 1 else [0.0] * len(members),
                "text": [labels[index] for index in members],
                "customdata": [int(sizes[index]) for index in members],
                "hovertemplate": f"<b>%{{text}}</b><br>group {group}, %{{customdata:,}} tokens<br>"
                "(%{x:.2f}, %{y:.2f})<extra></extra>",
                "textfont": {"size": 11},
                "marker": {
                    "color": f"--g{group % 8}", "symbol": _SYMBOLS[group // 8 % 8],
                    "size": _rounded(diameters[members], 1), "line": {"color": "--surface", "width": 1.5},
                    "opacity": 0.9,
                },
            }
        )  # fmt: skip
    axis = {"zeroline": True, "automargin": True, "title": {"standoff": 8}}
    layout = {
        "xaxis": {**axis, "title": {"text": titles[0], "standoff": 8}},
        "yaxis": {**axis, "title": {"text": titles[1] if len(titles) > 1 else "", "standoff": 8}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hovermode": "closest",
    }
    columns = [_rounded(coordinates[:, axis]) for axis in range(len(titles))]
    members_of = [[i for i, of in enumerate(groups) if of == group] for group in sorted(set(groups))]
    return {
        "id": "axes", "data": data, "layout": layout, "height": 480, "titles": titles, "columns": columns,
        "members": members_of, "place_names": len(labels) <= MAX_ROWS,
    }  # fmt: skip


def sizes_chart(
    names: Sequence[str], groups: Sequence[int], num_input_tokens: Sequence[int], total: Sequence[int]
) -> Chart:
    """Tokens of every group, its datasets end to end.

    Args:
        total: tokens of each group, [K].
    """
    labels = unique_labels(names)
    order = sorted(range(len(names)), key=lambda index: (groups[index], -num_input_tokens[index], index))
    left = dict.fromkeys(range(len(total)), 0)
    bases = []
    for index in order:
        bases.append(left[groups[index]])
        left[groups[index]] += num_input_tokens[index]
    widest = max(total, default=1)
    trace = {
        "type": "bar", "orientation": "h", "y": [f"group {groups[index]}" for index in order],
        "x": [num_input_tokens[index] for index in order], "base": bases,
        # A name is written only where its bar has room for it.
        "text": [inert(labels[i]) if num_input_tokens[i] > 0.16 * widest else "" for i in order],
        "hovertext": [inert(labels[index]) for index in order],
        "hovertemplate": "<b>%{hovertext}</b><br>%{x:,} tokens<extra></extra>",
        "textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "constraintext": "inside",
        "textfont": {"size": 11, "color": [f"--on-g{groups[index] % 8}" for index in order]},
        "marker": {
            "color": [f"--g{groups[index] % 8}" for index in order],
            "line": {"color": "--surface", "width": 1.5 if len(names) <= MAX_ROWS else 0.4},
        },
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "input tokens in one pass", "standoff": 8}, "tickformat": ",", "automargin": True},
        "yaxis": {
            "type": "category", "categoryorder": "array", "automargin": True,
            "categoryarray": [f"group {group}" for group in reversed(range(len(total)))],
        },
        "barmode": "overlay", "bargap": 0.25, "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "showlegend": False,
        "uniformtext": {"mode": "hide", "minsize": 10},
    }  # fmt: skip
    return {"id": "sizes", "data": [trace], "layout": layout, "height": 110 + 34 * len(total)}


def losses_chart(logs: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Training loss over steps, a line a model.

    Args:
        logs: {"group 0" or "joint": [(step, loss), …]}.
    """
    data = []
    for number, (name, points) in enumerate(logs.items()):
        steps, losses = thinned(points)
        colour = "--ink" if name == "joint" else f"--g{number % 8}"
        data.append(
            {
                "type": "scatter", "mode": "lines+markers" if len(steps) <= 40 else "lines", "name": name,
                "x": steps, "y": losses, "hovertemplate": f"{name}<br>step %{{x}}: %{{y:.3f}}<extra></extra>",
                "line": {"color": colour, "width": 2, "dash": "dot" if name == "joint" else _DASHES[number // 8 % 4]},
                "marker": {"color": colour, "symbol": _SYMBOLS[number % 8], "size": 7},
            }
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "step", "standoff": 8}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": "training loss (nats a token)", "standoff": 8}, "automargin": True,
                  "zeroline": False},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "hovermode": "closest",
    }  # fmt: skip
    return {"id": "losses", "data": data, "layout": layout, "height": 400}


def comparison_chart(rows: Mapping[str, Mapping[str, float]], pair: tuple[str, str] | None) -> Chart:
    """Held-out loss of several models, a row a dataset, in the order of `rows`.

    Args:
        rows: {dataset: {model: loss}}; models as in `_MODELS`.
        pair: (model, reference): a line joins the two.
    """
    names = list(rows)
    labels = dict(zip(names, unique_labels(names, 28), strict=True))
    names = extremes(names)
    ticks = [inert(labels[name]) for name in names]
    data: list[dict[str, Any]] = []
    if pair is not None:
        ends: list[float | None] = []
        for name in names:
            ends += [rows[name][pair[1]], rows[name][pair[0]], None]
        data.append(
            {
                "type": "scatter", "mode": "lines", "x": [None if v is None else round(v, 4) for v in ends],
                "y": [tick for tick in ticks for _ in range(3)], "hoverinfo": "skip", "showlegend": False,
                "line": {"color": "--line", "width": 5},
            }
        )  # fmt: skip
    for model, (colour, symbol) in _MODELS.items():
        if not all(model in rows[name] for name in names):
            continue
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": model, "y": ticks,
                "x": [round(rows[name][model], 4) for name in names],
                "hovertemplate": f"%{{y}}<br>{model}: %{{x:.3f}}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 1.5, "color": colour}},
            }
        )  # fmt: skip
    layout = _row_layout(ticks, "held-out loss (nats a token)")
    return {"id": "comparison", "data": data, "layout": layout, "height": 120 + 26 * len(ticks)}


def gain_chart(gains: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> Chart:
    """What averaging gained on every dataset: measured with its interval, and predicted.

    Args:
        gains: {dataset: (measured, ladder)}, as in diagnosis.json.
    """
    names = sorted(gains, key=lambda name: gains[name][0]["value"], reverse=True)
    names = extremes(names)
    labels = dict(zip(gains, unique_labels(list(gains), 28), strict=True))
    ticks = [inert(labels[name]) for name in names]
    measured = [gains[name][0] for name in names]
    predicted = [gains[name][1][0].get("predicted") if gains[name][1] else None for name in names]
    above = [round((m.get("high", m["value"]) or m["value"]) - m["value"], 4) for m in measured]
    below = [round(m["value"] - (m.get("low", m["value"]) or m["value"]), 4) for m in measured]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "markers", "name": "measured", "y": ticks,
            "x": [round(m["value"], 4) for m in measured],
            "error_x": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": "--g0",
                        "thickness": 2, "width": 4},
            "hovertemplate": "%{y}<br>measured: %{x:.3f}<extra></extra>",
            "marker": {"color": "--g0", "symbol": "circle", "size": 10},
        },
        {
            "type": "scatter", "mode": "markers", "name": "predicted", "y": ticks,
            "x": [None if p is None or p["value"] is None else round(p["value"], 4) for p in predicted],
            "hovertemplate": "%{y}<br>predicted: %{x:.3f}<extra></extra>",
            "marker": {"color": "--g1", "symbol": "diamond-open", "size": 11, "line": {"width": 2, "color": "--g1"}},
        },
    ]  # fmt: skip
    layout = _row_layout(ticks, "gain of averaging (nats a token)")
    layout["xaxis"] = {**layout["xaxis"], "zeroline": True}
    return {"id": "gain", "data": data, "layout": layout, "height": 120 + 26 * len(ticks)}


def _row_layout(ticks: Sequence[str], title: str) -> dict[str, Any]:
    """A row a dataset, the first on top."""
    return {
        "xaxis": {"title": {"text": title, "standoff": 8}, "automargin": True, "zeroline": False},
        "yaxis": {"type": "category", "categoryorder": "array", "categoryarray": list(ticks)[::-1],
                  "automargin": True, "tickfont": {"size": 11}, "range": [-0.6, len(ticks) - 0.4]},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "hovermode": "closest",
    }  # fmt: skip


def extremes(rows: Sequence[str]) -> list[str]:
    """The first and the last of many rows: what a figure has room for."""
    return [*rows] if len(rows) <= MAX_ROWS else [*rows[: MAX_ROWS // 2], *rows[-MAX_ROWS // 2 :]]


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` steps and losses: beyond that, means of equal runs of steps."""
    values = np.asarray(points, dtype=float).reshape(-1, 2)
    if len(values) > MAX_POINTS:
        values = np.array([part.mean(axis=0) for part in np.array_split(values, MAX_POINTS)])
    return _rounded(values[:, 0], 2), _rounded(values[:, 1])


def _rounded(values: np.ndarray, digits: int = 4) -> list[float]:
    return [float(value) for value in np.round(values, digits)]

"""The pictures of a plan and of a run, as PNG. Same plan, same bytes.

conflict heatmap, conflict axes, tokens by group; training losses and held-out losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from merit_hf.text import public_text

if TYPE_CHECKING:
    from merit_hf.plan import PartitionPlan

# Okabe and Ito's colours, which colour-blind readers tell apart; beyond eight groups they repeat with other markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#555555")
_DARK = (0, 7)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# How a model is drawn next to the others: colour, marker, whether the marker is open.
MODELS = {
    "base": ("#555d66", "o", True),
    "joint": ("#D55E00", "s", False),
    "own group": ("#009E73", "^", False),
    "merged": ("#0072B2", "o", False),
}
_MAX_LABELS = 80
# So many names fit along the largest heatmap, and so many are worth reading in a scatter.
_MAX_TICKS = 150
_MAX_NAMES = 40
_MAX_VALUES = 16
# Points along a heatmap; more datasets are averaged. Members of a group that are clustered; more join the nearest.
_MAX_POINTS = 1000
_MAX_CLUSTERED = 1000
# Beyond this many datasets the parts of a bar would be thinner than their edges.
_MAX_PARTS = 200


def save_plan_figures(plan: PartitionPlan, folder: Path, with_matrix: bool = True) -> list[str]:
    """Write the figures that a plan has into `folder`/figures; returns their paths relative to `folder`.

    `with_matrix`: also the one that needs the whole conflict matrix.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    names = [public_text(name, 40) for name in plan.names]
    groups = [dataset.group for dataset in plan.datasets]
    tokens = [dataset.num_input_tokens for dataset in plan.datasets]
    written = ["figures/groups.png"]
    save_group_sizes(names, groups, tokens, folder / written[0])
    if plan.is_measured:
        matrix = plan.conflict_matrix if with_matrix else None
        if matrix is not None:
            written.append("figures/conflict.png")
            save_conflict_heatmap(matrix, names, groups, folder / written[-1])
        written.append("figures/axes.png")
        coordinates = np.array([dataset.coordinates for dataset in plan.datasets])
        save_pca_scatter(coordinates, names, groups, plan.explained, tokens, folder / written[-1])
    return written


def save_conflict_heatmap(matrix: np.ndarray, names: Sequence[str], groups: Sequence[int], path: Path) -> None:
    """Cosines between datasets, group by group, alike datasets side by side; red where they conflict.

    More datasets than the picture has points are averaged, block by block, without the diagonal; then names would say
    nothing, and the groups' numbers alone are written.

    Args:
        matrix: C, [T, T]. groups: the group of each dataset, [T].
    """
    order = display_order(matrix, groups)
    count = len(order)
    side = float(np.clip(2.2 + 0.36 * min(count, _MAX_LABELS), 3.8, 14.0))
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    shown, width = averaged(matrix, order, _MAX_POINTS)
    off_diagonal = np.abs(shown[~np.eye(len(shown), dtype=bool)])
    limit = float(np.clip(np.ceil(10 * off_diagonal.max()) / 10, 0.1, 1.0)) if off_diagonal.size else 1.0
    extent = (-0.5, count - 0.5, count - 0.5, -0.5)
    image = axes.imshow(shown, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest", extent=extent)
    figure.colorbar(image, ax=axes, shrink=0.75, label=f"cosine (colours end at ±{limit:.1f})")
    step = _label_ticks(axes, [names[index] for index in order]) if width == 1 else 0
    if count <= _MAX_VALUES:
        for row in range(count):
            for column in range(count):
                value = shown[row, column]
                colour = "white" if abs(value) > 0.7 * limit else "black"
                axes.text(
                    column,
                    row,
                    f"{value:.2f}".replace("-0.00", "0.00"),
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=colour,
                )
    start = 0
    for group in sorted(set(groups)):
        size = list(groups).count(group)
        axes.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, fill=False, lw=2.0, ec="black"))
        axes.annotate(
            str(group), (start + (size - 1) / 2, -0.5), (0, 3), textcoords="offset points", fontsize=8,
            weight="bold", ha="center", va="bottom",
        )  # fmt: skip
        start += size
    if width > 1:
        note = f"; {count:,} datasets, a point is the mean of up to {width} × {width} pairs"
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        note = "" if step == 1 else f"; 1 name in {step} is shown"
    axes.set_title(
        f"Which datasets pull together (blue) and which conflict (red)\nboxes: the groups, numbered{note}",
        fontsize=10,
        pad=18,
    )
    _save(figure, path)


def save_pca_scatter(
    coordinates: np.ndarray,
    names: Sequence[str],
    groups: Sequence[int],
    explained: Sequence[float],
    num_input_tokens: Sequence[int],
    path: Path,
) -> None:
    """Datasets on the first two conflict axes, coloured by group, area by tokens.

    Args:
        coordinates: [T, r ≥ 1]; with a third axis, a second panel. explained: share of the variance of each axis.
    """
    others: list[int | None] = [*range(1, min(coordinates.shape[1], 3))] or [None]
    figure = Figure(figsize=(7.5 * len(others), 5.8), layout="constrained")
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    sizes = np.asarray(num_input_tokens, dtype=float)
    crowd = min(1.0, _MAX_LABELS / len(names))
    # Points of a crowd get smaller, but stay visible: no edge, and see-through where they lie on each other.
    areas = np.maximum((30 + 220 * sizes / max(sizes.max(), 1.0)) * crowd, 3.0)
    edge, alpha = ("white", 0.85) if len(names) <= _MAX_POINTS else ("none", 0.4)
    x = coordinates[:, 0]
    heights = [np.zeros(len(x)) if other is None else coordinates[:, other] for other in others]
    for axes, other, y in zip(panels, others, heights, strict=True):
        for group in sorted(set(groups)):
            mine = np.array(groups) == group
            axes.scatter(
                x[mine], y[mine], s=areas[mine], color=_COLOURS[group % 8], marker=_MARKERS[group // 8 % 8],
                alpha=alpha, edgecolor=edge, label=f"group {group}",
            )  # fmt: skip
        axes.margins(x=0.24, y=0.14)
        axes.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
        axes.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
        axes.set_xlabel(_axis_label(0, explained))
        axes.set_ylabel(_axis_label(other or 1, explained))
    # In a crowd of thousands a name would stand far from its point.
    named = len(names) <= _MAX_POINTS
    note = "" if len(names) <= _MAX_NAMES or not named else "; named: the outermost"
    figure.suptitle(f"The datasets on the main axes of conflict (area: tokens{note})", fontsize=10)
    legend = panels[0].legend(
        loc="best", fontsize=8, markerscale=min(0.6 / crowd**0.5, 4.0), ncols=1 + len(set(groups)) // 9
    )
    # Places in pixels are final only once every panel is laid out.
    FigureCanvasAgg(figure).draw()
    figure.set_layout_engine("none")
    for axes, y in zip(panels, heights, strict=True) if named else ():
        _annotate(figure, axes, x, y, names, legend.get_window_extent() if axes is panels[0] else None)
    _save(figure, path)


def save_group_sizes(names: Sequence[str], groups: Sequence[int], num_input_tokens: Sequence[int], path: Path) -> None:
    """Tokens of every group, its datasets stacked; of many datasets, the sums alone."""
    numbers = sorted(set(groups))
    figure = Figure(figsize=(7.5, float(np.clip(1.0 + 0.5 * len(numbers), 1.6, 12.0))), layout="constrained")
    axes = figure.subplots()
    total = sum(num_input_tokens)
    if len(names) > _MAX_PARTS:
        sums = [sum(t for t, g in zip(num_input_tokens, groups, strict=True) if g == group) for group in numbers]
        axes.barh(range(len(numbers)), sums, color=[_COLOURS[group % 8] for group in numbers])
        numbers_drawn = []
    else:
        numbers_drawn = numbers
    for row, group in enumerate(numbers_drawn):
        left = 0
        for index in [i for i, g in enumerate(groups) if g == group]:
            width = num_input_tokens[index]
            axes.barh(row, width, left=left, color=_COLOURS[group % 8], edgecolor="white", lw=1)
            if width > 0.07 * total / max(1, len(numbers)) * 2 and len(names) <= _MAX_LABELS:
                axes.text(
                    left + width / 2,
                    row,
                    names[index],
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color="white" if group % 8 in _DARK else "black",
                )
            left += width
    axes.set_yticks(range(len(numbers)), [f"group {group}" for group in numbers], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("input tokens in one pass")
    _save(figure, path)


def save_losses(logs: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Training loss over steps, a line a model.

    Args:
        logs: {"group 0" or "joint": [(step, loss), …]}.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(logs.items()):
        steps, losses = zip(*points, strict=True)
        joint = name == "joint"
        axes.plot(
            steps, losses, ":" if joint else "-", color="black" if joint else _COLOURS[number % 8], lw=1.6, label=name,
            marker=_MARKERS[number % 8] if len(points) <= 40 else None, ms=4,
        )  # fmt: skip
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend(fontsize=8, ncols=1 + len(logs) // 9)
    _save(figure, path)


def save_comparison(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Held-out loss of several models, a row a dataset; the bar goes from the base to the merged model.

    Args:
        rows: {dataset: {model: loss}}, in the order to show; models as in [`MODELS`].
    """
    figure = Figure(figsize=(7.5, float(np.clip(1.2 + 0.24 * len(rows), 2.2, 16.0))), layout="constrained")
    axes = figure.subplots()
    for row, losses in enumerate(rows.values()):
        if {"base", "merged"} <= losses.keys():
            axes.plot([losses["base"], losses["merged"]], [row, row], color="#cfd4da", lw=4, zorder=1)
    for model, (colour, marker, open_) in MODELS.items():
        places = [(losses[model], row) for row, losses in enumerate(rows.values()) if model in losses]
        if places:
            x, y = zip(*places, strict=True)
            axes.scatter(x, y, marker=marker, s=42, facecolor="white" if open_ else colour, edgecolor=colour,
                         label=model, zorder=2)  # fmt: skip
    axes.set_yticks(range(len(rows)), [public_text(name, 40) for name in rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_xlabel("held-out loss (nats a token); lower is better")
    axes.legend(fontsize=8, ncols=len(MODELS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _save(figure, path)


def _axis_label(axis: int, explained: Sequence[float]) -> str:
    share = f" ({explained[axis]:.0%} of the variance)" if axis < len(explained) else ""
    return f"conflict axis {axis + 1}{share}"


def averaged(matrix: np.ndarray, order: np.ndarray, max_points: int) -> tuple[np.ndarray, int]:
    """The matrix in an order, at most `max_points` wide: means over blocks of w × w pairs, the diagonal left out.

    Returns:
        The means, float64, and w; where w is 1, the entries as they are.
    """
    count = len(order)
    width = -(-count // max_points)
    if width == 1:
        return matrix[np.ix_(order, order)], 1
    starts = np.arange(0, count, width)
    sizes = np.diff(np.append(starts, count))
    means = np.empty((len(starts), len(starts)))
    for point, start in enumerate(starts):
        rows = order[start : start + width]
        block = matrix[rows].sum(axis=0, dtype=np.float64)
        block[rows] -= matrix[rows, rows]
        means[point] = np.add.reduceat(block[order], starts)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    return means / np.maximum(pairs, 1), width


def display_order(matrix: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Positions sorted by group, and inside a group by hierarchical clustering of the rows.

    Clustering takes the square of a group's size: of a large one, evenly spaced members are clustered, and each other
    member follows the one that it is most similar to.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    def clustered(members: np.ndarray) -> np.ndarray:
        distance = np.clip(1.0 - matrix[np.ix_(members, members)], 0.0, None)
        np.fill_diagonal(distance, 0.0)
        return members[leaves_list(linkage(squareform(distance, checks=False), "average"))]

    order: list[int] = []
    for group in sorted(set(groups)):
        members = np.flatnonzero(np.array(groups) == group)
        if len(members) > _MAX_CLUSTERED:
            leaders = clustered(members[:: -(-len(members) // _MAX_CLUSTERED)])
            nearest = matrix[np.ix_(members, leaders)].argmax(axis=1)
            members = members[np.argsort(nearest, kind="stable")]
        elif len(members) > 2:
            members = clustered(members)
        order += members.tolist()
    return np.array(order)


def _label_ticks(axes: Axes, labels: Sequence[str]) -> int:
    """Name every row and column, or every n-th where there is no room; returns n."""
    step = -(-len(labels) // _MAX_TICKS)
    size = float(np.clip(11 - 0.08 * len(labels), 4.5, 8.5))
    positions = range(0, len(labels), step)
    axes.set_xticks(positions, labels[::step], rotation=90, fontsize=size)
    axes.set_yticks(positions, labels[::step], fontsize=size)
    return step


def _annotate(
    figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], legend: Bbox | None
) -> None:
    """Names beside their points, each moved to the first free place around it, inside the axes and off the legend."""
    to_pixels = axes.transData.transform(np.column_stack([x, y]))
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in to_pixels]
    taken += [legend.extents] if legend is not None else []
    inside = axes.get_window_extent()
    places = ((9, -3), (9, 9), (9, -15), (-9, -3), (-9, 9), (-9, -15), (9, 21), (-9, 21), (9, -27), (-9, -27))
    # The outermost names are the ones worth reading; those of the crowd in the middle would hide it.
    outermost = np.argsort(-((x / max(x.std(), 1e-12)) ** 2 + (y / max(y.std(), 1e-12)) ** 2), kind="stable")
    named = set(outermost[:_MAX_NAMES].tolist())
    for index in np.argsort(-y, kind="stable"):
        if int(index) not in named:
            continue
        px, py = to_pixels[index]
        width = 4.6 * len(names[index]) * figure.dpi / 72
        for dx, dy in places:
            left = px + dx if dx > 0 else px + dx - width
            box = (left, py + dy, left + width, py + dy + 11)
            within = box[0] > inside.x0 and box[2] < inside.x1 and box[1] > inside.y0 and box[3] < inside.y1
            if within and all(box[0] > t[2] or box[2] < t[0] or box[1] > t[3] or box[3] < t[1] for t in taken):
                break
        else:
            continue  # No free place: a name on top of another would make both unreadable.
        taken.append(box)
        axes.annotate(
            names[index], (x[index], y[index]), (dx, dy), textcoords="offset points", fontsize=7,
            ha="left" if dx > 0 else "right",
        )  # fmt: skip


def _save(figure: Figure, path: Path) -> None:
    # Names are data: a dollar sign in one is no formula.
    for axes in figure.axes:
        for text in [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]:
            text.set_parse_math(False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})

"""The figures as PNG: names and axes of large plans, and the same losses as the report's."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from merit_hf.figures import (
    MODELS,
    display_order,
    save_comparison,
    save_conflict_heatmap,
    save_losses,
    save_pca_scatter,
)


def size(path: Path) -> tuple[int, int]:
    """Width and height that the PNG's header tells."""
    return struct.unpack(">II", path.read_bytes()[16:24])


def scatter(path: Path, coordinates: np.ndarray, names: list[str]) -> bytes:
    groups = [index % 8 for index in range(len(names))]
    save_pca_scatter(coordinates, names, groups, [0.5, 0.2, 0.1], [100] * len(names), path)
    return path.read_bytes()


def test_the_third_axis_has_a_panel_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coordinates = rng.normal(size=(20, 3))
    names = [f"d{index}" for index in range(20)]
    three = scatter(tmp_path / "three.png", coordinates, names)
    scatter(tmp_path / "two.png", coordinates[:, :2], names)
    assert size(tmp_path / "three.png")[0] == 2 * size(tmp_path / "two.png")[0]
    moved = coordinates.copy()
    moved[3, 2] += 1.0
    assert scatter(tmp_path / "moved.png", moved, names) != three
    assert scatter(tmp_path / "flat.png", coordinates[:, :1], names).startswith(b"\x89PNG")


def test_many_datasets_are_named_where_they_stand_out(tmp_path: Path) -> None:
    count = 200
    coordinates = 0.1 * np.random.default_rng(0).normal(size=(count, 2))
    coordinates[7] = (3.0, 3.0)
    coordinates[8] = (0.0, 0.0)
    names = [f"d{index}" for index in range(count)]
    shown = scatter(tmp_path / "a.png", coordinates, names)
    assert scatter(tmp_path / "b.png", coordinates, [*names[:7], "other", *names[8:]]) != shown
    assert scatter(tmp_path / "c.png", coordinates, [*names[:8], "other", *names[9:]]) == shown


def test_a_heatmap_too_large_for_all_names_shows_every_second(tmp_path: Path) -> None:
    count = 160
    names = [f"d{index}" for index in range(count)]
    groups = [0] * (count // 2) + [1] * (count // 2)
    matrix = np.full((count, count), 0.1) + 0.9 * np.eye(count)

    def drawn(labels: list[str]) -> bytes:
        save_conflict_heatmap(matrix, labels, groups, tmp_path / "heatmap.png")
        return (tmp_path / "heatmap.png").read_bytes()

    before = drawn(names)
    for place, shown in ((40, True), (41, False)):
        changed = list(names)
        changed[display_order(matrix, groups)[place]] = "other"
        assert (drawn(changed) != before) == shown


def test_losses_and_results_are_drawn_twice_the_same(tmp_path: Path) -> None:
    logs = {"group 0": [(1.0, 3.0), (2.0, 2.0)], "joint": [(1.0, 3.0)]}
    rows = {f"${name}": dict.fromkeys(MODELS, 2.0) | {"merged": 1.0} for name in "abc"}
    for name in ("one", "two"):
        save_losses(logs, tmp_path / f"losses-{name}.png")
        save_comparison(rows, tmp_path / f"rows-{name}.png")
    for what in ("losses", "rows"):
        assert (tmp_path / f"{what}-one.png").read_bytes() == (tmp_path / f"{what}-two.png").read_bytes()
    save_comparison(rows | {"$c": {"base": 2.0}}, tmp_path / "fewer.png")
    assert (tmp_path / "fewer.png").read_bytes() != (tmp_path / "rows-one.png").read_bytes()

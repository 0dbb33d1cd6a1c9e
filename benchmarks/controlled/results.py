"""Tables and figures of controlled experiments, from their raw results alone.

    python benchmarks/controlled/results.py runs/controlled/smoke/results.jsonl --output benchmarks/controlled

writes OUTPUT/RESULTS.md and OUTPUT/figures/. Every number in the text comes from the files that are given.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from entries import shown
from experiment import BASE
from record import read_rows
from summaries import Summary, across_conditions, predictors_across, summaries
from verdicts import advice, controls, for_users, held, in_short, limits

from merit_hf.config import ConfigError
from merit_hf.entry import exit_on_error

HERE = Path(__file__).resolve().parent
TEMPLATE = "RESULTS.md.jinja"


def write_results(files: Sequence[Path], output: Path) -> Path:
    """RESULTS.md and its figures.

    Raises:
        ConfigError: a file that is not there, or nothing in any of them.
    """
    known = [summary for file in files for summary in summaries(read_rows(file))]
    found = [summary for summary in known if BASE in summary.cells]
    if not known:
        raise ConfigError(f"{', '.join(map(str, files))}: no finished cell yet. Run the experiment first.")
    (output / "figures").mkdir(parents=True, exist_ok=True)
    pictures = {summary.title: save_trade_off(summary, output / "figures") for summary in found}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "shown": shown, "number": number, "held": held, "controls": controls, "limits": limits, "advice": advice,
        "in_short": in_short, "for_users": for_users,
    }  # fmt: skip
    results = [summary for summary in found if summary.experiment.claims]
    text = environment.get_template(TEMPLATE).render(
        results=results,
        trials=[summary for summary in found if not summary.experiment.claims],
        stopped=[summary for summary in known if BASE not in summary.cells],
        pictures=pictures,
        across=across_conditions(results),
        predictors=predictors_across(results),
        sources=[_named(file) for file in files],
    )
    path = output / "RESULTS.md"
    part = path.with_name(path.name + ".part")
    part.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def _named(file: Path) -> str:
    """As one who stands in the repository would call it; of a file elsewhere, its name."""
    root = HERE.parents[1]
    return file.resolve().relative_to(root).as_posix() if file.resolve().is_relative_to(root) else file.name


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def save_trade_off(summary: Summary, folder: Path) -> str | None:
    """Loss on the mixture against what was forgotten, arms and lines; None where there is nothing to show."""
    if BASE not in summary.cells or len(summary.cells) < 2:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mixture, held_out = summary.mixture, summary.held_out
    base = summary.cells[BASE][None, None]
    figure, axes = plt.subplots(figsize=(7.5, 5), constrained_layout=True)
    colours = {arm.name: f"C{i % 10}" for i, arm in enumerate(summary.experiment.arms)}
    markers = {arm.name: "osD^vP*X"[i % 8] for i, arm in enumerate(summary.experiment.arms)}
    for name in summary.experiment.lines.of:
        curves = [summary.curve(name, seeds) for seeds in summary.cells.get(name, {})]
        lines = [curve for curve in curves if curve is not None]
        if lines:
            along = np.linspace(0, lines[0].lambdas[-1], 100)
            x = np.mean([curve.at(along, mixture).mean(axis=1) for curve in lines], axis=0)
            y = np.mean([curve.at(along, held_out).mean(axis=1) for curve in lines], axis=0) - base.loss(held_out)
            axes.plot(x, y, "-", color=colours[name], linewidth=1, alpha=0.7)
    for arm in summary.experiment.arms:
        cells = summary.cells.get(arm.name, {}).values()
        x = [cell.loss(mixture) for cell in cells]
        y = [cell.loss(held_out) - base.loss(held_out) for cell in cells]
        if x:
            axes.plot(x, y, markers[arm.name], color=colours[arm.name], markersize=3, alpha=0.5)
            axes.plot(np.mean(x), np.mean(y), markers[arm.name], color=colours[arm.name], markersize=8, label=arm.name)
    axes.plot(base.loss(mixture), 0, "k+", markersize=10, label=BASE)
    axes.set_xlabel("loss on the mixture, nats a token (test rows)")
    axes.set_ylabel("forgotten: held-out loss − the base's, nats a token")
    axes.set_title(f"{summary.title}: better is to the left and down; curves are θ0 + λ(θ − θ0)", fontsize=9)
    axes.legend(fontsize=8)
    path = folder / f"{re.sub(r'[^a-zA-Z0-9]+', '-', summary.title)}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"figures/{path.name}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULTS.jsonl", help="what run.py wrote")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for RESULTS.md and figures/ (default: here)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options: Any = parser.parse_args(argv)
    with exit_on_error(options.debug):
        path = write_results(options.files, options.output)
        sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    main()

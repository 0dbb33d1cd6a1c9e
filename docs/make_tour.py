r"""docs/tour.md and its pictures, from the finished run of the quickstart: `make screenshots` after `make demo`.

    python docs/make_tour.py runs/quickstart/run

Section 5 has its numbers from run/diagnosis, which `merit diagnose` leaves when it is told to:

    cd runs/quickstart/run && merit diagnose plan groups/0 groups/1 groups/2 groups/3 --merged merged \
        --joint joint/groups/0 --num-samples 4 --forward-only --epsilon 0.5 --epsilon 1 --output diagnosis

Needs Chromium (`make browser`), or the path of one in MERIT_CHROMIUM.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from merit_hf.figures import save_plan_figures
from merit_hf.report.blocks import Cell, Table, decimals
from merit_hf.report.diagnosed import diagnosis_facts
from merit_hf.report.page import save_evaluation_figure, write_report
from merit_hf.report.results import evaluation_facts
from merit_hf.report.run_folder import RunFolder, read_run
from merit_hf.report.sections import merge_facts, plan_facts, training_facts
from merit_hf.text import escape_markdown

DOCS = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Shot = tuple[str, tuple[int, int], bool, str | None]
# Name, size of the window, dark, and the heading that the picture begins at.
SHOTS: tuple[Shot, ...] = (
    ("report_desktop", (1180, 1420), False, None),
    ("report_conflict", (1180, 1010), False, "Which datasets agree, and which conflict"),
    ("report_phone", (360, 1100), False, "Which datasets agree, and which conflict"),
    ("report_dark", (1180, 1180), True, "The results: winners and losers"),
)
DIAGNOSIS_SHOT: Shot = ("report_diagnosis", (1180, 1000), False, "The diagnosis: was it one basin")


def render_tour(run: RunFolder) -> str:
    """docs/tour.md of a run that is merged and evaluated."""
    plan, training, merge, results = plan_facts(run.plan), training_facts(run), merge_facts(run), evaluation_facts(run)
    assert merge is not None, "the run is not merged"
    assert results is not None, "the run is not evaluated"
    diagnosis = diagnosis_facts(run)
    conflict, matrix = plan["conflict"], run.plan.conflict_matrix
    assert matrix is not None, "the plan has no conflict matrix"
    pairs = np.stack(np.triu_indices(len(matrix), 1), axis=1)
    order = np.argsort(matrix[pairs[:, 0], pairs[:, 1]], kind="stable")
    losses: Table = results["table"]
    joint = [cell for (title, _), cell in zip(losses.columns, losses.last, strict=True) if title == "merged − joint"]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = (DOCS / "tour.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        count=len(run.plan.datasets),
        groups=run.plan.num_groups,
        cosines=conflict["cosines"],
        verdict=conflict["verdict"],
        lowest=pair(run, pairs[order[0]]),
        highest=pair(run, pairs[order[-1]]),
        axes=rows(conflict["axes"]),
        balance=f"{plan['balance']:.0%}",
        group_rows=rows(plan["groups"]),
        training=rows(training["table"]),
        mismatched=training["mismatched"],
        merge_rows=rows(merge["table"]),
        displacement=decimals(merge["stats"]["displacement"]),
        mean_distance=decimals(merge["mean_distance"]),
        agreement=None if merge["agreement"] is None else decimals(merge["agreement"], 2),
        cast=f"{100 * merge['cast_share']:.1g} %",
        sentences=results["sentences"],
        results_head=head(losses),
        results=rows(losses),
        beats_joint=bool(joint) and (joint[0].value or 0) < 0,
        fewest=results["fewest"],
        diagnosis=diagnosis,
        gain_head=head(diagnosis["gain"]) if diagnosis and diagnosis["gain"] else "",
        gains=rows(diagnosis["gain"]) if diagnosis and diagnosis["gain"] else [],
    ).rstrip() + "\n"  # fmt: skip


def pair(run: RunFolder, indices: Sequence[int]) -> dict[str, str]:
    a, b = (int(index) for index in indices)
    matrix = run.plan.conflict_matrix
    assert matrix is not None
    names = [escape_markdown(run.plan.names[index]) for index in (a, b)]
    return {"a": names[0], "b": names[1], "cosine": decimals(matrix[a, b], 2)}


def rows(table: Table) -> list[list[str]]:
    def cells(row: Sequence[Cell]) -> list[str]:
        return [str(escape_markdown(cell.text)) for cell in row]

    return [cells(row) for row in [*table.rows, *([table.last] if table.last else [])]]


def head(table: Table) -> str:
    titles = [str(escape_markdown(title)) for title, _ in table.columns]
    rule = ["---:" if kind == "number" else "---" for _, kind in table.columns]
    return f"| {' | '.join(titles)} |\n|{'|'.join(rule)}|"


def take_screenshots(page_path: Path, folder: Path, shots: Sequence[Shot]) -> None:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("MERIT_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        for name, (width, height), dark, heading in shots:
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                reduced_motion="reduce",
            )
            page.set_default_timeout(120_000)
            page.goto(page_path.as_uri())
            page.wait_for_selector("html.drawn")
            if heading is not None:
                page.locator("h2, h3", has_text=heading).first.evaluate("element => element.scrollIntoView()")
            if name == "report_conflict":
                cells = page.locator("#chart-conflict .nsewdrag").bounding_box()
                assert cells is not None
                page.mouse.move(cells["x"] + 0.88 * cells["width"], cells["y"] + 0.54 * cells["height"])
                page.locator("#chart-conflict .hoverlayer .hovertext").wait_for()
            path = folder / f"{name}.png"
            page.screenshot(path=path)
            shrink(path)
        browser.close()


def shrink(path: Path) -> None:
    """To a palette of 256 colours: a third of the bytes, and no difference to the eye."""
    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder that `merit run` made")
    parser.add_argument("--output", type=Path, default=DOCS, help="where tour.md and images/ go")
    options = parser.parse_args()
    images: Path = options.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    run = read_run(options.run)
    (options.output / "tour.md").write_text(render_tour(run), encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        save_plan_figures(run.plan, Path(scratch))
        assert run.evaluation is not None
        picture = save_evaluation_figure(run.evaluation, run.merged, Path(scratch))
        for source, name in ((Path(scratch) / "figures/conflict.png", "conflict"),
                             (Path(scratch) / "figures/axes.png", "axes"), (picture, "results")):  # fmt: skip
            shutil.copyfile(source, images / f"quickstart_{name}.png")
        shots = SHOTS if run.diagnosis is None else (*SHOTS, DIAGNOSIS_SHOT)
        take_screenshots(write_report(options.run, Path(scratch) / "report.html"), images, shots)


if __name__ == "__main__":
    main()

"""The report's page in headless Chromium: it draws, answers mouse and keyboard, loads nothing, and fits a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright
from test_report import HOSTILE, NAMES

from merit_hf.plan import PartitionPlan
from merit_hf.report.charts import unique_labels
from merit_hf.report.page import write_report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


# A slow machine is no failure.
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, or Playwright's own. Without one the tests are skipped, or fail where CI asks for one."""
    found = os.environ.get("MERIT_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found)
        except Error as error:
            if os.environ.get("MERIT_REQUIRE_BROWSER"):
                raise
            pytest.skip(f"no Chromium: apt-get install chromium, or set MERIT_CHROMIUM ({str(error).splitlines()[0]})")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of six datasets in five groups, so with three axes, and its page. Read only."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    runs.make_run(folder, NAMES, 5)
    write_report(folder)
    return folder


def opened(browser: Browser, folder: Path, **context: Any) -> tuple[Page, list[str]]:
    """The page once its figures are drawn, and a list that fills with whatever goes wrong in it."""
    context = {"viewport": DESKTOP, **context}
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(120_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: wrong.append(request.url) if request.url != page_url(folder) else None)
    page.goto(page_url(folder))
    if context.get("java_script_enabled", True):
        page.wait_for_selector("html.drawn")
    return page, wrong


def page_url(folder: Path) -> str:
    return (folder / "report.html").as_uri()


def overflow(page: Page) -> int:
    """How far the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def open_all(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((element) => { element.open = true; })")


# Between them they hold every layout and every colour.
@pytest.mark.parametrize(
    "context",
    [{}, {"viewport": PHONE, "color_scheme": "dark", "has_touch": True, "is_mobile": True}],
    ids=["desktop", "dark phone"],
)
def test_the_page_draws_fits_and_is_accessible(context: dict[str, Any], browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run, **context)
    assert overflow(page) == 0
    open_all(page)
    assert overflow(page) == 0
    for name in ("sizes", "conflict", "axes", "losses", "comparison", "gain"):
        box = page.locator(f"#chart-{name} svg.main-svg").first.bounding_box()
        assert box is not None, name
        assert box["width"] > 250, name
        assert box["height"] > 100, name
    assert page.locator("#chart-conflict .hm image").count() == 1
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    assert wrong == []
    page.context.close()


def test_pointing_at_a_cell_reads_it(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run)
    plan = PartitionPlan.from_pretrained(run / "plan")
    matrix = plan.conflict_matrix
    assert matrix is not None
    page.select_option("#order", "names")
    page.locator("#chart-conflict").scroll_into_view_if_needed()
    for row, column in ((1, 4), (5, 0)):
        box = page.locator("#chart-conflict .nsewdrag").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 6, box["y"] + (row + 0.5) * box["height"] / 6)
        value = f"{matrix[row, column]:.2f}".replace("-", "−").replace("−0.00", "0.00")
        expect(page.locator("#readout")).to_contain_text(f"{plan.names[row]} and {plan.names[column]}: {value} ")
        label = page.locator("#chart-conflict .hoverlayer").text_content() or ""
        for part in (plan.names[row], plan.names[column], f"cosine {value}"):
            assert part in label.replace("-", "−"), label
    assert wrong == []
    page.context.close()


def test_the_order_of_the_rows_and_the_look_up(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run)
    plan = PartitionPlan.from_pretrained(run / "plan")
    assert plan.conflict_matrix is not None
    shown = "document.getElementById('chart-conflict').data[0]"
    for order in ("groups", "clusters", "names"):
        page.select_option("#order", order)
        names = page.evaluate(f"{shown}.y")
        indices = [plan.names.index(name) for name in names]
        expected = plan.conflict_matrix[np.ix_(indices, indices)]
        assert np.allclose(page.evaluate(f"{shown}.z"), expected, atol=0.0051)
        boxes = page.evaluate("document.getElementById('chart-conflict').layout.shapes || []")
        assert len(boxes) == (5 if order == "groups" else 0)
    assert names == plan.names
    page.select_option("#lookup", "0")
    first, last = np.argsort(plan.conflict_matrix[0][1:])[[0, -1]] + 1
    items = page.locator("#found li").all_text_contents()
    assert items[0].startswith(f"{plan.names[first]}: ")
    assert any(item.startswith(f"{plan.names[last]}: ") for item in items)
    page.select_option("#axes-pair", "1 2")
    trace = page.evaluate("document.getElementById('chart-axes').data[0]")
    member = next(dataset for dataset in plan.datasets if dataset.group == 0)
    assert [trace["x"][0], trace["y"][0]] == pytest.approx(member.coordinates[1:3], abs=1e-4)
    assert wrong == []
    page.context.close()


def test_the_keyboard_reaches_every_control(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run)
    seen: list[str] = []
    describe = """() => {
        const element = document.activeElement, style = getComputedStyle(element);
        const name = element.id || element.textContent.trim().slice(0, 30) || element.tagName;
        const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
        return [element === document.body ? "" : name, outlined];
    }"""
    while len(seen) < 300:
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(describe)
        if not name:
            break
        assert outlined, f"{name} shows no focus"
        seen.append(name)
    assert seen[:4] == ["Skip to the report", "Plan", "Training", "Merge"]
    for control in (
        "order",
        "lookup",
        "axes-pair",
        "What a cosine says",
        "merged − base",
        "Every model on every dataset",
    ):
        assert any(name.startswith(control) for name in seen), control
    page.focus("text=What a cosine says")
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1
    assert wrong == []
    page.context.close()


def test_tables_sort_by_number_and_back(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run)
    table = page.locator("#losses-table")
    header = table.locator("th", has_text="merged − base").first

    def column() -> list[float]:
        cells = table.locator("tbody tr td:nth-child(3)").evaluate_all("cells => cells.map(c => c.dataset.value)")
        return [float(cell) for cell in cells]

    for direction in ("ascending", "descending"):
        header.locator("button").focus()
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == direction
        assert column() == sorted(column(), reverse=direction == "descending")
    table.locator("th button").first.click()
    assert header.get_attribute("aria-sort") == "none"
    assert table.locator("tbody th").all_text_contents() == sorted(NAMES)
    assert table.locator("tfoot th").text_content() == "mean"
    assert wrong == []
    page.context.close()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_hostile_names_are_shown_as_they_are(viewport: dict[str, int], browser: Browser, tmp_path: Path) -> None:
    plan = runs.make_run(tmp_path, HOSTILE)
    write_report(tmp_path)
    page, wrong = opened(browser, tmp_path, viewport=viewport)
    open_all(page)
    assert overflow(page) == 0
    assert page.evaluate("window.pwned") is None
    assert page.locator("main a, main img, .chart a, .chart b").count() == 0
    labels = unique_labels(plan.names, 28)
    if viewport is DESKTOP:
        # Plotly turns blanks into no-break spaces.
        ticks = [text.replace("\xa0", " ") for text in page.locator("#chart-conflict .ytick text").all_text_contents()]
        assert sorted(ticks) == sorted(labels)
    page.select_option("#order", "names")
    page.locator("#chart-conflict").scroll_into_view_if_needed()
    box = page.locator("#chart-conflict .nsewdrag").bounding_box()
    assert box is not None
    for number, name in enumerate(labels):
        at = (number + 0.5) / len(labels)
        page.mouse.move(box["x"] + at * box["width"], box["y"] + at * box["height"])
        expect(page.locator("#readout")).to_have_text(
            f"{name} and {name}: 1.00 (both in group {plan.datasets[number].group})"
        )
        label = (page.locator("#chart-conflict .hoverlayer").text_content() or "").replace("\xa0", " ")
        assert label.count(name) == 2, (name, label)
    drawn = page.evaluate("[...document.querySelectorAll('.lookup option')].map((option) => option.textContent)")
    assert drawn[1:] == labels
    assert wrong == []
    page.context.close()


def test_five_hundred_datasets_stay_usable(browser: Browser, large_run: Path) -> None:
    page, wrong = opened(browser, large_run)
    assert overflow(page) == 0
    ticks = page.locator("#chart-conflict .ytick text").count()
    assert 10 < ticks < 120, "names that do not fit are thinned out"
    page.locator("#chart-conflict").scroll_into_view_if_needed()
    box = page.locator("#chart-conflict .nsewdrag").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    expect(page.locator("#readout")).to_contain_text(" and org__")
    page.locator("summary", has_text="Every dataset, with its numbers").click()
    page.fill("#search-datasets", "name-04")
    assert page.locator("#datasets tbody tr:visible").count() == 10
    assert "10 of 500 rows" in (page.locator(".search", has=page.locator("#search-datasets")).text_content() or "")
    assert wrong == []
    page.context.close()


def test_without_javascript_every_table_is_there(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run, java_script_enabled=False, viewport=PHONE)
    assert page.locator("noscript p").is_visible()
    assert not page.locator("#order").is_visible()
    assert page.locator("#losses-table").is_visible()
    assert page.locator("button").count() == 0
    assert wrong == []
    page.context.close()


def test_colours_follow_the_reader(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run, color_scheme="light")
    ink = page.locator("#chart-losses .xtick text").first
    page.emulate_media(color_scheme="dark")
    expect(ink).to_have_css("fill", "rgb(232, 234, 237)")
    page.emulate_media(color_scheme="light")
    expect(ink).to_have_css("fill", "rgb(27, 30, 35)")
    page.set_viewport_size(PHONE)
    expect(page.locator("#chart-losses svg.main-svg").first).to_have_attribute("width", "328")
    assert overflow(page) == 0
    assert wrong == []
    page.context.close()


def test_the_page_is_not_allowed_to_ask_anybody(browser: Browser, run: Path) -> None:
    page, wrong = opened(browser, run)
    with pytest.raises(Error, match="fetch"):
        page.evaluate("async () => { await fetch('http://127.0.0.1:9/'); }")
    with pytest.raises(Error, match="Content Security Policy"):
        page.add_script_tag(content="window.pwned = 1")
    assert page.evaluate("window.pwned") is None
    assert wrong, "the refusals are on the console"
    page.context.close()

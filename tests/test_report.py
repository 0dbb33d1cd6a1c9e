"""The report's page as a file: self-contained, the same twice, inert names, right numbers, every section optional."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritError
from merit_hf.plan import PartitionPlan
from merit_hf.report.blocks import change, decimals, estimate, listed, signed
from merit_hf.report.charts import thinned, unique_labels
from merit_hf.report.page import write_report
from merit_hf.report.run_folder import read_run
from merit_hf.report.sections import step_agreement

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
HOSTILE = [
    "</script><script>window.pwned=1</script>", "<!-- <script>", "<b>bold</b>", '<a href="https://evil.example">x</a>',
    "<img src=x onerror=window.pwned=1>",
    "{{ 7*7 }}", "%{x} %{customdata}", "&lt;i&gt;", "\" onmouseover='1'", "$x^2$",
    "]]>", "/home/me/secret/chat.jsonl", "a" * 300, "line\nbreak", "\u202eright to left", "2024", "--g0", "nul\u2028l",
]  # fmt: skip


class Page(html.parser.HTMLParser):
    """Elements with their attributes, text by element, and the content of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._parts: list[str] = []
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join("".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._open != "style":
            self._parts.append(data)

    @property
    def charts(self) -> dict[str, Any]:
        (content,) = [text for attributes, text in self.scripts if attributes.get("id") == "figures"]
        return dict(json.loads(content))

    def table(self, name: str) -> bool:
        return ("table", name) in [(tag, attributes.get("id")) for tag, attributes in self.elements]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of six datasets in two groups. Read only."""
    folder = tmp_path_factory.mktemp("run") / "run"
    runs.make_run(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


def test_the_page_is_one_file_that_may_load_nothing(page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    code = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in code}
    assert set(rules["script-src"].split()) == hashes
    assert len(code) == 2


def test_the_same_folder_gives_the_same_bytes_and_an_unchanged_page_is_left_alone(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "elsewhere"))
    written = write_report(copy, tmp_path / "pages" / "page.html")
    assert written.read_bytes() == write_report(run).read_bytes()
    assert str(tmp_path) not in written.read_text(encoding="utf-8")
    before = written.stat()
    write_report(copy, written)
    assert (written.stat().st_mtime_ns, written.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    (copy / "merged" / "merit.json").unlink()
    assert write_report(copy, written).stat().st_ino != before.st_ino
    assert list(written.parent.iterdir()) == [written]


def test_every_figure_is_valid_to_plotly(page: Page) -> None:
    assert set(page.charts) == {"sizes", "conflict", "axes", "losses", "comparison", "gain"}

    def resolved(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: resolved(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [resolved(entry, key) for entry in value]
        if key in ("color", "colorscale"):
            assert re.fullmatch(r"--[a-z0-9-]+", value)
            return "#123456" if key == "color" else [[0, "#000000"], [1, "#ffffff"]]
        return value

    for chart in page.charts.values():
        go.Figure(data=resolved(chart["data"]), layout=resolved(chart["layout"]))


def test_the_figures_hold_the_plans_numbers(run: Path, page: Page) -> None:
    plan = PartitionPlan.from_pretrained(run / "plan")
    chart = page.charts["conflict"]
    matrix = np.frombuffer(base64.b64decode(chart["matrix"]), dtype=np.int8).reshape(6, 6) / 100
    assert plan.conflict_matrix is not None
    assert np.abs(matrix - plan.conflict_matrix).max() <= 0.005 + 1e-12
    assert chart["labels"] == plan.names
    by_group = [plan.datasets[index].group for index in chart["orders"]["groups"]]
    assert by_group == sorted(by_group)
    assert all(sorted(order) == list(range(6)) for order in chart["orders"].values())
    axes = page.charts["axes"]
    for trace, members in zip(axes["data"], axes["members"], strict=True):
        assert trace["text"] == [plan.names[index] for index in members]
        assert np.allclose(trace["x"], [plan.datasets[index].coordinates[0] for index in members], atol=1e-4)
    sizes = page.charts["sizes"]["data"][0]
    ends = set(np.add(sizes["x"], sizes["base"]).tolist())
    assert {group.num_input_tokens for group in plan.groups} <= ends
    assert page.charts["losses"]["data"][0]["x"] == [1, 2, 3, 4, 5]


def test_hostile_names_stay_text(tmp_path: Path, page: Page) -> None:
    runs.make_run(tmp_path, HOSTILE)
    attacked = Page(write_report(tmp_path))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(attacked.scripts) == 3
    harmless = {(tag, tuple(sorted(attributes))) for tag, attributes in page.elements}
    assert {(tag, tuple(sorted(attributes))) for tag, attributes in attacked.elements} <= harmless | {
        ("td", ("class", "data-value")), ("table", ("data-searchable", "data-sortable", "id")),
    }  # fmt: skip
    for shown in ("<b>bold</b>", "{{ 7*7 }}", "%{x} %{customdata}", "&lt;i&gt;", "line break", "chat.jsonl"):
        assert shown in attacked.text, shown
    for hidden in ("/home/me", "\u202e", "\u2028"):
        assert hidden not in source.replace(page_code(source), "")
    # What Plotly reads as HTML is escaped in what Plotly is given; the page's own look-up takes the names as they are.
    axes = [text for trace in attacked.charts["axes"]["data"] for text in trace["text"]]
    assert not [text for text in axes if "<" in text]
    assert "<b>bold</b>" in attacked.charts["conflict"]["labels"]


def page_code(source: str) -> str:
    """Plotly itself."""
    return max(re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL), key=len)


def test_every_section_says_which_command_fills_it(tmp_path: Path) -> None:
    plan = runs.make_plan(tmp_path / "run/plan", NAMES)
    folder = tmp_path / "run"

    def commands() -> list[str]:
        text = Page(write_report(folder)).text
        return [re.findall(r"merit (\w+)", part)[0] for part in text.split("Not there yet.")[1:]]

    assert commands() == ["train", "merge", "evaluate", "diagnose"]
    runs.train(plan, folder)
    assert commands() == ["merge", "evaluate", "diagnose"]
    shutil.rmtree(folder / "groups/1")
    assert "merit train plan --group 1 --output groups/1" in Page(write_report(folder)).text
    runs.merge(plan, folder)
    (folder / "evaluation").mkdir()
    (folder / "evaluation/evaluation.json").write_text(json.dumps(runs.evaluation(plan)))
    assert commands() == ["train", "diagnose"]
    (folder / "diagnosis.json").write_text(json.dumps(runs.diagnosis(plan)))
    assert commands() == ["train"]


def test_a_plan_alone_and_one_without_gradients(tmp_path: Path) -> None:
    runs.make_plan(tmp_path / "plan", NAMES)
    alone = Page(write_report(tmp_path / "plan"))
    assert "merit train . --group all --output groups" in alone.text
    assert alone.table("pairs")
    (tmp_path / "plan/data/conflict.parquet").unlink()
    bare = Page(write_report(tmp_path / "plan"))
    assert set(bare.charts) == {"sizes"}
    assert "needs no gradients" in bare.text
    assert not bare.table("pairs")


def test_winners_losers_and_the_groups_mean_are_right(run: Path, page: Page) -> None:
    plan = PartitionPlan.from_pretrained(run / "plan")
    assert (
        "Merged is better than the base: mean held-out loss 2.583 against 3.000, lower on 4 of 6 datasets."
        in page.text
    )
    assert "Merged is worse than one model trained on everything: mean held-out loss 2.583 against 2.000" in page.text
    # Names are sorted: alpha beta delta epsilon gamma zeta change by +¼ −½ −1 again and again.
    assert "It gained most on delta (−1.000), zeta (−1.000) and beta (−0.500)." in page.text
    assert "It lost on 2 datasets, most on epsilon (+0.250) and alpha (+0.250)." in page.text
    weight = {group.group: group.weight for group in plan.groups}
    mean = np.mean([3.0 - 0.75 * weight[dataset.group] for dataset in plan.datasets])
    assert f"than the groups are on average: mean held-out loss 2.583 against {mean:.3f}" in page.text
    first = page.charts["comparison"]["data"][1]["y"]
    assert first[0] in ("delta", "zeta")
    assert first[-1] in ("alpha", "epsilon")


def test_the_diagnosis_and_the_answers_are_shown(page: Page) -> None:
    for shown in (
        "Problem. Group 1 left the basin on 1 dataset. Merge with --exclude 1.",
        "Averaging lowered the loss by 0.200",
        "+0.250 [−0.050, 0.550]",
        "ρ: 1.00 at ε = 0.25, 1.00 at ε = 0.5, 1.00 at ε = 1.",
        "−0.400 [−0.450, −0.350]",
        "Not measured: tiny (it has no held-out rows).",
        "merged answers alpha with less than half of the reference's tokens.",
        "Tasks of lm-evaluation-harness 0.4.9",
    ):
        assert shown in page.text, shown


def test_what_belongs_to_another_plan_is_named_and_left_out(tmp_path: Path) -> None:
    runs.make_run(tmp_path / "run", NAMES)
    other = runs.make_plan(tmp_path / "other/plan", NAMES, seed=1)
    runs.train(other, tmp_path / "other")
    shutil.rmtree(tmp_path / "run/groups/0")
    shutil.copytree(tmp_path / "other/groups/0", tmp_path / "run/groups/0")
    (tmp_path / "run/evaluation.json").write_text(json.dumps(runs.evaluation(other)))
    text = Page(write_report(tmp_path / "run")).text
    assert "groups/0 was trained under another plan" in text
    assert "evaluation.json is of another plan: it is left out." in text
    assert "1 of 2 groups are trained" in text


def test_a_page_is_a_file_in_a_folder(tmp_path: Path) -> None:
    runs.make_plan(tmp_path / "plan", NAMES)
    before = sorted(tmp_path.iterdir())
    for output, said in (
        (tmp_path, f"Give {tmp_path}/report.html"),
        (tmp_path / "plan/plan.json/x", "plan.json: is a f"),
    ):
        with pytest.raises(ConfigError, match=said):
            write_report(tmp_path, output)
    assert sorted(tmp_path.iterdir()) == before


def test_the_evaluation_that_the_pages_own_command_makes_is_shown(tmp_path: Path) -> None:
    plan = runs.make_plan(tmp_path / "plan", NAMES)
    later = runs.evaluation(plan) | {"num_bootstrap": 7}
    (tmp_path / "evaluation").mkdir()
    for name, content in (("evaluation.json", runs.evaluation(plan)), ("evaluation/evaluation.json", later)):
        (tmp_path / name).write_text(json.dumps(content))
    found = read_run(tmp_path)
    assert found.evaluation == later
    assert found.notices == ["evaluation.json is left out: evaluation/evaluation.json is shown."]


def test_tokens_that_were_counted_otherwise_are_told(tmp_path: Path) -> None:
    runs.make_run(tmp_path, NAMES)
    path = tmp_path / "groups/1/merit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_input_tokens": 7}))
    assert "Group 1 counted other tokens than the plan foresees" in Page(write_report(tmp_path)).text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation.json", "{"),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"models": 3}'),
        ("diagnosis/diagnosis.json", '{"kind": "groups", "datasets": []}'),
        ("groups/0/trainer_state.json", '{"log_history": [{"loss": "x", "step": 1}]}'),
        ("merged/merit.json", "not json"),
    ],
)
def test_a_broken_file_is_named_in_one_line(run: Path, tmp_path: Path, file: str, content: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / file).write_text(content)
    with pytest.raises(MeritError, match=file.rpartition("/")[2]):
        write_report(folder)


def test_the_command(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 0
    assert str(tmp_path / "page.html") in done.output
    assert (tmp_path / "page.html").read_bytes() == write_report(run).read_bytes()
    shutil.copytree(run, tmp_path / "run")
    drawn = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--figures"])
    assert drawn.output.count("Figure: ") == 2
    for name in ("training_loss.png", "held_out_loss.png"):
        assert (tmp_path / "run/figures" / name).read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "run/groups")])
    assert refused.exit_code == 2
    assert "neither plan/plan.json nor plan.json" in refused.stderr
    with pytest.raises(ConfigError):
        write_report(tmp_path / "nothing")


def test_five_hundred_datasets_stay_small(large_run: Path) -> None:
    path = large_run / "report.html"
    assert path.stat().st_size < 15e6
    page = Page(path)
    assert len(base64.b64decode(page.charts["conflict"]["matrix"])) == 500 * 500
    assert len(page.charts["comparison"]["data"][1]["y"]) == 60
    assert len(page.charts["axes"]["titles"]) == 3


@given(st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=2, max_size=6), st.randoms())
def test_lengths_alone_give_the_mean_cosine_of_the_steps(steps: list[list[float]], random: Any) -> None:
    vectors = np.array(steps)
    weights = np.array([random.uniform(0.1, 1) for _ in steps])
    weights /= weights.sum()
    lengths = np.linalg.norm(vectors, axis=1)
    pairs = [(i, j) for i in range(len(steps)) for j in range(i)]
    shares = np.array([weights[i] * weights[j] * lengths[i] * lengths[j] for i, j in pairs])
    found = step_agreement(weights.tolist(), lengths.tolist(), float(np.linalg.norm(weights @ vectors)))
    if shares.sum() < 1e-6:
        return
    products = sum(weights[i] * weights[j] * float(vectors[i] @ vectors[j]) for i, j in pairs)
    assert found == pytest.approx(products / shares.sum(), abs=1e-6)


def test_one_group_has_no_agreement() -> None:
    assert step_agreement([1.0], [2.0], 2.0) is None


@given(st.lists(st.floats(0, 10), max_size=2000))
def test_a_thinned_log_keeps_its_range_and_its_ends(losses: list[float]) -> None:
    steps, shown = thinned([(step, loss) for step, loss in enumerate(losses)])
    assert len(steps) == len(shown) == min(len(losses), 400)
    assert steps == sorted(steps)
    if losses:
        assert min(losses) - 1e-4 <= min(shown) <= max(shown) <= max(losses) + 1e-4


@settings(max_examples=50)
@given(st.lists(st.text(max_size=60), max_size=8, unique=True))
def test_labels_are_told_apart(names: list[str]) -> None:
    labels = unique_labels(names, 10)
    assert len(set(labels)) == len(names)
    assert all(label and "\n" not in label for label in labels)


def test_numbers_as_people_read_them() -> None:
    assert [decimals(value, 2) for value in (-0.001, 1234.5, -1.5, None)] == ["0.00", "1,234.50", "−1.50", "–"]
    assert [signed(value, 1) for value in (0.04, 0.06, -0.06)] == ["0.0", "+0.1", "−0.1"]
    assert [change(value).tone for value in (-0.1, 0.1, 0.0001, None)] == ["good", "bad", "", ""]
    clear, unclear = {"value": -1.0, "low": -2.0, "high": -0.5}, {"value": -1.0, "low": -2.0, "high": 0.5}
    assert [estimate(value, 1, True).tone for value in (clear, unclear)] == ["good", ""]
    assert estimate(clear, 1, False).text == "−1.0 [−2.0, −0.5]"
    assert [listed(names, 2) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and 1 more"]


def test_the_tour_renders_from_a_run_and_has_its_templates_headings(run: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location("make_tour", root / "docs" / "make_tour.py")
    assert spec is not None
    assert spec.loader is not None
    make_tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tour)
    tour = make_tour.render_tour(read_run(run))
    assert "lower on 4 of 6 datasets" in tour
    assert "Merge with --exclude 1." in tour.replace("&#45;", "-")
    committed = (root / "docs" / "tour.md").read_text(encoding="utf-8")

    def headings(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("#")]

    assert headings(tour) == headings(committed)
    for picture in re.findall(r"images/[a-z_]+\.png", committed):
        assert 0 < (root / "docs" / picture).stat().st_size < 300_000, picture

"""lighteval on tasks of one's own: its numbers are ours for the same texts, and flow into file and card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate_harness import nats
from tiny import task_rows, write_jsonl
from typer.testing import CliRunner

from merit_hf import merge_groups
from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritError
from merit_hf.evaluation.harness import HarnessCall, run_harness
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress

pytest.importorskip("lighteval", reason="needs the lighteval extra")
# It imports all of its tasks before its first question.
pytestmark = pytest.mark.slow
QUIET = Progress(quiet=True)
NAME = "merit_test"
TASKS = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def written_out(line, task_name):
    return Doc(task_name=task_name, query=line["said"], choices=[line["completion"] + "<|end|>"], gold_index=0)


def asked(line, task_name):
    return Doc(task_name=task_name, query=line["prompt"], choices=[line["completion"] + "<|end|>"], gold_index=0)


def task(name, prompt, folder={folder!r}, metrics=(Metrics.target_perplexity,)):
    return LightevalTaskConfig(
        name="merit_test:" + name, prompt_function=prompt, hf_repo=folder, hf_subset="default", metrics=list(metrics),
        hf_avail_splits=["train"], evaluation_splits=["train"], generation_size=8, stop_sequence=["<|end|>"],
    )


TASKS_TABLE = [
    task("copy", written_out),
    task("chat", asked, metrics=[Metrics.target_perplexity, Metrics.exact_match]),
]
LOST = task("lost", asked, folder={folder!r} + "/lost")
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of two tasks over the held-out rows of `copy`. Read only."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = task_rows("copy", 8, seed=1)
    said = [{**row, "said": f"<|user|>{row['prompt']}<|end|><|assistant|>"} for row in rows]
    write_jsonl(folder / "data" / "copy.jsonl", said)
    (folder / "own.py").write_text(TASKS.format(folder=str(folder / "data")), encoding="utf-8")
    return folder / "own.py"


def perplexities(found: dict[str, Any], task: str) -> dict[str, float]:
    return {label: math.log(number["value"]) for label, number in found["tasks"][task]["ppl"].items()}


def test_lighteval_and_we_agree(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tasks: Path, tmp_path: Path
) -> None:
    models = {"base": tiny_plan.base_folder(), "group-1": tiny_groups[1]}
    files = {path: path.stat().st_mtime_ns for folder in models.values() for path in folder.rglob("*")}
    call = HarnessCall.of("lighteval", NAME, tasks)
    assert call is not None
    found = run_harness(tiny_plan, models, call, progress=QUIET)
    ours = nats(tiny_plan, models, "copy")
    assert perplexities(found, f"{NAME}:copy") == pytest.approx(ours, rel=1e-4)
    assert ours["base"] != pytest.approx(ours["group-1"], rel=1e-2)
    # Without the template the same question is another text, and with it the same again.
    assert perplexities(found, f"{NAME}:chat")["base"] != pytest.approx(ours["base"], rel=1e-3)
    call = HarnessCall.of("lighteval", f"{NAME}:chat", tasks, apply_chat_template=True)
    assert call is not None
    asked = run_harness(tiny_plan, models, call, progress=QUIET, cache=tmp_path)
    assert perplexities(asked, f"{NAME}:chat") == pytest.approx(ours, rel=1e-4)
    assert 0 <= asked["tasks"][f"{NAME}:chat"]["em"]["base"]["value"] <= 1
    assert len(list(tmp_path.iterdir())) == 2, "a file a model and task"
    assert run_harness(tiny_plan, models, call, progress=QUIET, cache=tmp_path) == asked
    assert torch.is_grad_enabled()
    assert files == {path: path.stat().st_mtime_ns for folder in models.values() for path in folder.rglob("*")}


def test_the_numbers_flow_into_file_screen_and_card(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tasks: Path, tmp_path: Path
) -> None:
    merge_groups(tiny_plan, tiny_groups, tmp_path / "merged")
    arguments = [
        "evaluate", tmp_path / "merged", "--plan", tiny_plan.folder, "--output", tmp_path / "e", "--no-generate",
        "--harness", "lighteval", "--tasks", f"{NAME}:copy", "--include-path", tasks, "--limit", 3, "--card",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="merit")
    assert done.exit_code == 0, done.output
    harness = json.loads((tmp_path / "e" / "evaluation.json").read_text())["harness"]
    assert harness["name"] == "lighteval"
    assert harness["settings"] == {
        "tasks": [f"{NAME}:copy"], "num_fewshot": None, "limit": 3, "apply_chat_template": False,
    }  # fmt: skip
    assert set(harness["tasks"]) == {f"{NAME}:copy"}
    value = f"{harness['tasks'][f'{NAME}:copy']['ppl']['merged']['value']:.4g}"
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert value in done.stdout
    assert value in card
    assert "lighteval task" in card


def test_what_lighteval_cannot_run_is_told(tiny_plan: PartitionPlan, tasks: Path, tmp_path: Path) -> None:
    broken, lost = tmp_path / "broken.py", tmp_path / "lost.py"
    broken.write_text("import no_such_library", encoding="utf-8")
    lost.write_text(tasks.read_text().replace("LOST = task(", "TASKS_TABLE.append(task(") + ")", encoding="utf-8")
    for name, file, said in (
        ("arc:easy", tmp_path, "no such file"),
        ("arc:easy", broken, "No module named 'no_such_library'"),
    ):
        with pytest.raises(ConfigError, match=said):
            HarnessCall.of("lighteval", name, file)
    call = HarnessCall((f"{NAME}:lost",), lost, harness="lighteval")
    with pytest.raises(MeritError, match=f"lighteval failed on task `{NAME}:lost` as base"):
        run_harness(tiny_plan, {"base": tiny_plan.base_folder()}, call, progress=QUIET)

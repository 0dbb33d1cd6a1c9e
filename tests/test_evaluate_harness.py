"""lm-evaluation-harness on a task of one's own: its numbers are ours for the same texts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import task_rows, write_jsonl
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritError
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.evaluation.harness import HarnessCall, run_harness
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress

# The harness reads thousands of task files before its first question.
pytestmark = pytest.mark.slow
QUIET = Progress(quiet=True)
NAME = "merit_test_copy"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task over the held-out rows of `copy`, and one whose data is not there. Read only."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = task_rows("copy", 8, seed=1)
    write_jsonl(
        folder / "copy.jsonl", [{**row, "said": f"<|user|>{row['prompt']}<|end|><|assistant|>"} for row in rows]
    )
    task = {
        "task": NAME, "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "copy.jsonl")},
        "test_split": "train", "output_type": "loglikelihood", "doc_to_text": "{{said}}",
        "doc_to_target": "{{completion}}<|end|>", "target_delimiter": "",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                        {"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    in_template = {**task, "task": f"{NAME}_chat", "doc_to_text": "{{prompt}}"}
    lost = {**task, "task": f"{NAME}_lost", "dataset_kwargs": {"data_files": str(folder / "lost.jsonl")}}
    for content in (task, in_template, lost):
        (folder / f"{content['task']}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def models(tiny_plan: PartitionPlan, tiny_groups: list[Path]) -> dict[str, Path]:
    return {"base": tiny_plan.base_folder(), "group-1": tiny_groups[1]}


def nats(plan: PartitionPlan, models: dict[str, Path], dataset: str) -> dict[str, float]:
    """Our loss on a dataset, in nats an example: what the harness's perplexity is the exponential of."""
    entry = evaluate_models(plan, models, generate=False, progress=QUIET)["datasets"][dataset]
    return {label: loss * entry["num_loss_tokens"] / entry["num_examples"] for label, loss in entry["loss"].items()}


def test_the_harness_and_we_agree(tiny_plan: PartitionPlan, models: dict[str, Path], tasks: Path) -> None:
    call = HarnessCall.of("lm-eval", f"{NAME}, {NAME}_chat", tasks)
    assert call is not None
    assert call.tasks == (NAME, f"{NAME}_chat")
    found = run_harness(tiny_plan, models, call, progress=QUIET)
    ours = nats(tiny_plan, models, "copy")
    assert set(found["tasks"][NAME]) == {"perplexity", "acc"}
    for label in models:
        assert math.log(found["tasks"][NAME]["perplexity"][label]["value"]) == pytest.approx(ours[label], rel=1e-5)
        assert found["tasks"][NAME]["perplexity"][label]["stderr"] > 0
    assert ours["base"] != pytest.approx(ours["group-1"])
    # Without the template the same question is another text, and with it the same again.
    plain = found["tasks"][f"{NAME}_chat"]["perplexity"]["base"]["value"]
    assert math.log(plain) != pytest.approx(ours["base"], rel=1e-3)
    call = HarnessCall.of("lm-eval", f"{NAME}_chat", tasks, apply_chat_template=True)
    assert call is not None
    asked = run_harness(tiny_plan, {"base": models["base"]}, call, progress=QUIET)
    value = asked["tasks"][f"{NAME}_chat"]["perplexity"]["base"]["value"]
    assert math.log(value) == pytest.approx(ours["base"], rel=1e-5)


def test_the_harness_through_the_command(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tasks: Path, tmp_path: Path
) -> None:
    def call(*more: object) -> tuple[dict[str, Any], str]:
        arguments = [
            "evaluate", tiny_groups[0], "--plan", tiny_plan.folder, "--output", tmp_path, "--no-generate",
            "--harness", "lm-eval", "--tasks", NAME, "--include-path", tasks, *more,
        ]  # fmt: skip
        done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="merit")
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "evaluation.json").read_text())["harness"], done.stdout

    first, shown = call()
    assert first["name"] == "lm-eval"
    assert first["settings"] == {"tasks": [NAME], "num_fewshot": None, "limit": None, "apply_chat_template": False}
    assert set(first["tasks"][NAME]["perplexity"]) == {"base", "group-0"}
    assert NAME in shown
    assert f"{first['tasks'][NAME]['perplexity']['base']['value']:.4g}" in shown
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluation_cache").glob("harness-*")}
    assert len(files) == 2, "a file a model and task"
    assert call()[0] == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluation_cache").glob("harness-*")} == files
    limited, _ = call("--limit", 3)
    assert limited["settings"]["limit"] == 3
    assert limited["tasks"][NAME]["perplexity"]["base"] != first["tasks"][NAME]["perplexity"]["base"]


def test_a_changed_task_is_run_again(
    tiny_plan: PartitionPlan, models: dict[str, Path], tasks: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(tasks, tmp_path / "tasks"))
    call, base = HarnessCall((NAME,), own), {"base": models["base"]}
    first = run_harness(tiny_plan, base, call, progress=QUIET, cache=tmp_path / "cache")
    file = own / f"{NAME}.yaml"
    file.write_text(file.read_text().replace("<|end|>", ""))
    second = run_harness(tiny_plan, base, call, progress=QUIET, cache=tmp_path / "cache")
    assert first["tasks"] != second["tasks"]


def test_an_unknown_task_and_a_failing_one(tiny_plan: PartitionPlan, models: dict[str, Path], tasks: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--tasks {NAME}y: .*Did you mean `{NAME}`"):
        HarnessCall.of("lm-eval", f"{NAME},{NAME}y", tasks)
    with pytest.raises(MeritError, match=rf"lm-eval failed on task `{NAME}_lost` as base: .*lost\.jsonl"):
        run_harness(tiny_plan, models, HarnessCall((f"{NAME}_lost",), tasks), progress=QUIET)

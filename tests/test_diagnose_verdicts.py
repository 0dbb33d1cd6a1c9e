"""Real trainings that went well or wrong in known ways: each gets its verdict, and the remedy that was measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import WORDS, as_chat, make_base, task_rows, write_jsonl

from merit_hf import MeritConfig, MeritPlanner, PartitionPlan, diagnose, merge_groups, train_group
from merit_hf.diagnosis.wording import diagnosis_lines
from merit_hf.progress import Progress

pytestmark = pytest.mark.slow
QUIET = Progress(quiet=True)
# Two groups: copy and count, first and upper.
TAGS = {"copy": "a", "count": "a", "first": "b", "upper": "b"}
TASKS = ("copy", "reverse", "count", "first", "upper", "repeat")
Rows = dict[str, list[dict[str, str]]]


def make_plan(
    folder: Path,
    base: Path,
    sft: dict[str, Any],
    plan: dict[str, Any],
    train: Rows,
    held_out: Rows,
    peft: dict[str, Any] | None = None,
) -> PartitionPlan:
    entries = []
    for task, rows in train.items():
        for name, part in ((task, rows), (f"{task}_eval", held_out[task])):
            write_jsonl(folder / f"data/{name}.jsonl", [as_chat(row) for row in part])
        paths = {"path": f"data/{task}.jsonl", "eval_path": f"data/{task}_eval.jsonl"}
        entries.append({"name": task, "tag": TAGS.get(task, task), **paths})
    common = {
        "per_device_train_batch_size": 8, "max_length": 64, "activation_checkpointing": False, "logging_steps": 50,
        "save_strategy": "no", "lr_scheduler_type": "constant", "num_train_epochs": 2,
    }  # fmt: skip
    config = {
        "base": {"model_name_or_path": str(base)},
        "datasets": entries,
        "plan": {"num_samples": 8, "sketch_dim": 1024, **plan},
        "sft": {**common, **sft},
        **({"peft": peft} if peft else {}),
    }
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return MeritPlanner(MeritConfig.from_yaml(path), QUIET).plan(folder / "plan")


@pytest.fixture(scope="module")
def warm_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt something: groups that start at a random one share no basin."""
    folder = tmp_path_factory.mktemp("warm")
    raw = make_base(folder / "raw", dtype=torch.float32)
    train = {task: task_rows(task, 150) for task in TASKS}
    held_out = {task: task_rows(task, 8, seed=1) for task in TASKS}
    sft = {"learning_rate": 3e-3, "num_train_epochs": 4}
    return train_group(
        make_plan(folder, raw, sft, {"split": "joint"}, train, held_out), 0, folder / "0", progress=QUIET
    )


@pytest.fixture(scope="module")
def scenario(
    warm_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[PartitionPlan, list[Path], dict[str, Any]]]:
    """`scenario(learning_rate, train, held_out)`: plan, trained groups, diagnosis; the last two replace rows."""

    def run(
        learning_rate: float, train: Rows | None = None, held_out: Rows | None = None
    ) -> tuple[PartitionPlan, list[Path], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("scenario")
        rows = {task: task_rows(task, 60) for task in TAGS} | (train or {})
        unseen = {task: task_rows(task, 24, seed=1) for task in TAGS} | (held_out or {})
        split = {"split": "by_tag", "num_groups": 2}
        plan = make_plan(folder, warm_base, {"learning_rate": learning_rate}, split, rows, unseen)
        groups = [train_group(plan, k, folder / str(k), progress=QUIET) for k in range(2)]
        merge_groups(plan, groups, folder / "merged", out_dtype="float32")
        return plan, groups, diagnose(plan, groups, folder / "d", merged=folder / "merged", progress=QUIET)

    return run


@pytest.fixture(scope="module")
def healthy(scenario: Callable[..., Any]) -> tuple[PartitionPlan, list[Path], dict[str, Any]]:
    return scenario(1e-3)


@pytest.fixture(scope="module")
def too_fast(scenario: Callable[..., Any]) -> tuple[PartitionPlan, list[Path], dict[str, Any]]:
    return scenario(5e-2)


def found(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["code"]: finding for finding in content["verdict"]["findings"]}


def test_a_healthy_merge(healthy: tuple[PartitionPlan, list[Path], dict[str, Any]]) -> None:
    content = healthy[2]
    assert content["verdict"]["status"] == "healthy"
    assert content["verdict"]["remedy"] == "Nothing to mend."
    assert set(found(content)) == {"quadratic", "flat_base"}
    assert content["overall"]["gain"]["measured"]["low"] > 0.01
    assert all(0.8 < step["rho"]["value"] < 1.2 for step in content["overall"]["gain"]["ladder"])
    assert all(barrier["height"]["value"] < 0 for barrier in content["overall"]["barriers"])
    assert all(row["own"]["prompts"]["low"] > 0.05 for row in content["groups"])


def test_a_learning_rate_that_is_too_high(too_fast: tuple[PartitionPlan, list[Path], dict[str, Any]]) -> None:
    content = too_fast[2]
    finding = found(content)["diverged"]
    assert content["verdict"]["status"] == "problem"
    assert finding["groups"] == [0, 1]
    assert "left the basin on 4 of 4 datasets" in finding["text"]
    assert content["verdict"]["remedy"].startswith("Lower sft.learning_rate (0.05 now)")
    assert "--exclude" not in content["verdict"]["remedy"], "leaving out one of two that diverged mends nothing"
    assert not {"wrong_data", "noise", "learnt_nothing", "quadratic"} & found(content).keys()


def upside_down(row: dict[str, str]) -> dict[str, str]:
    """The row with an answer of another kind than its task's."""
    words = row["prompt"].partition(": ")[2].split()
    return {**row, "completion": " ".join(reversed(words)).upper()}


def test_training_rows_with_wrong_answers(scenario: Callable[..., Any]) -> None:
    _, _, content = scenario(
        1e-3, {task: [upside_down(row) for row in task_rows(task, 60)] for task in ("first", "upper")}
    )
    finding = found(content)["wrong_data"]
    assert content["verdict"]["status"] == "problem"
    assert (finding["groups"], finding["datasets"]) == ([1], ["first", "upper"])
    assert "its training rows improved" in finding["text"]
    assert "do training and held-out rows ask for the same answers?" in finding["remedy"]
    assert "`--exclude 1`: measured, the mean loss changes by −" in finding["remedy"]
    assert not {"diverged", "left_basin", "overshot", "noise"} & found(content).keys()


def test_a_group_of_noise(scenario: Callable[..., Any]) -> None:
    def noise(task: str, count: int, seed: int) -> list[dict[str, str]]:
        rng = random.Random(f"{task}-{seed}")
        return [
            {**row, "completion": " ".join(rng.choice(WORDS) for _ in range(4))}
            for row in task_rows(task, count, seed)
        ]

    train, held_out = ({task: noise(task, *size) for task in ("first", "upper")} for size in ((60, 0), (24, 1)))
    _, _, content = scenario(1e-3, train, held_out)
    finding = found(content)["noise"]
    assert content["verdict"]["status"] == "problem"
    assert finding["groups"] == [1]
    # It did learn how such answers look; a lower loss alone would have called it a success.
    own = content["groups"][1]["own"]
    assert own["held_out"]["high"] < -1.0
    assert own["prompts"]["low"] <= 0 <= own["prompts"]["high"]
    assert "can their answers be told from their prompts?" in finding["remedy"]
    assert "`--exclude 1`: measured, the mean loss on the other groups' datasets changes by −" in finding["remedy"]
    assert not {"diverged", "left_basin", "wrong_data"} & found(content).keys()


def test_one_group_from_another_training_is_the_one_that_is_named(
    healthy: tuple[PartitionPlan, list[Path], dict[str, Any]],
    too_fast: tuple[PartitionPlan, list[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    plan, groups, before = healthy
    content = diagnose(plan, [groups[0], too_fast[1][1]], tmp_path / "d", forward_only=True, progress=QUIET)
    assert found(content)["diverged"]["groups"] == found(content)["not_verified"]["groups"] == [1]
    assert "learning_rate" in found(content)["not_verified"]["text"]
    assert "`--exclude 1`: measured" in content["verdict"]["remedy"]
    assert content["groups"][1]["variance_share"] < 0.6, "of two, each shares the variance about their mean"
    assert content["groups"][0]["own"]["held_out"] == before["groups"][0]["own"]["held_out"]
    # The remedy is right: without the group the loss is what the other one has.
    assert content["overall"]["loss"]["group-0"] < content["overall"]["loss"]["mean"]
    assert any("Remedy: " in str(line) for line in diagnosis_lines(content))
    readme = (tmp_path / "d" / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Diagnosis: problem\n")
    assert "--exclude 1" in readme, "however long the verdict is"

"""SIGKILL at random moments, then the same command again: the uninterrupted result, and next to no work twice."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import jobs
import numpy as np
import pytest
from tiny import make_mixture

from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]


def contents(folder: Path, *leave_out: str) -> dict[str, bytes]:
    """{name: bytes} of every file below `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in leave_out]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def timed(function, arguments: list[object], log: Path) -> tuple[float, str]:  # type: ignore[no-untyped-def]
    start = time.monotonic()
    job = jobs.Job(function, arguments, log)
    assert job.wait() == 0, job.output
    return time.monotonic() - start, job.output


def gradients(output: str) -> list[str]:
    """The datasets whose gradient was begun, by the line that says so."""
    return re.findall(r"^Gradients: (\S+) \(", output, flags=re.MULTILINE)


def steps(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"^Group \d: step (\d+) of", output, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def slow_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CONFIG whose gradients and steps take a while: six tasks of 60 rows, each row a micro-batch of its own."""
    tasks = ("copy", "reverse", "repeat", "count", "first", "upper")
    return make_mixture(tmp_path_factory.mktemp("slow"), tasks, count=60, num_samples=40, tokens_per_batch=1)


@pytest.fixture(scope="module")
def uninterrupted(slow_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The plan of `slow_config`, and the seconds it took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    # The first job also waits for the server to import everything.
    timed(jobs.plan, [slow_config, folder / "joint", ["plan.split=joint", "plan.num_groups=1"]], folder / "log-joint")
    seconds, output = timed(jobs.plan, [slow_config, folder / "plan"], folder / "log")
    assert sorted(gradients(output)) == sorted(PartitionPlan.from_pretrained(folder / "plan").names)
    return folder / "plan", seconds


def check_same_plan(first: Path, second: Path) -> None:
    ours, theirs = PartitionPlan.from_pretrained(first), PartitionPlan.from_pretrained(second)
    assert ours.sha256 == theirs.sha256
    assert ours.datasets == theirs.datasets
    assert ours.groups == theirs.groups
    assert ours.bounds == theirs.bounds
    assert np.array_equal(ours.conflict_matrix, theirs.conflict_matrix)
    assert (first / "sketches.safetensors").read_bytes() == (second / "sketches.safetensors").read_bytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_plan(seed: int, slow_config: Path, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    expected, duration = uninterrupted
    output = tmp_path / "plan"
    outputs, killed = jobs.run_until_done(jobs.plan, [slow_config, output], tmp_path, seed, duration, kills=3)
    check_same_plan(expected, output)
    assert not (tmp_path / "plan.part").exists()
    begun = Counter(name for text in outputs for name in gradients(text))
    assert set(begun) == set(PartitionPlan.from_pretrained(output).names)
    # A kill repeats at most the one gradient that it interrupted.
    assert begun.total() <= len(begun) + killed
    for text in outputs:
        assert len(gradients(text)) == len(set(gradients(text)))


def test_a_plan_killed_in_the_midst_of_a_gradient(
    slow_config: Path, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    output, log = tmp_path / "plan", tmp_path / "log"
    job = jobs.Job(jobs.plan, [slow_config, output], log)
    # The third gradient has begun: two are done, and none of those is computed again.
    assert job.kill_when(lambda: len(gradients(job.output)) == 3)
    first = gradients(job.output)
    assert len(list((tmp_path / "plan.part" / "gradients").glob("*.npy"))) >= len(first) - 1
    again = jobs.Job(jobs.plan, [slow_config, output], tmp_path / "again")
    assert again.wait() == 0, again.output
    assert not set(first[:-1]) & set(gradients(again.output))
    assert "gradients are there already" in again.output
    check_same_plan(uninterrupted[0], output)


def test_work_under_other_settings_is_not_taken_over(
    slow_config: Path, uninterrupted: tuple[Path, float], tmp_path: Path
) -> None:
    """A killed plan with another seed leaves gradients of other samples behind."""
    output = tmp_path / "plan"
    job = jobs.Job(jobs.plan, [slow_config, output, ["plan.seed=1"]], tmp_path / "log")
    assert job.kill_when(lambda: len(gradients(job.output)) == 3)
    again = jobs.Job(jobs.plan, [slow_config, output], tmp_path / "again")
    assert again.wait() == 0, again.output
    assert len(gradients(again.output)) == 6
    check_same_plan(uninterrupted[0], output)


@pytest.fixture(scope="module")
def trained(uninterrupted: tuple[Path, float], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Group 0, trained without interruption, and the seconds it took."""
    folder = tmp_path_factory.mktemp("trained")
    seconds, output = timed(jobs.train, [uninterrupted[0], 0, folder / "0", {"save_steps": 10}], folder / "log")
    assert steps(output) == list(range(1, PartitionPlan.from_pretrained(uninterrupted[0]).group(0).num_steps + 1))
    return folder / "0", seconds


def check_same_training(expected: Path, found: Path) -> None:
    # trainer_state.json holds speeds.
    assert contents(found, "trainer_state.json") == contents(expected, "trainer_state.json")
    assert read_manifest(found)["status"] == "complete"
    histories = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (expected, found)
    ]
    ours, theirs = ([entry["loss"] for entry in history if "loss" in entry] for history in histories)
    assert ours == theirs
    assert not found.with_name(found.name + ".part").exists()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_training(
    seed: int, uninterrupted: tuple[Path, float], trained: tuple[Path, float], tmp_path: Path
) -> None:
    expected, duration = trained
    arguments = [uninterrupted[0], 0, tmp_path / "0", {"save_steps": 10}]
    outputs, killed = jobs.run_until_done(jobs.train, arguments, tmp_path, seed, duration, kills=3)
    check_same_training(expected, tmp_path / "0")
    done = Counter(step for text in outputs for step in steps(text))
    assert set(done) == set(range(1, read_manifest(expected)["num_steps"] + 1))
    # A kill repeats at most the steps since the last save.
    assert done.total() <= len(done) + killed * 10


@pytest.mark.parametrize("moment", ["before the weights", "before the optimizer", "before the state"])
def test_a_training_killed_while_it_saves(
    moment: str, uninterrupted: tuple[Path, float], trained: tuple[Path, float], tmp_path: Path
) -> None:
    """A half-written checkpoint is passed over: the one before it is resumed."""
    arguments = [uninterrupted[0], 0, tmp_path / "0", {"save_steps": 10}]
    saved = tmp_path / "0.part" / "checkpoint-20"
    begun, missing = {
        "before the weights": (saved, saved / "model.safetensors"),
        "before the optimizer": (saved / "model.safetensors", saved / "optimizer.pt"),
        "before the state": (saved / "optimizer.pt", saved / "trainer_state.json"),
    }[moment]
    for attempt in range(20):
        job = jobs.Job(jobs.train, arguments, tmp_path / f"log-{attempt}")
        assert job.kill_when(begun.exists)
        if not missing.exists():
            break
        # Too late: the state was written meanwhile.
        import shutil

        shutil.rmtree(tmp_path / "0.part")
    else:
        pytest.fail("the moment was never met")
    again = jobs.Job(jobs.train, arguments, tmp_path / "again")
    assert again.wait() == 0, again.output
    assert steps(again.output)[0] == 11
    check_same_training(trained[0], tmp_path / "0")


def test_a_training_killed_after_its_last_step(
    uninterrupted: tuple[Path, float], trained: tuple[Path, float], tmp_path: Path
) -> None:
    arguments = [uninterrupted[0], 0, tmp_path / "0", {"save_steps": 10}]
    job = jobs.Job(jobs.train, arguments, tmp_path / "log")
    if job.kill_when((tmp_path / "0.part" / "final" / "config.json").exists):
        assert not (tmp_path / "0").exists()
    again = jobs.Job(jobs.train, arguments, tmp_path / "again")
    assert again.wait() == 0, again.output
    assert steps(again.output) == []
    check_same_training(trained[0], tmp_path / "0")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_merge(seed: int, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path) -> None:
    rng = random.Random(seed)
    expected, found = tmp_path / "expected", tmp_path / "merged"
    assert jobs.Job(jobs.merge, [tiny_plan.folder, tiny_groups, expected], tmp_path / "log").wait() == 0
    part, killed = tmp_path / "merged.part", 0
    for attempt in range(20):
        wait = rng.uniform(0, 0.03)

        def ready(wait: float = wait) -> bool:
            return part.exists() and not time.sleep(wait)

        job = jobs.Job(jobs.merge, [tiny_plan.folder, tiny_groups, found], tmp_path / f"log-{attempt}")
        if not job.kill_when(ready):
            break
        assert not found.exists() or read_manifest(found)["kind"] == "merged"
        killed += part.exists()
        if killed == 3 or found.exists():
            break
    if not found.exists():
        last = jobs.Job(jobs.merge, [tiny_plan.folder, tiny_groups, found], tmp_path / "last")
        assert last.wait() == 0, last.output
    assert killed
    differing = ("merit.json", "README.md")
    assert contents(found, *differing) == contents(expected, *differing)
    ours, theirs = read_manifest(expected), read_manifest(found)
    assert ours["files"] == theirs["files"]
    assert ours["groups"] == theirs["groups"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run(seed: int, slow_config: Path, uninterrupted: tuple[Path, float], tmp_path: Path) -> None:
    arguments = ["run", slow_config, "--output"]
    seconds, _ = timed(jobs.merit, [[*arguments, tmp_path / "expected"]], tmp_path / "log-expected")
    outputs, killed = jobs.run_until_done(
        jobs.merit, [[*arguments, tmp_path / "run"]], tmp_path, seed, seconds, kills=4
    )
    check_same_plan(tmp_path / "expected" / "plan", tmp_path / "run" / "plan")
    for number in range(2):
        check_same_training(tmp_path / "expected" / "groups" / str(number), tmp_path / "run" / "groups" / str(number))
    name = "model.safetensors"
    assert (tmp_path / "run" / "merged" / name).read_bytes() == (tmp_path / "expected" / "merged" / name).read_bytes()
    evaluations = [json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("expected", "run")]
    assert evaluations[0] == evaluations[1]
    assert not list(tmp_path.glob("run/**/*.part"))
    begun = Counter(name for text in outputs for name in gradients(text))
    assert begun.total() <= len(begun) + killed

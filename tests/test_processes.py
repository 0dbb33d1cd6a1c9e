"""Two processes, really two: the same plan as one process makes, and an equivalent training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jobs
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file
from tiny import make_mixture

from merit_hf.config import ConfigError, MeritError
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.training import train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint
from merit_hf.workers import Worker, check_processes

RECIPES = jobs.ROOT / "recipes"
CPU_2 = ["--config_file", RECIPES / "accelerate_configs" / "cpu_2.yaml"]
QUIET = Progress(quiet=True)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


class Watch(threading.Thread):
    """Notes what lies in a planner's work folder while it works: claims, and every version of every read-out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.claims, self.versions = folder, set[str](), dict[str, set[int]]()
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.is_set():
            try:
                self.claims |= {f"{path.parent.name}/{path.name}" for path in self.folder.glob("claims-*/*")}
                for path in self.folder.glob("*.npy"):
                    self.versions.setdefault(path.stem, set()).add(path.stat().st_ino)
            except FileNotFoundError:
                pass
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def __enter__(self) -> Watch:
        self.start()
        return self


@pytest.mark.slow
def test_two_planners_make_the_plan_of_one(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, ("copy", "reverse", "repeat", "count", "first"), count=40, tokens_per_batch=1)
    alone = jobs.Job(jobs.plan, [config, tmp_path / "alone"], tmp_path / "log")
    assert alone.wait() == 0, alone.output
    with Watch(tmp_path / "plan.part" / "gradients") as watch:
        done = jobs.launch([*CPU_2, RECIPES / "plan.py", config, "--output", tmp_path / "plan", "--num-processes", 2])
    assert done.returncode == 0, done.stderr
    one, two = (PartitionPlan.from_pretrained(tmp_path / name) for name in ("alone", "plan"))
    assert (one.cost["world_size"], two.cost["world_size"]) == (1, 2)
    assert two.sha256 == one.sha256
    assert two.datasets == one.datasets
    first, second = (tmp_path / name / "sketches.safetensors" for name in ("alone", "plan"))
    assert first.read_bytes() == second.read_bytes()
    # One launch claims every dataset once, and no read-out is written a second time.
    assert len(watch.claims) == 5
    assert len({claim.split("/")[0] for claim in watch.claims}) == 1
    assert len(watch.versions) == 5
    assert all(len(inodes) == 1 for inodes in watch.versions.values())
    assert f"Plan {two.sha256[:12]}" in done.stderr
    assert not (tmp_path / "plan.part").exists()


def plan_as(rank: int, config: Path, output: Path, port: str) -> None:
    """One of two planners, as torchrun tells it; each shows what it does."""
    from merit_hf.config import MeritConfig
    from merit_hf.planner import MeritPlanner

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    worker = Worker.from_environment()
    assert (worker.rank, worker.world_size) == (rank, 2)
    assert "WORLD_SIZE" not in os.environ
    MeritPlanner(MeritConfig.from_yaml(config), Progress(), worker).plan(output)


def two_at_work(config: Path, folder: Path, port: str) -> list[jobs.Job]:
    """Two planners that have claimed a dataset each; the first one is held (SIGSTOP) at its own."""
    work = folder / "plan.part" / "gradients"

    def is_at_work(planner: jobs.Job) -> bool:
        mine = [path.name for path in work.glob("claims-*/*") if path.read_text() == str(planner.pid)]
        return any(not (work / f"{name}.json").exists() for name in mine)

    planners = [jobs.Job(plan_as, [rank, config, folder / "plan", port], folder / f"log-{rank}") for rank in range(2)]
    for planner in planners:
        while not is_at_work(planner):
            assert planner.is_alive(), planner.output
            time.sleep(0.0005)
        if planner is planners[0]:
            os.kill(planner.pid, signal.SIGSTOP)
    return planners


def test_two_planners_share_the_datasets(tmp_path: Path) -> None:
    names = ("copy", "reverse", "repeat", "count", "first")
    config = make_mixture(tmp_path, names, count=40, tokens_per_batch=1)
    workers = two_at_work(config, tmp_path, "12345")
    os.kill(workers[0].pid, signal.SIGCONT)
    for worker in workers:
        assert worker.wait() == 0, worker.output
    begun = [[name for name in names if f"Gradients: {name} (" in worker.output] for worker in workers]
    assert all(begun), "one process did everything"
    assert sorted(begun[0] + begun[1]) == sorted(names)
    again = jobs.Job(jobs.plan, [config, tmp_path / "alone"], tmp_path / "log")
    assert again.wait() == 0, again.output
    plans = [PartitionPlan.from_pretrained(tmp_path / name) for name in ("plan", "alone")]
    assert plans[0].sha256 == plans[1].sha256
    assert (tmp_path / "plan/sketches.safetensors").read_bytes() == (
        tmp_path / "alone/sketches.safetensors"
    ).read_bytes()


def test_what_a_dead_planner_claimed_is_done_by_the_other(tmp_path: Path) -> None:
    names = ("copy", "reverse", "repeat", "count", "first")
    config = make_mixture(tmp_path, names, count=40, tokens_per_batch=1)
    with Watch(tmp_path / "plan.part" / "gradients") as watch:
        survivor, victim = two_at_work(config, tmp_path, "12347")
        os.kill(victim.pid, signal.SIGKILL)
        os.kill(survivor.pid, signal.SIGCONT)
        assert survivor.wait() == 0, survivor.output
    assert len(watch.versions) == 5
    assert all(len(inodes) == 1 for inodes in watch.versions.values()), "a dataset was done twice"
    alone = jobs.Job(jobs.plan, [config, tmp_path / "alone"], tmp_path / "log")
    assert alone.wait() == 0, alone.output
    first, second = (tmp_path / name / "sketches.safetensors" for name in ("alone", "plan"))
    assert first.read_bytes() == second.read_bytes()


def test_a_planner_that_comes_late_finds_the_plan(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, ("copy", "count"), count=8)
    first = jobs.Job(plan_as, [0, config, tmp_path / "plan", "12346"], tmp_path / "log-0")
    assert first.wait() == 0, first.output
    late = jobs.Job(plan_as, [1, config, tmp_path / "plan", "12346"], tmp_path / "log-1")
    assert late.wait() == 0, late.output
    assert "Gradients:" not in late.output
    assert not (tmp_path / "plan.part").exists()


def test_a_worker_claims_what_no_other_of_its_launch_has(tmp_path: Path) -> None:
    first, second, later = (Worker(rank, 2, run) for rank, run in ((0, "a"), (1, "a"), (0, "b")))
    assert first.claim(tmp_path, "x")
    assert not second.claim(tmp_path, "x")
    assert second.claim(tmp_path, "y")
    assert later.claim(tmp_path, "x"), "the claims of a killed launch must not bind the next"
    assert Worker().claim(tmp_path, "x")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "claims-a" / "x").write_text(str(gone.pid))
    assert [first.claim(tmp_path, "x"), second.claim(tmp_path, "x")] == [True, False]
    assert not first.claim(tmp_path / "gone", "x"), "who comes when all is done claims nothing"


def test_workers_on_several_machines_are_refused_but_where_they_share_a_model() -> None:
    two = {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    for given in (two, {**two, "GROUP_WORLD_SIZE": "1"}, {**two, "LOCAL_WORLD_SIZE": "4"}):
        with mock.patch.dict(os.environ, given):
            with pytest.raises(ConfigError, match=r"of one machine, found 2 machines. Launch it on one"):
                Worker.from_environment()
            os.environ["ACCELERATE_USE_FSDP"] = "true"
            assert Worker.from_environment().shards


def test_a_worker_gives_up_when_nothing_moves() -> None:
    with pytest.raises(MeritError, match=r"no other planner process .* run the command again"):
        Worker(1, 2).wait(until=lambda: False, patience=0.3)
    figures = iter(range(100))
    done = iter([False] * 3 + [True])
    Worker(1, 2).wait(until=lambda: next(done), alive=lambda: next(figures), patience=0.3)


@pytest.fixture(scope="module")
def two_process_plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionPlan, list[Path]]:
    """Groups of 24 and 22 rows at 4 a step, by SGD; each trained by one process."""
    from merit_hf.config import MeritConfig
    from merit_hf.planner import MeritPlanner

    folder = tmp_path_factory.mktemp("two")
    config = make_mixture(folder, ("copy", "reverse", "count", "first"), count=12)
    content = yaml.safe_load(config.read_text())
    for entry, tag in zip(content["datasets"], "aabb", strict=True):
        entry["tag"] = tag
        # An uneven group: 22 rows leave half a batch, which two processes fill with rows they have seen.
        if tag == "b":
            file = folder / entry["path"]
            file.write_text("".join(file.read_text().splitlines(keepends=True)[:11]))
    content["plan"] = {"split": "by_tag"}
    content["sft"].update(optim="sgd", learning_rate=0.5, save_strategy="no")
    config.write_text(yaml.safe_dump(content))
    plan = MeritPlanner(MeritConfig.from_yaml(config), QUIET).plan(folder / "plan")
    return plan, [train_group(plan, number, folder / "alone" / str(number), progress=QUIET) for number in range(2)]


def launch_training(plan: PartitionPlan, number: int, output: Path, *more: object) -> Any:
    assert plan.folder is not None
    command = [RECIPES / "train_group.py", plan.folder, "--group", number, "--output", output]
    return jobs.launch([*CPU_2, *command, "sft.per_device_train_batch_size=2", *more])


def check_equivalent(plan: PartitionPlan, one: Path, two: Path, steps: slice = slice(None)) -> None:
    found = read_manifest(two)
    assert (found["num_processes"], found["wrapper"]) == (2, "DistributedDataParallel")
    assert read_manifest(one)["wrapper"] is None
    assert losses(two)[steps] == pytest.approx(losses(one)[steps], abs=2e-4)
    assert failed(verify_checkpoint(plan, two)) is None
    base, first, second = (load_file(folder / "model.safetensors") for folder in (plan.base_folder(), one, two))
    for name in first:
        moved = (first[name] - base[name].float()).abs().max()
        difference = (first[name] - second[name]).abs().max()
        assert difference < (0.001 if steps == slice(None) else 0.5) * moved, name


def test_two_processes_train_as_one(two_process_plan: tuple[PartitionPlan, list[Path]], tmp_path: Path) -> None:
    plan, alone = two_process_plan
    done = launch_training(plan, 0, tmp_path / "0", "--num-processes", 2)
    assert done.returncode == 0, done.stderr
    check_equivalent(plan, alone[0], tmp_path / "0")
    one, two = read_manifest(alone[0]), read_manifest(tmp_path / "0")
    for field in ("num_input_tokens", "num_loss_tokens", "num_steps"):
        assert one[field] == two[field], field


@pytest.mark.slow
def test_two_processes_that_fill_a_last_batch(
    two_process_plan: tuple[PartitionPlan, list[Path]], tmp_path: Path
) -> None:
    plan, alone = two_process_plan
    done = launch_training(plan, 1, tmp_path / "1", "--num-processes", 2)
    assert done.returncode == 0, done.stderr
    check_equivalent(plan, alone[1], tmp_path / "1", slice(0, 5))
    planned, two = plan.group(1), read_manifest(tmp_path / "1")
    assert planned.train_input_tokens <= two["num_input_tokens"] <= planned.train_input_tokens + 4 * 64
    assert two["num_steps"] == planned.num_steps


@pytest.mark.slow
def test_one_process_where_two_were_asked_for(
    two_process_plan: tuple[PartitionPlan, list[Path]], tmp_path: Path
) -> None:
    """`--cpu --num_processes 2` is what people try first, and it starts one process."""
    plan, _ = two_process_plan
    command = [RECIPES / "train_group.py", plan.folder, "--group", 0, "--output", tmp_path / "0", "--num-processes", 2]
    done = jobs.launch(["--cpu", "--num_processes", 2, *command])
    assert done.returncode == 1
    assert "2 processes were asked for, 1 are running" in done.stderr
    assert "cpu_2.yaml" in done.stderr
    assert not list(tmp_path.iterdir())
    config = plan.folder.parent / "mixture.yaml"
    done = jobs.launch(
        ["--cpu", "--num_processes", 2, RECIPES / "plan.py", config, "--output", tmp_path / "p", "--num-processes", 2]
    )
    assert done.returncode == 1
    assert "2 processes were asked for, 1 are running" in done.stderr


@pytest.mark.slow
def test_the_modules_launch_too(two_process_plan: tuple[PartitionPlan, list[Path]], tmp_path: Path) -> None:
    """`accelerate launch -m`, as installed packages are launched, and `merit train --num-processes`."""
    plan, alone = two_process_plan
    job = jobs.Job(
        jobs.merit,
        [["train", plan.folder, "sft.per_device_train_batch_size=2", "--group", 0, "--output", tmp_path / "0",
          "--num-processes", 2, "--accelerate-config", CPU_2[1]]],
        tmp_path / "log", {"PYTHONPATH": str(jobs.ROOT)},
    )  # fmt: skip
    assert job.wait() == 0, job.output
    check_equivalent(plan, alone[0], tmp_path / "0")
    config = plan.folder.parent / "mixture.yaml"
    done = jobs.launch([*CPU_2, "-m", "merit_hf.planner", config, "--output", tmp_path / "plan", "--num-processes", 2])
    assert done.returncode == 0, done.stderr
    assert PartitionPlan.from_pretrained(tmp_path / "plan").sha256 == plan.sha256


def test_process_counts() -> None:
    check_processes(1, None)
    check_processes(2, 2)
    with pytest.raises(MeritError, match="2 processes were asked for, 1 are running"):
        check_processes(1, 2)


CONFIGS = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))


def test_the_configs_are_there() -> None:
    assert [path.stem for path in CONFIGS] == ["cpu_2", "ddp", "fsdp2", "single_gpu", "zero3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs_parse_against_the_installed_release(path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    config = ClusterConfig.from_yaml_file(yaml_file=str(path))
    assert config.num_processes >= 1
    known = {action.dest for action in launch_command_parser()._actions}
    nested = {f"{'' if key.startswith('fsdp') else 'fsdp_'}{key}" for key in config.fsdp_config or {}}
    nested |= set(config.deepspeed_config or {})
    assert nested <= known, nested - known


CHECKS: dict[str, Callable[[ClusterConfig], bool]] = {
    "cpu_2": lambda c: c.use_cpu and c.distributed_type.value == "MULTI_GPU" and c.num_processes == 2,
    "ddp": lambda c: c.distributed_type.value == "MULTI_GPU" and not c.use_cpu,
    "fsdp2": lambda c: (
        c.fsdp_config["fsdp_version"] == 2 and c.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    ),
    "single_gpu": lambda c: c.num_processes == 1,
    "zero3": lambda c: c.deepspeed_config["zero_stage"] == 3 and c.deepspeed_config["zero3_save_16bit_model"] is True,
}


@pytest.mark.parametrize("name", CHECKS)
def test_accelerate_configs_say_what_their_name_does(name: str) -> None:
    path = RECIPES / "accelerate_configs" / f"{name}.yaml"
    assert CHECKS[name](ClusterConfig.from_yaml_file(yaml_file=str(path)))

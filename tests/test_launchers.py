"""Launching: records that survive their writer, processes beside this one, scripts, and what is not started twice."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jobs as processes
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritError
from merit_hf.launchers import local, slurm
from merit_hf.launchers.dispatch import describe, dry_run, look_at, train_groups
from merit_hf.launchers.jobs import (
    Job,
    JobState,
    jobs_of,
    last_lines,
    log_path,
    progress_of,
    read_job,
    record_path,
    start_log,
    told_its_error,
    write_end,
    write_job,
)
from merit_hf.launchers.request import Request, accelerate_command
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sharing.status import next_step, plan_status, status_table

QUIET = Progress(quiet=True)
GOLDEN = Path(__file__).parent / "golden" / "slurm_array.sh"
CPU_2 = Path(__file__).resolve().parents[1] / "recipes" / "accelerate_configs" / "cpu_2.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have launched is not remembered here."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that does nothing for a long time."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def local_job(plan: PartitionPlan, output: Path, process: psutil.Process, group: int = 0) -> Job:
    """The record of a training that `process` would be."""
    job = Request(plan, [group], [output]).job(
        "local", group, ["sleep"], str(process.pid), parent=os.getpid(), created=process.create_time()
    )
    write_job(job)
    return job


def merit(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("gpus", "jobs", "per_job", "slots"),
    [
        ("", None, 1, [""]),
        ("", 3, 1, ["", "", ""]),
        ("0", None, 1, ["0"]),
        ("0123", None, 1, ["0", "1", "2", "3"]),
        ("0123", 2, 1, ["0", "1"]),
        ("0123", None, 2, ["01", "23"]),
        ("0123", None, 4, ["0123"]),
        ("012", None, 2, ["01"]),
        ("01", None, 4, ["01"]),
        ("0", 2, 1, ["0", "0"]),
        ("57", 3, 1, ["5", "7", "5"]),
    ],
)
def test_every_job_has_its_own_gpus(gpus: str, jobs: int | None, per_job: int, slots: list[str]) -> None:
    assert local.device_slots(list(gpus), jobs, per_job) == [list(slot) for slot in slots]


def test_the_command_needs_nothing_of_this_process(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    request = Request(tiny_plan, [1], [tmp_path / "1"], ["sft.logging_steps=2"], 2, CPU_2)
    command = accelerate_command(request, 1, tmp_path / "1")
    assert command[command.index("-m", 3) + 1 :] == [
        "merit_hf.training", str(tiny_plan.folder), "sft.logging_steps=2", "--group", "1", "--output",
        str(tmp_path / "1"), "--num-processes", "2",
    ]  # fmt: skip
    assert command[:5] == [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
    # Two groups on one machine would meet on accelerate's own port.
    assert command[command.index("--main_process_port") + 1] == "0"
    alone = accelerate_command(Request(tiny_plan, [1], [tmp_path / "1"]), 1, tmp_path / "1")
    assert alone[alone.index("--num_processes") + 1] == "1"
    machines = tmp_path / "machines.yaml"
    machines.write_text("num_machines: 2\nmain_process_port: 29500\n")
    request = Request(tiny_plan, [1], [tmp_path / "1"], accelerate_config=machines)
    assert "--main_process_port" not in accelerate_command(request, 1, tmp_path / "1")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        Request(tiny_plan, [1], [tmp_path / "1"], accelerate_config=Path("none.yaml"))


def test_a_record_comes_back_and_is_found_by_its_plan(
    tiny_plan: PartitionPlan, tmp_path: Path, sleeper: psutil.Process
) -> None:
    job = local_job(tiny_plan, tmp_path / "far" / "group.v1", sleeper)
    assert read_job(tmp_path / "far" / "group.v1") == job
    assert record_path(tmp_path / "far" / "group.v1") == tmp_path / "far" / "jobs" / "group.v1.json"
    # By the plan alone; and by the folder, where this machine's memory is gone.
    assert jobs_of(tiny_plan) == {0: job}
    shutil.rmtree(Path(os.environ["HF_HOME"]) / "merit")
    assert jobs_of(tiny_plan) == {}
    assert jobs_of(tiny_plan, tmp_path / "far") == {0: job}
    assert jobs_of(tiny_plan, tmp_path / "far" / "group.v1") == {0: job}
    assert read_job(tmp_path / "nothing") is None
    record_path(tmp_path / "far" / "group.v1").write_text("{")
    with pytest.raises(MeritError, match=r"group\.v1\.json: not a job's record .* Delete it if no job"):
        read_job(tmp_path / "far" / "group.v1")


def test_a_local_job_is_seen_from_any_process(
    tiny_plan: PartitionPlan, tmp_path: Path, sleeper: psutil.Process
) -> None:
    job = local_job(tiny_plan, tmp_path / "0", sleeper)
    start_log(log_path(tmp_path / "0"), "1")
    with log_path(tmp_path / "0").open("a") as log:
        log.write("Group 0: step 3 of 6, loss 5.1\n")
    assert local.look([job]) == [JobState("running", "", 3, 6)]
    elsewhere = replace(job, host="another")
    assert local.look([elsewhere])[0].state == "unknown"
    assert "another" in local.look([elsewhere])[0].detail
    waiting = replace(job, job_id=None, details={"parent": sleeper.pid, "created": sleeper.create_time()})
    assert local.look([waiting])[0].state == "pending"
    # A process that has the same number by chance is another one.
    again = replace(job, details={**job.details, "created": sleeper.create_time() - 60})
    assert local.look([again])[0].state == "failed"
    sleeper.kill()
    sleeper.wait()
    state = local.look([job])[0]
    assert state == JobState("failed", "it was killed", 3, 6, ["Group 0: step 3 of 6, loss 5.1"])
    assert describe(job, state) == [
        f"group 0: failed: it was killed, step 3 of 6. Last lines of {job.log}:", "    Group 0: step 3 of 6, loss 5.1",
    ]  # fmt: skip
    # The word of an earlier job is not this one's.
    write_end(tmp_path / "0", "1", 2, "the earlier one's")
    assert local.look([job])[0].detail == "it was killed"
    write_end(tmp_path / "0", job.job_id, 1, "no space left")
    assert local.look([job])[0].detail == "no space left"
    write_end(tmp_path / "0", job.job_id, 0)
    assert local.look([job])[0].detail == "ended without a checkpoint"


def test_what_a_log_says_is_of_its_last_start(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    log, job = log_path(tmp_path / "0"), Request(tiny_plan, [0], [tmp_path / "0"]).job("local", 0, [])
    assert (last_lines(job.log), progress_of(job)) == ([], (None, None))
    start_log(log, "1")
    with log.open("a") as file:
        file.write("Group 0: step 5 of 6\nmerit: error: the disk is full\nTraceback of a launcher\n")
    assert last_lines(job.log) == ["merit: error: the disk is full"]
    assert told_its_error(log)
    assert progress_of(job) == (5, 6)
    start_log(log, "2")
    assert not told_its_error(log)
    assert progress_of(job) == (None, None)
    with log.open("a") as file:
        file.write("x" * 100_000 + "\n" + "".join(f"line {number}\n\n" for number in range(20)))
    assert last_lines(job.log) == [f"line {number}" for number in range(12, 20)]
    # Without a word in the log, what is saved says how far it is.
    (tmp_path / "0.part" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "0.part" / "checkpoint-12").mkdir()
    assert progress_of(job) == (12, None)


def test_a_group_that_runs_is_not_started_again(
    tiny_plan: PartitionPlan, tmp_path: Path, sleeper: psutil.Process
) -> None:
    job = local_job(tiny_plan, tmp_path / "0", sleeper)
    command = ["train", tiny_plan.folder, "--group", "0", "--output", tmp_path / "0", "--launcher", "slurm"]
    code, said = merit(*command, "--no-wait")
    assert code == 0, said
    assert "1 jobs run or wait" in said
    assert read_job(tmp_path / "0") == job
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs"]
    write_job(replace(job, host="another"))
    code, said = merit(*command)
    assert code == 1
    assert "may be running: it was started on another: look there. Nothing was started" in " ".join(said.split())
    write_job(replace(job, group_sha256="0" * 64))
    code, said = merit(*command)
    assert code == 2
    assert "another plan" in said


def test_a_group_that_another_process_trains_is_waited_for(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path, sleeper: psutil.Process
) -> None:
    local_job(tiny_plan, tmp_path / "0", sleeper)
    shutil.copytree(tiny_groups[1], tmp_path / "1")
    waiting = processes.Job(
        processes.merit, [["train", tiny_plan.folder, "--group", "all", "--output", tmp_path]], tmp_path / "log",
        {"HF_HOME": os.environ["HF_HOME"]},
    )  # fmt: skip
    while "running already" not in waiting.output:
        assert waiting.is_alive(), waiting.output
        time.sleep(0.05)
    shutil.copytree(tiny_groups[0], tmp_path / "0")
    sleeper.kill()
    assert waiting.wait() == 0, waiting.output
    assert "group 0: finished" in waiting.output
    assert "step" not in waiting.output


def test_one_of_several_that_fails_does_not_stop_the_others(
    make_plan: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    """In one process: the data of a group have changed since they were planned."""
    plan = make_plan()
    victim = plan.group(0).datasets[0]
    changed = tmp_path / "changed.jsonl"
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    changed.write_text(json.dumps(row) + "\n")
    plan = PartitionPlan.from_pretrained(str(plan.folder))
    plan.supply({victim: changed})
    outputs = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(MeritError, match=r"group 0 of 2 failed; .* trains only what is missing"):
        train_groups(plan, [0, 1], outputs, progress=QUIET)
    assert not outputs[0].exists()
    assert read_manifest(outputs[1])["status"] == "complete"
    states = look_at([job for output in outputs if (job := read_job(output))])
    assert [state.state for state in states] == ["failed", "finished"]
    assert victim in states[0].detail
    whole = PartitionPlan.from_pretrained(str(plan.folder))
    before = read_job(outputs[1])
    statuses, problems = plan_status(whole, output=tmp_path)
    assert [status.job and status.job["state"] for status in statuses] == ["failed", "finished"]
    assert problems[0].startswith("group 0: failed: ")
    assert next_step(whole, statuses) == (
        f"Failed: group 0. Next: merit train {whole.folder} --group 0 --output {outputs[0]}"
    )
    assert status_table(whole, statuses).columns[4].header == "job"
    train_groups(whole, [0], [outputs[0]], progress=QUIET)
    assert read_job(outputs[1]) == before
    statuses, problems = plan_status(whole, output=tmp_path)
    assert problems == []
    assert next_step(whole, statuses).startswith("Next: merit merge")


def test_sigterm_saves_the_step_and_the_same_command_goes_on(
    make_plan: Callable[..., PartitionPlan], tmp_path: Path
) -> None:
    plan = make_plan("sft.num_train_epochs=60", "sft.save_steps=1000")
    whole = processes.Job(processes.train, [plan.folder, 0, tmp_path / "whole", {}], tmp_path / "whole.log")
    assert whole.wait() == 0, whole.output
    command = ["train", plan.folder, "--group", "0", "--output", tmp_path / "0"]
    stopped = processes.Job(processes.merit, [command], tmp_path / "log")
    while "step 2 of" not in stopped.output:
        assert stopped.is_alive(), stopped.output
        time.sleep(0.005)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait() == 1
    said = re.search(r"merit: error: group 0: stopped by SIGTERM; step (\d+) of 360 is saved", stopped.output)
    assert said, stopped.output
    assert not (tmp_path / "0").exists()
    again = processes.Job(processes.merit, [command], tmp_path / "again")
    assert again.wait() == 0, again.output
    assert f"going on from checkpoint-{said[1]}" in again.output
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "0/merit.json").read_bytes() == (tmp_path / "whole/merit.json").read_bytes()


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("PENDING", "Resources", JobState("pending", "Slurm says Resources")),
        ("PENDING", "None", JobState("pending")),
        ("RUNNING", "None", JobState("running")),
        ("COMPLETING", "None", JobState("running")),
        ("OUT_OF_MEMORY", "OutOfMemory", JobState("failed", "Slurm says OUT_OF_MEMORY")),
        ("COMPLETED", "None", JobState("failed", "Slurm says COMPLETED")),
        ("", "", JobState("failed", "it left the queue without a word")),
    ],
)
def test_what_slurm_says(
    state: str, reason: str, expected: JobState, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    request = Request(tiny_plan, [0], [tmp_path / "0"])
    job = request.job("slurm", 0, [], "7_0", stdout=str(tmp_path / "out"), stderr=str(tmp_path / "err"))
    assert slurm._look(job, state, reason) == expected
    if expected.state == "failed":
        (tmp_path / "err").write_text("module: command not found\n")
        assert slurm._look(job, state, reason).lines == ["module: command not found"]
        shutil.copytree(tiny_groups[0], tmp_path / "0")
        assert slurm._look(job, state, reason) == JobState("finished")


def test_the_sbatch_script_is_printed_without_a_cluster(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    options = slurm.SlurmOptions(
        partition="gpu", account="lab", time="2-00:00:00", mem="64G", gpus=2, cpus=8, array_parallelism=1,
        setup=["module load cuda"], extra={"qos": "long", "exclusive": "true", "signal_delay_s": "300"},
    )  # fmt: skip
    text = dry_run(tiny_plan, [0, 1], [tmp_path / "0", tmp_path / "1"], launcher="slurm", options=options)
    text = text.replace(str(tmp_path), "OUT").replace(str(tiny_plan.folder), "PLAN").replace(sys.executable, "python")
    assert text + "\n" == GOLDEN.read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--launcher", "k8s"], "--launcher k8s: expected local, slurm, hf-jobs"),
        (["--partition", "gpu"], "--partition is an option of --launcher slurm, not of local"),
        (["--launcher", "slurm", "--jobs", "2"], "--jobs is an option of --launcher local, not of slurm"),
        (["--no-wait"], "--no-wait: local jobs live as long as this command"),
        (["--launcher", "slurm", "--dry-run", "--slurm", "array=0-3"], "--slurm array: merit sets it itself"),
        (["--launcher", "slurm", "--dry-run", "--slurm", "signal_delay_s=x"], "expected seconds"),
        (["--launcher", "slurm", "--dry-run", "--slurm", "qos"], "--slurm qos: expected NAME=VALUE"),
        (["--launcher", "slurm", "--dry-run", "sft.report_too=x"], "Did you mean `report_to`?"),
        (["--dry-run", "sft.learning_rate=2"], "sft.learning_rate is part of the plan's identity"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(arguments: list[str], said: str, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    code, output = merit("train", tiny_plan.folder, "--group", "all", "--output", tmp_path / "out", *arguments)
    assert code == 2
    assert said in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "not a config of accelerate's"),
        ("base: {model_name_or_path: x}", "not a config of accelerate's"),
        ("distributed_type: MULTIGPU", "distributed_type='MULTIGPU': accelerate knows"),
        ("a: [", "not YAML"),
    ],
)
def test_what_is_no_config_of_accelerate(text: str, said: str, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        Request(tiny_plan, [0], [tmp_path / "0"], accelerate_config=tmp_path / "config.yaml")


def test_shipped_configs_of_accelerate_leave_the_precision_to_the_plan() -> None:
    """What they say would stand above sft.bf16=false."""
    for path in CPU_2.parent.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no", path


def test_a_record_holds_what_the_same_command_needs(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    config = CPU_2
    request = Request(tiny_plan, [0], [tmp_path / "0"], ["sft.report_to=none"], accelerate_config=config)
    options = slurm.SlurmOptions(partition="gpu", setup=["module load cuda"], extra={"qos": "long"})
    assert shlex.split(request.job("slurm", 0, [], "7_0", options).details["options"]) == [
        "--partition", "gpu", "--setup", "module load cuda", "--slurm", "qos=long", "sft.report_to=none",
        "--accelerate-config", str(config),
    ]  # fmt: skip


def test_slurm_where_there_is_none(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    command = ["train", tiny_plan.folder, "--group", "0", "--output", tmp_path / "0", "--launcher", "slurm"]
    job = processes.Job(processes.merit, [command], tmp_path / "log", {"PATH": "/nowhere"})
    assert job.wait() == 2
    assert "no sbatch on this machine. Call it on a login node, or with --dry-run" in job.output


def test_local_commands_are_shown_before_they_run(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    code, output = merit("train", tiny_plan.folder, "--group", "all", "--output", tmp_path, "--dry-run")
    assert code == 0
    assert [line.partition(" -m ")[2] for line in output.splitlines()] == [
        f"merit_hf.training {tiny_plan.folder} --group {group} --output {tmp_path / str(group)}" for group in range(2)
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_groups_side_by_side_of_which_one_is_killed(make_plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    """It is said with its last lines, the other goes on, and running again starts only what is missing."""
    plan = make_plan("sft.num_train_epochs=60", "sft.save_steps=1000")
    command = ["train", plan.folder, "--group", "all", "--output", tmp_path / "groups", "--jobs", "2"]
    environment = {"PYTHONPATH": str(processes.ROOT), "HF_HOME": os.environ["HF_HOME"]}
    first = processes.Job(processes.merit, [command], tmp_path / "first", environment)
    log = log_path(tmp_path / "groups" / "1")
    while not log.exists() or "step 2 of" not in log.read_text():
        assert first.is_alive(), first.output
        time.sleep(0.01)
    victim = read_job(tmp_path / "groups" / "1")
    assert victim is not None
    statuses, _ = plan_status(plan, output=tmp_path / "groups")
    assert all(status.job and status.job["state"] == "running" for status in statuses)
    assert next_step(plan, statuses).startswith("In training: group 0, 1.")
    os.kill(int(str(victim.job_id)), signal.SIGKILL)
    assert first.wait() == 1, first.output
    assert "group 1: failed: ended with exit code 137, step " in first.output
    assert re.search(r"^ {4}Group 1: step \d+ of 360", first.output, flags=re.MULTILINE)
    assert "group 0: finished" in first.output
    assert "group 1 of 2 failed" in first.output.splitlines()[-1]
    assert read_manifest(tmp_path / "groups" / "0")["status"] == "complete"
    again = processes.Job(processes.merit, [command], tmp_path / "again", environment)
    assert again.wait() == 0, again.output
    assert "group 0" not in again.output
    assert [log_path(tmp_path / "groups" / name).read_text().count("merit: started") for name in "01"] == [1, 2]
    assert victim.host == socket.gethostname()

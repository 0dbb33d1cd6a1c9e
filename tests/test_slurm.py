"""Groups on a real Slurm of one node: killed, preempted, out of time, cancelled; and what is told of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import SlurmCluster, missing

from merit_hf.launchers.jobs import log_path, read_job
from merit_hf.plan import PartitionPlan
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two CPUs, so two groups at a time. Without Slurm the tests are skipped, or fail where CI asks for it."""
    pytest.importorskip("submitit")
    if absent := missing():
        if os.environ.get("MERIT_REQUIRE_SLURM"):
            pytest.fail(f"no Slurm ({', '.join(absent)} missing), and MERIT_REQUIRE_SLURM asks for it: make slurm")
        pytest.skip(f"no Slurm ({', '.join(absent)} missing): make slurm, and run as root")
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), cpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def four_groups(make_plan: Callable[..., PartitionPlan]) -> PartitionPlan:
    """Four groups that take some seconds each, and save nothing by themselves."""
    return make_plan("plan.num_groups=4", "sft.num_train_epochs=120", "sft.save_steps=10000")


class Merit:
    """`merit …` in a process of its own, beside the cluster."""

    def __init__(self, cluster: SlurmCluster, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "merit_hf.cli", *map(str, arguments)],
            env={**os.environ, **cluster.environment, "COLUMNS": "200"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self) -> tuple[int, str]:
        output, _ = self._process.communicate(timeout=500)
        return self._process.returncode, output


def said(output: Path) -> str:
    """What the training of `output` has written so far."""
    return log_path(output).read_text() if log_path(output).exists() else ""


def starts(output: Path) -> int:
    return said(output).count("merit: started ")


def steps(output: Path) -> list[int]:
    return [int(step) for step in re.findall(r"^Group \d: step (\d+) of", said(output), flags=re.MULTILINE)]


def is_training(output: Path, start: int) -> bool:
    """Whether start number `start` has made a step."""
    return starts(output) == start and "step" in said(output).rpartition("merit: started ")[2]


def training_process(output: Path) -> psutil.Process:
    """The process that trains, not the launcher above it."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[1:3] == ["-m", "merit_hf.training"] and str(output) in words:
            return process
    raise AssertionError(f"nobody trains {output}")


def test_four_groups_of_which_every_one_is_disturbed(
    cluster: SlurmCluster, four_groups: PartitionPlan, tmp_path: Path
) -> None:
    groups = tmp_path / "groups"
    output = [groups / str(number) for number in range(4)]
    command = ["train", four_groups.folder, "--group", "all", "--output", groups, "--launcher", "slurm",
               "--mem", "100M", "--time", "30"]  # fmt: skip
    shown = Merit(cluster, *command, "--dry-run").wait()
    waiting = Merit(cluster, *command)

    # A job of another partition preempts the two that run: they save, and come back by themselves.
    cluster.until(lambda: is_training(output[0], 1) and is_training(output[1], 1), "step of groups 0 and 1")
    cluster("sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true")
    array = str(read_job(output[0]).job_id).partition("_")[0]  # type: ignore[union-attr]
    cluster.until(lambda: all("stopped by SIGTERM" in said(path) for path in output[:2]), "stop of groups 0 and 1")
    at = len(steps(output[1]))

    # Of the two that follow, one is near its time limit, by the signal that Slurm sends then: the same.
    cluster.until(lambda: is_training(output[2], 1), "step of group 2")
    cluster("scancel", "--signal=USR2", f"{array}_2")
    cluster.until(lambda: "stopped by SIGTERM" in said(output[2]), "stop of group 2")
    # The other is cancelled: it stays so.
    cluster.until(lambda: is_training(output[3], 1), "step of group 3")
    cluster("scancel", f"{array}_3")

    # A second call starts nothing that runs or waits.
    code, text = Merit(cluster, *command[:3], "0", "--output", output[0], *command[6:], "--no-wait").wait()
    assert (code, text.count("no second one is started")) == (0, 1), text
    assert all(job.job_id == f"{array}_{job.group}" for path in output if (job := read_job(path)))

    # The out-of-memory killer takes a training: it is begun again at once, in the same job.
    cluster.until(lambda: release(cluster, array) and is_training(output[0], 2), "second start of group 0")
    training_process(output[0]).kill()
    cluster.until(lambda: starts(output[0]) == 3, "third start of group 0")
    assert "restart 1 of 3" in said(output[0])
    cluster.until(lambda: release(cluster, array) and all(map(Path.exists, output[:3])), "end of all others")
    code, text = waiting.wait()
    script = (groups / "jobs" / "slurm" / f"{array}_submission.sh").read_text()
    assert shown[0] == 0
    assert shown[1].partition("\n# job 0 of the array")[0].strip() == script.strip(), "what was shown is what runs"
    assert len(re.findall(r"^# job \d of the array trains group \d: .* -m merit_hf.training ", shown[1], re.M)) == 4
    assert code == 1, text
    assert "group 3: failed: Slurm says CANCELLED" in text
    assert "group 3 of 4 failed" in text.splitlines()[-1]
    assert [starts(path) for path in output] == [3, 2, 2, 1]
    # No step was trained twice, and none is missing.
    assert all(steps(output[number]) == list(range(1, four_groups.group(number).num_steps + 1)) for number in (1, 2))
    assert 0 < at < four_groups.group(1).num_steps
    code, text = Merit(cluster, "status", four_groups.folder, "--output", groups).wait()
    assert code == 0
    assert re.search(rf"failed, step \d+ of {four_groups.group(3).num_steps} \(slurm {array}_3\)", text), text
    assert "Last lines of" in text
    assert "Failed: group 3. Next: merit train" in text

    code, text = Merit(cluster, *command).wait()
    assert code == 0, text
    assert [starts(path) for path in output] == [3, 2, 2, 2]
    assert steps(output[3]) == list(range(1, four_groups.group(3).num_steps + 1))
    assert all(failed(verify_checkpoint(four_groups, path)) is None for path in output)


def release(cluster: SlurmCluster, array: str) -> bool:
    """Slurm lets a requeued job wait for two minutes: no longer."""
    for line in cluster("squeue", "--noheader", "--array", f"--jobs={array}", "--format=%i %r").splitlines():
        job, _, reason = line.strip().partition(" ")
        if reason == "BeginTime":
            cluster("scontrol", "update", f"JobId={job}", "StartTime=now")
    time.sleep(0.1)
    return True


def test_jobs_that_cannot_begin(cluster: SlurmCluster, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    command = ["train", tiny_plan.folder, "--group", "0", "--output", tmp_path / "0", "--launcher", "slurm"]
    code, text = Merit(cluster, *command, "--partition", "none-such").wait()
    assert code == 2
    assert text.splitlines()[-1].startswith("merit: error: sbatch refused: sbatch: error: ")
    assert "partition" in text
    assert read_job(tmp_path / "0") is None
    code, text = Merit(cluster, *command, "--setup", "echo module: not found >&2; exit 3").wait()
    assert code == 1, text
    assert "group 0: failed: Slurm says FAILED" in text
    assert "    module: not found" in text
    # A refusal of the training's own is told in its words, and is not tried again.
    code, text = Merit(cluster, *command, "sft.per_device_train_batch_size=7").wait()
    assert code == 1, text
    assert "    merit: error: the plan trains " in text
    assert starts(tmp_path / "0") == 1


def test_a_controller_that_does_not_answer(cluster: SlurmCluster, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    """Whether the job runs cannot be known, so nothing is started."""
    command = ["train", tiny_plan.folder, "--group", "0", "--output", tmp_path / "0", "--launcher", "slurm"]
    code, text = Merit(cluster, *command, "--setup", "sleep 600", "--no-wait").wait()
    assert code == 0, text
    job = read_job(tmp_path / "0")
    assert job is not None
    elsewhere = tmp_path / "slurm.conf"
    elsewhere.write_text(
        (cluster.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1")
    )  # fmt: skip
    environment, cluster.environment = cluster.environment, {"SLURM_CONF": str(elsewhere)}
    try:
        code, text = Merit(cluster, *command).wait()
        assert code == 1, text
        assert "may be running: squeue" in text
        assert "Nothing was started" in text
    finally:
        cluster.environment = environment
        cluster("scancel", job.job_id)

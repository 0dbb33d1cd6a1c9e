"""Four groups on a Slurm of one node: one training is killed, two jobs are preempted, one is cancelled; all come back.

    python recipes/slurm/story.py --output runs/slurm

The cluster is the tests': munged, slurmctld and slurmd of this machine, on free ports (`make slurm` installs them; be
root). Models and data are tiny. What stands below a `$` is what was printed; the transcript is written to
OUTPUT/transcript.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from slurm_cluster import SlurmCluster, missing  # noqa: E402
from tiny import make_mixture  # noqa: E402

TRAIN = [
    "train",
    "plan",
    "--group",
    "all",
    "--output",
    "groups",
    "--launcher",
    "slurm",
    "--mem",
    "200M",
    "--time",
    "30",
]


class Story:
    """Runs commands in the story's folder, and keeps what was said."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = {**os.environ, **cluster.environment, "COLUMNS": "150", "HF_HOME": str(folder / "home")}
        self.lines = ["# Four groups on Slurm, one of them killed\n", f"\n{str(__doc__).splitlines()[0]}\n"]

    def tell(self, text: str) -> None:
        self.lines.append(f"\n{text}\n")
        sys.stderr.write(f"\n{text}\n")

    def show(self, command: str, output: str) -> None:
        for path, name in ((str(self.folder), "~"), (sys.executable, "python")):
            output = output.replace(path, name)
        self.lines.append(f"```\n$ {command}\n{output.rstrip()}\n```")
        sys.stderr.write(f"$ {command}\n{output}")

    def merit(self, *arguments: str, fails: bool = False) -> str:
        """`merit ARGUMENTS`; stops the story where it ends otherwise than told."""
        done = subprocess.run(
            [sys.executable, "-m", "merit_hf.cli", *arguments],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.show(f"merit {' '.join(arguments)}", done.stdout)
        if (done.returncode != 0) != fails:
            raise SystemExit(f"merit {arguments[0]} ended with exit code {done.returncode}")
        return done.stdout

    def slurm(self, *command: str) -> None:
        self.show(" ".join(command), self.cluster(*command))

    def log(self, group: int) -> str:
        path = self.folder / f"groups/jobs/{group}.log"
        return path.read_text() if path.exists() else ""

    def until(self, ready: Callable[[], object], what: str) -> None:
        self.cluster.until(ready, what, seconds=600)

    def training(self, group: int) -> psutil.Process | None:
        """The process that trains a group, once it makes steps."""
        if "step" not in self.log(group).rpartition("merit: started ")[2]:
            return None
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[1:3] == ["-m", "merit_hf.training"] and str(self.folder / f"groups/{group}") in words:
                return process
        return None

    def release(self) -> bool:
        """Slurm lets a requeued job wait for two minutes; the story does not."""
        for line in self.cluster("squeue", "--noheader", "--array", "--format=%i %r").splitlines():
            job, _, reason = line.strip().partition(" ")
            if reason == "BeginTime":
                self.cluster("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(0.2)
        return True


def play(story: Story) -> None:
    """From the plan to the merged model."""
    tell, merit = story.tell, story.merit
    tell("## What would be submitted")
    merit(*TRAIN, "--dry-run")
    tell("## An array of four jobs; the node has two CPUs")
    merit(*TRAIN, "--no-wait")
    story.until(lambda: story.training(0) and story.training(1), "training of groups 0 and 1")
    merit("status", "plan")
    tell("## The training of group 0 is killed, as the out-of-memory killer does it")
    victim = story.training(0)
    assert victim is not None
    victim.kill()
    story.show(f"kill -9 {victim.pid}", "")
    story.until(lambda: "restart 1 of 3" in story.log(0), "restart of group 0")
    tell("It is begun again in its own job, up to `--restarts` times:")
    story.until(lambda: story.training(0), "second start of group 0")
    lines = [line for line in story.log(0).splitlines() if line.startswith("merit:")]
    story.show("grep merit: groups/jobs/0.log", "\n".join(lines))
    tell("## Somebody with a higher priority wants the node, as soon as the two make steps")
    story.until(
        lambda: story.training(0) and (story.training(1) or story.folder.joinpath("groups/1").exists()), "steps"
    )
    story.slurm("sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap", "sleep 5")
    story.until(lambda: "stopped by SIGTERM" in story.log(0), "preemption")
    story.until(lambda: "high" not in story.cluster("squeue", "--noheader", "--format=%P"), "the other's end")
    tell("They have saved their step and wait in the queue; the other groups take their turn meanwhile:")
    merit("status", "plan")
    tell("## Group 3 is cancelled by hand")
    story.until(lambda: story.training(3), "training of group 3")
    job = re.findall(r"started job (\S+)", story.log(3))[-1]
    story.slurm("scancel", job)
    story.until(
        lambda: story.release() and all((story.folder / f"groups/{group}").exists() for group in (0, 1, 2)), "the rest"
    )
    story.until(lambda: story.cluster.state(job) == "CANCELLED", "end of the cancelled job")
    merit("status", "plan")
    tell("What group 0 went through, from its log:")
    lines = [line for line in story.log(0).splitlines() if line.startswith("merit:") or "going on" in line]
    story.show("grep -e merit: -e 'going on' groups/jobs/0.log", "\n".join(lines))
    tell("## The same command again starts only what is missing, and waits for it")
    merit(*TRAIN)
    merit("status", "plan")
    merit("merge", "plan", *(f"groups/{group}" for group in range(4)), "--output", "merged")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/slurm"))
    folder = parser.parse_args().output.resolve()
    if absent := missing():
        raise SystemExit(f"{', '.join(absent)} missing: make slurm, and run as root")
    shutil.rmtree(folder, ignore_errors=True)
    config = make_mixture(folder / "mixture", count=400, num_groups=4)
    with SlurmCluster(folder / "cluster", cpus=2) as cluster:
        story = Story(cluster, folder)
        overrides = ["sft.num_train_epochs=6", "sft.save_steps=10000"]
        planned = [sys.executable, "-m", "merit_hf.cli", "plan", str(config), *overrides, "--output", "plan"]
        subprocess.run(planned, cwd=folder, env=story.environment, check=True, capture_output=True)
        play(story)
    (folder / "transcript.md").write_text("\n".join(story.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Work in processes that may be killed: each is forked from a server that has imported torch once.

job = Job(train, [plan, 0, output, {}], log=tmp_path / "log"); job.kill_when(seconds=1.5); job.wait()
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["jobs_preload"])


class Job:
    """A function called in a process of its own, with its output in `log`."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: Sequence[Any],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = _PATH
        try:
            self._process = _context.Process(
                target=_run, args=(function, list(arguments), str(log), environment or {})
            )
            self._process.start()
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before

    def kill_when(self, ready: Callable[[], bool] | None = None, seconds: float = 120.0) -> bool:
        """SIGKILL once `ready()`, or after `seconds`; False where the job had ended by itself."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not (ready and ready()):
            if not self._process.is_alive():
                return False
            time.sleep(0.0005)
        self._process.kill()
        return self.wait() == -signal.SIGKILL

    def wait(self, seconds: float = 300.0) -> int:
        """The exit code; negative is a signal."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds} s:\n{self.output}"
        return self._process.exitcode

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def _run(function: Callable[..., None], arguments: list[Any], log: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_until_done(
    function: Callable[..., None], arguments: Sequence[Any], folder: Path, seed: int, duration: float, kills: int
) -> tuple[list[str], int]:
    """Start, kill at a random moment of a run that takes `duration` seconds, start again …; then let it end.

    Returns:
        What each run wrote, and how many were killed.
    """
    rng = random.Random(seed)
    outputs, killed = [], 0
    for number in range(kills):
        job = Job(function, arguments, folder / f"log-{number}")
        # The first kill comes early: `duration` may have been taken while the machine was busier.
        share = rng.uniform(0.05, 0.95) * (1.0 if number else 0.3)
        killed += job.kill_when(seconds=share * duration)
        outputs.append(job.output)
    job = Job(function, arguments, folder / "log-last")
    code = job.wait()
    assert code == 0, f"exit {code}:\n{job.output}"
    assert killed, "every run ended before its kill"
    return [*outputs, job.output], killed


def plan(config: Path, output: Path, overrides: Sequence[str] = ()) -> None:
    from merit_hf.config import MeritConfig
    from merit_hf.planner import MeritPlanner

    MeritPlanner(MeritConfig.from_yaml(config, list(overrides))).plan(output)


def train(plan: Path, group: int, output: Path, placement: dict[str, Any]) -> None:
    from merit_hf.plan import PartitionPlan
    from merit_hf.training import train_group

    train_group(PartitionPlan.from_pretrained(plan), group, output, placement)


def merge(plan: Path, checkpoints: Sequence[Path], output: Path) -> None:
    from merit_hf.group_merge import merge_groups
    from merit_hf.plan import PartitionPlan

    merge_groups(PartitionPlan.from_pretrained(plan), checkpoints, output)


def merit(arguments: Sequence[object], directory: Path | None = None) -> None:
    """The `merit` command."""
    from merit_hf.cli import app

    if directory is not None:
        os.chdir(directory)
    app(args=[str(argument) for argument in arguments], prog_name="merit")


def launch(arguments: Sequence[object], directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`accelerate launch …`, on a free port."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": _PATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=directory, env=environment, capture_output=True, text=True, timeout=300
    )

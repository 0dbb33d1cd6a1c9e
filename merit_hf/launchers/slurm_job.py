"""What runs on a Slurm node: the training's command, begun again where it was killed, and given back in time.

submitit pickles it. Slurm says SIGTERM when it preempts or cancels a job, and SIGUSR2 some time before the time limit.
The training then saves where it is, and the job is queued again unless it was cancelled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import submitit

from merit_hf.config import MeritError
from merit_hf.launchers.jobs import forget_end, log_path, saved_steps, start_log, told_its_error, write_end

# submitit's, which its sbatch script asks Slurm for.
_TIME_LIMIT = signal.SIGUSR2


@dataclass
class GroupTraining:
    """Train one group; callable as submitit wants it.

    Attributes:
        command: the `accelerate launch` command line.
        output: where its checkpoint is to lie.
        restarts: how often it is begun again after it was killed, as by the out-of-memory killer.
    """

    command: list[str]
    output: Path
    restarts: int

    def __call__(self) -> None:
        job_id = submitit.JobEnvironment().job_id
        forget_end(self.output)
        for attempt in range(self.restarts + 1):
            start_log(log_path(self.output), job_id)
            before = saved_steps(self.output)
            code, told = self._run()
            if code == 0:
                write_end(self.output, job_id, 0)
                return
            if told == _TIME_LIMIT and saved_steps(self.output) <= before:
                self._fail(job_id, code, "the time limit came before a step was saved: give it more --time")
            if told is not None:
                _queue_again()
            if told_its_error(log_path(self.output)):
                self._fail(job_id, code, "")
            self._say(f"killed (exit code {code}), restart {attempt + 1} of {self.restarts}")
        self._fail(job_id, code, f"it was killed {self.restarts + 1} times, at last with exit code {code}")

    def _run(self) -> tuple[int, int | None]:
        """(exit code, the signal that asked for the node meanwhile)."""
        told: list[int] = []

        def ask(number: int, frame: Any) -> None:
            told.append(number)

        for number in (signal.SIGTERM, _TIME_LIMIT):
            signal.signal(number, ask)
        with log_path(self.output).open("ab") as file:
            process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=_ignore
            )
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=1)
                break
            if told:
                # Again and again: one that is still being loaded takes no notice.
                _stop_trainings()
        return (code if code >= 0 else 128 - code), (told[0] if told else None)

    def _say(self, text: str) -> None:
        with log_path(self.output).open("a", encoding="utf-8") as file:
            file.write(f"merit: {text}\n")

    def _fail(self, job_id: str, code: int, error: str) -> None:
        write_end(self.output, job_id, code, error)
        raise MeritError(error or f"the training ended with exit code {code}; see {log_path(self.output)}")


def _stop_trainings() -> None:
    """SIGTERM to the training below this process, not to the launcher above it or to what it has forked."""
    below = psutil.Process().children(recursive=True)
    trainings = {process.pid: process for process in below if "merit_hf.training" in _words(process)[1:4]}
    for process in trainings.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() not in trainings:
                process.terminate()


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _ignore() -> None:
    """The launcher in between outlives the signals; the training takes them itself."""
    for number in (signal.SIGTERM, _TIME_LIMIT):
        signal.signal(number, signal.SIG_IGN)


def _queue_again() -> None:
    """Give the node back and wait in the queue, unless the job was cancelled or Slurm queues it by itself."""
    job = os.environ["SLURM_JOB_ID"]
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "RUNNING":
        subprocess.run(["scontrol", "requeue", job], check=True)
    # No result is left, so that the next start is a new one.
    sys.exit(1)

"""Train groups on Slurm: an array with one job a group, through submitit."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merit_hf.config import ConfigError, MeritError
from merit_hf.launchers.jobs import Job, JobState, ended_state, progress_of, read_end, record_path, write_job
from merit_hf.launchers.request import Request, accelerate_command
from merit_hf.text import one_line

NAME = "slurm"
POLL_SECONDS = 5.0
# What this module says itself.
_OWN = ("array", "error", "job_name", "nodes", "ntasks", "ntasks_per_node", "open_mode", "output", "requeue", "signal")
_WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_RUNS = ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")


@dataclass(frozen=True)
class SlurmOptions:
    """Of every job of the array.

    Attributes:
        partition, account, time, mem: as sbatch takes them; None: the cluster's default.
        gpus, cpus: for one group.
        array_parallelism: at most so many groups at a time.
        setup: shell lines before the training, such as `module load cuda`.
        restarts: how often a training that was killed is begun again in its job.
        extra: further options of sbatch; `signal_delay_s` is how long before the time limit the training saves.
    """

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    mem: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    array_parallelism: int | None = None
    setup: Sequence[str] = ()
    restarts: int = 3
    extra: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def started(request: Request, options: SlurmOptions) -> Iterator[list[Job]]:
    """Submit the groups as one array. Leaving early leaves the jobs to Slurm.

    Raises:
        ConfigError: submitit or Slurm is not here, or sbatch refuses the options.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError("--launcher slurm: no sbatch on this machine. Call it on a login node, or with --dry-run.")
    executor = _executor(request, options)
    trainings = _trainings(request, options)
    try:
        # submitit prints what sbatch said, and raises it too.
        with contextlib.redirect_stderr(io.StringIO()):
            submitted = executor.submit_array(trainings)
    except RuntimeError as error:
        raise ConfigError(f"sbatch refused: {one_line(_last_line(str(error)))}") from error
    jobs = []
    for job, group, training in zip(submitted, request.groups, trainings, strict=True):
        paths = {"stdout": str(job.paths.stdout), "stderr": str(job.paths.stderr)}
        jobs.append(request.job(NAME, group, training.command, job.job_id, options, **paths))
        write_job(jobs[-1])
    yield jobs


def script(request: Request, options: SlurmOptions) -> str:
    """The sbatch script that would be submitted, and what each job of the array runs."""
    executor = _executor(request, options)
    lines = [executor.script(len(request.groups))]
    for number, (group, training) in enumerate(zip(request.groups, _trainings(request, options), strict=True)):
        lines.append(f"# job {number} of the array trains group {group}: {shlex.join(training.command)}")
    return "\n".join(lines)


def look(jobs: Sequence[Job]) -> list[JobState]:
    """Where the jobs stand, by one call of squeue, by what they left, and by their checkpoints.

    squeue knows a job for as long as it waits and runs, and some minutes longer; sacct is not needed.
    """
    try:
        queue = _queue({str(job.job_id).partition("_")[0] for job in jobs})
    except MeritError as error:
        return [ended_state(job) or JobState("unknown", str(error), *progress_of(job)) for job in jobs]
    return [_look(job, *queue.get(str(job.job_id), ("", ""))) for job in jobs]


def _look(job: Job, state: str, reason: str) -> JobState:
    if state in _WAITS:
        step, num_steps = progress_of(job)
        return JobState("pending", "" if reason == "None" else f"Slurm says {reason}", step, num_steps)
    if state in _RUNS and read_end(job) is None:
        return JobState("running", "", *progress_of(job))
    gone = f"Slurm says {state}" if state else "it left the queue without a word"
    ended = ended_state(job, gone) or JobState("failed", gone)
    if ended.state == "failed" and not ended.lines:
        # It came to nothing before the training began.
        said = _tail(job.details["stderr"]) or _tail(job.details["stdout"])
        return replace(ended, lines=said)
    return ended


def _queue(arrays: set[str]) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of the arrays that squeue still knows.

    Raises:
        MeritError: it cannot be asked.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(
            [*command, f"--jobs={','.join(sorted(arrays))}"], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeritError(f"squeue cannot be asked ({one_line(error)})") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise MeritError(f"squeue says: {one_line(_last_line(done.stderr))}")
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    return {job.strip(): (state, reason.strip()) for job, state, reason in rows}


def _executor(request: Request, options: SlurmOptions) -> Any:
    """submitit's executor with these options."""
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise ConfigError("--launcher slurm: submitit is not installed. pip install 'merit_hf[slurm]'") from error

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            # A script can be looked at where there is no Slurm.
            return 2

        def script(self, count: int) -> str:
            if count > 1:
                self.parameters["map_count"] = count
            return self._make_submission_file_text(self._submitit_command_str, "")

    folder = record_path(request.outputs[0]).parent / NAME
    executor = Executor(folder)
    executor.update_parameters(**_parameters(options))
    return executor


def _parameters(options: SlurmOptions) -> dict[str, Any]:
    """Of submitit's executor; what is not given is left to the cluster."""
    extra = {key.lstrip("-").replace("-", "_"): value for key, value in options.extra.items()}
    for key in extra:
        if key in _OWN:
            raise ConfigError(f"--slurm {key}: merit sets it itself. Of a signal, set signal_delay_s.")
    delay = extra.pop("signal_delay_s", "90")
    if not delay.isdigit():
        raise ConfigError(f"--slurm signal_delay_s={delay}: expected seconds before the time limit.")
    given = {
        "partition": options.partition, "account": options.account, "mem": options.mem,
        "gpus_per_node": options.gpus, "cpus_per_task": options.cpus, "array_parallelism": options.array_parallelism,
        "setup": list(options.setup) or None,
    }  # fmt: skip
    additional = {key: True if value == "true" else value for key, value in extra.items()}
    return {
        **{key: value for key, value in given.items() if value is not None},
        # Where these are missing, submitit has values of its own.
        "time": options.time, "wckey": None, "job_name": "merit", "nodes": 1, "ntasks_per_node": 1,
        "signal_delay_s": int(delay), "additional_parameters": {"requeue": True, **additional},
    }  # fmt: skip


def _trainings(request: Request, options: SlurmOptions) -> list[Any]:
    from merit_hf.launchers.slurm_job import GroupTraining

    if request.num_processes is None and request.accelerate_config is None and (options.gpus or 1) > 1:
        request = replace(request, num_processes=options.gpus)
    return [
        GroupTraining(accelerate_command(request, group, output.absolute()), output.absolute(), options.restarts)
        for group, output in zip(request.groups, request.outputs, strict=True)
    ]


def _tail(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [one_line(line) for line in lines if line.strip()][-8:]


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), text)

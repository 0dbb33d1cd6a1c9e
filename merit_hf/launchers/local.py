"""Train groups on this machine: in this process, or in processes beside it, one or several at a time."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import psutil

from merit_hf.config import ConfigError, MeritError
from merit_hf.errors import StoppedError
from merit_hf.launchers.jobs import (
    Job,
    JobState,
    ended_state,
    forget_end,
    progress_of,
    read_end,
    read_job,
    start_log,
    write_end,
    write_job,
)
from merit_hf.launchers.request import Request, accelerate_command, training_command
from merit_hf.progress import Progress

NAME = "local"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class LocalOptions:
    """`--jobs`: how many groups at a time. Default: as many as the GPUs allow, else one."""

    jobs: int | None = None


def trains_here(request: Request, options: LocalOptions) -> bool:
    """Whether this process trains by itself: one group at a time, on at most one GPU."""
    return not request.is_distributed and options.jobs in (None, 1) and len(visible_gpus()) < 2


def register(request: Request) -> None:
    """Record that this process is about to train these groups; of finished ones nothing changes."""
    for group, output in zip(request.groups, request.outputs, strict=True):
        if not output.exists():
            forget_end(output)
            write_job(_here(request, group, None))


def train_here(request: Request, progress: Progress) -> None:
    """Train groups one after another in this process. Where one of several fails, the others go on.

    Raises:
        ConfigError: a mistake in the call, which would be the same for all.
        MeritError: a training failed.
    """
    from merit_hf.placement import parse_placement
    from merit_hf.training import train_group

    failed = []
    try:
        placement = parse_placement(request.placement)
        for group, output in zip(request.groups, request.outputs, strict=True):
            is_new = not output.exists()
            if is_new:
                write_job(_here(request, group, str(os.getpid())))
            try:
                train_group(request.plan, group, output, placement, request.num_processes, progress)
                if is_new:
                    write_end(output, str(os.getpid()), 0)
            except Exception as error:
                if isinstance(error, ConfigError | StoppedError) or len(request.groups) == 1:
                    raise
                write_end(output, str(os.getpid()), 1, str(error))
                failed.append(group)
                progress.note(f"group {group}: failed: {error}")
            gc.collect()
    except BaseException as error:
        _abandon(request, 2 if isinstance(error, ConfigError) else 1, str(error) or type(error).__name__)
        raise
    if failed:
        names = ", ".join(map(str, failed))
        raise MeritError(
            f"group {names} of {len(request.groups)} failed; the reason stands above. Run the same command again: it "
            "trains only what is missing."
        )


@contextlib.contextmanager
def started(request: Request, options: LocalOptions) -> Iterator[list[Job]]:
    """Start every group as a process of its own, at most `options.jobs` at a time; the records of all of them.

    Leaving early, by an interrupt too, ends them: they resume when they are started again.
    """
    gpus = visible_gpus()
    slots = device_slots(gpus, options.jobs, _processes(request, len(gpus)))
    pool = _Pool(slots)
    jobs = [_planned(request, group, output) for group, output in zip(request.groups, request.outputs, strict=True)]
    for job in jobs:
        forget_end(Path(job.output))
        write_job(job)
    try:
        pool.start(jobs)
        yield jobs
        pool.join()
    finally:
        pool.stop()
        _abandon(request, 1, "`merit train` was stopped")


def script(request: Request, options: LocalOptions) -> str:
    """What `--dry-run` shows: a command line a group."""
    jobs = [_planned(request, group, output) for group, output in zip(request.groups, request.outputs, strict=True)]
    return "\n".join(subprocess.list2cmdline(job.command) for job in jobs)


def look(jobs: Sequence[Job]) -> list[JobState]:
    """Where jobs of this machine stand, whichever process started them."""
    return [_look(job) for job in jobs]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


def device_slots(gpus: Sequence[str], jobs: int | None, per_job: int) -> list[list[str]]:
    """The GPUs of each of the jobs that run at the same time; nothing in them where there are no GPUs.

    Args:
        jobs: how many at a time; None: as many as the GPUs allow. More than that share GPUs, round robin.
        per_job: how many GPUs one takes.
    """
    if not gpus:
        return [[] for _ in range(jobs or 1)]
    count = jobs or max(1, len(gpus) // per_job)
    return [
        [gpus[(slot * per_job + number) % len(gpus)] for number in range(min(per_job, len(gpus)))]
        for slot in range(count)
    ]


@dataclass
class _Pool:
    """Threads that run one job after another, each on its own GPUs."""

    slots: list[list[str]]
    _stopping: threading.Event = field(default_factory=threading.Event)
    _running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, jobs: Sequence[Job]) -> None:
        free: SimpleQueue[list[str]] = SimpleQueue()
        for slot in self.slots:
            free.put(slot)
        self._executor = ThreadPoolExecutor(len(self.slots))
        self._futures = [self._executor.submit(self._run, job, free) for job in jobs]

    def join(self) -> None:
        for future in self._futures:
            future.result()

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._stopping.set()
            for process in self._running.values():
                # The training saves where it is, and ends.
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job, free: SimpleQueue[list[str]]) -> None:
        gpus = free.get()
        try:
            with self._lock:
                if self._stopping.is_set():
                    return
                process = _spawn(job, gpus)
                self._running[process.pid] = process
            code = process.wait()
            write_end(Path(job.output), str(process.pid), code if code >= 0 else 128 - code)
        finally:
            free.put(gpus)


def _spawn(job: Job, gpus: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
    log = Path(str(job.log))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    start_log(log, str(process.pid))
    created = psutil.Process(process.pid).create_time()
    write_job(replace(job, job_id=str(process.pid), details={**job.details, "created": created, "gpus": gpus}))
    return process


def _planned(request: Request, group: int, output: Path) -> Job:
    make = accelerate_command if request.is_distributed else training_command
    me = psutil.Process()
    return request.job(NAME, group, make(request, group, output.absolute()), parent=me.pid, created=me.create_time())


def _here(request: Request, group: int, job_id: str | None) -> Job:
    me = psutil.Process()
    job = request.job(NAME, group, me.cmdline(), job_id, parent=me.pid, created=me.create_time())
    # What it says goes to the terminal.
    return replace(job, log=None)


def _abandon(request: Request, exit_code: int, why: str) -> None:
    """Say of every group that has not ended that it will not."""
    for output in request.outputs:
        job = read_job(output)
        if job is not None and read_end(job) is None:
            write_end(output, job.job_id, exit_code, why)


def _processes(request: Request, num_gpus: int) -> int:
    """How many GPUs one job takes: a config of accelerate's may want all of them."""
    return request.num_processes or (max(1, num_gpus) if request.accelerate_config is not None else 1)


def _look(job: Job) -> JobState:
    if (state := ended_state(job)) is not None:
        return state
    if job.host != socket.gethostname():
        return JobState("unknown", f"it was started on {job.host}: look there", *progress_of(job))
    pid = int(job.job_id or job.details["parent"])
    if not _is_alive(pid, job.details["created"]):
        gone = "it was killed" if job.job_id else "`merit train` ended before it began"
        return ended_state(job, gone) or JobState("failed", gone)
    return JobState("running", "", *progress_of(job)) if job.job_id else JobState("pending", "waits for its turn")


def _is_alive(pid: int, created: float) -> bool:
    """Whether the process runs that had this number at that time."""
    try:
        process = psutil.Process(pid)
        # A process that ended is in the table until its parent has asked.
        return abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""Train groups where `--launcher` says: one function for all of them, and for waiting until they are done.

A launcher is a module with NAME, POLL_SECONDS, `started`, `look` and `script`; see [`Launcher`].
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

from merit_hf.config import ConfigError, MeritError
from merit_hf.launchers import local
from merit_hf.launchers.jobs import Job, JobState, launching, read_end, read_job
from merit_hf.launchers.request import Request
from merit_hf.manifest import end_of_training
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress, Stage

LAUNCHERS = {
    "local": "merit_hf.launchers.local",
    "slurm": "merit_hf.launchers.slurm",
    "hf-jobs": "merit_hf.launchers.hf_jobs",
}


class Launcher(Protocol):
    """What a launcher's module offers.

    Attributes:
        NAME: as `--launcher` and a job's record have it.
        POLL_SECONDS: between two looks while waiting.
    """

    NAME: str
    POLL_SECONDS: float

    def started(self, request: Request, options: Any) -> AbstractContextManager[list[Job]]:
        """Start every group of the request; a record of each is written before this returns."""

    def look(self, jobs: Sequence[Job]) -> list[JobState]:
        """Where these jobs stand now, asked from any process, without the options that they were started with."""

    def script(self, request: Request, options: Any) -> str:
        """Exactly what `started` would submit; submits nothing."""


def open_launcher(name: str) -> Launcher:
    """Raises ConfigError where there is none of this name."""
    if name not in LAUNCHERS:
        raise ConfigError(f"--launcher {name}: expected {', '.join(LAUNCHERS)}.")
    return cast(Launcher, importlib.import_module(LAUNCHERS[name]))


def train_groups(
    plan: PartitionPlan,
    groups: Sequence[int],
    outputs: Sequence[Path],
    placement: Sequence[str] = (),
    num_processes: int | None = None,
    accelerate_config: Path | None = None,
    progress: Progress | None = None,
    launcher: str = "local",
    options: Any = None,
    wait: bool = True,
) -> list[Job]:
    """Train groups; finished ones are left as they are, and so are those whose job runs or waits.

    Args:
        plan ([`PartitionPlan`]): the plan, loaded from a folder or the Hub.
        groups, outputs: which groups, and a folder for each.
        placement: `sft.KEY=VALUE` and `train.KEY=VALUE` texts.
        num_processes, accelerate_config: for `accelerate launch`; without both, and with one GPU, `local` trains in
            this process.
        launcher: `local`, `slurm` or `hf-jobs`.
        options: the launcher's own, such as [`LocalOptions`].
        wait: return when all are done; else as soon as they are submitted, which `local` cannot.

    Returns:
        The jobs that were started, or run already; none where this process trained.

    Raises:
        ConfigError: a mistake in the call. MeritError: a training failed.
    """
    module, progress = open_launcher(launcher), progress or Progress()
    check_words(placement)
    request = Request(plan, list(groups), list(outputs), placement, num_processes, accelerate_config)
    options = options or local.LocalOptions()
    if launcher == local.NAME and not wait:
        raise ConfigError("--no-wait: local jobs live as long as this command. Put it into the background instead.")
    here = launcher == local.NAME and local.trains_here(request, options)
    with contextlib.ExitStack() as stack:
        with launching(request.outputs):
            active, missing = survey(request, progress, again=here)
            started: list[Job] = []
            if here:
                local.register(request.only(missing))
            elif missing:
                started = stack.enter_context(module.started(request.only(missing), options))
        if here and missing:
            local.train_here(request.only(missing), progress)
        jobs = sorted([*active, *started], key=lambda job: job.group)
        for job in started if not wait else ():
            what = f"submitted as {job.launcher} job {job.job_id}" if job.job_id else "finished already"
            progress.note(f"group {job.group}: {what}")
        if wait and jobs:
            raise_failed(request, jobs, watch(request, jobs, progress))
    return jobs


def dry_run(
    plan: PartitionPlan,
    groups: Sequence[int],
    outputs: Sequence[Path],
    placement: Sequence[str] = (),
    num_processes: int | None = None,
    accelerate_config: Path | None = None,
    launcher: str = "local",
    options: Any = None,
) -> str:
    """What [`train_groups`] would start for these groups, as text; nothing is started or written."""
    check_words(placement)
    request = Request(plan, list(groups), list(outputs), placement, num_processes, accelerate_config)
    missing = [
        group
        for group, output in zip(request.groups, request.outputs, strict=True)
        if end_of_training(plan.group(group).group_sha256, group, output) != "complete"
    ]
    if not missing:
        return "Nothing to train: every group is finished."
    return open_launcher(launcher).script(request.only(missing), options or local.LocalOptions())


def check_words(placement: Sequence[str]) -> None:
    """Raises ConfigError where a placement is refused, before a job is queued for it."""
    if placement:
        # They know TRL's fields, and so load it.
        from merit_hf.placement import check_placement, parse_placement

        check_placement(parse_placement(placement))


def survey(request: Request, progress: Progress, again: bool = False) -> tuple[list[Job], list[int]]:
    """(the jobs that run or wait already, the groups to start); finished groups are in neither.

    Args:
        again: count finished groups as to be started, where that is cheap: what was not pushed is pushed then.

    Raises:
        ConfigError: an output holds, or is being made into, something else.
        MeritError: a job cannot be asked after from here.
    """
    active, missing = [], []
    for group, output in zip(request.groups, request.outputs, strict=True):
        planned, job = request.plan.group(group).group_sha256, read_job(output)
        state = look_at([job])[0] if job is not None else None
        if job is not None and state is not None and state.is_active:
            where = f"{job.launcher} job {job.job_id or '(not started yet)'} of {job.host}"
            if job.group_sha256 != planned:
                raise ConfigError(f"{output}: {where} trains group {job.group} of another plan into it. Give another "
                                  "--output, or end that job.")  # fmt: skip
            if state.state == "unknown":
                raise MeritError(
                    f"group {group}: {where} may be running: {state.detail}. Nothing was started. If it runs no more, "
                    f"delete {output.parent / 'jobs' / output.name}.json."
                )
            progress.note(f"group {group}: {state.state} already as {where}; no second one is started")
            active.append(job)
            continue
        # Of one that failed though its checkpoint is there, the push is still to come.
        trained = end_of_training(planned, group, output) == "complete"
        failed = state is not None and state.state == "failed"
        if again or failed or not trained:
            missing.append(group)
    return active, missing


def look_at(jobs: Sequence[Job]) -> list[JobState]:
    """Where jobs of any launchers stand, each launcher asked once."""
    states: dict[int, JobState] = {}
    for name in {job.launcher for job in jobs}:
        mine = [number for number, job in enumerate(jobs) if job.launcher == name]
        states |= zip(mine, open_launcher(name).look([jobs[number] for number in mine]), strict=True)
    return [states[number] for number in range(len(jobs))]


def watch(request: Request, jobs: Sequence[Job], progress: Progress) -> list[JobState]:
    """Look again and again until every job has ended, and say what changes; how each of them ended."""
    pause = min(open_launcher(job.launcher).POLL_SECONDS for job in jobs)
    total = sum(request.plan.group(job.group).num_steps for job in jobs)
    said: dict[int, str] = {}
    with progress.stage("Training", total=total, unit="steps") as stage:
        while True:
            # A local job has its number only once it runs.
            jobs = [read_job(Path(job.output)) or job for job in jobs]
            states = look_at(jobs)
            for job, state in zip(jobs, states, strict=True):
                if said.get(job.group) != state.state:
                    said[job.group] = state.state
                    progress.note("\n".join(describe(job, state)))
            _show(request, stage, jobs, states, total)
            if not any(state.is_active for state in states):
                return states
            time.sleep(pause)


def _show(request: Request, stage: Stage, jobs: Sequence[Job], states: Sequence[JobState], total: int) -> None:
    done = 0
    for job, state in zip(jobs, states, strict=True):
        done += request.plan.group(job.group).num_steps if state.state == "finished" else state.step or 0
    counts = Counter(state.state for state in states)
    stage.update(done, total)
    stage.describe(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))


def describe(job: Job, state: JobState) -> list[str]:
    """A line about a job, and below it what a failed one said last."""
    what = f"group {job.group}: {state.state}"
    if state.is_active and job.job_id:
        what += f" as {job.launcher} job {job.job_id}"
    if state.detail:
        what += f": {state.detail}"
    if state.state != "failed":
        return [what]
    where = f", step {state.step} of {state.num_steps}" if state.step else ""
    return [
        f"{what}{where}. Last lines of {job.log or 'its log'}:" if state.lines else what,
        *(f"    {x}" for x in state.lines),
    ]


def raise_failed(request: Request, jobs: Sequence[Job], states: Sequence[JobState]) -> None:
    """Raises MeritError where a job failed; ConfigError where every one that failed was refused."""
    failed = [job for job, state in zip(jobs, states, strict=True) if state.state not in ("finished", "stopped")]
    if not failed:
        return
    names = ", ".join(str(job.group) for job in failed)
    refused = all((read_end(job) or {}).get("exit_code") == 2 for job in failed)
    error = ConfigError if refused else MeritError
    raise error(
        f"group {names} of {len(request.groups)} {'was refused' if refused else 'failed'}; the last lines stand "
        "above. Run the same command again: it starts only what is missing."
    )

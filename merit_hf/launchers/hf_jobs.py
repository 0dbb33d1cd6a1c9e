"""Groups on HF Jobs: one `run_uv_job` a group, which trains it, pushes it, and goes on from its own last push.

    uv run --with merit_hf==VERSION accelerate launch … -m merit_hf.training org/plan@COMMIT --group 0 …

A job sees nothing of this machine: the plan and its data are on the Hub, at commits, and secrets go by name.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import current_user, is_private
from merit_hf.hub_jobs import TOKEN_NAME, HubJob, JobCall, find_jobs, inspect_job, job_log, job_request, submit_job
from merit_hf.launchers.jobs import Job, JobState, telling_lines, write_job
from merit_hf.launchers.request import Request, accelerate_command
from merit_hf.plan import PartitionPlan
from merit_hf.sharing.publish import read_remote_manifest
from merit_hf.text import one_line
from merit_hf.train_section import PREFIX

NAME = "hf-jobs"
POLL_SECONDS = 10.0
PLAN_LABEL, GROUP_LABEL = "merit-plan", "merit-group"
_TIMEOUT = re.compile(r"\d+(\.\d+)?[smhd]?")
_SECRET = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_GPUS = re.compile(r"x(\d+)$")
_LOG_LINES = 100
# What a job needs to say: its disk is gone when it ends.
_PUSHED = {"push_to_hub": "true", "hub_strategy": "checkpoint"}


@dataclass(frozen=True)
class HfJobsOptions:
    """How groups are trained on HF Jobs.

    Attributes:
        flavor: the machine to rent, by the Hub's name for it.
        timeout: after which a job is stopped; the same command then goes on from its last push.
        namespace: who pays, and whose the group repos are. Default: the token's owner.
        image: Docker image with uv. Default: the Hub's client's.
        secrets: names of environment variables that the job gets besides HF_TOKEN.
        hf_from: URL that merit_hf is installed from. Default: this version from PyPI.
        hf_with: what is installed besides, such as `trackio`.
        contribute: open the contribution to the plan when a group is pushed.
    """

    flavor: str | None = None
    timeout: str = "6h"
    namespace: str | None = None
    image: str | None = None
    secrets: Sequence[str] = ()
    hf_from: str | None = None
    hf_with: Sequence[str] = ()
    contribute: bool = False


@dataclass(frozen=True)
class _Planned:
    """One group: what would be submitted, and how far it is; `finished` is the commit of its checkpoint, or None."""

    group: int
    repo_id: str
    call: JobCall
    finished: str | None
    job: HubJob | None

    @property
    def is_missing(self) -> bool:
        return self.finished is None and not (self.job and self.job.is_alive)


@contextlib.contextmanager
def started(request: Request, options: HfJobsOptions) -> Iterator[list[Job]]:
    """Submit every group that is neither finished nor on its way on the Hub, whoever started it; records of all.

    Jobs run on when this is left.

    Raises:
        ConfigError: plan, base or data are not on the Hub, an option is wrong, a repo holds something else, or the Hub
            refuses a job.
    """
    yield [_start(request, planned, options) for planned in _plan_jobs(request, options)]


def script(request: Request, options: HfJobsOptions) -> str:
    """The requests that `started` would send, a secret's name in the place of its value."""
    shown = []
    for planned in _plan_jobs(request, options):
        if planned.is_missing:
            url, body = job_request(planned.call)
            shown.append(f"# group {planned.group}\nPOST {url}\n{json.dumps(body, indent=2, ensure_ascii=False)}")
        elif planned.finished:
            shown.append(f"# group {planned.group} is finished: {planned.repo_id}@{planned.finished[:12]}")
        else:
            assert planned.job is not None
            shown.append(f"# group {planned.group} is on its way: {planned.job.url}")
    return "\n".join(shown)


def look(jobs: Sequence[Job]) -> list[JobState]:
    """Where groups stand, by the manifests in their repos and by their jobs."""
    return [_look(job) for job in jobs]


def _plan_jobs(request: Request, options: HfJobsOptions) -> list[_Planned]:
    _check_on_hub(request.plan, request.groups)
    _check_options(options)
    given = _checked_placement(request)
    plan, namespace = request.plan, options.namespace or current_user()[0]
    placement = dict(given)
    if "hub_private_repo" not in given and is_private(str(plan.repo_id), plan.revision, "dataset"):
        placement["hub_private_repo"] = "true"
    jobs = _newest_jobs(plan, namespace)
    return [_plan_job(request, group, placement, namespace, options, jobs.get(group)) for group in request.groups]


def _newest_jobs(plan: PartitionPlan, namespace: str) -> dict[int, HubJob]:
    """{group: its newest job} of a plan in a namespace; one that is on its way counts before one that is not."""
    found = sorted(find_jobs(namespace, {PLAN_LABEL: _label(plan)}), key=lambda job: job.is_alive)
    return {int(number): job for job in found if (number := job.labels.get(GROUP_LABEL, "")).isdigit()}


def _label(plan: PartitionPlan) -> str:
    """Of the plan's identity, so that a plan that was pushed again keeps its jobs."""
    return plan.sha256[:12]


def _plan_job(
    request: Request,
    group: int,
    placement: Mapping[str, str],
    namespace: str,
    options: HfJobsOptions,
    job: HubJob | None,
) -> _Planned:
    from merit_hf.training import group_repo

    repo_id = group_repo(request.plan, group, placement.get("hub_model_id"), namespace)
    fields = {**_PUSHED, **placement, "hub_model_id": repo_id}
    texts = [f"{key if key.startswith(PREFIX) else f'sft.{key}'}={value}" for key, value in fields.items()]
    trained = replace(request, placement=texts, num_processes=request.num_processes or _num_gpus(options))
    # The first words are this machine's Python and module.
    words = accelerate_command(trained, group, Path(f"group-{group}"))[3:]
    package = f"merit_hf=={importlib.metadata.version('merit_hf')}"
    if options.hf_from:
        package = f"merit_hf @ {options.hf_from}"
    label = _label(request.plan)
    call = JobCall(
        namespace=namespace, command="accelerate",
        arguments=["launch", *words, *(["--contribute"] if options.contribute else [])],
        dependencies=[package, *options.hf_with], flavor=str(options.flavor), timeout=options.timeout,
        secrets=list(dict.fromkeys([TOKEN_NAME, *options.secrets])), image=options.image,
        labels={"name": f"merit-{label}-group-{group}", PLAN_LABEL: label, GROUP_LABEL: str(group)},
    )  # fmt: skip
    return _Planned(group, repo_id, call, _finished(repo_id, request.plan.group(group).group_sha256, group), job)


def _num_gpus(options: HfJobsOptions) -> int:
    """A process for each GPU of the machine, which the flavor's name tells: `a10g-largex4` has four."""
    found = _GPUS.search(str(options.flavor))
    return int(found[1]) if found else 1


def _finished(repo_id: str, group_sha256: str, group: int) -> str | None:
    """The commit of the group's finished checkpoint in its repo, or None."""
    found = read_remote_manifest(repo_id)
    if found is None:
        return None
    manifest, revision = found
    if manifest.get("group_sha256") != group_sha256:
        raise ConfigError(
            f"`{repo_id}` holds another group's training ({str(manifest.get('group_sha256'))[:12]}, group {group} of "
            f"this plan is {group_sha256[:12]}). Choose another repo with sft.hub_model_id=OWNER/NAME."
        )
    return revision if manifest.get("status") == "complete" else None


def _start(request: Request, planned: _Planned, options: HfJobsOptions) -> Job:
    """Submit a group where it is missing, and record its job before the next one is submitted."""
    _, body = job_request(planned.call)
    found = submit_job(planned.call) if planned.is_missing else None if planned.finished else planned.job
    details: dict[str, Any] = {
        "namespace": planned.call.namespace, "repo_id": planned.repo_id, "url": found.url if found else None,
        "num_steps": request.plan.group(planned.group).num_steps,
    }  # fmt: skip
    record = request.job(NAME, planned.group, body["command"], found.id if found else None, options, **details)
    job = replace(record, log=None)
    write_job(job)
    return job


def _look(job: Job) -> JobState:
    repo_id, step, stopped = job.details["repo_id"], None, False
    try:
        pushed = read_remote_manifest(repo_id)
        if pushed is not None and pushed[0].get("group_sha256") == job.group_sha256:
            if pushed[0].get("status") == "complete":
                return JobState("finished", f"{repo_id}@{pushed[1][:12]}")
            step = pushed[0].get("num_steps")
            stopped = pushed[0].get("status") == "stopped"
        found = inspect_job(job.details["namespace"], job.job_id) if job.job_id else None
        if stopped and not (found is not None and found.is_alive):
            return JobState("stopped", f"before its planned steps, in {repo_id}", step, job.details["num_steps"])
        if found is not None and not found.is_alive:
            said = telling_lines(job_log(found, _LOG_LINES))
            return JobState("failed", _ended_as(found, repo_id), step, job.details["num_steps"], said)
    except MeritError as error:
        return JobState("unknown", one_line(str(error)))
    if found is None:
        return JobState("failed", "the Hub knows its job no more", step, job.details["num_steps"])
    state = "pending" if found.stage == "SCHEDULING" else "running"
    return JobState(state, found.url, step, job.details["num_steps"])


def _ended_as(job: HubJob, repo_id: str) -> str:
    why = f"ended as {job.stage}{f' ({job.message})' if job.message else ''}"
    if job.stage == "COMPLETED":
        why = f"ended without a finished checkpoint in {repo_id}"
    return one_line(f"{why}: {job.url}")


def _check_on_hub(plan: PartitionPlan, groups: Sequence[int]) -> None:
    if plan.repo_id is None:
        raise ConfigError(
            f"{plan.folder}: a job on the Hub does not see this folder. Publish the plan (`merit push {plan.folder} "
            "OWNER/NAME --with-data`), and give OWNER/NAME."
        )
    if plan.supplied:
        raise ConfigError(
            f"--data {next(iter(plan.supplied))}: a job on the Hub does not see files of this machine. The plan's "
            f"author publishes them with `merit push PLAN {plan.repo_id} --with-data`."
        )
    local = [member.name for group in groups for member in plan.members(group) if member.repo_id is None]
    if local:
        raise ConfigError(
            f"`{plan.repo_id}`: the data of {', '.join(local[:5])}{' …' if len(local) > 5 else ''} are files of "
            f"another machine, which a job does not see. Their owner publishes them with `merit push PLAN "
            f"{plan.repo_id} --with-data`."
        )
    if plan.base["repo_id"] is None:
        raise ConfigError(
            f"`{plan.repo_id}`: its base was a folder, which a job does not see. Plan from a base on the Hub."
        )


def _check_options(options: HfJobsOptions) -> None:
    if not options.flavor:
        raise ConfigError(
            "--flavor is missing: the machine to rent, such as a10g-large. `hf jobs hardware` lists them with prices."
        )
    if not _TIMEOUT.fullmatch(options.timeout):
        raise ConfigError(f"--timeout {options.timeout}: expected a number with s, m, h or d, such as 6h.")
    for name in options.secrets:
        if not _SECRET.fullmatch(name):
            # Never the whole text: it may hold the secret.
            raise ConfigError(
                f"--secrets {name.partition('=')[0]}…: expected the name of an environment variable, not its value."
            )
    if options.hf_from is None:
        return
    parts = urlsplit(options.hf_from.removeprefix("git+"))
    if "@" in parts.netloc:
        raise ConfigError("--hf-from: the URL holds a password or token, and a job's command is not secret.")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"--hf-from {options.hf_from}: expected a URL that a job can reach, git+https://HOST/REPO@REVISION or "
            "https://HOST/merit_hf-VERSION-py3-none-any.whl."
        )


def _checked_placement(request: Request) -> dict[str, str]:
    """{SFT field, or `train.KEY`: text}, checked before a machine is paid for."""
    from merit_hf.placement import check_placement, parse_placement

    if request.accelerate_config is not None:
        raise ConfigError(
            f"--accelerate-config {request.accelerate_config}: a job on the Hub does not see this file. It starts a "
            "process on each GPU of its machine by itself; leave the option out."
        )
    values = parse_placement(request.placement)
    check_placement(values)
    if values.get("push_to_hub", True) is not True:
        raise ConfigError("sft.push_to_hub=false: a job's disk is gone when it ends, so its group must be pushed.")
    if len(request.groups) > 1 and "hub_model_id" in values:
        raise ConfigError(
            f"sft.hub_model_id={values['hub_model_id']} names one repo, and {len(request.groups)} groups are trained. "
            "Leave it out, or train one --group."
        )
    return {text.partition("=")[0].removeprefix("sft."): text.partition("=")[2] for text in request.placement}

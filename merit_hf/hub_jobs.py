"""HF Jobs: submitting a command, finding jobs by their labels, their last words.

Secrets go by name. Their values are looked up when a job is submitted, and are in nothing that is returned from here.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, JobInfo, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, JobNotFoundError

from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import hub_errors

TOKEN_NAME = "HF_TOKEN"
# The Hub refuses a body or an account with these; trying again changes nothing.
_REFUSED = (400, 402, 403, 404, 409, 422)
# What it says last is read where it fails: nothing may be left in a buffer, or drowned in bars.
_ENVIRONMENT = dict.fromkeys(
    ("PYTHONUNBUFFERED", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1"
)
_PUBLIC_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class JobCall:
    """What `run_uv_job` is asked for.

    Attributes:
        namespace: user or organisation that pays for the job.
        command, arguments: what `uv run` starts, by names that mean the same on every machine.
        dependencies: what uv installs first, as pip would be told.
        flavor: the machine, such as `a10g-large`. timeout: such as `6h`.
        secrets: names of environment variables here; HF_TOKEN may also be the stored login.
        labels: by which the job is found again.
        image: Docker image with uv; None is the Hub's default.
    """

    namespace: str
    command: str
    arguments: Sequence[str]
    dependencies: Sequence[str]
    flavor: str
    timeout: str
    secrets: Sequence[str]
    labels: Mapping[str, str]
    image: str | None = None


@dataclass(frozen=True)
class HubJob:
    """A job as the Hub tells of it. `stage` is SCHEDULING, RUNNING, COMPLETED, ERROR, CANCELED or DELETED."""

    id: str
    namespace: str
    stage: str
    message: str | None
    url: str
    labels: Mapping[str, str]
    created_at: str

    @property
    def is_alive(self) -> bool:
        return self.stage in ("SCHEDULING", "RUNNING")


class _Caught(BaseException):
    """A request that was kept back."""


def job_request(call: JobCall) -> tuple[str, dict[str, Any]]:
    """(URL, JSON body) of the POST that [`submit_job`] sends, a secret's name in the place of its value.

    The client itself makes the request; it is taken from it before it leaves, and nothing is sent.

    Raises:
        ConfigError: as [`submit_job`].
    """

    def catch(request: Any) -> NoReturn:
        raise _Caught(str(request.url), json.loads(request.content))

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks["request"], catch]}
    try:
        _run(call, {name: f"<{name} of this machine>" for name in call.secrets})
    except _Caught as caught:
        url, body = caught.args
        return url, body
    finally:
        client.event_hooks = hooks
    raise AssertionError("run_uv_job sent no request")


def submit_job(call: JobCall) -> HubJob:
    """Start a job.

    Raises:
        ConfigError: a secret has no value here, an argument is the name of a file here, or the Hub refuses the call.
        HubUnavailableError: the Hub failed or cannot be reached.
    """
    secrets = {name: _secret(name) for name in call.secrets}
    with hub_errors("submitting the job"):
        try:
            return _described(_run(call, secrets), call.namespace)
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status not in _REFUSED:
                raise
            why = " ".join((error.server_message or "no reason given").split())
            raise ConfigError(
                f"HF Jobs of `{call.namespace}` refused the job (HTTP {status}): {why}. Flavors and prices: "
                "`hf jobs hardware`; jobs need a paid account or credits, and a token that may write."
            ) from error


def find_jobs(namespace: str, labels: Mapping[str, str]) -> list[HubJob]:
    """The jobs of `namespace` that carry all of `labels`, oldest first."""
    with hub_errors(f"listing the jobs of `{namespace}`"):
        found = [_described(job, namespace) for job in HfApi().list_jobs(labels=dict(labels), namespace=namespace)]
    return sorted(found, key=lambda job: job.created_at)


def inspect_job(namespace: str, job_id: str) -> HubJob | None:
    """A job as it stands now; None where the Hub does not know it."""
    with hub_errors(f"asking for job {job_id}"):
        try:
            return _described(HfApi().inspect_job(job_id=job_id, namespace=namespace), namespace)
        except JobNotFoundError:
            return None


def job_log(job: HubJob, count: int) -> list[str]:
    """The last `count` lines that a job has written."""
    with hub_errors(f"reading the log of job {job.id}"):
        lines = HfApi().fetch_job_logs(job_id=job.id, namespace=job.namespace, tail=count)
        return [line.rstrip() for line in deque(lines, maxlen=count)]


def _run(call: JobCall, secrets: dict[str, str]) -> JobInfo:
    # The client uploads every argument that is the name of a file here, and rewrites it. None is meant as one.
    for text in (call.command, *call.arguments):
        if Path(text).is_file():
            raise ConfigError(
                f"`{text}` is also the name of a file in {Path.cwd()}, which the Hub's client would upload in its "
                "place. Run the command in another folder."
            )
    environment = dict(_ENVIRONMENT)
    # A Hub of one's own is the job's Hub too.
    if constants.ENDPOINT != _PUBLIC_HUB:
        environment["HF_ENDPOINT"] = constants.ENDPOINT
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental")
        try:
            return HfApi().run_uv_job(
                call.command, script_args=list(call.arguments), dependencies=list(call.dependencies), image=call.image,
                env=environment, secrets=secrets, flavor=call.flavor, timeout=call.timeout, labels=dict(call.labels),
                namespace=call.namespace,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise ConfigError(f"{error}: names a file of this machine, which the job does not have.") from error


def _secret(name: str) -> str:
    value = os.environ.get(name) or (get_token() if name == TOKEN_NAME else None)
    if not value:
        cure = "Log in with `hf auth login`" if name == TOKEN_NAME else f"Set it (export {name}=…)"
        raise MeritError(f"the secret {name} has no value on this machine. {cure}, and run the command again.")
    return value


def _described(job: JobInfo, namespace: str) -> HubJob:
    created = job.created_at.isoformat() if job.created_at else ""
    return HubJob(
        job.id, namespace, str(getattr(job.status.stage, "value", job.status.stage)), job.status.message, job.url,
        job.labels or {}, created,
    )  # fmt: skip

"""HF Jobs: what clients submit is kept as it came; whoever holds the server decides what becomes of a job."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import JobHardware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .access import known_user_of
from .repos import HubError, timestamp


@dataclass
class Job:
    """A submitted job: `body` is the request's, values of secrets included; `log` holds (time, line)."""

    namespace: str
    body: dict[str, Any]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    stage: str = "SCHEDULING"
    message: str | None = None
    created: str = field(default_factory=timestamp)
    log: list[tuple[str, str]] = field(default_factory=list)

    def write(self, line: str) -> None:
        self.log.append((timestamp(), line))

    def to_json(self) -> dict[str, Any]:
        shown = ("command", "arguments", "environment", "flavor", "labels", "dockerImage", "spaceId")
        described = {key: self.body[key] for key in shown if key in self.body}
        owner = {"id": secrets.token_hex(12), "name": self.namespace, "type": "user"}
        return {"id": self.id, "createdAt": self.created, "owner": owner,
                "status": {"stage": self.stage, "message": self.message}} | described  # fmt: skip


def _namespace(request: Request) -> str:
    user, namespace = known_user_of(request), str(request.path_params["ns"])
    if namespace not in (user, *request.app.state.hub.organisations[user]):
        raise HubError(403, f"You may not run jobs in {namespace}")
    return namespace


def _job(request: Request) -> Job:
    namespace, wanted = _namespace(request), request.path_params["job"]
    for job in request.app.state.hub.jobs:
        if (job.namespace, job.id) == (namespace, wanted):
            return job
    raise HubError(404, "Job not found")


async def create(request: Request) -> Response:
    namespace, body = _namespace(request), await request.json()
    if body["flavor"] not in {hardware.value for hardware in JobHardware}:
        raise HubError(400, f'"flavor" must be one of the hardware flavors, not "{body["flavor"]}"')
    request.app.state.hub.jobs.append(Job(namespace, body))
    return JSONResponse(request.app.state.hub.jobs[-1].to_json())


async def list_jobs(request: Request) -> Response:
    namespace, query = _namespace(request), request.query_params
    labels = [label.split("=", 1) for label in query.getlist("label")]
    found = [job for job in request.app.state.hub.jobs if job.namespace == namespace
             and job.stage in (query.getlist("stage") or [job.stage])
             and all(job.body.get("labels", {}).get(key) == value for key, value in labels)]  # fmt: skip
    return JSONResponse([job.to_json() for job in reversed(found)])


async def inspect(request: Request) -> Response:
    return JSONResponse(_job(request).to_json())


async def logs(request: Request) -> Response:
    """The log so far as server-sent events, the last `tail` lines where asked for."""
    job = _job(request)
    lines = job.log[-int(request.query_params["tail"]) :] if "tail" in request.query_params else job.log

    def events() -> Iterator[str]:
        for number, (moment, line) in enumerate([(job.created, "===== Job started"), *lines]):
            yield f"id: {number}\ndata: {json.dumps({'timestamp': moment, 'data': line})}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")

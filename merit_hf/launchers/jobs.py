"""A launched training: what its record says, how it ended, and where it stands.

Beside the checkpoint OUT/0 lie, in OUT/jobs:

    0.json      what was started: by which launcher, as which job, with which command; written by the launcher alone
    0.end       how it ended: written by whoever saw its end, on whatever machine
    0.log       what it said, one start after another

OUT/0 itself is the proof that it finished. A list of the outputs of every plan is kept in HF_HOME/merit, so that
`merit status PLAN` finds them, for a plan of the Hub too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from merit_hf.config import MeritError
from merit_hf.manifest import MANIFEST_NAME, read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.text import one_line

SCHEMA_VERSION = 1
ACTIVE = ("pending", "running", "unknown")
# What the training says as it goes, and when it refuses to.
_STEP = re.compile(r"\bstep (\d+) of (\d+)\b")
_ERROR = "merit: error:"
_STARTED = "merit: started "
_TAIL_BYTES = 1 << 16
_TAIL_LINES = 8


@dataclass(frozen=True)
class Job:
    """One start of a group's training.

    Attributes:
        launcher: `local`, `slurm` or `hf-jobs`.
        plan_sha256, group, group_sha256: what is trained.
        output: where the checkpoint is to lie; absolute.
        job_id: what its launcher knows it by; None while it has none yet.
        command: what runs.
        log: the file with its output; None where that goes elsewhere.
        host: where it was launched from.
        submitted_at: ISO 8601.
        details: what only its launcher understands.
    """

    launcher: str
    plan_sha256: str
    group: int
    group_sha256: str
    output: str
    job_id: str | None
    command: list[str]
    log: str | None
    host: str = field(default_factory=socket.gethostname)
    submitted_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobState:
    """Where a job stands.

    Attributes:
        state: `pending`, `running`, `finished`, `stopped` (on purpose, before its planned steps; what it trained is
            there), `failed`, or `unknown` where nobody can be asked from here.
        detail: in a few words, such as why it waits or failed.
        step, num_steps: how far it is, where it said so.
        lines: of a failed one, what it said last.
    """

    state: str
    detail: str = ""
    step: int | None = None
    num_steps: int | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def is_active(self) -> bool:
        """Whether a second one must not be started."""
        return self.state in ACTIVE


def record_path(output: Path) -> Path:
    """OUT/jobs/0.json of the checkpoint OUT/0."""
    output = output.absolute()
    return output.parent / "jobs" / f"{output.name}.json"


def log_path(output: Path) -> Path:
    return record_path(output).with_suffix(".log")


def write_job(job: Job) -> None:
    """Record a start."""
    path = record_path(Path(job.output))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(job)})
    _remember(job.plan_sha256, job.output)


def read_job(output: Path) -> Job | None:
    """The last start of the training that makes `output`; None where there was none.

    Raises:
        MeritError: its record cannot be read.
    """
    path = record_path(output)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("another schema_version")
        return Job(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MeritError(
            f"{path}: not a job's record ({error}). Delete it if no job of this group is running any more."
        ) from error


def write_end(output: Path, job_id: str | None, exit_code: int, error: str = "") -> None:
    """Record how job `job_id` ended. `error` is told by `merit status`; exit code 2 is a refusal."""
    content = {"job_id": job_id, "exit_code": exit_code, "error": error, "host": socket.gethostname(),
               "ended_at": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    _write_json(record_path(output).with_suffix(".end"), content)


def forget_end(output: Path) -> None:
    """A new start begins: how the one before it ended no longer counts."""
    record_path(output).with_suffix(".end").unlink(missing_ok=True)


def read_end(job: Job) -> dict[str, Any] | None:
    """How this very job ended, {exit_code, error, host, ended_at}; None where nobody has said so."""
    try:
        end = json.loads(record_path(Path(job.output)).with_suffix(".end").read_text(encoding="utf-8"))
        return end if end["job_id"] == job.job_id and isinstance(end["exit_code"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trained(group_sha256: str, output: Path) -> dict[str, Any] | None:
    """The manifest of this group's checkpoint in `output`, `complete` or `stopped`; None where it is not there."""
    try:
        manifest = read_manifest(output) if (output / MANIFEST_NAME).exists() else {}
    except MeritError:
        return None
    ours = manifest.get("group_sha256") == group_sha256 and manifest.get("status") in ("complete", "stopped")
    return manifest if ours else None


def ended_state(job: Job, gone: str | None = None) -> JobState | None:
    """The state of a job that has ended, by its record and its checkpoint; None where it has said nothing.

    Args:
        gone: why it is known to run no more, though it left no word.
    """
    end, manifest = read_end(job), trained(job.group_sha256, Path(job.output))
    if end is None and gone is None:
        return None
    if manifest is not None and (end is None or end["exit_code"] == 0):
        if manifest["status"] == "complete":
            return JobState("finished")
        return JobState("stopped", "before its planned steps", manifest["num_steps"], progress_of(job)[1])
    if end is not None and end["exit_code"]:
        why = str(end["error"]) or f"ended with exit code {end['exit_code']}"
    else:
        why = gone or "ended without a checkpoint"
    return JobState("failed", one_line(why), *progress_of(job), last_lines(job.log))


def progress_of(job: Job) -> tuple[int | None, int | None]:
    """(step, num_steps) of the job's last start, by its log; else by what it has saved."""
    found = [match for line in _said(job.log) if (match := _STEP.search(line))]
    return (int(found[-1][1]), int(found[-1][2])) if found else (saved_steps(Path(job.output)) or None, None)


def saved_steps(output: Path) -> int:
    """The steps of the newest checkpoint in `output`.part; 0 where there is none."""
    folders = output.with_name(f"{output.name}.part").glob("checkpoint-*")
    steps = [folder.name.rpartition("-")[2] for folder in folders]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def last_lines(log: str | None) -> list[str]:
    """What a job's last start said at the end."""
    return telling_lines(_said(log))


def telling_lines(said: Sequence[str]) -> list[str]:
    """Of what a job said: its own error where it told one, else its last lines."""
    said = [line for line in said if line.strip()]
    errors = [line for line in said if line.startswith(_ERROR)]
    return [one_line(line) for line in (errors[-1:] or said[-_TAIL_LINES:])]


def told_its_error(log: Path) -> bool:
    """Whether the training of the last start said itself why it ended; one that was killed could not."""
    return any(line.startswith(_ERROR) for line in _said(str(log)))


def start_log(log: Path, job_id: str) -> None:
    """Begin a new start in the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"{_STARTED}job {job_id} on {socket.gethostname()} at {now}\n")


def _said(log: str | None) -> list[str]:
    """The end of the last start's output."""
    try:
        with open(log or "", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    start = max((number for number, line in enumerate(lines) if line.startswith(_STARTED)), default=-1)
    return lines[start + 1 :]


@contextlib.contextmanager
def launching(outputs: Sequence[Path]) -> Iterator[None]:
    """While one command looks at these outputs' records and starts what is missing, no other does."""
    folders = sorted({record_path(output).parent for output in outputs})
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".lock"))
        yield


def jobs_of(plan: PartitionPlan, output: Path | None = None) -> dict[int, Job]:
    """{group: its newest job} of those that were launched from here, or whose records lie in `output` or beside."""
    outputs = [Path(text) for text in _remembered(plan.sha256)]
    run = None if plan.folder is None or plan.repo_id else plan.folder.resolve().parent / "groups"
    for folder in filter(None, (output, run)):
        outputs += [folder, *(folder / path.stem for path in sorted((folder / "jobs").glob("*.json")))]
    planned = {group.group: group.group_sha256 for group in plan.groups}
    found: dict[int, Job] = {}
    for job in filter(None, map(read_job, outputs)):
        if planned.get(job.group) == job.group_sha256 and (
            job.group not in found or found[job.group].submitted_at <= job.submitted_at
        ):
            found[job.group] = job
    return found


def _registry(plan_sha256: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()
    return home / "merit" / "jobs" / f"{plan_sha256}.json"


def _remembered(plan_sha256: str) -> list[str]:
    try:
        outputs = json.loads(_registry(plan_sha256).read_text(encoding="utf-8"))["outputs"]
        return [str(output) for output in outputs]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _remember(plan_sha256: str, output: str) -> None:
    path = _registry(plan_sha256)
    # Only for convenience: where no home can be written to, `merit status --output` still finds the jobs.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            outputs = _remembered(plan_sha256)
            if output not in outputs:
                _write_json(path, {"outputs": [*outputs, output]})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)

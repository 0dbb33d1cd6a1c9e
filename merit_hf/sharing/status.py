"""Where each group of a plan stands: claimed, trained, verified, merged. Of a Hub repo, or of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from merit_hf.config import MeritError
from merit_hf.hub_write import PullRequest, open_pull_requests
from merit_hf.launchers.dispatch import describe, look_at
from merit_hf.launchers.jobs import ACTIVE, Job, JobState, jobs_of, saved_steps
from merit_hf.manifest import MANIFEST_NAME, read_manifest
from merit_hf.plan import PLAN_NAME, PartitionPlan
from merit_hf.sharing.community import load_registry
from merit_hf.sharing.registry import Registry
from merit_hf.text import one_line
from merit_hf.verification.checks import failed, manifest_checks
from merit_hf.verification.sources import FolderSource


@dataclass(frozen=True)
class GroupStatus:
    """One group.

    Attributes:
        num_input_tokens: of its whole training.
        claim: `free`, `pending` (a pull request waits), `held` or `expired`; of a folder `local`.
        claimed_by, until: by whom, and until when (ISO 8601).
        checkpoint: where it lies (`repo@commit` or a folder), or what there is of it; None where there is nothing.
        verified: the level at which it was verified, or None.
        merged: the merged model it went into, or None.
        job: of the group's training that was launched from here, its launcher, job_id, state (`pending`, `running`,
            `finished`, `stopped`, `failed` or `unknown`), step, num_steps, detail, lines (the last it said), output,
            log, and the options that it was given.
    """

    group: int
    datasets: list[str]
    num_input_tokens: int
    claim: str
    claimed_by: str | None
    until: str | None
    checkpoint: str | None
    verified: str | None
    merged: str | None
    job: dict[str, Any] | None = None


def plan_status(
    plan: PartitionPlan, now: datetime | None = None, output: Path | None = None
) -> tuple[list[GroupStatus], list[str]]:
    """(every group's status, problems found on the way).

    Args:
        output: the `--output` of a training, where its job was launched from another machine or home.
    """
    jobs = jobs_of(plan, output)
    looks = dict(zip(jobs, look_at(list(jobs.values())), strict=True))
    failed = [
        line for group, state in looks.items() if state.state == "failed" for line in describe(jobs[group], state)
    ]
    if plan.repo_id is None:
        states = [_local_status(plan, group.group, _folder(plan, group.group, jobs, output)) for group in plan.groups]
        return [_with_job(state, jobs, looks) for state in states], failed
    now = now or datetime.now(UTC)
    registry, requests = load_registry(plan), open_pull_requests(plan.repo_id)
    problems = [f"{path}: {why}" for path, why in sorted(registry.problems.items())]
    states = [_hub_status(plan, group.group, registry, requests, now) for group in plan.groups]
    return [_with_job(state, jobs, looks) for state in states], problems + failed


def status_json(plan: PartitionPlan, states: Sequence[GroupStatus], problems: Sequence[str]) -> str:
    """For programs: {plan, groups: [GroupStatus], problems}."""
    head: dict[str, Any] = {"repo_id": plan.repo_id, "revision": plan.revision, "sha256": plan.sha256}
    content = {"plan": head, "groups": [asdict(state) for state in states], "problems": list(problems)}
    return json.dumps(content, indent=2, ensure_ascii=False)


def status_table(plan: PartitionPlan, states: Sequence[GroupStatus]) -> Table:
    """For people."""
    ready = sum(state.verified is not None for state in states)
    title = f"Plan {plan.sha256[:12]}: {ready} of {len(states)} groups ready to merge"
    table = Table(title=title, title_justify="left")
    launched = any(state.job for state in states)
    for column, justify in (("group", "right"), ("datasets", "left"), ("tokens", "right"), ("claimed by", "left"),
                            *([("job", "left")] if launched else []),
                            ("checkpoint", "left"), ("verified", "left"), ("merged", "left")):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for state in states:
        names = ", ".join(state.datasets[:4]) + (
            f" and {len(state.datasets) - 4} more" if len(state.datasets) > 4 else ""
        )
        until = f" until {state.until[:16]}" if state.until and state.claim == "held" else ""
        claimed = f"{state.claimed_by} ({state.claim}{until})" if state.claimed_by else state.claim
        cells = [str(state.group), names, f"{state.num_input_tokens:,}", claimed,
                 *([_job_text(state.job)] if launched else []),
                 state.checkpoint or "–", state.verified or "–", state.merged or "–"]  # fmt: skip
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    return table


def next_step(plan: PartitionPlan, states: Sequence[GroupStatus]) -> str:
    """What to do now."""
    where = plan.repo_id or str(plan.folder)
    rounds = _rounds(plan)
    if rounds:
        return f"This plan is trained in {len(rounds)} rounds: merit status {rounds[-1]}"
    if all(state.merged for state in states):
        return f"All groups are merged: {states[0].merged}."
    if all(state.verified for state in states):
        return f"Next: merit merge {where}{'' if plan.repo_id else ' CHECKPOINT…'} --output merged"
    failed = [state for state in states if state.job and state.job["state"] == "failed"]
    if failed and failed[0].job:
        job, number = failed[0].job, failed[0].group
        how = "" if job["launcher"] == "local" else f" --launcher {job['launcher']}"
        again = f"merit train {where} --group {number} --output {job['output']}{how} {job['options']}".rstrip()
        return f"Failed: group {_numbers(failed)}. Next: {again}"
    running = [state for state in states if state.job and state.job["state"] in ACTIVE]
    if running:
        return f"In training: group {_numbers(running)}. Look again with merit status {where}"
    stopped = [state for state in states if state.job and state.job["state"] == "stopped" and not state.verified]
    if stopped and stopped[0].job:
        again = f"merit train {where} --group {stopped[0].group} --output {stopped[0].job['output']}"
        return (
            f"Stopped before its planned steps: group {_numbers(stopped)}. Next: {again} to go on, or merit merge "
            f"{where} CHECKPOINT… --allow-partial"
        )
    unoffered = [
        state for state in states if state.job and state.checkpoint and state.checkpoint == state.job["detail"]
    ]
    if plan.repo_id and unoffered:
        return f"Trained: group {_numbers(unoffered)}. Next: merit contribute {where} {unoffered[0].checkpoint}"
    if plan.repo_id is None and all(state.verified or state.merged for state in states):
        before = next(state.merged for state in states if state.merged)
        new = " ".join(str(state.checkpoint) for state in states if not state.merged)
        return f"Next: merit merge {where} {new} --with-merged {before} --output {before}-extended"
    pending = [state for state in states if state.claim == "pending" or (state.checkpoint and not state.verified)]
    if plan.repo_id and pending:
        return f"{len(pending)} pull requests wait for a maintainer: merit accept {where}"
    free = [state.group for state in states if state.claim in ("free", "expired", "local") and not state.checkpoint]
    if free and plan.repo_id:
        return f"Free: group {', '.join(map(str, free))}. Next: merit claim {where} --group {free[0]}"
    if plan.repo_id:
        held = [f"{state.group} ({state.claimed_by})" for state in states if not state.verified]
        return f"Still to come: group {', '.join(held)}."
    groups = plan.folder and plan.folder.resolve().parent / "groups"
    if any(state.merged for state in states):
        # Groups in a merged model need no training here.
        first = next(state.group for state in states if not state.merged and not state.verified)
        return f"Next: merit train {where} --group {first} --output {groups}/{first}"
    return f"Next: merit train {where} --group all --output {groups}"


def _hub_status(
    plan: PartitionPlan, number: int, registry: Registry, requests: Sequence[PullRequest], now: datetime
) -> GroupStatus:
    planned, claim = plan.group(number), registry.claims.get(number)
    state, by, until = "free", None, None
    if claim is not None:
        state = "held" if claim.active(now) else "expired"
        by, until = claim.claimant, claim.expires_at
    wanted = next((pr for pr in requests if pr.title == f"Claim group {number}"), None)
    if wanted is not None and state != "held":
        state, by, until = "pending", wanted.author, None
    accepted = registry.contributions.get(number)
    offered = next((pr for pr in requests if pr.title == f"Contribute group {number}"), None)
    checkpoint = f"{accepted.repo_id}@{accepted.revision[:12]}" if accepted else None
    if checkpoint is None and offered is not None:
        checkpoint = f"offered by {offered.author} in pull request #{offered.num}"
    merged = None
    if accepted is not None and registry.merged is not None:
        groups = registry.merged.get("groups")
        went_in = isinstance(groups, dict) and groups.get(str(number)) == accepted.revision
        merged = f"{registry.merged['repo_id']}" if went_in else None
    return GroupStatus(
        number, planned.datasets, planned.train_input_tokens, state, by, until, checkpoint,
        accepted.level if accepted else None, merged,
    )  # fmt: skip


def _folder(plan: PartitionPlan, number: int, jobs: Mapping[int, Job], output: Path | None) -> Path:
    """Where a local plan's group lies: where its job was told to put it, else beside the plan, as `merit run` does."""
    if number in jobs:
        return Path(jobs[number].output)
    return (output or Path(str(plan.folder)).resolve().parent / "groups") / str(number)


def _local_status(plan: PartitionPlan, number: int, folder: Path) -> GroupStatus:
    planned = plan.group(number)
    checkpoint = verified = merged = None
    if folder.is_dir():
        checkpoint = str(folder)
        try:
            verified = "manifest" if failed(manifest_checks(plan, FolderSource(folder))[0]) is None else None
        except MeritError:
            checkpoint = f"{folder} (not readable)"
    elif folder.with_name(f"{folder.name}.part").is_dir():
        checkpoint = f"{saved_steps(folder)} of {planned.num_steps} steps saved"
    merged = next((str(place) for place, groups in _merged_here(plan) if number in groups), None)
    return GroupStatus(
        number, planned.datasets, planned.train_input_tokens, "local", None, None, checkpoint, verified, merged
    )


def _with_job(state: GroupStatus, jobs: Mapping[int, Job], looks: Mapping[int, JobState]) -> GroupStatus:
    if state.group not in jobs:
        return state
    job, look = jobs[state.group], looks[state.group]
    facts = {"launcher": job.launcher, "job_id": job.job_id, **asdict(look), "output": job.output, "log": job.log,
             "options": job.details.get("options", "")}  # fmt: skip
    # HF Jobs leave a checkpoint in a repo, which may not have been offered to the plan yet.
    pushed = look.detail if look.state == "finished" and "repo_id" in job.details else None
    return replace(state, job=facts, checkpoint=state.checkpoint or pushed)


def _job_text(job: Mapping[str, Any] | None) -> str:
    """`running, step 12 of 40 (slurm 3_1)`."""
    if job is None:
        return "–"
    step = f", step {job['step']}" + (f" of {job['num_steps']}" if job["num_steps"] else "") if job["step"] else ""
    name = f" ({job['launcher']} {job['job_id']})" if job["job_id"] else f" ({job['launcher']})"
    return f"{job['state']}{'' if job['state'] == 'finished' else step}{name}"


def _numbers(states: Sequence[GroupStatus]) -> str:
    return ", ".join(str(state.group) for state in states)


def _merged_here(plan: PartitionPlan) -> list[tuple[Path, list[int]]]:
    """Merged models beside the plan with the groups in them: its own first, then those of a plan that it extends."""
    assert plan.folder is not None
    found = []
    for path in sorted(plan.folder.resolve().parent.glob(f"*/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        extended = plan.extends(manifest["plan"]["sha256"]) if manifest.get("kind") == "merged" else None
        if extended is not None:
            place = (extended < plan.num_groups, path.parent.name != "merged", path)
            found.append((place, path.parent, [group["group"] for group in manifest["groups"]]))
    return [(folder, groups) for _, folder, groups in sorted(found)]


def _rounds(plan: PartitionPlan) -> list[Path]:
    """The plans of the rounds that `merit run` made of this one, in order."""
    if plan.repo_id is not None or plan.folder is None:
        return []
    rounds = plan.folder.resolve().parent / "rounds"
    found = [path.parent for path in rounds.glob(f"*/plan/{PLAN_NAME}") if path.parent.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name))

"""Where each group of a plan stands: claimed, trained, verified, merged. Of a Hub repo, or of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from merit_hf.config import MeritError
from merit_hf.hub_write import PullRequest, open_pull_requests
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


def plan_status(plan: PartitionPlan, now: datetime | None = None) -> tuple[list[GroupStatus], list[str]]:
    """(every group's status, problems found on the way)."""
    if plan.repo_id is None:
        return [_local_status(plan, group.group) for group in plan.groups], []
    now = now or datetime.now(UTC)
    registry, requests = load_registry(plan), open_pull_requests(plan.repo_id)
    problems = [f"{path}: {why}" for path, why in sorted(registry.problems.items())]
    return [_hub_status(plan, group.group, registry, requests, now) for group in plan.groups], problems


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
    for column, justify in (("group", "right"), ("datasets", "left"), ("tokens", "right"), ("claimed by", "left"),
                            ("checkpoint", "left"), ("verified", "left"), ("merged", "left")):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for state in states:
        names = ", ".join(state.datasets[:4]) + (
            f" and {len(state.datasets) - 4} more" if len(state.datasets) > 4 else ""
        )
        until = f" until {state.until[:16]}" if state.until and state.claim == "held" else ""
        claimed = f"{state.claimed_by} ({state.claim}{until})" if state.claimed_by else state.claim
        cells = [str(state.group), names, f"{state.num_input_tokens:,}", claimed, state.checkpoint or "–",
                 state.verified or "–", state.merged or "–"]  # fmt: skip
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


def _local_status(plan: PartitionPlan, number: int) -> GroupStatus:
    """From where `merit run` puts things: beside the plan."""
    planned = plan.group(number)
    assert plan.folder is not None
    run = plan.folder.resolve().parent
    folder = run / "groups" / str(number)
    checkpoint = verified = merged = None
    if folder.is_dir():
        checkpoint = str(folder)
        try:
            verified = "manifest" if failed(manifest_checks(plan, FolderSource(folder))[0]) is None else None
        except MeritError:
            checkpoint = f"{folder} (not readable)"
    elif folder.with_name(f"{number}.part").is_dir():
        checkpoint = (
            f"in training, {_steps_done(folder.with_name(f'{number}.part'))} of {planned.num_steps} steps saved"
        )
    merged = next((str(place) for place, groups in _merged_here(plan) if number in groups), None)
    return GroupStatus(
        number, planned.datasets, planned.train_input_tokens, "local", None, None, checkpoint, verified, merged
    )


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


def _steps_done(part: Path) -> int:
    steps = [path.name.rpartition("-")[2] for path in part.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)

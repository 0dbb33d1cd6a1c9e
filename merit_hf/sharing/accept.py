"""The maintainer's side: open pull requests on a plan, taken or refused in the order in which they came.

A pull request is never merged. What it proposes is read from the commit it had, checked, and written by the
maintainer's own commit from the fields that were understood; then it is closed with the reason. So nothing that its
author changes after the check, and no other file in it, ever reaches the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar

from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import HubUnavailableError, current_user, list_files, read_file
from merit_hf.hub_write import (
    LostRaceError,
    PullRequest,
    close_pull_request,
    commit,
    fork_point,
    open_pull_requests,
    pull_request_head,
)
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sharing.community import check_free, load_registry, may_write, plan_repo
from merit_hf.sharing.registry import (
    MAX_CLAIM,
    MAX_ENTRY_BYTES,
    Claim,
    Contribution,
    Registry,
    checked,
    claim_path,
    contribution_path,
    entry_of,
    parse_time,
)
from merit_hf.text import escape_markdown, one_line
from merit_hf.verification.checks import failed
from merit_hf.verification.sources import HubSource
from merit_hf.verification.verify import Replay, partial_replays, verify_checkpoints

_TRIES = 5
_OUR_TITLE = re.compile(r"(Claim|Release|Contribute) group \d+", re.ASCII)
_E = TypeVar("_E", Claim, Contribution)


@dataclass(frozen=True)
class Decision:
    """What became of a pull request: `accepted`, `refused`, or `left` where it is none of ours; and why."""

    num: int
    title: str
    author: str
    verdict: str
    reason: str


class _RefusedError(Exception):
    """The reason for which a pull request is refused."""


def accept(
    plan: PartitionPlan,
    level: str = "behaviour",
    progress: Progress | None = None,
    allow_partial: bool = False,
) -> Iterator[Decision]:
    """Decide on every open pull request of the plan's repo, oldest first; yields each decision once it is carried out.

    Args:
        level (`str`, *optional*, defaults to `"behaviour"`): how far contributions are verified.
        allow_partial (`bool`, *optional*, defaults to `False`): take groups that were stopped before their planned
            steps, at the tokens of the steps that they took; needs their data here.

    Raises:
        ConfigError: the user may not write to the repo, or base or data for the verification are not here.
        HubUnavailableError: the Hub failed; what is decided stays decided, the rest is open still.
    """
    repo_id = plan_repo(plan)
    user, organisations = current_user()
    if not may_write(repo_id, user, organisations):
        raise ConfigError(f"`{repo_id}` is not yours ({user}) to write to, so you cannot accept for it.")
    replays = partial_replays(plan, progress) if allow_partial else None
    for request in open_pull_requests(repo_id):
        decision = _decide(plan, request, level, progress, replays)
        if decision.verdict != "left":
            close_pull_request(repo_id, request.num, _comment(decision))
        yield decision


def _decide(
    plan: PartitionPlan, request: PullRequest, level: str, progress: Progress | None, replays: Replay | None
) -> Decision:
    def decision(verdict: str, reason: str) -> Decision:
        return Decision(request.num, one_line(request.title, 60), request.author, verdict, reason)

    try:
        found = _proposal(plan, request)
        if found is None:
            return decision("left", "neither a claim nor a contribution")
        kind, group, raw = found
        if kind == "claims":
            return decision("accepted", _take_claim(plan, request, group, raw))
        return decision("accepted", _take_contribution(plan, request, group, raw, level, progress, replays))
    except _RefusedError as refusal:
        return decision("refused", str(refusal))


def _proposal(plan: PartitionPlan, request: PullRequest) -> tuple[str, int, bytes | None] | None:
    """(kind, group, content or None where it deletes) of what a pull request proposes; None where it is not ours."""
    repo_id = plan_repo(plan)
    head = pull_request_head(repo_id, request.num)
    main = load_registry(plan).revision
    before = list_files(repo_id, fork_point(repo_id, head, main), "dataset")
    try:
        after = list_files(repo_id, head, "dataset")
    except HubUnavailableError:
        raise
    except MeritError as error:
        raise _RefusedError(str(error)) from error
    changed = sorted(
        path
        for path in before.keys() | after.keys()
        if path not in before or path not in after or before[path].blob_id != after[path].blob_id
    )
    entries = [path for path in changed if entry_of(path)]
    if not entries:
        if _OUR_TITLE.fullmatch(request.title):
            # `claim` and `status` go by titles: left open, it would keep the group from everybody else.
            raise _RefusedError("it is named like one of merit's and holds no entry")
        return None
    if len(changed) > 1:
        raise _RefusedError(f"it changes {len(changed)} files ({', '.join(changed[:3])}), where an entry is one file")
    place = entry_of(entries[0])
    assert place is not None
    kind, group = place
    if group >= plan.num_groups:
        raise _RefusedError(f"group {group}: the plan has groups 0 to {plan.num_groups - 1}")
    file = after.get(entries[0])
    if file is None:
        return kind, group, None
    if file.size > MAX_ENTRY_BYTES:
        raise _RefusedError(f"{file.path} has {file.size:,} bytes, an entry at most {MAX_ENTRY_BYTES:,}")
    return kind, group, read_file(repo_id, head, "dataset", file, MAX_ENTRY_BYTES)


def _take_claim(plan: PartitionPlan, request: PullRequest, group: int, raw: bytes | None) -> str:
    now = datetime.now(UTC)
    if raw is None:
        return _take_release(plan, request, group)
    claim = _parsed(plan, Claim, raw, claim_path(group), group)
    if claim.claimant != request.author:
        raise _RefusedError(f"it claims for {claim.claimant}, and {request.author} opened it")
    if not claim.active(now) or parse_time(claim.expires_at) > now + MAX_CLAIM:
        raise _RefusedError(
            f"it would hold until {claim.expires_at}; a claim ends within {MAX_CLAIM.days} days from now"
        )

    def write(registry: Registry) -> dict[str, bytes] | None:
        _free_for(plan, registry, group, request.author)
        return {claim_path(group): claim.to_bytes()}

    _write(plan, write, f"Claim group {group} for {claim.claimant} (#{request.num})")
    return f"{claim.claimant} holds group {group} until {claim.expires_at}"


def _take_release(plan: PartitionPlan, request: PullRequest, group: int) -> str:
    def write(registry: Registry) -> dict[str, bytes] | None:
        held = registry.claims.get(group)
        if held is None:
            return None
        if held.claimant != request.author:
            raise _RefusedError(f"group {group} is held by {held.claimant}, not by {request.author}")
        return {}

    _write(plan, write, f"Release group {group} for {request.author} (#{request.num})", claim_path(group))
    return f"group {group} is free again"


def _take_contribution(
    plan: PartitionPlan,
    request: PullRequest,
    group: int,
    raw: bytes | None,
    level: str,
    progress: Progress | None,
    replays: Replay | None,
) -> str:
    if raw is None:
        raise _RefusedError("an accepted checkpoint is not removed by a pull request")
    entry = _parsed(plan, Contribution, raw, contribution_path(group), group)
    if entry.contributor != request.author:
        raise _RefusedError(f"it contributes for {entry.contributor}, and {request.author} opened it")
    registry = load_registry(plan)
    source = HubSource(entry.repo_id, entry.revision)
    if _is_taken(registry, entry):
        return f"{source.name} is group {group}'s checkpoint already"
    _free_for(plan, registry, group, request.author)
    accepted = [HubSource(c.repo_id, c.revision) for _, c in sorted(registry.contributions.items())]
    if level != "manifest":
        # A base that is not here is not the contributor's fault.
        plan.base_folder()
    try:
        cheap = "manifest" if level == "manifest" else "weights"
        first = verify_checkpoints(plan, [source, *accepted], cheap, replays=replays)[0]
    except HubUnavailableError:
        raise
    except MeritError as error:
        raise _RefusedError(f"{entry.repo_id}@{entry.revision[:12]}: {error}") from error
    if first.ok and level == "behaviour":
        first = verify_checkpoints(plan, [source], level, progress, replays=replays)[0]
    check = failed(first.checks)
    if check is not None:
        raise _RefusedError(f"{check.name}: expected {check.expected}; found {check.found}")
    if first.group != group:
        raise _RefusedError(f"the checkpoint is of group {first.group}, the entry says {group}")

    def write(current: Registry) -> dict[str, bytes] | None:
        if _is_taken(current, entry):
            return None
        _free_for(plan, current, group, request.author)
        return {contribution_path(group): replace(entry, level=level).to_bytes()}

    _write(plan, write, f"Accept {entry.repo_id} for group {group} (#{request.num})")
    return f"{entry.repo_id}@{entry.revision[:12]} is group {group}'s checkpoint: {len(first.checks)} checks passed"


def _is_taken(registry: Registry, entry: Contribution) -> bool:
    """Whether this very checkpoint was accepted before, by a run whose last words the Hub did not get."""
    accepted = registry.contributions.get(entry.group)
    return accepted is not None and replace(accepted, level=entry.level) == entry


def _parsed(plan: PartitionPlan, kind: type[_E], raw: bytes, path: str, group: int) -> _E:
    try:
        return checked(kind.from_bytes(raw, path), group, plan.sha256)
    except MeritError as error:
        raise _RefusedError(str(error)) from error


def _free_for(plan: PartitionPlan, registry: Registry, group: int, user: str) -> None:
    try:
        check_free(plan, registry, group, user, datetime.now(UTC))
    except MeritError as error:
        raise _RefusedError(str(error)) from error


def _write(
    plan: PartitionPlan, decide: Callable[[Registry], dict[str, bytes] | None], message: str, delete: str | None = None
) -> None:
    """Commit what `decide` says of the registry as it is now; decided anew where somebody else was faster.

    None: the registry holds it already, such as after a commit whose answer was lost.
    """
    repo_id = plan_repo(plan)
    for _ in range(_TRIES):
        registry = load_registry(plan)
        files = decide(registry)
        if files is None:
            return
        try:
            commit(repo_id, "dataset", files, message, delete=[delete] if delete else [], parent=registry.revision)
        except LostRaceError:
            continue
        return
    raise MeritError(f"`{repo_id}` changes faster than it can be committed to. Run the command again.")


def _comment(decision: Decision) -> str:
    """Closing words. The reason quotes what a stranger wrote, so it goes in as inert text."""
    if decision.verdict == "accepted":
        return f"Accepted: {escape_markdown(decision.reason)}. The entry is in the plan now; thank you."
    return (
        f"Refused: {escape_markdown(decision.reason)}. Nothing was taken; mend it and run the same command again, "
        "which opens a new pull request."
    )

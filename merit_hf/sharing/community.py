"""Claims and contributions of a plan's groups: what anybody can do. `accept` is the maintainer's side.

    claim(plan, group=3)                         I train it
    contribute(plan, "bob/group-3")              I have trained it

With write access to the plan's repo an entry is a commit on the head that was read; for everybody else it is a pull
request that adds one file. Two who want the same group at once: the Hub takes one of the commits, or gives one of the
pull requests the lower number, and the other learns who was first.
"""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import current_user, list_files, pin_revision, read_file
from merit_hf.hub_write import (
    LostRaceError,
    PullRequest,
    Pushed,
    close_pull_request,
    commit,
    open_pull_requests,
    pull_request_head,
)
from merit_hf.manifest import MANIFEST_NAME, MAX_BYTES, parse_manifest
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.sharing.registry import (
    MAX_ENTRY_BYTES,
    MERGED_NAME,
    Claim,
    Contribution,
    Registry,
    claim_path,
    contribution_path,
    entry_of,
    new_claim,
    read_registry,
)
from merit_hf.verification.checks import failed
from merit_hf.verification.sources import FolderSource, open_source
from merit_hf.verification.verify import partial_replays, verify_checkpoints

_TRIES = 5


def plan_repo(plan: PartitionPlan) -> str:
    """The plan's Hub repo. Raises ConfigError where it was loaded from a folder."""
    if plan.repo_id is None:
        raise ConfigError(
            f"{plan.folder}: claims and contributions live in a plan's Hub repo. Publish it with `merit push "
            f"{plan.folder} OWNER/NAME`, and give OWNER/NAME."
        )
    return plan.repo_id


def load_registry(plan: PartitionPlan) -> Registry:
    """Claims and contributions at the head of the plan's repo."""
    repo_id = plan_repo(plan)
    head = pin_revision(repo_id, None, "dataset", "plan")
    files = [
        file for path, file in list_files(repo_id, head, "dataset").items() if entry_of(path) or path == MERGED_NAME
    ]
    small = [file for file in files if file.size <= MAX_ENTRY_BYTES]
    registry = read_registry(
        head, [(file.path, read_file(repo_id, head, "dataset", file, MAX_ENTRY_BYTES)) for file in small], plan.sha256
    )
    registry.problems.update({file.path: "too large for an entry" for file in files if file not in small})
    return registry


def accepted_checkpoints(plan: PartitionPlan) -> list[str]:
    """`org/name@commit` of the checkpoints that were accepted for the plan's groups.

    Raises:
        ConfigError: the plan is a folder, or none was accepted yet.
    """
    if plan.repo_id is None:
        raise ConfigError("no checkpoints to merge: give the folders of the groups, or their Hub ids.")
    found = load_registry(plan).contributions
    if not found:
        raise ConfigError(f"`{plan.repo_id}` has no accepted checkpoints yet. See `merit status {plan.repo_id}`.")
    return [f"{entry.repo_id}@{entry.revision}" for _, entry in sorted(found.items())]


def may_write(repo_id: str, user: str, organisations: list[str]) -> bool:
    """Whether the token's owner owns the namespace; the Hub has the last word when a commit comes."""
    return repo_id.partition("/")[0] in (user, *organisations)


def claim(plan: PartitionPlan, group: int, days: float = 7, hardware: str | None = None) -> str:
    """Claim a group for `days` days; returns what to tell the user.

    Raises:
        ConfigError: no such group. MeritError: somebody else holds it or was first, or it has its checkpoint.
    """
    planned, repo_id = plan.group(group), plan_repo(plan)
    user, organisations = current_user()
    for _ in range(_TRIES):
        now = datetime.now(UTC)
        registry = load_registry(plan)
        held = check_free(plan, registry, group, user, now)
        if held is not None:
            return f"You hold group {group} until {held.expires_at}."
        entry = new_claim(
            plan.sha256, group, user, planned.train_input_tokens, hardware or describe_hardware(), days, now
        )
        if not may_write(repo_id, user, organisations):
            return _propose_claim(plan, entry)
        try:
            pushed = commit(
                repo_id, "dataset", {claim_path(group): entry.to_bytes()}, f"Claim group {group} for {user}",
                parent=registry.revision,
            )  # fmt: skip
        except LostRaceError:
            continue
        return f"You hold group {group} until {entry.expires_at}: {pushed.url}"
    raise MeritError(f"`{repo_id}` changes faster than group {group} can be claimed. Run the command again.")


def release(plan: PartitionPlan, group: int) -> str:
    """Give a claimed group back, or withdraw a pending claim; returns what to tell the user.

    Raises:
        ConfigError: no such group, nobody holds it, or somebody else does and the repo is not the user's.
    """
    plan.group(group)
    repo_id = plan_repo(plan)
    user, organisations = current_user()
    mine = _own_request(repo_id, _claim_title(group), user)
    if mine is not None:
        close_pull_request(repo_id, mine.num, "Withdrawn by its author.")
        return f"Withdrew your pending claim of group {group} (pull request #{mine.num})."
    for _ in range(_TRIES):
        registry = load_registry(plan)
        held = registry.claims.get(group)
        if held is None:
            raise ConfigError(f"group {group} is not claimed, so there is nothing to release.")
        writes = may_write(repo_id, user, organisations)
        if held.claimant != user and not writes:
            raise ConfigError(
                f"group {group} is held by {held.claimant} until {held.expires_at}; only they or a maintainer of "
                f"`{repo_id}` can release it."
            )
        title = f"Release group {group}"
        if not writes:
            mine = _own_request(repo_id, title, user)
            num = mine.num if mine else commit(
                repo_id, "dataset", {}, title, delete=[claim_path(group)], create_pr=True
            ).pull_request  # fmt: skip
            return f"Asked to release group {group} in pull request #{num}; `merit accept` of a maintainer does it."
        try:
            pushed = commit(repo_id, "dataset", {}, title, delete=[claim_path(group)], parent=registry.revision)
        except LostRaceError:
            continue
        return f"Released group {group}, which {held.claimant} held: {pushed.url}"
    raise MeritError(f"`{repo_id}` changes faster than group {group} can be released. Run the command again.")


def contribute(plan: PartitionPlan, checkpoint: str, allow_partial: bool = False) -> str:
    """Register a group checkpoint on the Hub, pinned to its commit, by a pull request; returns what to tell the user.

    Its manifest, files and tensors are verified first, so that its author learns of a failure first. One that was
    stopped before its planned steps is offered with `allow_partial`, and its maintainer may take it so.

    Raises:
        ConfigError: the checkpoint is a folder. MeritError: it does not verify, or the group is somebody else's.
    """
    repo_id = plan_repo(plan)
    source = open_source(checkpoint)
    if isinstance(source, FolderSource):
        raise ConfigError(
            f"{checkpoint}: a contribution is a repo on the Hub. Push it with `merit push {checkpoint} YOU/NAME`, and "
            "give YOU/NAME."
        )
    user, _ = current_user()
    replays = partial_replays(plan) if allow_partial else None
    verified = verify_checkpoints(plan, [source], "manifest", replays=replays)[0]
    check = failed(verified.checks)
    if check is not None or verified.group is None:
        assert check is not None
        raise MeritError(
            f"{source.name} does not verify: {check.name}: expected {check.expected}; found {check.found}. Nothing "
            "was contributed; `merit verify` shows every check."
        )
    group, now = verified.group, datetime.now(UTC)
    registry = load_registry(plan)
    accepted = registry.contributions.get(group)
    if accepted is not None and (accepted.repo_id, accepted.revision) == (source.repo_id, source.revision):
        return f"{source.name} is accepted for group {group} already."
    check_free(plan, registry, group, user, now)
    manifest = parse_manifest(source.read(MANIFEST_NAME, MAX_BYTES), MANIFEST_NAME)
    entry = Contribution(
        plan.sha256, group, source.repo_id, source.revision, user, now.replace(microsecond=0).isoformat(),
        canonical_sha256(manifest["files"]), "",
    )  # fmt: skip
    pushed = _propose_contribution(plan, entry)
    return (
        f"Contributed {source.name} for group {group} in pull request #{pushed}. The plan's maintainer takes it with "
        f"`merit accept {repo_id}{' --allow-partial' if manifest['status'] == 'stopped' else ''}`."
    )


def check_free(plan: PartitionPlan, registry: Registry, group: int, user: str, now: datetime) -> Claim | None:
    """The user's own claim of a group, or None where nobody holds it.

    Raises:
        MeritError: somebody else holds it, or its checkpoint is accepted.
    """
    accepted = registry.contributions.get(group)
    if accepted is not None:
        raise MeritError(
            f"group {group} has its checkpoint: {accepted.repo_id}@{accepted.revision[:12]} by "
            f"{accepted.contributor}. {_free_groups(plan, registry, now)}"
        )
    held = registry.holder(group, now)
    if held is not None and held.claimant != user:
        raise MeritError(
            f"group {group} is held by {held.claimant} until {held.expires_at}. {_free_groups(plan, registry, now)}"
        )
    return held


def describe_hardware() -> str:
    """One line about this machine, for the claim."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} × {torch.accelerator.current_accelerator()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _free_groups(plan: PartitionPlan, registry: Registry, now: datetime) -> str:
    free = [
        str(number)
        for number in range(plan.num_groups)
        if registry.holder(number, now) is None and number not in registry.contributions
    ]
    return f"Free groups: {', '.join(free)}." if free else "No group is free."


def _claim_title(group: int) -> str:
    return f"Claim group {group}"


def _own_request(repo_id: str, title: str, user: str) -> PullRequest | None:
    return next((pr for pr in open_pull_requests(repo_id) if (pr.title, pr.author) == (title, user)), None)


def _propose_claim(plan: PartitionPlan, entry: Claim) -> str:
    repo_id, title = plan_repo(plan), _claim_title(entry.group)

    def requests() -> list[PullRequest]:
        return [pr for pr in open_pull_requests(repo_id) if pr.title == title]

    def check_first(first: PullRequest) -> None:
        if first.author != entry.claimant:
            raise MeritError(
                f"group {entry.group} was claimed by {first.author} before you, in pull request #{first.num}, which "
                f"waits for a maintainer. See `merit status {repo_id}` for free groups."
            )

    waiting = requests()
    if waiting:
        check_first(waiting[0])
        return _pending(entry, waiting[0].num, repo_id)
    commit(repo_id, "dataset", {claim_path(entry.group): entry.to_bytes()}, title, create_pr=True)
    # Another may have asked in the same moment; the Hub numbers them in order.
    waiting = requests()
    if waiting and waiting[0].author != entry.claimant:
        for pr in waiting:
            if pr.author == entry.claimant:
                close_pull_request(repo_id, pr.num, f"Pull request #{waiting[0].num} was first.")
        check_first(waiting[0])
    if not waiting:
        raise MeritError(
            f"your claim of group {entry.group} was decided in the same moment. See `merit status {repo_id}`."
        )
    return _pending(entry, waiting[0].num, repo_id)


def _pending(entry: Claim, num: int, repo_id: str) -> str:
    return (
        f"Your claim of group {entry.group} waits in pull request #{num}; it holds once a maintainer runs "
        f"`merit accept {repo_id}`. You can begin to train: merit train {repo_id} --group {entry.group} --output "
        f"group-{entry.group}"
    )


def _propose_contribution(plan: PartitionPlan, entry: Contribution) -> int:
    """The number of the pull request; one for the same commit is not opened twice, one for another is replaced."""
    repo_id, title, path = plan_repo(plan), f"Contribute group {entry.group}", contribution_path(entry.group)
    mine = _own_request(repo_id, title, entry.contributor)
    if mine is not None:
        head = pull_request_head(repo_id, mine.num)
        proposed = list_files(repo_id, head, "dataset").get(path)
        raw = read_file(repo_id, head, "dataset", proposed, MAX_ENTRY_BYTES) if proposed else b""
        if proposed and Contribution.from_bytes(raw, path).revision == entry.revision:
            return mine.num
        close_pull_request(repo_id, mine.num, "Replaced by its author.")
    pushed: Pushed = commit(repo_id, "dataset", {path: entry.to_bytes()}, title, create_pr=True)
    assert pushed.pull_request is not None
    return pushed.pull_request

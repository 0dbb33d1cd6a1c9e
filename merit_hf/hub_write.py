"""Writing to the Hub: commits, pull requests, comments, collections. Every call can be repeated after a failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResultEntry,
    HfApi,
    ModelCard,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from merit_hf.config import ConfigError, MeritError
from merit_hf.hub import hub_errors, pin_revision

__all__ = ["EvalResultEntry", "eval_result_entries_to_yaml"]
_BUSY = (429, 500, 502, 503, 504)


class LostRaceError(MeritError):
    """Somebody else committed first: `parent` is no longer the head."""


class NoWriteAccessError(ConfigError):
    """The token may not commit to this repo; a pull request is open to everybody who can see it."""


@dataclass(frozen=True)
class Pushed:
    """A commit that the Hub has confirmed: its sha, its address, and the pull request it opened, if any."""

    revision: str
    url: str
    pull_request: int | None = None


@dataclass(frozen=True)
class PullRequest:
    """An open pull request: number, title, author, time of creation (ISO 8601)."""

    num: int
    title: str
    author: str
    created_at: str


def ensure_repo(repo_id: str, repo_type: str, private: bool | None) -> None:
    """Make the repo where it is not there; `private=None` leaves its visibility to the Hub's default."""
    with hub_errors(f"creating `{repo_id}`"):
        HfApi().create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)


def commit(
    repo_id: str,
    repo_type: str,
    files: Mapping[str, bytes | Path],
    message: str,
    *,
    delete: Iterable[str] = (),
    parent: str | None = None,
    create_pr: bool = False,
    description: str = "",
) -> Pushed:
    """One commit of `files` (path in the repo → content, or file on this machine); unchanged ones are left out.

    Args:
        delete: paths to remove in the same commit.
        parent: the head that the commit must follow.
        create_pr: open a pull request instead.

    Raises:
        LostRaceError: the head is not `parent` any more. NoWriteAccessError: the token may not commit.
        MeritError: the Hub stayed busy, or failed.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, content) for path, content in sorted(files.items())
    ]
    operations += [CommitOperationDelete(path) for path in sorted(delete)]

    def send() -> CommitInfo:
        return HfApi().create_commit(
            repo_id, operations, commit_message=message, commit_description=description, repo_type=repo_type,
            parent_commit=parent, create_pr=create_pr,
        )  # fmt: skip

    with hub_errors(f"committing to `{repo_id}`"):
        try:
            # A pull request whose answer was lost is there already; asking again would open a second one.
            info = send() if create_pr else _again_if_busy(send)
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status == 412:
                raise LostRaceError(f"`{repo_id}` has changed meanwhile. Run the command again.") from error
            if status == 403:
                raise NoWriteAccessError(
                    f"committing to `{repo_id}`: your token may not write there (HTTP 403). Use your own namespace, "
                    "or ask its owner."
                ) from error
            raise
    return Pushed(str(info.oid), str(info.pr_url or info.commit_url), info.pr_num)


def push_files(
    files: Mapping[str, bytes | Path],
    repo_id: str,
    repo_type: str,
    private: bool | None,
    message: str,
    *,
    prune: bool = False,
    create_pr: bool = False,
) -> Pushed:
    """Upload `files` (path in the repo → content, or file here) as one commit. Run again, unchanged files are no-ops.

    Args:
        private: visibility of a repo that does not exist yet; None leaves it to the Hub's default.
        prune: remove from the repo what is not among `files`.
    """
    if not create_pr:
        ensure_repo(repo_id, repo_type, private)
    extra: list[str] = []
    if prune:
        with hub_errors(f"listing `{repo_id}`"):
            entries = HfApi().list_repo_tree(repo_id, repo_type=repo_type, recursive=True)
            kept = files.keys() | {".gitattributes"}
            extra = [entry.path for entry in entries if isinstance(entry, RepoFile) and entry.path not in kept]
    return commit(repo_id, repo_type, files, message, delete=extra, create_pr=create_pr)


def folder_files(folder: Path, ignore: Sequence[str] = ()) -> dict[str, bytes | Path]:
    """{path in the repo: file} of everything below a folder but `ignore`, dot files and unfinished `.part` ones."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ignore and not path.name.endswith(".part")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }  # fmt: skip


def validate_model_card(text: str) -> None:
    """The Hub's own check of a card's metadata, before anything is uploaded.

    Raises:
        MeritError: what the Hub says is wrong with it.
    """
    with hub_errors("checking the card"):
        try:
            ModelCard(text, ignore_metadata_errors=False).validate()
        except ValueError as error:
            raise MeritError(f"the Hub refuses the card's metadata: {' '.join(str(error).split())}") from error


def open_pull_requests(repo_id: str) -> list[PullRequest]:
    """The open pull requests of a plan's repo, oldest first."""
    with hub_errors(f"listing the pull requests of `{repo_id}`"):
        found = HfApi().get_repo_discussions(
            repo_id, repo_type="dataset", discussion_type="pull_request", discussion_status="open"
        )
        return sorted(
            (PullRequest(d.num, d.title, d.author, d.created_at.isoformat()) for d in found), key=lambda pr: pr.num
        )


def pull_request_head(repo_id: str, num: int) -> str:
    """The commit that a pull request of a plan's repo now proposes."""
    return pin_revision(repo_id, f"refs/pr/{num}", "dataset", f"pull request #{num}")


def fork_point(repo_id: str, head: str, main: str) -> str:
    """The newest commit of the pull request `head` that the plan's `main` holds too."""
    with hub_errors(f"reading the history of `{repo_id}`"):
        known = {commit.commit_id for commit in HfApi().list_repo_commits(repo_id, repo_type="dataset", revision=main)}
        for step in HfApi().list_repo_commits(repo_id, repo_type="dataset", revision=head):
            if step.commit_id in known:
                return str(step.commit_id)
    raise MeritError(f"`{repo_id}`: {head[:12]} shares no commit with main.")


def close_pull_request(repo_id: str, num: int, comment: str) -> None:
    """Close a pull request of a plan's repo with a comment that says why."""
    with hub_errors(f"closing pull request #{num} of `{repo_id}`"):
        HfApi().change_discussion_status(repo_id, num, new_status="closed", comment=comment, repo_type="dataset")


def collect(
    namespace: str, title: str, items: Sequence[tuple[str, Literal["model", "dataset"], str]], private: bool
) -> str:
    """A collection with `items` (repo, type, note), made or completed; returns its address."""
    with hub_errors(f"making the collection {title!r}"):
        api = HfApi()
        collection = api.create_collection(title, namespace=namespace, private=private, exists_ok=True)
        for repo_id, kind, note in items:
            api.add_collection_item(collection.slug, repo_id, kind, note=note, exists_ok=True)
        return str(collection.url)


def _again_if_busy(send: Callable[[], CommitInfo], attempts: int = 4) -> CommitInfo:
    """The client repeats its other requests, but never the commit; on a branch, repeating one is a no-op."""
    for attempt in range(1, attempts):
        try:
            return send()
        except HfHubHTTPError as error:
            response = error.response
            if response is None or response.status_code not in _BUSY:
                raise
            asked = response.headers.get("Retry-After", "")
            time.sleep(min(float(asked) if asked.isdigit() else 2.0**attempt, 60.0))
    return send()

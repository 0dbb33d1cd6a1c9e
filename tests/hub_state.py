"""What a loopback Hub holds, to look at and to go back to; only while nothing is being asked of it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from hub_server import HubServer
from hub_server.repos import Repo

# Differ from run to run, and say nothing about what was done.
_TIMES = re.compile(rb'"(claimed_at|expires_at|contributed_at)": "[^"]*"')
_REVISION = re.compile(rb'"revision": "[^"]*"')
Key = tuple[str, str]


@dataclass
class Snapshot:
    """Everything a Hub holds but git's objects, which are only ever added to."""

    repos: dict[Key, Repo]
    refs: dict[Key, dict[str, str]]
    discussions: dict[Key, list[Any]]
    lfs: set[str]
    collections: dict[str, Any]
    jobs: list[Any]


def save(hub: HubServer) -> Snapshot:
    repos = dict(hub.hub.repos)
    return Snapshot(
        repos,
        {key: {ref: str(r.git.references[ref].target) for ref in r.git.references} for key, r in repos.items()},
        {key: copy.deepcopy(repo.discussions) for key, repo in repos.items()},
        {path.name for path in (hub.hub.root / "lfs").iterdir()},
        copy.deepcopy(hub.hub.collections),
        copy.deepcopy(hub.hub.jobs),
    )  # fmt: skip


def restore(hub: HubServer, snapshot: Snapshot) -> None:
    """Go back to a snapshot, and let no fault be pending."""
    hub.heal()
    for key in set(hub.hub.repos) - set(snapshot.repos):
        # Its folder stays: a later snapshot may hold it.
        del hub.hub.repos[key]
    hub.hub.repos.update(snapshot.repos)
    for key, repo in snapshot.repos.items():
        for name in set(repo.git.references) - set(snapshot.refs[key]):
            repo.git.references.delete(name)
        for name, target in snapshot.refs[key].items():
            repo.git.references.create(name, target, force=True)
        repo.discussions[:] = copy.deepcopy(snapshot.discussions[key])
    # Put away, not removed: another snapshot may hold it.
    here, away = hub.hub.root / "lfs", hub.hub.root / "lfs-away"
    away.mkdir(exist_ok=True)
    for path in here.iterdir():
        if path.name not in snapshot.lfs:
            path.replace(away / path.name)
    for name in snapshot.lfs:
        if not (here / name).exists():
            (away / name).replace(here / name)
    hub.hub.jobs[:] = copy.deepcopy(snapshot.jobs)
    hub.hub.collections.clear()
    hub.hub.collections.update(copy.deepcopy(snapshot.collections))


@dataclass(frozen=True)
class RepoState:
    """A repo as people see it: commits of main (newest last), its files (path → what stands for the content), and the
    pull requests (title, author, open or not, number of comments)."""

    commits: list[tuple[str, str]]
    files: dict[str, str]
    requests: list[tuple[str, str, str, int]]
    private: bool


def look(hub: HubServer) -> dict[str, RepoState]:
    """{`type id`: state} of every repo."""
    return {f"{kind} {name}": look_at(repo) for (kind, name), repo in sorted(hub.hub.repos.items())}


def look_at(repo: Repo) -> RepoState:
    head = repo.resolve("main")
    commits = [
        (commit.message.splitlines()[0], commit.author.name) for commit in repo.git.walk(head.id)
    ]  # fmt: skip
    files = {}
    for entry in repo.entries(head):
        if entry.is_folder:
            continue
        raw = _TIMES.sub(b"", repo.git[entry.oid].data)
        # The commit of a model that was pushed just now.
        raw = _REVISION.sub(b"", raw) if entry.path == "merged.json" else raw
        files[entry.path] = hashlib.sha256(raw).hexdigest()
    requests = [
        (d.title, d.author, d.status, sum(event["type"] == "comment" for event in d.events))
        for d in repo.discussions
        if d.is_pull_request
    ]
    return RepoState(commits[::-1], files, requests, repo.private)


def read(hub: HubServer, kind: str, repo_id: str, path: str, revision: str = "main") -> Any:
    """The JSON of a file; None where there is none."""
    repo = hub.hub.repos[kind, repo_id]
    raw = repo.read(repo.resolve(revision), path)
    return None if raw is None else json.loads(raw)


def head(hub: HubServer, kind: str, repo_id: str) -> str:
    """The commit of main."""
    return str(hub.hub.repos[kind, repo_id].resolve("main").id)


def everything(hub: HubServer) -> bytes:
    """Every byte of every file at every head."""
    found = [path.read_bytes() for path in (hub.hub.root / "lfs").iterdir()]
    for repo in hub.hub.repos.values():
        found += [repo.git[entry.oid].data for entry in repo.entries(repo.resolve("main")) if not entry.is_folder]
    return b"\n".join(found)

"""What a plan's repo records of its groups besides the plan: who holds one, and whose checkpoint is the one to merge.

    claims/group-3.json           who trains group 3, and until when
    contributions/group-3.json    the checkpoint that was accepted for it, pinned to a commit
    merged.json                   the merged model that was published

Pure data: entries are parsed from whatever a stranger wrote, field by field, and written anew from what was parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

from merit_hf.config import MeritError
from merit_hf.text import one_line

SCHEMA_VERSION = 1
MERGED_NAME = "merged.json"
MAX_ENTRY_BYTES = 16_384
MAX_CLAIM = timedelta(days=30)
_ENTRY = re.compile(r"(claims|contributions)/group-(\d{1,6})\.json", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPO_ID = re.compile(r"([\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}", re.ASCII)
_USER = re.compile(r"[\w-][\w.-]{0,95}", re.ASCII)


def claim_path(group: int) -> str:
    return f"claims/group-{group}.json"


def contribution_path(group: int) -> str:
    return f"contributions/group-{group}.json"


def entry_of(path: str) -> tuple[str, int] | None:
    """(`claims` or `contributions`, group) of a path of the registry, else None."""
    found = _ENTRY.fullmatch(path)
    return (found[1], int(found[2])) if found else None


def is_repo_id(text: object) -> bool:
    """True for `owner/name`, or a bare `name`, as the Hub allows it."""
    return isinstance(text, str) and _REPO_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def is_commit(text: object) -> bool:
    """True for a full commit sha."""
    return isinstance(text, str) and _SHA.fullmatch(text) is not None


@dataclass(frozen=True)
class _Entry:
    """Common to all entries: the plan and the group they are about."""

    plan_sha256: str
    group: int

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same entry is the same bytes."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, raw: bytes, path: str) -> Self:
        """Parse an entry; only known fields are taken.

        Raises:
            MeritError: not JSON, a field is missing or has another type, or a value that no entry can have.
        """
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise MeritError(f"{path}: not valid JSON") from error
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            raise MeritError(f"{path}: not an entry of schema_version {SCHEMA_VERSION}")
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = content.get(field.name)
            wanted = int if field.type == "int" else str
            if type(value) is not wanted:
                raise MeritError(f"{path}: {field.name} is {one_line(repr(value), 60)}, expected {wanted.__name__}")
            values[field.name] = one_line(value) if isinstance(value, str) else value
        entry = cls(**values)
        problem = entry._problem()
        if problem:
            raise MeritError(f"{path}: {problem}")
        return entry

    def _problem(self) -> str | None:
        return None if _SHA256.fullmatch(self.plan_sha256) else "plan_sha256 is no sha256"


@dataclass(frozen=True)
class Claim(_Entry):
    """A promise to train a group. Times are ISO 8601 in UTC; tokens as the plan counts them."""

    claimant: str
    claimed_at: str
    expires_at: str
    num_input_tokens: int
    hardware: str

    def active(self, now: datetime) -> bool:
        return now < parse_time(self.expires_at)

    def _problem(self) -> str | None:
        if not _USER.fullmatch(self.claimant):
            return "claimant is no user name"
        try:
            start, end = parse_time(self.claimed_at), parse_time(self.expires_at)
            latest = start + MAX_CLAIM
        except (ValueError, OverflowError):
            return "claimed_at and expires_at must be ISO 8601 times with a time zone"
        if not start < end <= latest:
            return f"a claim lasts up to {MAX_CLAIM.days} days, this one from {self.claimed_at} to {self.expires_at}"
        return super()._problem()


@dataclass(frozen=True)
class Contribution(_Entry):
    """A group checkpoint on the Hub, pinned. `level` is how far it was verified: empty until it is accepted."""

    repo_id: str
    revision: str
    contributor: str
    contributed_at: str
    files_sha256: str
    level: str

    def _problem(self) -> str | None:
        if not is_repo_id(self.repo_id) or "/" not in self.repo_id:
            return "repo_id is no `owner/name`"
        if not is_commit(self.revision):
            return "revision is no commit sha; a branch can change after it was verified"
        if not _USER.fullmatch(self.contributor):
            return "contributor is no user name"
        if not _SHA256.fullmatch(self.files_sha256):
            return "files_sha256 is no sha256"
        return super()._problem()


_E = TypeVar("_E", Claim, Contribution)


@dataclass(frozen=True)
class Registry:
    """The entries of a plan's repo at one commit.

    Attributes:
        revision: that commit.
        claims, contributions: by group.
        merged: what `merged.json` says, or None.
        problems: entries that cannot be read, {path: why}.
    """

    revision: str
    claims: dict[int, Claim]
    contributions: dict[int, Contribution]
    merged: Mapping[str, Any] | None
    problems: dict[str, str]

    def holder(self, group: int, now: datetime) -> Claim | None:
        """The claim that holds a group now; an expired one holds nothing."""
        claim = self.claims.get(group)
        return claim if claim is not None and claim.active(now) else None


def read_registry(revision: str, contents: Iterable[tuple[str, bytes]], plan_sha256: str) -> Registry:
    """The registry from (path, bytes) of its files; entries of another plan count as problems."""
    registry = Registry(revision, {}, {}, None, {})
    merged = None
    for path, raw in contents:
        if path == MERGED_NAME:
            merged = _read_merged(raw)
            continue
        place = entry_of(path)
        if place is None:
            continue
        kind, group = place
        try:
            if kind == "claims":
                registry.claims[group] = checked(Claim.from_bytes(raw, path), group, plan_sha256)
            else:
                registry.contributions[group] = checked(Contribution.from_bytes(raw, path), group, plan_sha256)
        except MeritError as error:
            registry.problems[path] = str(error)
    return Registry(revision, registry.claims, registry.contributions, merged, registry.problems)


def checked(entry: _E, group: int, plan_sha256: str) -> _E:
    """The entry itself. Raises MeritError where it is about another group or plan than the place it lies in."""
    if entry.group != group:
        raise MeritError(f"the entry is about group {entry.group}, its file about group {group}")
    if entry.plan_sha256 != plan_sha256:
        raise MeritError(f"it is about plan {entry.plan_sha256[:12]}, this repo holds {plan_sha256[:12]}")
    return entry


def new_claim(
    plan_sha256: str, group: int, claimant: str, num_input_tokens: int, hardware: str, days: float, now: datetime
) -> Claim:
    """A claim from `now` for `days` days.

    Raises:
        MeritError: more days than a claim may last.
    """
    start = now.astimezone(UTC).replace(microsecond=0)
    end = start + timedelta(days=days)
    claim = Claim(
        plan_sha256, group, claimant, start.isoformat(), end.isoformat(), num_input_tokens, one_line(hardware)
    )
    problem = claim._problem()
    if problem:
        raise MeritError(f"claim of group {group}: {problem}")
    return claim


def parse_time(text: str) -> datetime:
    """An ISO 8601 time with its zone. Raises ValueError."""
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text}: no time zone")
    return time.astimezone(UTC)


def _read_merged(raw: bytes) -> Mapping[str, Any] | None:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    known = isinstance(content, dict) and is_repo_id(content.get("repo_id")) and is_commit(content.get("revision"))
    return content if known else None

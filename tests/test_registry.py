"""Entries of the registry: any bytes give an entry or a MeritError, and an entry keeps its bytes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merit_hf.config import MeritError
from merit_hf.sharing.registry import (
    Claim,
    Contribution,
    claim_path,
    contribution_path,
    entry_of,
    is_commit,
    is_repo_id,
    new_claim,
    read_registry,
)

PLAN, COMMIT = "a" * 64, "b" * 40
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CLAIM: dict[str, Any] = {
    "schema_version": 1, "plan_sha256": PLAN, "group": 3, "claimant": "bob", "claimed_at": "2026-03-01T12:00:00+00:00",
    "expires_at": "2026-03-08T12:00:00+00:00", "num_input_tokens": 5, "hardware": "1 × GPU",
}  # fmt: skip
CONTRIBUTION: dict[str, Any] = {
    "schema_version": 1, "plan_sha256": PLAN, "group": 3, "repo_id": "bob/x", "revision": COMMIT, "contributor": "bob",
    "contributed_at": "2026-03-01T12:00:00+00:00", "files_sha256": "c" * 64, "level": "",
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


def as_bytes(content: Any) -> bytes:
    return json.dumps(content).encode()


@given(raw=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_an_entry_or_an_error(raw: bytes) -> None:
    for kind in (Claim, Contribution):
        with pytest.raises(MeritError):
            kind.from_bytes(raw, "p")


@given(data=st.data())
def test_any_value_in_any_field_is_an_entry_or_an_error(data: st.DataObject) -> None:
    kind, valid = data.draw(st.sampled_from([(Claim, CLAIM), (Contribution, CONTRIBUTION)]))
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(valid)), VALUES, min_size=1, max_size=3))
    try:
        entry = kind.from_bytes(as_bytes(valid | changes), "p")
    except MeritError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert kind.from_bytes(entry.to_bytes(), "p") == entry
    assert all("\n" not in value for value in vars(entry).values() if isinstance(value, str))


@pytest.mark.parametrize("raw", [b"[" * 200_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b"\x00", b"null", b""])
def test_hostile_json(raw: bytes) -> None:
    with pytest.raises(MeritError):
        Claim.from_bytes(raw, "p")
    registry = read_registry(COMMIT, [("claims/group-0.json", raw), ("merged.json", raw)], PLAN)
    assert (registry.claims, registry.merged, list(registry.problems)) == ({}, None, ["claims/group-0.json"])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Claim, {"claimant": "../bob"}), (Claim, {"claimant": "<b>bob</b>"}), (Claim, {"claimant": ""}),
        (Claim, {"claimant": "{{7*7}}"}), (Claim, {"claimed_at": "yesterday"}), (Claim, {"group": True}),
        (Claim, {"claimed_at": "2026-03-01T12:00:00"}), (Claim, {"expires_at": "2026-03-01T12:00:00+00:00"}),
        (Claim, {"expires_at": "2026-04-01T12:00:00+00:00"}), (Claim, {"expires_at": "9999-12-31T23:59:59-23:00"}),
        (Claim, {"claimed_at": "9999-12-31T00:00:00+00:00", "expires_at": "9999-12-31T01:00:00+00:00"}),
        (Claim, {"plan_sha256": "A" * 64}), (Claim, {"schema_version": 2}), (Claim, {"num_input_tokens": 1.0}),
        (Contribution, {"repo_id": "x"}), (Contribution, {"repo_id": "bob/../x"}), (Contribution,
            {"repo_id": "/etc/x"}),
        (Contribution, {"repo_id": "bob/x/y"}), (Contribution, {"repo_id": "bob/x@main"}),
        (Contribution, {"revision": "main"}), (Contribution, {"revision": COMMIT.upper()}),
        (Contribution, {"contributor": "bob eve"}), (Contribution, {"files_sha256": ""}), (Contribution,
            {"level": None}),
    ],
)  # fmt: skip
def test_what_no_entry_can_say(kind: type[Claim] | type[Contribution], changes: dict[str, Any]) -> None:
    valid = CLAIM if kind is Claim else CONTRIBUTION
    kind.from_bytes(as_bytes(valid), "p")
    with pytest.raises(MeritError):
        kind.from_bytes(as_bytes(valid | changes), "p")


def test_unknown_fields_are_not_kept() -> None:
    entry = Claim.from_bytes(as_bytes(CLAIM | {"note": "<script>", "__class__": "x"}), "p")
    assert b"script" not in entry.to_bytes()


def test_text_becomes_one_line() -> None:
    entry = Claim.from_bytes(as_bytes(CLAIM | {"hardware": "a\n\u202eb\x00" + "c" * 500}), "p")
    assert entry.hardware.startswith("a b c")
    assert len(entry.hardware) == 200


@given(group=st.integers(0, 999_999), days=st.floats(0.001, 30), tokens=st.integers(0), hardware=st.text())
def test_a_claim_is_read_as_it_was_written(group: int, days: float, tokens: int, hardware: str) -> None:
    claim = new_claim(PLAN, group, "bob", tokens, hardware, days, NOW)
    assert Claim.from_bytes(claim.to_bytes(), "p") == claim
    assert claim.active(NOW)
    assert not claim.active(NOW + timedelta(days=days, seconds=1))


def test_a_claim_has_an_end() -> None:
    for days in (0, -1, 30.1):
        with pytest.raises(MeritError, match="up to 30 days"):
            new_claim(PLAN, 0, "bob", 1, "", days, NOW)


@given(group=st.integers(0, 999_999))
def test_paths(group: int) -> None:
    assert entry_of(claim_path(group)) == ("claims", group)
    assert entry_of(contribution_path(group)) == ("contributions", group)


@given(st.text())
def test_no_other_path_is_an_entry(text: str) -> None:
    found = entry_of(text)
    assert found is None or text.isascii()


@pytest.mark.parametrize(
    "path",
    ["claims/group--1.json", "claims/../group-1.json", "x/claims/group-1.json", "claims/group-1.json\n",
        "claims/group-.json",
     "claims/group-١.json", "claims/group-1234567.json", "Claims/group-1.json"],
)  # fmt: skip
def test_paths_that_are_none(path: str) -> None:
    assert entry_of(path) is None


def test_names() -> None:
    for good in ("a/b", "org/name.x-y_z", "squad"):
        assert is_repo_id(good), good
    for bad in (
        "",
        "/a",
        "a/",
        "a/b/c",
        "../a",
        "a/..",
        "a/.b",
        ".a/b",
        "a b",
        "a/b\n",
        "a/b@c",
        "~/x",
        "C:\\x",
        "ä/b",
        None,
        3,
    ):
        assert not is_repo_id(bad), bad
    assert is_commit(COMMIT)
    for bad in (COMMIT[1:], COMMIT.upper(), COMMIT + "\n", "main", None, 7):
        assert not is_commit(bad), bad


def test_entries_of_other_places_are_problems_not_entries() -> None:
    files = [
        ("claims/group-2.json", as_bytes(CLAIM)),
        ("claims/group-3.json", as_bytes(CLAIM | {"plan_sha256": "d" * 64})),
        ("contributions/group-3.json", as_bytes(CONTRIBUTION)),
        ("README.md", b"x"),
        ("merged.json", as_bytes({"repo_id": "../x", "revision": COMMIT})),
    ]
    registry = read_registry(COMMIT, files, PLAN)
    assert registry.claims == {}
    assert list(registry.contributions) == [3]
    assert registry.merged is None
    assert list(registry.problems) == ["claims/group-2.json", "claims/group-3.json"]
    assert read_registry(COMMIT, [("claims/group-3.json", as_bytes(CLAIM))], PLAN).holder(3, NOW) is not None
    assert (
        read_registry(COMMIT, [("claims/group-3.json", as_bytes(CLAIM))], PLAN).holder(3, NOW + timedelta(8)) is None
    )

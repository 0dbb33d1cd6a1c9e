"""Claims, contributions and their acceptance on a loopback Hub: members and strangers, in turn and at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hub_merit import Account, Command
from hub_state import RepoState, look, read
from hub_world import PLAN, World

GROUP_0, GROUP_1 = "claims/group-0.json", "claims/group-1.json"
PROPOSE = (
    "import sys, json; from huggingface_hub import HfApi, CommitOperationAdd as Add; files = json.loads(sys.argv[2]); "
    "print(HfApi().create_commit('org/plan', [Add(path, text.encode()) for path, text in files.items()], "
    "commit_message=sys.argv[1], repo_type='dataset', create_pr=True, parent_commit=sys.argv[3] or None).pr_num)"
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A published plan of two groups."""
    with World(tmp_path_factory.mktemp("world")) as world:
        world.publish_base_and_data()
        world.publish_plan()
        world.save("planned")
        yield world


@pytest.fixture
def world(shared: World) -> World:
    shared.back_to("planned")
    return shared


@pytest.fixture
def trained(shared: World) -> World:
    """Also, group 0 trained by alice and 1 by bob, in repos of their own."""
    if "groups" not in shared.saved:
        shared.back_to("planned")
        shared.train_groups()
        shared.save("groups")
    shared.back_to("groups")
    return shared


@pytest.fixture
def alice(shared: World) -> Account:
    return shared.alice


@pytest.fixture
def bob(shared: World) -> Account:
    return shared.bob


def plan_state(world: World) -> RepoState:
    return look(world.hub)["dataset org/plan"]


def claim_entry(
    world: World, group: int, claimant: str, days: float = 3.0, age: float = 0.0, **changes: object
) -> str:
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=age)
    sha256 = read(world.hub, "dataset", PLAN, "plan.json")["sha256"]
    entry = {
        "schema_version": 1, "plan_sha256": sha256, "group": group, "claimant": claimant,
        "claimed_at": start.isoformat(), "expires_at": (start + timedelta(days=days)).isoformat(),
        "num_input_tokens": 1, "hardware": "a laptop", **changes,
    }  # fmt: skip
    return json.dumps(entry)


def propose(account: Account, title: str, files: dict[str, str], parent: str = "", user: str | None = None) -> int:
    """A pull request as anybody can make one without merit; returns its number."""
    return int(account("-c", PROPOSE, title, json.dumps(files), parent, user=user).check().out)


def comments(world: World, num: int) -> list[str]:
    discussion = world.hub.hub.repos["dataset", PLAN].discussions[num - 1]
    return [event["data"]["latest"]["raw"] for event in discussion.events if event["type"] == "comment"]


def status(account: Account) -> list[dict]:
    return json.loads(account("status", PLAN, "--json").check().out)["groups"]


def flat(command: Command) -> str:
    return " ".join(command.out.split())


def test_a_member_claims_by_a_commit_and_releases(world: World, alice: Account) -> None:
    before = plan_state(world)
    done = alice("claim", PLAN, "--group", 0, "--days", 3, "--hardware", "2 × <b>GPU</b>").check()
    after = plan_state(world)
    assert after.commits == [*before.commits, ("Claim group 0 for alice", "alice")]
    assert after.requests == []
    claim = read(world.hub, "dataset", PLAN, GROUP_0)
    assert (claim["claimant"], claim["group"], claim["hardware"]) == ("alice", 0, "2 × <b>GPU</b>")
    held = datetime.fromisoformat(claim["expires_at"]) - datetime.fromisoformat(claim["claimed_at"])
    assert held == timedelta(days=3)
    assert claim["num_input_tokens"] == status(alice)[0]["num_input_tokens"] > 0
    assert claim["expires_at"] in done.out
    # Again is no second claim, and no second commit.
    assert f"You hold group 0 until {claim['expires_at']}." in flat(alice("claim", PLAN, "--group", 0).check())
    assert plan_state(world).commits == after.commits
    assert "which alice held" in flat(alice("release", PLAN, "--group", 0).check())
    assert GROUP_0 not in plan_state(world).files
    assert "nothing to release" in alice("release", PLAN, "--group", 0).error


def test_a_stranger_claims_by_a_pull_request(world: World, alice: Account, bob: Account) -> None:
    before = plan_state(world)
    assert "pull request #1" in bob("claim", PLAN, "--group", 1).check().out
    assert "pull request #1" in bob("claim", PLAN, "--group", 1).check().out
    after = plan_state(world)
    assert after.commits == before.commits
    assert after.requests == [("Claim group 1", "bob", "open", 1)]
    assert [state["claim"] for state in status(bob)] == ["free", "pending"]
    # Another stranger is told who was first; nothing is opened.
    error = bob("claim", PLAN, "--group", 1, user="dave").error
    assert "claimed by bob before you, in pull request #1" in error
    assert len(plan_state(world).requests) == 1
    assert "#1 Claim group 1 (bob): accepted" in flat(alice("accept", PLAN).check())
    assert read(world.hub, "dataset", PLAN, GROUP_1)["claimant"] == "bob"
    assert plan_state(world).commits == [*before.commits, ("Claim group 1 for bob (#1)", "alice")]
    # A holder without write access asks to release; accepted, the group is free.
    for _ in range(2):
        assert "pull request #2" in bob("release", PLAN, "--group", 1).check().out
    assert "#2 Release group 1 (bob): accepted: group 1 is free again" in flat(alice("accept", PLAN).check())
    assert GROUP_1 not in plan_state(world).files
    assert len(plan_state(world).requests) == 2


def test_release_of_a_pending_claim_and_of_another_s(world: World, alice: Account, bob: Account) -> None:
    bob("claim", PLAN, "--group", 0).check()
    assert "Withdrew your pending claim of group 0 (pull request #1)" in flat(
        bob("release", PLAN, "--group", 0).check()
    )
    assert plan_state(world).requests[0][2] == "closed"
    assert status(bob)[0]["claim"] == "free"
    alice("claim", PLAN, "--group", 0).check()
    assert "only they or a maintainer" in bob("release", PLAN, "--group", 0).error
    assert bob("release", PLAN, "--group", 0).code == 2
    assert GROUP_0 in plan_state(world).files
    # Nor by a pull request of one's own making; accept says whose it is.
    code = (
        "from huggingface_hub import HfApi, CommitOperationDelete as Delete; HfApi().create_commit('org/plan', "
        "[Delete('claims/group-0.json')], commit_message='Release group 0', repo_type='dataset', create_pr=True)"
    )
    bob("-c", code).check()
    assert "refused: group 0 is held by alice, not by bob" in flat(alice("accept", PLAN).check())
    assert GROUP_0 in plan_state(world).files
    # A maintainer releases what another holds.
    assert "which alice held" in flat(alice("release", PLAN, "--group", 0, user="carol").check())
    assert GROUP_0 not in plan_state(world).files


@pytest.mark.parametrize("again", range(3))
def test_two_members_at_once(world: World, alice: Account, again: int) -> None:
    # Both commits wait at the Hub until both have read the same head.
    world.hub.fail("slow", "/commit/", "POST", times=2, seconds=0.7)
    world.hub.exchanges.clear()
    pair = {user: alice.start("claim", PLAN, "--group", 0, user=user) for user in ("alice", "carol")}
    codes = {user: command.code for user, command in pair.items()}
    assert sorted(codes.values()) == [0, 1], codes
    winner, loser = sorted(codes, key=lambda user: codes[user])
    assert read(world.hub, "dataset", PLAN, GROUP_0)["claimant"] == winner
    assert f"held by {winner} until" in pair[loser].error
    assert "Free groups: 1." in pair[loser].error
    assert [title for title, _ in plan_state(world).commits].count(f"Claim group 0 for {winner}") == 1
    assert 412 in [exchange.status for exchange in world.hub.exchanges], "nobody met a stale parent"


@pytest.mark.parametrize("again", range(3))
def test_two_strangers_at_once(world: World, bob: Account, again: int) -> None:
    world.hub.fail("slow", "/commit/", "POST", times=2, seconds=0.7)
    pair = {user: bob.start("claim", PLAN, "--group", 0, user=user) for user in ("bob", "dave")}
    codes = {user: command.code for user, command in pair.items()}
    assert sorted(codes.values()) == [0, 1], {user: command.err for user, command in pair.items()}
    winner, loser = sorted(codes, key=lambda user: codes[user])
    assert f"claimed by {winner} before you, in pull request #1" in pair[loser].error
    requests = plan_state(world).requests
    assert [(author, state) for _, author, state, _ in requests] == [(winner, "open"), (loser, "closed")]
    assert "Pull request #1 was first." in comments(world, 2)[-1]


def test_two_members_may_claim_different_groups_at_once(world: World, alice: Account) -> None:
    world.hub.fail("slow", "/commit/", "POST", times=2, seconds=0.5)
    pair = [alice.start("claim", PLAN, "--group", k, user=user) for k, user in enumerate(("alice", "carol"))]
    assert [command.code for command in pair] == [0, 0]
    assert [state["claimed_by"] for state in status(alice)] == ["alice", "carol"]


def test_an_expired_claim_holds_nothing(world: World, alice: Account, bob: Account) -> None:
    old = claim_entry(world, 0, "carol", days=3, age=4)
    alice("-c", PROPOSE.replace("create_pr=True", "create_pr=False").replace(".pr_num", ".oid"), "old",
          json.dumps({GROUP_0: old}), "").check()  # fmt: skip
    assert [state["claim"] for state in status(bob)] == ["expired", "free"]
    assert "carol (expired)" in alice("status", PLAN).check().out
    assert "pull request #1" in bob("claim", PLAN, "--group", 0).check().out
    assert "#1 Claim group 0 (bob): accepted" in flat(alice("accept", PLAN).check())
    assert read(world.hub, "dataset", PLAN, GROUP_0)["claimant"] == "bob"


def test_a_claim_that_lost_to_a_commit_is_told_who_holds_it(world: World, alice: Account, bob: Account) -> None:
    bob("claim", PLAN, "--group", 0).check()
    alice("claim", PLAN, "--group", 0, user="carol").check()
    assert "#1 Claim group 0 (bob): refused" in flat(alice("accept", PLAN).check())
    assert "group 0 is held by carol until" in comments(world, 1)[-1]
    assert read(world.hub, "dataset", PLAN, GROUP_0)["claimant"] == "carol"
    assert plan_state(world).requests[0][2] == "closed"


def test_accept_takes_claims_in_order_and_nothing_twice(world: World, alice: Account, bob: Account) -> None:
    # Two claims of one group, as two strangers who do not use `merit claim` would open them.
    for user in ("dave", "bob"):
        propose(bob, "Claim group 1", {GROUP_1: claim_entry(world, 1, user)}, user=user)
    out = flat(alice("accept", PLAN).check())
    assert out.index("#1 Claim group 1 (dave): accepted") < out.index("#2 Claim group 1 (bob): refused")
    assert "is held by dave" in comments(world, 2)[-1]
    state = plan_state(world)
    assert "Nothing was pending." in alice("accept", PLAN).check().out
    assert plan_state(world) == state


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"claimant": "alice"}, "claims for alice, and bob opened it"),
        ({"days": 29.0, "age": -20.0}, "a claim ends within 30 days"),
        ({"days": 3.0, "age": 4.0}, "it would hold until"),
        ({"days": 31.0}, "a claim lasts up to 30 days"),
        ({"plan_sha256": "0" * 64}, "it is about plan 000000000000"),
        ({"group": 1}, "the entry is about group 1, its file about group 0"),
        ({"hardware": 4}, "expected str"),
    ],
)
def test_claims_that_are_refused(
    world: World, alice: Account, bob: Account, changes: dict[str, object], reason: str
) -> None:
    values: dict = {"claimant": "bob", **changes}
    text = claim_entry(world, 0, values.pop("claimant"), values.pop("days", 3.0), values.pop("age", 0.0))
    propose(bob, "Claim group 0", {GROUP_0: json.dumps(json.loads(text) | values)})
    before = plan_state(world)
    assert "refused" in alice("accept", PLAN, "--level", "manifest").check().out
    assert reason in comments(world, 1)[-1].replace("\\", "")
    assert (plan_state(world).commits, plan_state(world).files) == (before.commits, before.files)


def test_only_one_entry_in_a_pull_request(world: World, alice: Account, bob: Account) -> None:
    files = {GROUP_0: claim_entry(world, 0, "bob"), "README.md": "# Mine now"}
    propose(bob, "Claim group 0", files)
    propose(bob, "Fix a typo", {"README.md": "# Typo"})
    propose(bob, "Claim group 9", {"claims/group-9.json": claim_entry(world, 9, "bob")})
    propose(bob, "Claim group 1", {"notes.txt": "no entry at all"})
    before = plan_state(world)
    out = flat(alice("accept", PLAN).check())
    assert "#1 Claim group 0 (bob): refused: it changes 2 files" in out
    assert "#2 Fix a typo (bob): left: neither a claim nor a contribution" in out
    assert "#3 Claim group 9 (bob): refused: group 9: the plan has groups 0 to 1" in out
    # A title alone would keep the group from everybody else.
    assert "#4 Claim group 1 (bob): refused" in out
    after = plan_state(world)
    assert (after.commits, after.files) == (before.commits, before.files)
    assert [request[2] for request in after.requests] == ["closed", "open", "closed", "closed"]
    assert after.requests[1] == before.requests[1], "somebody else's pull request was touched"


def test_a_pull_request_that_is_behind_main_brings_back_nothing(world: World, alice: Account, bob: Account) -> None:
    parent = str(world.hub.hub.repos["dataset", PLAN].resolve("main").id)
    alice("claim", PLAN, "--group", 0).check()
    propose(bob, "Claim group 1", {GROUP_1: claim_entry(world, 1, "bob")}, parent)
    assert "accepted" in alice("accept", PLAN).check().out
    assert [state["claimed_by"] for state in status(alice)] == ["alice", "bob"]


def test_what_is_added_after_the_check_does_not_land(world: World, alice: Account, bob: Account) -> None:
    """While the maintainer's commit waits, the author puts another file and another claimant into the pull request."""
    propose(bob, "Claim group 0", {GROUP_0: claim_entry(world, 0, "bob")})
    world.hub.exchanges.clear()
    world.hub.fail("slow", "/commit/main", "POST", seconds=4.0)
    accepting = alice.start("accept", PLAN)
    while not any("/commit/main" in exchange.path for exchange in world.hub.exchanges):
        assert not (accepting.folder / "code").exists(), accepting.out + accepting.err
    code = (
        "import sys; from huggingface_hub import HfApi, CommitOperationAdd as Add; HfApi().create_commit('org/plan', "
        "[Add('evil.py', b'1'), Add('claims/group-0.json', sys.argv[1].encode())], commit_message='more', "
        "repo_type='dataset', revision='refs/pr/1')"
    )
    bob("-c", code, claim_entry(world, 0, "bob", hardware="all of it")).check()
    accepting.wait().check()
    state = plan_state(world)
    assert "evil.py" not in state.files
    assert read(world.hub, "dataset", PLAN, GROUP_0)["hardware"] == "a laptop"
    assert state.requests[0][2] == "closed"


@pytest.mark.slow
def test_contributions(trained: World, alice: Account, bob: Account) -> None:
    bob("claim", PLAN, "--group", 1).check()
    alice("accept", PLAN).check()
    # Twice is one pull request; another commit replaces it; somebody else's group is refused with the holder's name.
    for _ in range(2):
        assert "in pull request #2" in flat(bob("contribute", PLAN, "bob/group-1").check())
    assert len(plan_state(trained).requests) == 2
    assert "group 1 is held by bob until" in alice("contribute", PLAN, "bob/group-1").error
    upload = (
        "from huggingface_hub import HfApi; HfApi().upload_file(path_or_fileobj=b'# Card', "
        "path_in_repo='README.md', repo_id='bob/group-1')"
    )
    bob("-c", upload).check()
    assert "in pull request #3" in flat(bob("contribute", PLAN, "bob/group-1").check())
    assert [(title, state) for title, _, state, _ in plan_state(trained).requests] == [
        ("Claim group 1", "closed"), ("Contribute group 1", "closed"), ("Contribute group 1", "open"),
    ]  # fmt: skip
    assert "Replaced by its author." in comments(trained, 2)[-1]
    head = str(trained.hub.hub.repos["model", "bob/group-1"].resolve("main").id)
    offered = status(bob)[1]
    assert offered["checkpoint"] == "offered by bob in pull request #3"
    assert offered["verified"] is None
    # A folder is no contribution.
    error = bob("contribute", PLAN, "group-1").error
    assert "merit push group-1 YOU/NAME" in error
    out = flat(alice("accept", PLAN, "--level", "weights").check())
    assert "#3 Contribute group 1 (bob): accepted" in out
    entry = read(trained.hub, "dataset", PLAN, "contributions/group-1.json")
    assert (entry["repo_id"], entry["revision"], entry["level"]) == ("bob/group-1", head, "weights")
    taken = plan_state(trained)
    assert "Nothing was pending." in alice("accept", PLAN).check().out
    assert plan_state(trained) == taken
    assert "group 1 has its checkpoint" in bob("claim", PLAN, "--group", 1, user="dave").error
    (row,) = [state for state in status(alice) if state["group"] == 1]
    assert (row["claim"], row["verified"], row["merged"]) == ("held", "weights", None)
    assert row["checkpoint"] == f"bob/group-1@{head[:12]}"


@pytest.mark.slow
def test_a_bad_contribution_is_refused_with_its_check(trained: World, alice: Account, bob: Account) -> None:
    entry = {
        "schema_version": 1, "plan_sha256": read(trained.hub, "dataset", PLAN, "plan.json")["sha256"], "group": 0,
        "repo_id": "bob/group-1", "revision": str(trained.hub.hub.repos["model", "bob/group-1"].resolve("main").id),
        "contributor": "bob", "contributed_at": "2026-01-01T00:00:00+00:00", "files_sha256": "0" * 64,
        "level": "behaviour",
    }  # fmt: skip
    propose(bob, "Contribute group 0", {"contributions/group-0.json": json.dumps(entry)})
    branch = json.dumps(entry | {"group": 1, "revision": "main"})
    propose(bob, "Contribute group 1", {"contributions/group-1.json": branch})
    before = plan_state(trained)
    out = flat(alice("accept", PLAN, "--level", "manifest").check())
    assert "the checkpoint is of group 1, the entry says 0" in out
    assert "#2 Contribute group 1 (bob): refused" in out
    assert "revision is no commit sha" in out
    assert plan_state(trained).files == before.files


def test_who_may_accept_and_what_needs_a_hub(world: World, alice: Account, bob: Account) -> None:
    refused = bob("accept", PLAN)
    assert refused.code == 2
    assert "not yours (bob) to write to" in refused.error
    for arguments in (("claim", "plan", "--group", "0"), ("release", "plan", "--group", "0"), ("accept", "plan"),
                      ("contribute", "plan", "alice/group-0")):  # fmt: skip
        done = alice(*arguments)
        assert done.code == 2, done.err
        assert "merit push" in done.error
    assert alice("claim", PLAN, "--group", 7).code == 2
    assert "7" in alice("claim", PLAN, "--group", 7).error
    assert alice("claim", PLAN, "--group", 0, "--days", 31).code == 2
    assert alice("claim", "org/nothing", "--group", 0).code == 2


@pytest.mark.slow
def test_status_of_a_folder_and_of_everything_merged(trained: World, alice: Account, tmp_path: Path) -> None:
    local = json.loads(alice("status", "plan", "--json").check().out)
    assert local["plan"]["repo_id"] is None
    assert [state["claim"] for state in local["groups"]] == ["local", "local"]
    for group, repo in enumerate(("alice/group-0", "bob/group-1")):
        account = alice if group == 0 else trained.bob
        account("contribute", PLAN, repo).check()
    alice("accept", PLAN, "--level", "manifest").check()
    assert "Next: merit merge org/plan --output merged" in alice("status", PLAN).check().out
    alice("merge", PLAN, "--output", tmp_path / "merged").check()
    alice("push", tmp_path / "merged", "org/merged", "--license", "mit").check()
    states = status(trained.bob)
    assert [state["merged"] for state in states] == ["org/merged", "org/merged"]
    assert [state["verified"] for state in states] == ["manifest", "manifest"]
    shown = trained.bob("status", PLAN).check().out
    assert "All groups are merged: org/merged" in shown
    assert "2 of 2 groups ready to merge" in shown


@pytest.mark.slow
def test_a_group_that_was_stopped_is_offered_and_taken_where_both_ask_for_it(
    trained: World, alice: Account, bob: Account
) -> None:
    bob("train", PLAN, "--group", 1, "--output", "stopped", "train.stop_at_step=1").check()
    bob("push", "stopped", "bob/stopped").check()
    refused = bob("contribute", PLAN, "bob/stopped").error
    assert "stopped at step 1 of" in refused
    assert "--allow-partial" in refused
    told = flat(bob("contribute", PLAN, "bob/stopped", "--allow-partial").check())
    assert "`merit accept org/plan --allow-partial`" in told
    alice("contribute", PLAN, "alice/group-0").check()
    done = flat(alice("accept", PLAN, "--level", "weights", "--allow-partial").check())
    assert "bob/stopped" in done
    assert "refused" not in done
    assert "stopped at step 1" in alice("merge", PLAN, "--output", "merged").error
    alice("merge", PLAN, "--output", "merged", "--allow-partial").check()
    group = json.loads((alice.folder / "merged" / "merit.json").read_text())["groups"][1]
    assert group["stopped_at_step"] == 1
    assert f"{group['num_input_tokens']:,}" in (alice.folder / "merged" / "README.md").read_text()

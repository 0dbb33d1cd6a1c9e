"""Every fault of a Hub × everything that merit does on one: what the user sees, what is left, and the second run.

Used by tests/test_hub_faults.py, and by benchmarks/hub_faults.py, which writes the table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from hub_merit import Account, Command
from hub_state import RepoState, look, read
from hub_world import PLAN, World

from merit_hf.manifest import hash_files, read_manifest

ASK, DOWNLOAD, DATA, UPLOAD, WRITE, AFTER = "ask", "download", "data", "upload", "write", "after"
# {fault: (what is injected, at which requests of an operation)}
FAULTS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "429, Retry-After": ({"kind": "status", "status": 429, "retry_after": 1}, (ASK, WRITE, AFTER)),
    "500": ({"kind": "status", "status": 500}, (ASK, WRITE)),
    "503": ({"kind": "status", "status": 503}, (DOWNLOAD, DATA, UPLOAD, WRITE, AFTER)),
    "503 until healed": ({"kind": "status", "status": 503, "times": 1_000_000}, (ASK, AFTER)),
    "dropped request": ({"kind": "drop_request"}, (ASK, WRITE, AFTER)),
    "lost answer": ({"kind": "lose_response"}, (ASK, WRITE, AFTER)),
    "dropped download": ({"kind": "drop_response"}, (DOWNLOAD, DATA)),
    "dropped upload": ({"kind": "drop_request"}, (UPLOAD,)),
    "truncated file": ({"kind": "truncate"}, (DOWNLOAD, DATA)),
    "corrupted file": ({"kind": "corrupt"}, (DOWNLOAD, DATA)),
    "slow answer": ({"kind": "slow", "seconds": 3.0}, (DOWNLOAD, WRITE)),
}


@dataclass(frozen=True)
class Operation:
    """One thing that people do.

    Attributes:
        state: the snapshot that it starts from.
        output: what it makes in the account's folder, if anything.
        targets: {ask, download, data, upload, write, after: (method, pattern)} of its requests of that kind.
    """

    name: str
    user: str
    state: str
    arguments: tuple[str, ...]
    targets: dict[str, tuple[str, str]]
    output: str | None = None


COMMIT, LFS_GET, LFS_PUT = ("POST", "/commit/"), ("GET", "/lfs/"), ("PUT", "/lfs/")
CLAIM_FILE = ("GET", "/resolve/.*/group-")
ROWS = ("GET", "/resolve/.*/train.jsonl")
TRAIN = ("train", PLAN, "--group", "0", "--output", "trained", "sft.push_to_hub=true",
         "sft.hub_model_id=alice/trained", "sft.hub_strategy=checkpoint", "sft.save_steps=5")  # fmt: skip
OPERATIONS = [
    Operation("plan", "alice", "data", ("plan", "mixture.yaml", "--output", "planned"),
              {ASK: ("GET", "/api/models/org/base"), DOWNLOAD: LFS_GET, DATA: ROWS}, "planned"),
    Operation("train and push", "alice", "groups", TRAIN,
              {ASK: ("GET", "/api/datasets/org/plan"), DOWNLOAD: LFS_GET, DATA: ROWS, UPLOAD: LFS_PUT,
               WRITE: COMMIT}, "trained"),
    Operation("claim (member)", "alice", "groups", ("claim", PLAN, "--group", "0", "--hardware", "a laptop"),
              {ASK: ("GET", "whoami"), DOWNLOAD: ("GET", "/resolve/.*/plan.json"), WRITE: COMMIT}),
    Operation("claim (stranger)", "bob", "groups", ("claim", PLAN, "--group", "1", "--hardware", "a laptop"),
              {ASK: ("GET", "whoami"), DOWNLOAD: ("GET", "/resolve/.*/plan.json"), WRITE: COMMIT,
               AFTER: ("GET", "/discussions")}),
    Operation("contribute", "bob", "groups", ("contribute", PLAN, "bob/group-1"),
              {ASK: ("GET", "/api/models/bob/group-1"), DOWNLOAD: ("GET", "/resolve/.*/merit.json"), WRITE: COMMIT}),
    Operation("accept a claim", "alice", "asked", ("accept", PLAN),
              {ASK: ("GET", "/discussions"), DOWNLOAD: CLAIM_FILE, WRITE: COMMIT,
               AFTER: ("POST", "/discussions/1/status")}),
    Operation("accept a group", "alice", "offered", ("accept", PLAN, "--level", "weights"),
              {ASK: ("GET", "/api/models/"), DOWNLOAD: LFS_GET, WRITE: COMMIT,
               AFTER: ("POST", "/discussions/2/status")}),
    Operation("merge", "alice", "accepted", ("merge", PLAN, "--output", "remade"),
              {ASK: ("GET", "/api/models/"), DOWNLOAD: LFS_GET}, "remade"),
    Operation("push plan", "alice", "data", ("push", "plan", "org/plan-again"),
              {ASK: ("GET", "/api/datasets/org/plan-again"), UPLOAD: LFS_PUT, WRITE: COMMIT}),
    Operation("push group", "bob", "data", ("push", "group-1", "bob/again"), {UPLOAD: LFS_PUT, WRITE: COMMIT}),
    Operation("push merged", "alice", "accepted", ("push", "merged", "org/merged"),
              {ASK: ("GET", "/api/models/"), DOWNLOAD: ("GET", "/resolve/.*/plan.json"), UPLOAD: LFS_PUT,
               WRITE: COMMIT, AFTER: ("POST", "/api/collections")}),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One fault at one kind of request of one operation: `by itself`, or the line with which it ended."""

    fault: str
    operation: str
    target: str
    line: str | None

    @property
    def recovered(self) -> bool:
        return self.line is None


class Table:
    """Runs cells in a world that is set back before each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._clean: dict[str, tuple[dict[str, RepoState], object]] = {}

    @staticmethod
    def prepare(world: World) -> None:
        """All the states that operations start from."""
        world.publish_base_and_data()
        world.save("data")
        world.publish_plan()
        world.train_groups()
        world.save("groups")
        world.bob("claim", PLAN, "--group", "1", "--hardware", "a laptop").check()
        world.save("asked")
        world.alice("accept", PLAN).check()
        world.bob("contribute", PLAN, "bob/group-1").check()
        world.alice("contribute", PLAN, "alice/group-0").check()
        world.save("offered")
        world.alice("accept", PLAN).check()
        world.alice("merge", PLAN, "--output", "merged").check()
        world.save("accepted")

    def account(self, operation: Operation) -> Account:
        return self.world.alice if operation.user == "alice" else self.world.bob

    def start(self, operation: Operation) -> None:
        """The operation's own state, nothing cached, no output."""
        account = self.account(operation)
        self.world.back_to(operation.state)
        account.forget()
        for made in account.folder.glob(f"{operation.output}*") if operation.output else ():
            shutil.rmtree(made)
        self.world.hub.exchanges.clear()

    def run(self, operation: Operation) -> Command:
        return self.account(operation)(*operation.arguments)

    def clean(self, operation: Operation) -> tuple[dict[str, RepoState], object]:
        """The state and the result that the operation has without a fault."""
        if operation.name not in self._clean:
            self.start(operation)
            self.run(operation).check()
            self._clean[operation.name] = (look(self.world.hub), self.result(operation))
        return self._clean[operation.name]

    def result(self, operation: Operation) -> object:
        """What it made here: the hashes of a checkpoint, the identity of a plan."""
        if operation.output is None:
            return None
        made = self.account(operation).folder / operation.output
        if not made.is_dir():
            return None
        if (made / "plan.json").exists():
            return json.loads((made / "plan.json").read_text())["sha256"]
        manifest = read_manifest(made)
        return hash_files(made), manifest.get("num_input_tokens"), manifest.get("groups")

    def cell(self, fault: str, operation: Operation) -> Iterator[Outcome]:
        """The fault at each kind of request that it can hit in this operation."""
        for target in FAULTS[fault][1]:
            if target in operation.targets:
                yield self.outcome(fault, operation, target)

    def outcome(self, fault: str, operation: Operation, target: str) -> Outcome:
        """Run with the fault, look at what is left, run again, and hold it against a clean run.

        Raises:
            AssertionError: it ended otherwise than well or with one line and exit code 1; something is half done; or
                the second run does not end where a clean one does.
        """
        expected, made = self.clean(operation)
        self.start(operation)
        before = look(self.world.hub)
        where = f"{fault}, {operation.name}, {target}"
        method, pattern = operation.targets[target]
        options = dict(FAULTS[fault][0])
        injected = self.world.hub.fail(options.pop("kind"), pattern, method, **options)  # type: ignore[arg-type]
        times = injected.times
        done = self.run(operation)
        self.world.hub.heal()
        assert injected.times < times, f"{where}: no request was hit\n{done.out}{done.err}"
        line = None
        if done.code:
            assert done.code == 1, f"{where}: exit code {done.code}: {done.err}"
            line = done.error
            assert self.result(operation) in (None, made), f"{where}: half a result"
            self._nothing_by_halves(where, before, look(self.world.hub), expected, operation)
            again = self.run(operation)
            assert again.code == 0, f"{where}: the second run ended with {again.code}: {again.err}\nfirst: {line}"
        assert self.result(operation) == made, f"{where}: another result"
        self._same(where, look(self.world.hub), expected, operation)
        return Outcome(fault, operation.name, target, line)

    def _nothing_by_halves(
        self, where: str, before: dict[str, RepoState], now: dict[str, RepoState], after: dict[str, RepoState],
        operation: Operation,
    ) -> None:  # fmt: skip
        assert now.keys() <= after.keys(), f"{where}: repos {now.keys() - after.keys()}"
        for name, state in now.items():
            if operation.name == "train and push" and name == "model alice/trained":
                # Intermediate pushes say of themselves that they are.
                manifest = read(self.world.hub, "model", "alice/trained", "merit.json")
                assert manifest is None or manifest["status"] in ("training", "complete"), where
                continue
            whole = after[name]
            assert state.commits == whole.commits[: len(state.commits)], f"{where}: {name}: {state.commits}"
            assert len(state.requests) <= len(whole.requests), f"{where}: {name}: {state.requests}"
            if name in before and len(state.commits) == len(before[name].commits):
                assert state.files == before[name].files, f"{where}: {name} changed without a commit"

    def _same(
        self, where: str, now: dict[str, RepoState], expected: dict[str, RepoState], operation: Operation
    ) -> None:
        assert now.keys() == expected.keys(), f"{where}: repos {now.keys() ^ expected.keys()}"
        for name, state in now.items():
            whole = expected[name]
            if operation.name == "train and push" and name == "model alice/trained":
                manifest = read(self.world.hub, "model", "alice/trained", "merit.json")
                assert manifest["status"] == "complete", where
                assert state.files.keys() == whole.files.keys(), f"{where}: {state.files.keys() ^ whole.files.keys()}"
                weights = "model.safetensors"
                assert state.files[weights] == whole.files[weights], f"{where}: other weights"
                continue
            assert state.commits == whole.commits, f"{where}: {name}: {state.commits}, clean {whole.commits}"
            assert state.requests == whole.requests, f"{where}: {name}: {state.requests}, clean {whole.requests}"
            different = {p for p in state.files | whole.files if state.files.get(p) != whole.files.get(p)}
            assert not different, f"{where}: {name}: {different}"
        if operation.name == "push merged":
            (collection,) = self.world.hub.hub.collections.values()
            assert len(collection["items"]) == 4, f"{where}: {collection['items']}"

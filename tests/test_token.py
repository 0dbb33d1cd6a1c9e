"""The token of the Hub is in nothing that merit prints, writes or publishes, not even where the Hub fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pygit2
import pytest
import yaml
from hub_server import HubServer
from tiny import as_chat, make_base, task_rows, write_jsonl

pytestmark = pytest.mark.slow


def everything(hub: HubServer) -> Iterator[tuple[str, bytes]]:
    """(where, bytes) of all that the Hub holds: every git object of every repo, LFS files, discussions."""
    for (_, name), repo in hub.hub.repos.items():
        for oid in repo.git:
            found = repo.git[oid]
            yield f"{name}:{oid}", found.data if isinstance(found, pygit2.Blob) else found.read_raw()
        for discussion in repo.discussions:
            yield f"{name}#{discussion.num}", repr(discussion).encode()
    for path in (hub.root / "hub/lfs").iterdir():
        yield path.name, path.read_bytes()


def test_no_token_is_printed_written_or_published(tmp_path: Path) -> None:
    said: list[tuple[str, bytes]] = []
    with HubServer() as hub:

        def merit(user: str, *arguments: str, code: int = 0) -> None:
            home = tmp_path / user
            home.mkdir(exist_ok=True)
            done = subprocess.run(
                [sys.executable, "-m", "merit_hf.cli", *arguments, "--debug"], cwd=home, capture_output=True,
                env=hub.environ(user, HF_HOME=str(tmp_path / f"cache-{user}")), timeout=240,
            )  # fmt: skip
            said.append((f"{user}$ {' '.join(arguments)}", done.stdout + done.stderr))
            assert (done.returncode != 0) == bool(code), done.stderr.decode()[-1500:]

        (tmp_path / "alice").mkdir()
        make_base(tmp_path / "alice/base")
        (tmp_path / "alice/base/README.md").write_text("---\nlicense: mit\n---\n")
        hub.api("alice").create_repo("org/base")
        upload = "from huggingface_hub import upload_folder as up; up(folder_path='base', repo_id='org/base')"
        subprocess.run([sys.executable, "-c", upload], cwd=tmp_path / "alice", env=hub.environ("alice"), check=True)
        for task in ("copy", "count"):
            write_jsonl(tmp_path / f"alice/{task}.jsonl", [as_chat(row) for row in task_rows(task, 24)])
        config = {
            "base": {"model_name_or_path": "org/base"},
            "datasets": [{"name": task, "path": f"{task}.jsonl", "eval_fraction": 0.2} for task in ("copy", "count")],
            "plan": {"num_groups": 2, "num_samples": 4, "sketch_dim": 256},
            "sft": {"learning_rate": 2e-3, "num_train_epochs": 4, "per_device_train_batch_size": 4, "max_length": 64,
                    "gradient_checkpointing": False, "save_steps": 4},
        }  # fmt: skip
        (tmp_path / "alice/mixture.yaml").write_text(yaml.safe_dump(config))
        merit("alice", "plan", "mixture.yaml", "--output", "plan")
        # Every kind of failure: an unknown token, no access, a broken Hub.
        hub.fail("status", "/commit/", "POST", status=401)
        merit("alice", "push", "plan", "org/plan", "--with-data", code=1)
        hub.heal()
        hub.fail("status", "/whoami", status=401)
        merit("bob", "push", "plan-that-is-not-there", "bob/x", code=1)
        hub.heal()
        merit("alice", "push", "plan", "org/plan", "--with-data")
        merit("bob", "claim", "org/plan", "--group", "0")
        hub.fail("status", "/commit/", "POST", status=500)
        merit("bob", "claim", "org/plan", "--group", "1", code=1)
        hub.heal()
        for user, group in (("bob", "0"), ("alice", "1")):
            repo = f"{user}/group-{group}"
            merit(user, "train", "org/plan", "--group", group, "--output", "mine", "sft.push_to_hub=true",
                  f"sft.hub_model_id={repo}", "sft.hub_strategy=checkpoint")  # fmt: skip
            merit(user, "contribute", "org/plan", repo)
        hub.fail("status", "/discussions", status=401)
        merit("alice", "accept", "org/plan", code=1)
        hub.heal()
        merit("alice", "accept", "org/plan")
        merit("alice", "merge", "org/plan", "--output", "merged")
        merit("alice", "push", "merged", "org/merged", "--license", "mit")
        secrets = {user: hub.token(user).encode() for user in ("alice", "bob")}
        kept = [*said, *everything(hub)]
        kept += [
            (str(path), path.read_bytes())
            for user in secrets
            for path in (tmp_path / user).rglob("*")
            if path.is_file()
        ]
        assert len(kept) > 100
        assert any("merit.json" in where for where, _ in kept)
    for where, content in kept:
        for user, secret in secrets.items():
            assert secret not in content, f"{user}'s token is in {where}"
            assert b"Bearer hf_" not in content, where

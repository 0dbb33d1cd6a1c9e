"""A loopback Hub with a base, two dataset repos, a plan over them with its trained groups, and its users."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Self

import yaml
from hub_merit import Account
from hub_server import HubServer
from hub_state import Snapshot, restore, save
from tiny import as_chat, make_base, task_rows, write_jsonl

PLAN = "org/plan"
UPLOAD = (
    "import sys; from huggingface_hub import HfApi; HfApi().upload_folder("
    "folder_path=sys.argv[1], repo_id=sys.argv[2], repo_type=sys.argv[3])"
)
# A client that gives up early, so that a slow answer is a time-out here too.
IMPATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}


class World:
    """`alice` is a member of `org`, `bob` is a stranger; `folder` holds their homes."""

    def __init__(self, folder: Path, tasks: tuple[str, ...] = ("copy", "count"), **sft: Any) -> None:
        self.folder, self.tasks, self.sft = folder, tasks, sft
        self.hub = HubServer()
        self.saved: dict[str, Snapshot] = {}

    def __enter__(self) -> Self:
        self.hub.__enter__()
        self.alice = Account(self.hub, "alice", self.folder / "alice", **IMPATIENT)
        self.bob = Account(self.hub, "bob", self.folder / "bob", **IMPATIENT)
        return self

    def __exit__(self, *_: object) -> None:
        self.alice.close()
        self.bob.close()
        self.hub.__exit__()

    def config(self, local: bool = False, **sections: Any) -> Path:
        """CONFIG in alice's folder; its data lie on the Hub, or (`local`) in files of hers."""
        datasets = [
            {"name": task, "path": f"data/{task}.jsonl" if local else f"org/{task}", "eval_fraction": 0.25}
            for task in self.tasks
        ]
        content = {
            "base": {"model_name_or_path": "org/base"},
            "datasets": datasets,
            "plan": {"num_groups": len(self.tasks), "num_samples": 4, "sketch_dim": 256},
            "sft": {
                "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
                "max_length": 64, "learning_rate": 2e-3, **self.sft,
            },
            **sections,
        }  # fmt: skip
        path = self.alice.folder / ("local.yaml" if local else "mixture.yaml")
        path.write_text(yaml.safe_dump(content))
        return path

    def publish_base_and_data(self) -> None:
        """org/base under Apache-2.0, org/TASK under MIT; the same rows in alice's data/TASK.jsonl."""
        api = self.hub.api("alice")
        base = make_base(self.folder / "base")
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        api.create_repo("org/base")
        self.alice("-c", UPLOAD, base, "org/base", "model").check()
        for task in self.tasks:
            folder = self.folder / "rows" / task
            rows = [as_chat(row) for row in task_rows(task, 24)]
            write_jsonl(folder / "train.jsonl", rows)
            write_jsonl(self.alice.folder / f"data/{task}.jsonl", rows)
            (folder / "README.md").write_text("---\nlicense: mit\n---\n")
            api.create_repo(f"org/{task}", repo_type="dataset")
            self.alice("-c", UPLOAD, folder, f"org/{task}", "dataset").check()

    def publish_plan(self) -> None:
        self.alice("plan", self.config(), "--output", "plan").check()
        self.alice("push", "plan", PLAN).check()

    def train_groups(self, owners: tuple[str, ...] = ("alice", "bob")) -> None:
        """Group k is trained and pushed by its owner as OWNER/group-k."""
        for group, owner in enumerate(owners):
            account = self.alice if owner == "alice" else self.bob
            account("train", PLAN, "--group", group, "--output", f"group-{group}").check()
            account("push", f"group-{group}", f"{owner}/group-{group}").check()

    def save(self, name: str) -> None:
        self.saved[name] = save(self.hub)

    def back_to(self, name: str) -> None:
        restore(self.hub, self.saved[name])

    def fresh(self, account: Account, folder: str) -> None:
        """Nothing cached, and nothing in `folder` of the account's home."""
        account.forget()
        for path in account.folder.glob(f"{folder}*"):
            shutil.rmtree(path)

"""A plan, two people, four groups, one bad card, one merged model: the whole story against a Hub on this machine.

    python recipes/community/story.py --output runs/community

Alice, a member of `org`, publishes a plan over her own files. She trains two groups; bob, a stranger, claims the other
two, trains them from the Hub alone and contributes them. One of his checkpoints was damaged on its way to the Hub:
`accept` refuses it and says why; he pushes it again. Alice merges and publishes. What stands below a `$` is what
`merit` printed; the transcript is written to OUTPUT/transcript.md. The models are tiny, the Hub is that of the tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer  # noqa: E402
from tiny import as_chat, make_base, task_rows, write_jsonl  # noqa: E402

TASKS = ("copy", "reverse", "count", "first", "repeat", "upper")
PLAN = "org/six-tasks"


class Story:
    """Runs commands as one of the two accounts, and keeps what was said."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder, self.lines = hub, folder, ["# Two people, one plan\n"]

    def tell(self, text: str) -> None:
        self.lines.append(f"\n{text}\n")
        sys.stderr.write(f"\n{text}\n")

    def run(self, user: str, *arguments: str, fails: bool = False) -> str:
        """`merit ARGUMENTS` in the user's own folder and cache; stops the story where it ends otherwise than told."""
        home = self.folder / user
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "merit_hf.cli", *arguments],
            cwd=home, env=self.hub.environ(user, HF_HOME=str(home / "cache"), COLUMNS="150"),
            capture_output=True, text=True,
        )  # fmt: skip
        output = done.stdout + "".join(f"{line}\n" for line in done.stderr.splitlines() if line.startswith("merit:"))
        output = output.replace(self.hub.endpoint, "https://hub.example").replace(str(home), "~")
        self.lines.append(f"```\n{user}$ merit {' '.join(arguments)}\n{output.rstrip()}\n```")
        sys.stderr.write(f"{user}$ merit {' '.join(arguments)}\n{output}")
        if (done.returncode != 0) != fails:
            raise SystemExit(f"merit {arguments[0]} ended with exit code {done.returncode}:\n{done.stderr}")
        return output


def prepare(hub: HubServer, folder: Path) -> None:
    """A base on the Hub under a licence, and alice's local data with a CONFIG over it."""
    base = make_base(folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    hub.api("alice").create_repo("org/base")
    upload = (
        "import sys; from huggingface_hub import upload_folder; "
        "upload_folder(folder_path=sys.argv[1], repo_id='org/base')"
    )
    subprocess.run(
        [sys.executable, "-c", upload, str(base)], env=hub.environ("alice"), check=True, capture_output=True
    )
    for task in TASKS:
        write_jsonl(folder / f"alice/data/{task}.jsonl", [as_chat(row) for row in task_rows(task, 60)])
    config = {
        "base": {"model_name_or_path": "org/base"},
        "datasets": [{"name": task, "path": f"data/{task}.jsonl", "eval_fraction": 0.2} for task in TASKS],
        "plan": {"num_groups": 4, "num_samples": 16, "sketch_dim": 4096},
        "sft": {
            "learning_rate": 2e-3, "num_train_epochs": 4, "per_device_train_batch_size": 4, "max_length": 64,
            "gradient_checkpointing": False, "save_steps": 20,
        },
        "merge": {"out_dtype": "float32"},
    }  # fmt: skip
    (folder / "alice/mixture.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def damage(checkpoint: Path) -> None:
    """A bad memory module: one matrix comes out as garbage, and the hashes are taken after that."""
    from merit_hf.manifest import hash_files

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].flip(0) * 3
    save_file(tensors, file, {"format": "pt"})
    manifest = json.loads((checkpoint / "merit.json").read_text())
    manifest["files"] = hash_files(checkpoint)
    (checkpoint / "merit.json").write_text(json.dumps(manifest, indent=2))


def play(story: Story) -> None:
    """From the plan to the published model."""
    run, tell = story.run, story.tell
    tell("## Alice plans a mixture of her own files and publishes the plan with its data")
    run("alice", "plan", "mixture.yaml", "--output", "plan")
    run("alice", "push", "plan", PLAN, "--with-data")
    tell("## Both take groups")
    for group in ("0", "1"):
        run("alice", "claim", PLAN, "--group", group, "--hardware", "1 × small GPU")
    run("bob", "claim", PLAN, "--group", "1", fails=True)
    for group in ("2", "3"):
        run("bob", "claim", PLAN, "--group", group, "--days", "3", "--hardware", "a laptop")
    run("alice", "accept", PLAN)
    tell("## Each trains at home, from the Hub alone")
    for user, groups in (("alice", (0, 1)), ("bob", (2, 3))):
        for group in groups:
            run(user, "train", PLAN, "--group", str(group), "--output", f"group-{group}")
    tell("## Bob's copy of group 3 is damaged before he pushes it")
    shutil.copytree(story.folder / "bob/group-3", story.folder / "bob/group-3-damaged")
    damage(story.folder / "bob/group-3-damaged")
    for user, group, folder in (("alice", 0, "group-0"), ("alice", 1, "group-1"), ("bob", 2, "group-2"),
                                ("bob", 3, "group-3-damaged")):  # fmt: skip
        repo = f"{'org' if user == 'alice' else user}/six-tasks-group-{group}"
        run(user, "push", folder, repo)
        run(user, "contribute", PLAN, repo)
    run("bob", "status", PLAN)
    tell("## Alice looks at what came: three are taken, one is refused with the reason")
    run("alice", "accept", PLAN)
    tell("## Bob pushes the good copy")
    run("bob", "push", "group-3", "bob/six-tasks-group-3")
    run("bob", "contribute", PLAN, "bob/six-tasks-group-3")
    run("alice", "accept", PLAN)
    tell("## Alice merges what was accepted, evaluates and publishes")
    run("alice", "verify", PLAN, "bob/six-tasks-group-3", "--level", "behaviour")
    run("alice", "merge", PLAN, "--output", "merged")
    run("alice", "evaluate", "merged", "--plan", PLAN, "--output", ".")
    run("alice", "push", "merged", "org/six-tasks-merged", fails=True)
    run("alice", "push", "merged", "org/six-tasks-merged", "--license", "apache-2.0")
    run("bob", "status", PLAN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the two homes and the transcript")
    output = parser.parse_args().output.resolve()
    if output.exists():
        raise SystemExit(f"{output} exists. Give another folder, or delete it.")
    output.mkdir(parents=True)
    with HubServer() as hub:
        prepare(hub, output)
        story = Story(hub, output)
        try:
            play(story)
        finally:
            (output / "transcript.md").write_text("\n".join(story.lines) + "\n", encoding="utf-8")
    sys.stderr.write(f"\nThe transcript is in {output / 'transcript.md'}.\n")


if __name__ == "__main__":
    main()

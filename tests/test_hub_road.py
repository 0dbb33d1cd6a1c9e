"""The road over the Hub: base and datasets by id, pinned; a run that publishes; a plan loaded by id elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from tiny import as_chat, make_base, task_rows, write_jsonl

from merit_hf.manifest import hash_files, read_manifest, write_manifest


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with a base and two dataset repos; the base's main has moved on after its tag v1."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        api = server.api("alice")
        upload = [sys.executable, "-c", "import sys; from huggingface_hub import HfApi; HfApi().upload_folder("
                  "folder_path=sys.argv[1], repo_id=sys.argv[2], repo_type=sys.argv[3])"]  # fmt: skip
        for task in ("copy", "count"):
            write_jsonl(folder / task / "train.jsonl", [as_chat(row) for row in task_rows(task, 12)])
            api.create_repo(f"org/{task}", repo_type="dataset")
            subprocess.run(
                [*upload, str(folder / task), f"org/{task}", "dataset"], env=server.environ("alice"), check=True
            )
        api.create_repo("org/base")
        for seed in (0, 1):
            make_base(folder / f"base{seed}", seed=seed)
            subprocess.run(
                [*upload, str(folder / f"base{seed}"), "org/base", "model"], env=server.environ("alice"), check=True
            )
            if seed == 0:
                api.create_tag("org/base", tag="v1")
        yield server


def write_config(folder: Path, **hub: object) -> Path:
    config = {
        "base": {"model_name_or_path": "org/base", "revision": "v1"},
        "datasets": [{"name": task, "path": f"org/{task}", "eval_fraction": 0.25} for task in ("copy", "count")],
        "plan": {"num_groups": 2, "num_samples": 4, "sketch_dim": 256},
        "sft": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": False},
        "hub": hub,
    }
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def merit(
    hub: HubServer, folder: Path, *arguments: str, user: str = "alice", **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merit_hf.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=hub.environ(user, **variables), capture_output=True, text=True, timeout=240
    )


def test_a_run_over_the_hub_is_pinned_published_and_loadable(hub: HubServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, push=True, namespace="org", private=False, license="apache-2.0")
    done = merit(hub, tmp_path, "run", str(config), "--output", "mixture")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "mixture/groups/0")
    tagged = hub.api("alice").repo_info("org/base", revision="v1").sha
    assert manifest["base"]["repo_id"] == "org/base"
    assert manifest["base"]["revision"] == tagged != hub.api("alice").repo_info("org/base").sha
    names = {f.rfilename for f in hub.api("alice").repo_info("org/mixture-plan", repo_type="dataset").siblings}
    assert {"plan.json", "data/datasets.parquet", "data/conflict.parquet", "README.md"} <= names
    assert "local.json" not in names
    merged = hub.api("bob").model_info("org/mixture-merged")
    assert {f"base_model:merge:org/mixture-group-{k}" for k in (0, 1)} <= set(merged.tags)
    assert "license:apache-2.0" in merged.tags
    assert {"dataset:org/copy", "dataset:org/count"} <= set(merged.tags)

    # A stranger trains a group from the Hub alone, and gets the same identity.
    other = tmp_path / "elsewhere"
    other.mkdir()
    trained = merit(hub, other, "train", "org/mixture-plan", "--group", "0", "--output", "mine", user="bob")
    assert trained.returncode == 0, trained.stderr
    assert read_manifest(other / "mine")["group_sha256"] == manifest["group_sha256"]
    assert read_manifest(other / "mine")["plan"]["repo_id"] == "org/mixture-plan"
    verified = merit(hub, other, "verify", "org/mixture-plan", "mine", "org/mixture-group-1", user="bob")
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.slow
def test_private_is_the_default(hub: HubServer, tmp_path: Path) -> None:
    config = write_config(tmp_path, push=True, license="mit")
    done = merit(hub, tmp_path, "run", str(config), "--output", "hidden")
    assert done.returncode == 0, done.stderr
    assert hub.api("alice").model_info("alice/hidden-merged").private is True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("base.model_name_or_path=org/absent", ("org/absent", "HTTP 404")),
        ("base.revision=v9", ("org/base", "v9")),
        ("datasets.copy.path=org/absent", ("copy", "org/absent")),
        ("datasets.copy.prompt=question", ("copy", "question", "Found: prompt, completion")),
    ],
)
def test_what_is_not_there_is_one_line(hub: HubServer, tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    done = merit(hub, tmp_path, "plan", str(write_config(tmp_path)), override, "--output", "plan")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("merit: error:")]
    assert all(word in line for word in words), line
    assert "Traceback" not in done.stderr


def test_a_busy_hub_delays_a_push(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from merit_hf.hub_write import folder_files, push_files; "
        "print(push_files(folder_files(Path(sys.argv[1])), 'org/busy', 'dataset', True, 'x'))"
    )
    (tmp_path / "a.txt").write_text("a")
    hub.fail("status", "/commit/", "POST", status=429, retry_after=1)
    done = hub.run(code, str(tmp_path))
    hub.heal()
    assert done.returncode == 0, done.stderr
    assert hub.api("alice").repo_info("org/busy", repo_type="dataset").private is True


@pytest.mark.slow
def test_a_lora_group_is_contributed_and_merged(hub: HubServer, tmp_path: Path) -> None:
    """An adapter is verified from its headers, then by its weights and its behaviour, like a whole checkpoint."""
    config = yaml.safe_load(write_config(tmp_path).read_text())
    config["peft"] = {"r": 4, "target_modules": "all-linear"}
    config["sft"] |= {"learning_rate": 5e-3, "num_train_epochs": 8}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments: str, user: str = "alice", code: int = 0) -> str:
        done = merit(hub, tmp_path, *arguments, user=user)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("plan", "mixture.yaml", "--output", "lora/plan")
    run("push", "lora/plan", "org/lora")
    for number, user in ((0, "alice"), (1, "bob")):
        run("train", "org/lora", "--group", str(number), "--output", f"lora-{number}", user=user)
        run("push", f"lora-{number}", f"{user}/lora-{number}", user=user)
        run("contribute", "org/lora", f"{user}/lora-{number}", user=user)
    assert "2 pull requests decided" in run("accept", "org/lora")
    assert '"verified": "behaviour"' in run("status", "org/lora", "--json")
    run("merge", "org/lora", "--output", "lora-merged")
    run("push", "lora-merged", "org/lora-merged", "--license", "mit")
    recipe = hub.api("bob").hf_hub_download("org/lora-merged", "mergekit_config.yml", cache_dir=tmp_path / "cache")
    assert "bob/lora-1" in Path(recipe).read_text()

    # Another rank under the same manifest is refused before its weights are read.
    other = tmp_path / "lora-1/adapter_config.json"
    other.write_text(other.read_text().replace('"r": 4', '"r": 8'))
    manifest = read_manifest(tmp_path / "lora-1")
    write_manifest(tmp_path / "lora-1", {**manifest, "files": hash_files(tmp_path / "lora-1")})
    run("push", "lora-1", "bob/lora-1", user="bob")
    said = run("verify", "org/lora", "bob/lora-1", "--level", "manifest", code=1)
    assert "FAILED bob/lora-1: adapter settings" in said

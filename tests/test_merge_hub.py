"""Merging straight from the Hub: ids in place of folders, every shard fetched once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer
from test_group_merge import finish_group, make_plan
from tiny import make_base
from transformers import AutoModelForCausalLM

from merit_hf.checkpoint import weights_sha256
from merit_hf.config import MeritConfig
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import read_manifest

UPLOAD = (
    "import sys; from huggingface_hub import HfApi; "
    "HfApi().upload_folder(folder_path=sys.argv[1], repo_id=sys.argv[2])"
)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def sharded(folder: Path, seed: int, size: str) -> Path:
    """A base as on the Hub, in shards of `size`."""
    make_base(folder, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


HEADER = "bytes=0-100000"


@pytest.mark.slow
def test_every_shard_is_fetched_once(hub: HubServer, tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", 9, "15KB")
    plan = make_plan(base)
    content = {"base": {"model_name_or_path": "org/base"}, "datasets": [{"name": n, "path": "x"} for n in plan.names]}
    plan.config = MeritConfig.from_dict({**content, "plan": {"num_groups": 3}}).model_dump(mode="json")
    # Differently sharded, one of them in a single file.
    groups = [sharded(tmp_path / "0", 0, "20KB"), make_base(tmp_path / "1", 1), sharded(tmp_path / "2", 2, "30KB")]
    for number, folder in enumerate(groups):
        finish_group(plan, folder, number)
    api = hub.api("alice")
    for name, folder in (("base", base), *((f"group-{k}", folder) for k, folder in enumerate(groups))):
        api.create_repo(f"org/{name}")
        subprocess.run(
            [sys.executable, "-c", UPLOAD, str(folder), f"org/{name}"], env=hub.environ("alice"), check=True
        )
    # The same weights once more, in a layout that nothing here reads.
    api.upload_file(path_or_fileobj=b"x" * 5000, path_in_repo="consolidated.safetensors", repo_id="org/base")
    sha = api.repo_info("org/base").sha
    at_hub = replace(plan, local={}, base={**plan.base, "revision": sha, "repo_id": "org/base"})
    at_hub.save_pretrained(tmp_path / "plan")
    hub.exchanges.clear()
    ids = [f"org/group-{k}" for k in range(3)]
    command = [sys.executable, "-m", "merit_hf.cli", "merge", "plan", *ids, "--output", "out"]
    command += ["--weights", "tokens", "--weights", "uniform"]
    done = subprocess.run(command, cwd=tmp_path, env=hub.environ("bob"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    shards = [path for folder in (base, *groups) for path in folder.glob("*.safetensors")]
    size = {hashlib.sha256(path.read_bytes()).hexdigest(): path.stat().st_size for path in shards}
    # Before a checkpoint is downloaded, its headers are: by ranges.
    got = [e for e in hub.exchanges if e.method == "GET" and e.path.startswith("/lfs/") and e.range != HEADER]
    assert Counter(e.path.removeprefix("/lfs/") for e in got) == dict.fromkeys(size, 1)
    assert sum(e.num_bytes for e in got) == sum(size.values())
    for name in ("tokens", "uniform"):
        merge_groups(plan, groups, tmp_path / "local" / name, weights=name)
        assert weights_sha256(tmp_path / "out" / name) == weights_sha256(tmp_path / "local" / name)
    merged = read_manifest(tmp_path / "out/tokens")
    assert [group["repo_id"] for group in merged["groups"]] == ids
    recipe = yaml.safe_load((tmp_path / "out/tokens/mergekit_config.yml").read_text())
    assert [m["model"] for m in recipe["models"]] == [f"{i}@{api.repo_info(i).sha}" for i in ids]

"""What a merge leaves behind: memory, the output folder, and a recipe with which mergekit makes the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from merging import (
    WEIGHTS,
    assert_nearest,
    load,
    make_family,
    make_folder,
    mean64,
    needs_mergekit,
    run_mergekit,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from merit_hf.align import align
from merit_hf.average import Average
from merit_hf.checkpoint import read_tensor_index, side_files
from merit_hf.config import ConfigError, MeritError
from merit_hf.merge import MERGEKIT_CONFIG_NAME, merge_checkpoints, model_reference


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Path]]]:
    return make_family(tmp_path_factory.mktemp("family"))


# Threads and memory


def test_any_number_of_threads_or_processes_gives_the_same_bytes_and_distances(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"empty": (0, 3), "large": (700, 1001), "matrix": (300, 500), "scalar": (), "vector": (17,)}
    folders = [
        make_folder(tmp_path / str(k), {n: torch.randn(s, generator=generator) for n, s in shapes.items()})
        for k in range(4)
    ]
    found = []
    for workers, processes in ((1, False), (2, False), (5, False), (1, True), (2, True), (5, True)):
        base, *groups = align(folders[0], folders[1:])
        average = Average(base, groups, [0.5, 0.3, 0.2], workers=workers, processes=processes)
        digest = hashlib.sha256()
        for name, pieces in average.stream(dict.fromkeys(shapes, "BF16")):
            digest.update(name.encode())
            for piece in pieces:
                digest.update(piece)
        found.append((digest.hexdigest(), average.squares, average.group_squares))
    assert all(other == found[0] for other in found)
    merge_checkpoints(folders[0], folders[1:], [5, 3, 2], tmp_path / "out", out_dtype="bfloat16")
    exact = mean64(folders[1:], [5, 3, 2])
    for name, tensor in load(tmp_path / "out").items():
        assert_nearest(tensor, exact[name])


MEMORY = """
import sys, threading, time
from pathlib import Path
from merit_hf.merge import merge_checkpoints
def anonymous():
    children = Path("/proc/self/task").glob("*/children")
    found = 0
    for pid in ["self", *(pid for path in children for pid in path.read_text().split())]:
        try:
            found += int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) / 1000
        except (OSError, IndexError):
            pass
    return found
before, highest, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        highest[0] = max(highest[0], anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
merge_checkpoints(sys.argv[1], sys.argv[2:-1], [1] * len(sys.argv[2:-1]), sys.argv[-1])
done.set()
watcher.join()
sys.stdout.write(str(highest[0] - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_a_few_blocks_and_not_a_tensor(tmp_path: Path) -> None:
    """What the merge allocates stays far below one tensor of 120 MB, let alone K of them."""
    base, *groups = [make_folder(tmp_path / str(k), {"x": torch.full((30_000_000,), 1.0 + k)}) for k in range(3)]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(base), *map(str, groups), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 80
    assert load(tmp_path / "out")["x"].unique().tolist() == [2.5]


# The output folder


def test_side_files_are_complete_and_the_model_works(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.bfloat16)
    base = Path(shutil.copytree(base, tmp_path / "base"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (base / name).write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("tools")
    (base / "README.md").write_text("the base's card")
    seen: list[tuple[int, int]] = []
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    copied = {path.relative_to(base): path.read_bytes() for path in side_files(base)}
    assert len(copied) >= 8
    assert {path.relative_to(tmp_path / "out"): path.read_bytes() for path in side_files(tmp_path / "out")} == copied
    extra = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in base.iterdir()}
    assert extra == {MERGEKIT_CONFIG_NAME}
    assert not (tmp_path / "out/README.md").exists()
    total = len(read_tensor_index(base))
    assert seen == [(done, total) for done in range(1, total + 1)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    batch = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**batch).logits).all()


def test_nested_dtypes_in_config_follow_out_dtype(tmp_path: Path) -> None:
    nested = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 2}, "vision_config": None}
    base = make_folder(tmp_path / "base", {"x": torch.ones(2).bfloat16()}, **nested)
    merge_checkpoints(base, [base], [1], tmp_path / "out", out_dtype="float32")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["text_config"] == {"dtype": "float32", "hidden_size": 2}
    assert config["vision_config"] is None
    assert "dtype" not in config


def test_finished_output_is_not_overwritten(family: Callable, tmp_path: Path) -> None:
    base, groups = family()
    merge_checkpoints(base, groups, [1, 1, 1], tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(
        ConfigError, match=r"out: exists already and is not overwritten\. Remove it, or choose another"
    ):
        merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


KILLED = """
import os, signal, sys
from merit_hf.merge import merge_checkpoints
base, first, second, output, at = sys.argv[1:]
def progress(done, total):
    if done == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
merge_checkpoints(base, [first, second], [1, 2], output, max_shard_size="20KB", progress=progress)
"""


@pytest.mark.parametrize("at", [1, 11, -1])
def test_killed_merge_leaves_nothing_and_runs_again(family: Callable, at: int, tmp_path: Path) -> None:
    base, groups = family()
    at = len(read_tensor_index(base)) if at == -1 else at
    arguments = [str(base), str(groups[0]), str(groups[1])]
    root = str(Path(__file__).parents[1])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, str(tmp_path / "out"), str(at)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.part").glob("*.safetensors"))
    (tmp_path / "out.part/model-00001-of-00099.safetensors").write_bytes(b"left by a larger model")
    for name in ("out", "undisturbed"):
        merge_checkpoints(base, groups[:2], [1, 2], tmp_path / name, max_shard_size="20KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    assert not (tmp_path / "out.part").exists()


# mergekit


def test_emitted_config_fixes_what_mergekit_leaves_open(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.bfloat16)
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "out")
    config = yaml.safe_load((tmp_path / "out" / MERGEKIT_CONFIG_NAME).read_text())
    assert config == {
        "merge_method": "linear",
        "models": [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip(groups, [w / sum(WEIGHTS) for w in WEIGHTS], strict=True)
        ],
        "base_model": str(groups[0]),
        "parameters": {"normalize": True},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    assert all(Path(model["model"]).is_absolute() for model in config["models"])


def test_hub_snapshots_are_named_by_commit() -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    assert model_reference(Path(f"/cache/hub/models--some-org--name-1/snapshots/{sha}")) == f"some-org/name-1@{sha}"
    assert model_reference(Path("/runs/groups/0")) == "/runs/groups/0"


@needs_mergekit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_mergekit_on_the_emitted_config_agrees(
    family: Callable, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    base, groups = family(dtype, tie_word_embeddings=tied)
    awkward = Path(shutil.copytree(groups[0], tmp_path / "lr+2@low rate"))
    groups = [awkward, *groups[1:]]
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "ours")
    theirs = run_mergekit(tmp_path / "ours" / MERGEKIT_CONFIG_NAME, tmp_path / "theirs")
    ours, exact = load(tmp_path / "ours"), mean64(groups, WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == dtype
        # One rounding of the output, after mergekit's sum in float32.
        size = torch.finfo(dtype).eps * exact[name].abs() + torch.finfo(torch.float32).eps * exact[name].abs().max()
        assert bool(((tensor.double() - theirs[name].double()).abs() <= size).all())


@needs_mergekit
def test_mergekit_engine_gives_a_complete_folder(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.bfloat16)
    base = Path(shutil.copytree(base, tmp_path / "base"))
    (base / "processor_config.json").write_text("{}")
    ours = merge_checkpoints(base, groups, WEIGHTS, tmp_path / "ours")
    theirs = merge_checkpoints(base, groups, WEIGHTS, tmp_path / "theirs", engine="mergekit")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in (tmp_path / "theirs").iterdir()
    }
    for path in side_files(base):
        assert (tmp_path / "theirs" / path.name).read_bytes() == path.read_bytes()
    assert theirs.displacement == pytest.approx(ours.displacement, rel=1e-7)
    assert theirs.cast_loss == pytest.approx(ours.cast_loss, rel=1e-3)
    ours_tensors, theirs_tensors = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert all(torch.allclose(ours_tensors[n], theirs_tensors[n], rtol=2**-7, atol=1e-6) for n in ours_tensors)


@needs_mergekit
def test_architecture_that_mergekit_would_mutilate(family: Callable, tmp_path: Path) -> None:
    base, groups = family(torch.float32, attention_bias=True, mlp_bias=True)
    total = len(read_tensor_index(base))
    with pytest.raises(
        MeritError, match=f"mergekit would lose 14 of {total} tensors: model.layers.0.mlp.down_proj.bias, "
    ):
        merge_checkpoints(base, groups, WEIGHTS, tmp_path / "theirs", engine="mergekit")
    assert not any(tmp_path.iterdir())
    merge_checkpoints(base, groups, WEIGHTS, tmp_path / "ours")
    merged, exact = load(tmp_path / "ours"), mean64(groups, WEIGHTS)
    assert len(merged) == total
    for name, tensor in merged.items():
        assert_nearest(tensor, exact[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").model.layers[0].mlp.down_proj.bias is not None

"""Checkpoint folders: headers, hashes, side files, the streaming writer, folders that are finished or not there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_base
from transformers import AutoModelForCausalLM

from merit_hf.checkpoint import (
    ShardWriter,
    TensorInfo,
    atomic_folder,
    read_tensor_index,
    side_files,
    weights_sha256,
)
from merit_hf.config import ConfigError, MeritError


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("checkpoint") / "single")


@pytest.fixture(scope="module")
def sharded(single: Path) -> Path:
    folder = single.with_name("sharded")
    AutoModelForCausalLM.from_pretrained(single, dtype="auto").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint to damage."""
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_index_reads_what_the_files_hold(single: Path, sharded: Path) -> None:
    index = read_tensor_index(single)
    with safe_open(single / "model.safetensors", framework="pt") as file:
        assert list(index) == sorted(file.keys())
        for name, info in index.items():
            tensor = file.get_tensor(name)
            assert (info.dtype, info.shape) == ("BF16", tuple(tensor.shape))
            raw = (single / info.file).read_bytes()[info.start : info.end]
            assert raw == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    other = read_tensor_index(sharded)
    assert {n: (i.dtype, i.shape) for n, i in other.items()} == {n: (i.dtype, i.shape) for n, i in index.items()}
    assert {info.file for info in other.values()} == {path.name for path in shards(sharded)}


def test_weights_sha256_ignores_sharding_and_order(single: Path, sharded: Path, tmp_path: Path) -> None:
    reordered = tmp_path / "reordered"
    reordered.mkdir()
    tensors = load_file(single / "model.safetensors")
    writer_order = {name: tensors[name] for name in sorted(tensors, reverse=True)}
    save_file(writer_order, reordered / "model.safetensors", {"format": "pt", "note": "other header"})
    assert weights_sha256(single) == weights_sha256(sharded) == weights_sha256(reordered)


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_weights_sha256_sees_every_part(change: str, tmp_path: Path) -> None:
    first = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    changed = {
        "value": {**first, "b": torch.tensor([1, 1, 1, -1.0])},
        "name": {"a": first["a"], "c": first["b"]},
        "dtype": {**first, "a": torch.zeros(2, 3, dtype=torch.int32)},
        "shape": {**first, "a": torch.zeros(3, 2)},
    }[change]
    hashes = []
    for number, tensors in enumerate((first, changed)):
        (tmp_path / str(number)).mkdir()
        save_file(tensors, tmp_path / str(number) / "model.safetensors")
        hashes.append(weights_sha256(tmp_path / str(number)))
    assert hashes[0] != hashes[1]


def test_missing_shard_is_named(broken: Path) -> None:
    lost, total = shards(broken)[1], len(shards(broken))
    lost.unlink()
    with pytest.raises(MeritError, match=f"1 of {total} shards missing, first {lost.name}"):
        read_tensor_index(broken)


def test_tensor_in_two_shards_is_named(broken: Path) -> None:
    first, second = shards(broken)[:2]
    tensors, extra = load_file(second), load_file(first)
    name = sorted(extra)[0]
    save_file({**tensors, name: extra[name]}, second)
    with pytest.raises(MeritError, match=f"`{re.escape(name)}` is in both {first.name} and {second.name}"):
        read_tensor_index(broken)


@pytest.mark.parametrize("where", ["index", "shard"])
def test_index_that_disagrees_is_refused(broken: Path, where: str) -> None:
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if where == "index":
        index["weight_map"]["ghost.weight"] = shards(broken)[0].name
        expected = f"puts tensor `ghost.weight` in {shards(broken)[0].name}, and it is in no shard"
    else:
        name = "model.norm.weight"
        at = index["weight_map"].pop(name)
        assert at in index["weight_map"].values()
        expected = f"puts tensor `{name}` in no shard, and it is in {at}"
    path.write_text(json.dumps(index))
    with pytest.raises(MeritError, match=re.escape(expected)):
        read_tensor_index(broken)


def test_truncated_shard_is_refused(broken: Path) -> None:
    path = shards(broken)[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MeritError, match=f"{path.name}: not a complete safetensors file"):
        read_tensor_index(broken)


def test_header_whose_shape_contradicts_its_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3)}, path)
    path.write_bytes(path.read_bytes().replace(b"[2,3]", b"[2,2]"))
    with pytest.raises(MeritError, match="not a complete safetensors file"):
        read_tensor_index(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "weights only as pickle \\(pytorch_model.bin\\).*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin"], "weights only as pickle"),
        (["adapter_model.safetensors"], "PEFT adapter.*merge_and_unload"),
        (["model-00001-of-00002.safetensors"], "shards .* but no model.safetensors.index.json"),
        (["model.safetensors", "model.safetensors.index.json"], "ambiguous. Remove the stale one"),
        (["config.json"], "no model.safetensors and no model.safetensors.index.json"),
    ],
)
def test_folders_without_usable_weights(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(MeritError, match=message):
        read_tensor_index(tmp_path)


def test_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(MeritError, match="no such folder"):
        read_tensor_index(tmp_path / "nowhere")


def test_side_files_are_what_the_weights_need(tmp_path: Path) -> None:
    wanted = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja", "processor_config.json",
        "preprocessor_config.json", "video_preprocessor_config.json", "modeling_custom.py", "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    unwanted = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt",
        "trainer_state.json", "README.md", "merit.json", "mergekit_config.yml", ".gitattributes", "tf_model.h5",
        "model.gguf", "checkpoint-10/config.json", "onnx/model.onnx",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in side_files(tmp_path)] == sorted(wanted)


MIXED = {
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "wide": torch.randn(2, 2, dtype=torch.float64),
    "byte": torch.arange(5, dtype=torch.uint8),
    "single": torch.randn(11),
}
NAMES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int64: "I64", torch.float32: "F32",
    torch.float64: "F64", torch.uint8: "U8",
}  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int | str = "5GB") -> None:
    infos = {name: TensorInfo(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(folder, infos, max_shard_size) as writer:
        for name in writer.names:
            raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            writer.write(name, [raw[:3], raw[3:]])


@pytest.mark.parametrize("max_shard_size", ["5GB", 48])
def test_writer_round_trip(tmp_path: Path, max_shard_size: int | str) -> None:
    write(tmp_path, MIXED, max_shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    index_path = tmp_path / "model.safetensors.index.json"
    assert index_path.exists() == (len(files) > 1) == (max_shard_size == 48)
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
    else:
        index = json.loads(index_path.read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in MIXED.values())
        assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    loaded = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert loaded.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    for info in read_tensor_index(tmp_path).values():
        assert info.start % {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(info.dtype, 1) == 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_writer_refuses_wrong_use(tmp_path: Path) -> None:
    infos = {"a": TensorInfo("F32", (2,)), "b": TensorInfo("F32", (2,))}
    with pytest.raises(ValueError, match="`b` is out of turn"), ShardWriter(tmp_path, infos) as writer:
        writer.write("b", [bytes(8)])
    with pytest.raises(ValueError, match="`a`: 7 bytes given, 8 expected"), ShardWriter(tmp_path, infos) as writer:
        writer.write("a", [bytes(7)])
    with pytest.raises(ValueError, match="1 tensors were not written"), ShardWriter(tmp_path, infos) as writer:
        writer.write("a", [bytes(8)])


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "out"
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "stale").touch()

    def fail_midway() -> None:
        with atomic_folder(output) as folder:
            assert not (folder / "stale").exists()
            (folder / "a").touch()
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert not output.exists()
    assert not part.exists()
    output.mkdir()
    with atomic_folder(output) as folder:
        (folder / "a").write_text("done")
        assert not any(output.iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    with pytest.raises(ConfigError, match="exists already and is not overwritten"), atomic_folder(output):
        pass
    assert (output / "a").read_text() == "done"

"""Files of a transformers checkpoint in a folder: what its tensors are, what lies beside them, how to write them.

    index = read_tensor_index(folder)          # headers only: name → dtype, shape, file, byte range
    with atomic_folder(output) as part:        # output.part, renamed when the block ends well
        with ShardWriter(part, index) as writer:
            for name in writer.names:
                writer.write(name, pieces(name))

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from huggingface_hub.serialization import split_state_dict_into_shards_factory

from merit_hf.errors import ConfigError, MeritError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_NOT_SIDE_SUFFIXES = _PICKLES | {".safetensors", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".part"}
# What a training or a publication leaves beside a model and the next model must not inherit.
_NOT_SIDE_NAMES = {
    "README.md", "merit.json", "mergekit_config.yml", "latest", "zero_to_fp32.py", "trainer_state.json",
    "trainer_config.json", "all_results.json", "train_results.json", "eval_results.json", "adapter_config.json",
}  # fmt: skip
# transformers keeps a tokenizer's further chat templates in this folder.
SIDE_FOLDERS = ("additional_chat_templates",)
_READ_BYTES = 1 << 22
_FLUSH_BYTES = 1 << 25


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor.

    Args:
        dtype (`str`): safetensors' name: `"F32"`, `"BF16"`, …
        shape (`tuple[int, ...]`): dimensions.
        file (`str`): name of the file in the checkpoint's folder.
        start, end (`int`): byte range in that file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = SINGLE_NAME
    start: int = 0
    end: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_SIZES[self.dtype]


def tensor_info(dtype: object, shape: Sequence[object], file: str, start: object, end: object) -> TensorInfo:
    """What a header says about a tensor. Raises TypeError where it is not what a header can say."""
    sizes = (*shape, start, end)
    if not isinstance(dtype, str) or any(type(size) is not int or size < 0 for size in sizes):
        raise TypeError("no dtype, shape and byte range")
    return TensorInfo(dtype, tuple(shape), file, start, end)  # type: ignore[arg-type]


def read_tensor_index(folder: Path, file: str | None = None) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint, sorted by name; reads headers only, of one file or of all shards.

    Args:
        file: read just this file, such as an adapter's.

    Raises:
        MeritError: no safetensors weights (pickles or an adapter only), a shard is missing or truncated, a tensor is
            in two shards, or shards and index disagree.
    """
    folder = Path(folder)
    mapped = _index_of_shards(folder) if file is None else None
    files = sorted(set(mapped.values())) if mapped is not None else [file or SINGLE_NAME]
    tensors: dict[str, TensorInfo] = {}
    for shard in files:
        for name, info in read_header(folder / shard).items():
            if name in tensors:
                raise MeritError(
                    f"{folder}: tensor `{name}` is in both {tensors[name].file} and {shard}, and must be in one "
                    "shard. Save the model again."
                )
            tensors[name] = info
    found = {name: info.file for name, info in tensors.items()}
    wrong = sorted(dict(found.items() ^ mapped.items())) if mapped is not None else []
    if mapped is not None and wrong:
        raise MeritError(
            f"{folder}: {INDEX_NAME} puts tensor `{wrong[0]}` in {mapped.get(wrong[0], 'no shard')}, and it is in "
            f"{found.get(wrong[0], 'no shard')}. Download or save the model again."
        )
    return dict(sorted(tensors.items()))


def weights_sha256(folder: Path, file: str | None = None) -> str:
    """Hash over the sorted (name, dtype, shape, bytes) of all tensors: independent of sharding and of file order.

    With `file`, of those in that file of the folder, such as an adapter's.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with contextlib.ExitStack() as stack:
        opened: dict[str, BinaryIO] = {}
        for name, info in read_tensor_index(folder, file).items():
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            if info.file not in opened:
                opened[info.file] = stack.enter_context((Path(folder) / info.file).open("rb", buffering=0))
            stream, left = opened[info.file], info.end - info.start
            stream.seek(info.start)
            while left:
                count = stream.readinto(buffer[: min(left, _READ_BYTES)])  # type: ignore[attr-defined]
                digest.update(buffer[:count])
                left -= count
    return digest.hexdigest()


def side_files(folder: Path) -> list[Path]:
    """What makes the weights usable: configs, tokenizer, chat templates, processors, custom code, licence.

    Weights in any format, trainer state, cards and `merit.json` are left out. Paths include `folder`, sorted.
    """
    folder = Path(folder)
    found = [
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _NOT_SIDE_NAMES
        and path.suffix not in _NOT_SIDE_SUFFIXES
        and not path.name.endswith(".index.json")
    ]
    for name in SIDE_FOLDERS:
        found += [path for path in (folder / name).rglob("*") if path.is_file()]
    return sorted(found)


def read_model_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        MeritError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MeritError(f"{folder}: no config.json. Give the folder of a transformers checkpoint.") from None
    except ValueError as error:
        raise MeritError(f"{path}: not valid JSON: {error}. Download or save the model again.") from None
    if not isinstance(config, dict):
        raise MeritError(f"{path}: expected a JSON object, found a {type(config).__name__}. Save the model again.")
    return config


def repo_of_snapshot(folder: Path) -> tuple[str, str] | None:
    """(repo, commit) of a snapshot folder in the Hub's cache; None of any other folder."""
    found = re.fullmatch(r".*/models--(.+)/snapshots/([0-9a-f]{40})", folder.as_posix())
    return (found[1].replace("--", "/"), found[2]) if found else None


def check_output_folder(output: Path) -> None:
    """Raises ConfigError where `output`, or what it would lie in, is a file."""
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"{there}: is a file, where a folder is needed. Choose another --output.")


def check_new_folder(output: Path) -> None:
    """Raises ConfigError where a folder cannot be made, or holds something."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output}: exists already and is not overwritten. Remove it, or choose another output.")
    check_output_folder(output)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yields `output.part`; it becomes `output`, flushed to disk, where the block ends well, else it is removed.

    A `.part` left by a killed run is removed first, so that a finished folder is a complete one.

    Raises:
        ConfigError: `output` exists already.
    """
    check_new_folder(output)
    part = output.with_name(output.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            _fsync(path)
        part.rename(output)
        _fsync(output.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class ShardWriter:
    """Writes safetensors shards tensor after tensor, in `names` order, holding no more than a piece of one.

    One `model.safetensors` where all fits in `max_shard_size`, else `model-0000i-of-0000n.safetensors` and the index.

    Args:
        folder (`Path`): where the shards go.
        tensors (`Mapping[str, TensorInfo]`): dtype and shape of every tensor to come.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): in bytes.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: int | str = "5GB") -> None:
        self._folder, self._tensors = folder, tensors
        self._split = split_state_dict_into_shards_factory(
            {name: tensors[name] for name in sorted(tensors)},
            get_storage_size=lambda info: info.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        # Widest dtype first keeps every tensor aligned, as safetensors' own writer does.
        self._shards = {
            file: sorted(names, key=lambda name: (-ITEM_SIZES[tensors[name].dtype], name))
            for file, names in self._split.filename_to_tensors.items()
        }
        self.names = [name for names in self._shards.values() for name in names]
        self._written = 0
        self._file: BinaryIO | None = None
        self._unflushed = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Append tensor `name`, given as consecutive pieces of its row-major little-endian bytes.

        Raises:
            ValueError: not the next of `names`, or the bytes are more or fewer than its shape needs.
        """
        if self._written == len(self.names) or name != self.names[self._written]:
            raise ValueError(f"tensor `{name}` is out of turn: tensors are written in the order of `names`.")
        shard = self._split.tensor_to_filename[name]
        if self._shards[shard][0] == name:
            self._begin(shard)
        assert self._file is not None
        size = 0
        for piece in pieces:
            size += self._file.write(piece)
            self._flush_behind(len(piece))
        if size != self._tensors[name].num_bytes:
            raise ValueError(f"tensor `{name}`: {size} bytes given, {self._tensors[name].num_bytes} expected.")
        self._written += 1

    def _begin(self, shard: str) -> None:
        self._close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self._shards[shard]:
            info = self._tensors[name]
            start, end = end, end + info.num_bytes
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self._folder / shard).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _flush_behind(self, count: int) -> None:
        """Let the disk write while more is computed; else all of it waits for the end."""
        assert self._file is not None
        self._unflushed += count
        if self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._await_flush()
            self._unflushed = 0
            self._flush = self._flusher.submit(os.fsync, self._file.fileno())

    def _await_flush(self) -> None:
        if self._flush is not None:
            self._flush.result()
            self._flush = None

    def _close(self) -> None:
        if self._file is not None:
            try:
                self._await_flush()
            finally:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with self._flusher:
            self._close()
        if kind is not None:
            return
        if self._written != len(self.names):
            raise ValueError(f"{len(self.names) - self._written} tensors were not written.")
        if len(self._shards) > 1:
            placed = dict(sorted(self._split.tensor_to_filename.items()))
            index = {"metadata": self._split.metadata, "weight_map": placed}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _index_of_shards(folder: Path) -> dict[str, str] | None:
    """The index's map of tensor to shard, every shard being there; None where the weights are a single file."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file() and index.is_file():
        raise MeritError(
            f"{folder}: holds both {SINGLE_NAME} and {INDEX_NAME}, so its weights are ambiguous. Remove the stale one."
        )
    if single.is_file():
        return None
    if not index.is_file():
        raise MeritError(_explain_no_weights(folder))
    try:
        mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in mapped.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MeritError(f"{index}: no readable `weight_map`. Download or save the model again.") from None
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise MeritError(
            f"{folder}: {len(missing)} of {len(files)} shards missing, first {missing[0]}. Download the model again."
        )
    return dict(mapped)


def _explain_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder. Give the folder of a transformers checkpoint."
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "adapter_model.safetensors" in names:
        return f"{folder}: holds a PEFT adapter, not a whole model. Merge it into its base first (`merge_and_unload`)."
    shards = [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]
    if shards:
        return f"{folder}: holds shards ({shards[0]}) but no {INDEX_NAME}. Download or save the model again."
    pickles = [name for name in names if name.startswith("pytorch_model") and Path(name).suffix in _PICKLES]
    if pickles:
        return (
            f"{folder}: weights only as pickle ({pickles[0]}), which can run code when it is read. Convert them to "
            "safetensors with `save_pretrained`."
        )
    return f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}. Give the folder of a checkpoint in safetensors."


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; MeritError where it is not complete."""
    size = path.stat().st_size
    broken = f"{path}: not a complete safetensors file ({size} bytes). Download or save the model again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise MeritError(broken)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                tensors[name] = tensor_info(entry["dtype"], entry["shape"], path.name, start, end)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise MeritError(broken) from None
    for info in tensors.values():
        known = info.dtype in ITEM_SIZES
        if not info.start <= info.end <= size or (known and info.end - info.start != info.num_bytes):
            raise MeritError(broken)
    return tensors


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not flush folders.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

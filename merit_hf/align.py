"""Checkpoints of one base, opened and held against each other tensor by tensor, by their headers.

    base, *groups = align(base_folder, group_folders)

By state-dict names alone: nothing here knows an architecture.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from merit_hf.adapters import is_adapter
from merit_hf.checkpoint import ITEM_SIZES, TensorInfo, read_model_config, read_tensor_index
from merit_hf.errors import MeritError
from merit_hf.sums import ARRAYS

if TYPE_CHECKING:
    import torch

# safetensors' names of floating dtypes, and everybody else's.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXACT = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


class Checkpoint:
    """Tensors of a folder, mapped from disk and opened on first use.

    Attributes:
        folder (`Path`): where it lies.
        tensors (`dict[str, TensorInfo]`): what takes part in the merge.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.tensors = read_tensor_index(self.folder)
        self._files: dict[str, Any] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._descriptors: dict[str, BinaryIO] = {}

    def stored(self, name: str) -> np.ndarray:
        """Tensor `name` as [num_elements], read as its pages are touched; bfloat16 and integers as unsigned bits."""
        info = self.tensors[name]
        size = ITEM_SIZES[info.dtype]
        if not info.num_elements:
            return np.empty(0, ARRAYS.get(info.dtype, f"<u{size}"))
        if info.file not in self._maps:
            with (self.folder / info.file).open("rb") as file:
                self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        kind = ARRAYS.get(info.dtype, f"<u{size}")
        return np.frombuffer(self._maps[info.file], kind, info.num_elements, info.start)

    def flat(self, name: str) -> torch.Tensor:
        """The same as a tensor of its own dtype."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file].get_tensor(name).reshape(-1)

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        """Ask the system to have elements `start` to `stop` of tensor `name` in memory soon; returns at once."""
        if not hasattr(os, "posix_fadvise"):  # macOS reads ahead by its own lights
            return
        info = self.tensors[name]
        if info.file not in self._descriptors:
            self._descriptors[info.file] = (self.folder / info.file).open("rb", buffering=0)
        size = ITEM_SIZES[info.dtype]
        count = min(stop, info.num_elements) - start
        if count > 0:
            descriptor = self._descriptors[info.file].fileno()
            os.posix_fadvise(descriptor, info.start + start * size, count * size, os.POSIX_FADV_WILLNEED)


def align(base: Path, folders: Sequence[Path]) -> list[Checkpoint]:
    """Open base and groups (whole or LoRA adapters) after checking, by headers, that they hold the same tensors.

    A tied tensor (say `lm_head.weight`) that only some of them store is left out, as transformers does when it saves.

    Raises:
        MeritError: keys, shapes or kinds of dtype differ (the first three are named), or the weights are quantised.
    """
    origin = Checkpoint(base)
    # An adapter reads like the whole checkpoint that it makes of the base.
    adapted = {folder: _adapted(origin, folder) for folder in folders if is_adapter(folder)}
    checkpoints = [origin, *(adapted.get(folder) or Checkpoint(folder) for folder in folders)]
    for checkpoint in checkpoints:
        if checkpoint.folder not in adapted:
            _refuse_quantised(checkpoint)
    shared = set.intersection(*(set(checkpoint.tensors) for checkpoint in checkpoints))
    if any(len(checkpoint.tensors) > len(shared) for checkpoint in checkpoints) and _ties_embeddings(base):
        for checkpoint in checkpoints:
            for name in _aliases(checkpoint, shared):
                del checkpoint.tensors[name]
    for checkpoint in checkpoints[1:]:
        _compare(checkpoints[0], checkpoint)
    return checkpoints


def _adapted(origin: Checkpoint, folder: Path) -> Checkpoint:
    from merit_hf.adapted import AdaptedCheckpoint

    return cast(Checkpoint, AdaptedCheckpoint(origin, folder))


def _compare(base: Checkpoint, other: Checkpoint) -> None:
    theirs, ours = other.tensors, base.tensors
    wrong = {
        "lacks": sorted(ours.keys() - theirs.keys()),
        "has in addition": sorted(theirs.keys() - ours.keys()),
    }
    found = [f"{what} {_first(names)}" for what, names in wrong.items() if names]
    if found:
        raise MeritError(
            f"{other.folder}: not the tensors of the base {base.folder}: {'; '.join(found)}. "
            "Merge checkpoints that were trained from this base without adding or removing parts."
        )
    different = [name for name in ours if theirs[name].shape != ours[name].shape]
    if different:
        shapes = [_versus(name, theirs[name].shape, ours[name].shape) for name in different]
        raise MeritError(
            f"{other.folder}: other shapes than the base's: {_first(shapes)}. Merge checkpoints with the base's "
            "vocabulary and sizes."
        )
    unlike = [name for name in ours if not _compatible(theirs[name], ours[name])]
    if unlike:
        kinds = [_versus(name, theirs[name].dtype, ours[name].dtype) for name in unlike]
        raise MeritError(
            f"{other.folder}: dtypes that do not merge: {_first(kinds)}. Floating dtypes (F64, F32, F16, BF16) may "
            "differ; others must be the base's. Save the checkpoint unquantised."
        )


def _versus(name: str, theirs: object, ours: object) -> str:
    return f"{name} {theirs}, in the base {ours}"


def _compatible(theirs: TensorInfo, ours: TensorInfo) -> bool:
    return (theirs.dtype in FLOATS and ours.dtype in FLOATS) or (theirs.dtype in _EXACT and theirs.dtype == ours.dtype)


def _same_form(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


def _first(items: Sequence[str], count: int = 3) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    method = read_model_config(checkpoint.folder).get("quantization_config")
    if method is not None:
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise MeritError(
            f"{checkpoint.folder}: quantised weights ({kind}), which cannot be averaged. Give the unquantised model."
        )


def _ties_embeddings(folder: Path) -> bool:
    config = read_model_config(folder)
    for section in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in section:
            return bool(section["tie_word_embeddings"])
    # transformers leaves defaults out of config.json, and the default is the model class's.
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("model_type") not in CONFIG_MAPPING:
        return False
    return bool(getattr(AutoConfig.from_pretrained(folder).get_text_config(), "tie_word_embeddings", False))


def _aliases(checkpoint: Checkpoint, shared: set[str]) -> list[str]:
    """The matrices beyond `shared` that repeat, bit for bit, one that all checkpoints have."""
    found = []
    for name in sorted(checkpoint.tensors.keys() - shared):
        info = checkpoint.tensors[name]
        twins = [
            twin for twin in sorted(shared) if len(info.shape) == 2 and _same_form(info, checkpoint.tensors[twin])
        ]
        if any(np.array_equal(_bits(checkpoint, name), _bits(checkpoint, twin)) for twin in twins):
            found.append(name)
    return found


def _bits(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.stored(name).view(np.uint8)

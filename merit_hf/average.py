"""The weighted mean of checkpoints, θ̄ = Σ w_k θ_k, tensor by tensor: summed in float64, rounded once.

    base, *groups = align(base_folder, group_folders)
    average = Average(base, groups, fractions)
    for name in ...:
        writer.write(name, average.pieces(name, torch.bfloat16))

By state-dict names alone: nothing here knows an architecture. Files are mapped; memory is a piece of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from merit_hf.adapted import AdaptedCheckpoint
from merit_hf.adapters import is_adapter
from merit_hf.checkpoint import TensorInfo, read_model_config, read_tensor_index
from merit_hf.config import MeritError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXACT = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_PIECE = 1 << 17  # elements: 1 MB in float64 stays in the cache, which more than halves the time


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

    def flat(self, name: str) -> torch.Tensor:
        """Tensor `name` as [num_elements], read as its pages are touched."""
        file = self.tensors[name].file
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file].get_tensor(name).reshape(-1)


def align(base: Path, folders: Sequence[Path]) -> list[Checkpoint]:
    """Open base and groups (whole or LoRA adapters) after checking, by headers, that they hold the same tensors.

    A tied tensor (say `lm_head.weight`) that only some of them store is left out, as transformers does when it saves.

    Raises:
        MeritError: keys, shapes or kinds of dtype differ (the first three are named), or the weights are quantised.
    """
    origin = Checkpoint(base)
    # An adapter reads like the whole checkpoint that it makes of the base.
    adapted = {folder: AdaptedCheckpoint(origin, folder) for folder in folders if is_adapter(folder)}
    checkpoints = [origin, *(cast(Checkpoint, adapted.get(folder) or Checkpoint(folder)) for folder in folders)]
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


class Average:
    """Σ w_k θ_k over aligned checkpoints, and how far everything moved.

    Args:
        base ([`Checkpoint`]): θ0, what displacements are measured from.
        groups (`Sequence[Checkpoint]`): θ_k.
        fractions (`Sequence[float]`): w_k, positive, summing to 1.
        result ([`Checkpoint`], *optional*): a merged model whose values are written in place of the rounded mean.

    Attributes:
        squares (`dict[str, float]`), group_squares (`list[float]`): ‖θ̄ − θ0‖² and ‖written − θ̄‖²; ‖θ_k − θ0‖².
    """

    def __init__(
        self,
        base: Checkpoint,
        groups: Sequence[Checkpoint],
        fractions: Sequence[float],
        result: Checkpoint | None = None,
    ) -> None:
        self._base, self._groups, self._fractions, self._result = base, groups, fractions, result
        self.squares = {"displacement": 0.0, "cast": 0.0}
        self.group_squares = [0.0] * len(groups)

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
        """The bytes of merged tensor `name`, cast once to `dtype` where it is floating.

        Raises:
            MeritError: a checkpoint holds a non-finite value, the mean exceeds the range of `dtype`, or an integer or
                boolean tensor is not the base's.
        """
        origin = self._base.flat(name)
        tensors = [group.flat(name) for group in self._groups]
        result = None if self._result is None else self._result.flat(name)
        if not origin.is_floating_point():
            yield self._common(name, origin, tensors)
            return
        for start in range(0, origin.numel(), _PIECE):
            rows = slice(start, start + _PIECE)
            mean, finite = self._mean(origin[rows].to(torch.float64), [tensor[rows] for tensor in tensors])
            cast = round_once(mean, dtype) if result is None else result[rows].to(dtype)
            lost = _square(cast.to(torch.float64) - mean)
            self.squares["cast"] += lost
            if not (finite and math.isfinite(lost)):
                self._refuse_non_finite(name, start, cast)
            yield cast.view(torch.uint8).numpy().data

    def _mean(self, origin: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """The mean of a piece in float64; False where the squares show that something in it may not be finite."""
        mean = torch.empty_like(origin)
        moved = []
        for index, (part, fraction) in enumerate(zip(parts, self._fractions, strict=True)):
            part = part.to(torch.float64, copy=True)
            if index == 0:
                # Not 0 + w·x, which would turn −0 into 0: identical groups merge to their very bits.
                torch.mul(part, fraction, out=mean)
            else:
                mean.add_(part, alpha=fraction)
            moved.append(_square(part.sub_(origin)))
            self.group_squares[index] += moved[-1]
        moved.append(_square(mean - origin))
        self.squares["displacement"] += moved[-1]
        return mean, math.isfinite(sum(moved))

    def _common(self, name: str, origin: torch.Tensor, tensors: Sequence[torch.Tensor]) -> memoryview:
        for group, tensor in zip(self._groups, tensors, strict=True):
            if not torch.equal(_bits(origin), _bits(tensor)):
                raise MeritError(
                    f"{group.folder}: tensor `{name}` ({self._base.tensors[name].dtype}) differs from the base's, and "
                    "integers cannot be averaged. Every checkpoint must hold the base's values."
                )
        return _bits(origin).numpy().data

    def _refuse_non_finite(self, name: str, start: int, cast: torch.Tensor) -> None:
        rows = slice(start, start + _PIECE)
        for checkpoint in (self._base, *self._groups):
            bad = (~torch.isfinite(checkpoint.flat(name)[rows])).nonzero()
            if len(bad):
                raise MeritError(
                    f"{checkpoint.folder}: tensor `{name}` is not finite (NaN or infinity) at flat index "
                    f"{start + int(bad[0])}. Make it again (a lower learning rate helps), or merge without it."
                )
        if not bool(torch.isfinite(cast).all()):
            raise MeritError(
                f"tensor `{name}`: the merged values exceed the range of {dtype_name(cast.dtype)}. "
                "Set out_dtype to bfloat16 or float32."
            )


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to a narrower dtype, each value to the nearest one (ties to even).

    torch goes to 16 bits through float32, which rounds twice and is wrong near the middle of two neighbours. Making an
    inexact float32 odd in its last bit keeps it off that middle, so that only the second rounding counts.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.to(torch.float32)
    excess = single.to(torch.float64).abs_().sub_(values.abs()).sign_().to(torch.int32)
    bits = single.view(torch.int32)
    bits -= excess * (1 - (bits & 1))
    return single.to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _square(values: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values))
    return norm * norm


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
        if any(torch.equal(_bits(checkpoint.flat(name)), _bits(checkpoint.flat(twin))) for twin in twins):
            found.append(name)
    return found


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)

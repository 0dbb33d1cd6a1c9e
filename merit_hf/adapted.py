"""An adapter's factors, and base and adapter as the one checkpoint that they stand for.

weights = AdaptedCheckpoint(base, "runs/groups/0")      # W + s·B·A, slice by slice, nothing copied
b, a = Adapter("runs/groups/0").factors("model.layers.0.self_attn.q_proj")
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open

from merit_hf.adapters import ADAPTER_NAME, PREFIX, adapter_settings, read_adapter_index
from merit_hf.checkpoint import TensorInfo
from merit_hf.config import MeritError


class Adapter:
    """The low-rank factors of a LoRA adapter in a folder.

    Attributes:
        folder (`Path`): where it lies.
        settings (`dict`): see [`adapter_settings`].
        modules (`list[str]`): the adapted modules, by their names in the model.

    Raises:
        MeritError: it holds other tensors than a pair of A and B for every module.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = adapter_settings(folder)
        self._tensors = read_adapter_index(folder)
        names = {module_of(name) for name in self._tensors} - {None}
        self.modules = sorted(name for name in names if name is not None)
        pairs = {name for module in self.modules for name in factor_names(module)}
        wrong = [f"{name} is missing" for name in sorted(pairs - set(self._tensors))]
        wrong += [f"{name} is no factor of one" for name in sorted(set(self._tensors) - pairs)]
        if wrong or not pairs:
            raise MeritError(
                f"{self.folder}: not LoRA on linear layers alone: {wrong[0] if wrong else 'it is empty'}. Train "
                "without what else was adapted, or save it again."
            )
        self._file = safe_open(self.folder / ADAPTER_NAME, framework="pt")

    def rank(self, module: str) -> int:
        return self._tensors[factor_names(module)[0]].shape[0]

    def scaling(self, module: str) -> float:
        """s of W + s·B·A: alpha/r, or alpha/√r with `use_rslora`, by the module's own rank and alpha."""
        from peft.utils.other import get_pattern_key

        alphas = self.settings["alpha_pattern"]
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self.settings["lora_alpha"])
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.settings["use_rslora"] else alpha / rank

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(s·B [out, r], A [r, in]) of a module in float64, whose product is what the adapter adds to its weight."""
        a, b = (self._file.get_tensor(name).to(torch.float64) for name in factor_names(module))
        return b.mul_(self.scaling(module)), a


class Weights(Protocol):
    """What a merge reads: tensors by name, as [num_elements]."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def flat(self, name: str) -> torch.Tensor: ...

    def stored(self, name: str) -> np.ndarray: ...


class AdaptedCheckpoint:
    """A base and an adapter as the whole checkpoint that they stand for: W + s·B·A in float64, made when it is read.

    Args:
        base ([`Weights`]): the opened base.
        folder (`Path`): the adapter.

    Raises:
        MeritError: an adapted module is not in the base, or has another shape there.
    """

    def __init__(self, base: Weights, folder: Path) -> None:
        self.folder = Path(folder)
        self.tensors = dict(base.tensors)
        self._base = base
        self._adapter = Adapter(folder)
        self._modules = {weight_of(module, base, self.folder): module for module in self._adapter.modules}
        for name, module in self._modules.items():
            self._oriented(name, module)

    def flat(self, name: str) -> Any:
        """Tensor `name`, to be taken in slices as a tensor of [num_elements]."""
        if name not in self._modules:
            return self._base.flat(name)
        b, a = self._oriented(name, self._modules[name])
        return _Adapted(self._base.flat(name), b, a)

    def stored(self, name: str) -> Any:
        """The same as an array, of float64 where it is adapted."""
        return self._base.stored(name) if name not in self._modules else _Stored(self.flat(name))

    def read_ahead(self, name: str, start: int, stop: int) -> None:
        """Nothing to ask the system for: the base reads ahead for itself, and the factors are small."""

    def _oriented(self, name: str, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors whose product has the weight's shape: some layers store [in, out]."""
        b, a = self._adapter.factors(module)
        shape, ours = self.tensors[name].shape, (b.shape[0], a.shape[1])
        turned = shape != ours if ours != ours[::-1] else self._adapter.settings["fan_in_fan_out"]
        if shape != (ours[::-1] if turned else ours):
            raise MeritError(
                f"{self.folder}: the adapter of `{module}` is for a weight of {ours}, the base's is {shape}. Give the "
                "base that it was trained on."
            )
        return (a.T.contiguous(), b.T.contiguous()) if turned else (b, a)


class _Adapted:
    """Slices of the flattened W + B·A; only the rows that a slice touches are computed."""

    def __init__(self, weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> None:
        self._weight, self._b, self._a = weight, b, a

    def __getitem__(self, elements: slice) -> torch.Tensor:
        start, stop, _ = elements.indices(self._weight.numel())
        width = self._a.shape[1]
        first, last = start // width, -(-stop // width)
        update = (self._b[first:last] @ self._a).reshape(-1)[start - first * width : stop - first * width]
        return update.add_(self._weight[start:stop])


class _Stored:
    def __init__(self, adapted: _Adapted) -> None:
        self._adapted = adapted

    def __getitem__(self, elements: slice) -> np.ndarray:
        return self._adapted[elements].numpy()


def module_of(name: str) -> str | None:
    """The module that an adapter's tensor belongs to; None where it is no factor of a linear layer."""
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if name.startswith(PREFIX) and name.endswith(suffix):
            return name[len(PREFIX) : -len(suffix)]
    return None


def weight_of(module: str, base: Weights, folder: Path) -> str:
    """The base's tensor behind an adapted module; a checkpoint may lack the model's own prefix, or have it besides."""
    name = f"{module}.weight"
    if name in base.tensors:
        return name
    near = [other for other in base.tensors if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if not near and (saved := _saved_names(base.folder).get(name)) in base.tensors:
        return saved
    if len(near) != 1:
        raise MeritError(
            f"{folder}: adapts `{module}`, and {len(near)} tensors of the base {base.folder} could be its weight. "
            "Give the base that it was trained on."
        )
    return near[0]


@functools.cache
def _saved_names(folder: Path) -> dict[str, str]:
    """{name in the model: name in the base's files}, which differ where transformers renames while loading."""
    from transformers import AutoConfig

    from merit_hf.vision import auto_class, saved_names

    with torch.device("meta"):
        model = auto_class(folder).from_config(AutoConfig.from_pretrained(str(folder)))
    return saved_names(model)


def factor_names(module: str) -> tuple[str, str]:
    """The tensors of A [r, in] and B [out, r] of a module, by their names in an adapter's file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"

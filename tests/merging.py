"""Checkpoints to merge, and what their mean must be."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import make_base

WEIGHTS = [123456789, 45678901, 7654321]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_mergekit = pytest.mark.skipif(importlib.util.find_spec("mergekit") is None, reason="needs the mergekit extra")

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def make_folder(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "custom", "tie_word_embeddings": False, **config}))
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def mean64(folders: Sequence[Path], weights: Sequence[float]) -> Tensors:
    """Σ w_k θ_k / Σ w_k in float64, in the plainest way."""
    loaded = [load(folder) for folder in folders]
    return {
        name: sum(w * tensors[name].double() for w, tensors in zip(weights, loaded, strict=True)) / sum(weights)
        for name in loaded[0]
    }


def assert_nearest(values: torch.Tensor, exact: torch.Tensor) -> None:
    """No neighbour of a value in its dtype is nearer to the exact one."""
    integers = {4: torch.int32, 2: torch.int16}[values.element_size()]
    error = (values.double() - exact).abs()
    for step in (-1, 1):
        other = (values.contiguous().view(integers) + step).view(values.dtype).double()
        slack = 1e-15 * exact.abs()
        assert bool(((other - exact).abs() >= error - slack).logical_or(other.isnan()).all())


def spread_biases(folder: Path, seed: int) -> None:
    """Biases and norms start equal in every model; a lost or unmerged one would go unseen."""

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            if tensor.ndim == 1:
                tensor += torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    rewrite(folder, change)


def make_family(root: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """Makes (base, three group checkpoints) of a tiny Llama once for each setting."""
    made: dict[str, tuple[Path, list[Path]]] = {}

    def make(dtype: torch.dtype = torch.float32, **config: object) -> tuple[Path, list[Path]]:
        key = re.sub(r"\W+", "-", f"{dtype}{sorted(config.items())}")
        if key not in made:
            base, *groups = [make_base(root / key / str(seed), seed, dtype, **config) for seed in range(4)]
            for folder, seed in zip((base, *groups), range(4), strict=True):
                spread_biases(folder, seed)
            made[key] = base, groups
        return made[key]

    return make


def run_mergekit(config: Path, output: Path) -> Tensors:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    recipe = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    run_merge(recipe, str(output), MergeOptions(quiet=True, write_model_card=False))
    return load(output)

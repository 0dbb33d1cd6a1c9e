"""How a gradient is read out: `count_sketch` (a seeded linear projection), `stride` (every s-th entry) or `exact`.

All three are linear in the gradient, so parts of it (parameters, shards, micro-batches) may be read out one by one and
summed. Nothing depends on the order of the parameters or on the process that does the work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

# Entries hashed at a time: small enough for the temporaries to stay in a core's cache.
_CHUNK = 1 << 18
# On an accelerator starting an operation costs more than memory does.
_DEVICE_CHUNK = 1 << 24


class Sketch(Protocol):
    """Reads gradients out into float32 vectors of length `dim`."""

    dim: int

    def add(self, out: torch.Tensor, name: str, gradient: torch.Tensor, offset: int = 0) -> None:
        """Add the read-out of entries `offset …` of parameter `name` (flattened) to `out` in place."""

    def norm(self, vector: np.ndarray) -> float:
        """‖g‖₂ as far as the read-out `vector` of g tells: exact for `exact`, right on average for the others."""


def make_sketch(
    kind: str, parameters: Iterable[tuple[str, int]], dim: int, stride: int, seed: int, by_layer: bool = False
) -> Sketch:
    """The sketch that `plan.sketch` names.

    Args:
        parameters: (name, number of entries) of every trained parameter, in any order.
        dim: length of a count sketch; the others' follows from the parameters.
        stride: of `stride`.
        seed: of `count_sketch`.
        by_layer: a part of its own in a count sketch for every layer.
    """
    if kind == "count_sketch":
        return (
            LayerSketch(layer_parts([name for name, _ in parameters], dim), seed)
            if by_layer
            else CountSketch(dim, seed)
        )
    return StrideSketch(parameters, 1 if kind == "exact" else stride)


class CountSketch:
    """s = R g, where column j of R holds one ±1 in a random row, so that E⟨R g, R h⟩ = ⟨g, h⟩.

    Row and sign come from a hash of (seed, parameter name, flat index): nothing is stored, and every process and every
    later session agrees. Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002); the error
    of one cosine has a standard deviation of at most about 1/√dim.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self.seed = seed

    def add(self, out: torch.Tensor, name: str, gradient: torch.Tensor, offset: int = 0) -> None:
        flat = gradient.reshape(-1)
        keys = _name_keys(self.seed, name)
        chunk = _CHUNK if flat.device.type == "cpu" else _DEVICE_CHUNK
        start = 0
        while start < flat.numel():
            # A chunk never crosses a multiple of 2³¹, where the hash takes up the index's high bits.
            stop = min(start + chunk, flat.numel(), ((offset + start >> 31) + 1 << 31) - offset)
            piece = flat[start:stop].to(torch.float32)
            bucket, negative = _hash(offset + start, piece.numel(), keys, self.dim, flat.device)
            out.index_add_(0, bucket, torch.where(negative, -piece, piece))
            start = stop

    def norm(self, vector: np.ndarray) -> float:
        return float(np.linalg.norm(vector.astype(np.float64)))


def layer_parts(names: Iterable[str], dim: int) -> dict[str, tuple[int, int]]:
    """{layer: (start, stop)}: an even share of `dim` for every layer, in order; "other" for what is in none.

    A layer is the first number in a parameter's name: "3" of `model.layers.3.mlp.up_proj.weight`.

    Raises:
        ValueError: not even 16 numbers a layer.
    """
    layers = sorted({_layer_of(name) for name in names}, key=lambda layer: (not layer.isdigit(), layer.zfill(8)))
    if dim < 16 * len(layers):
        raise ValueError(f"{dim} numbers are too few for {len(layers)} layers; at least {16 * len(layers)} are needed")
    edges = [dim * i // len(layers) for i in range(len(layers) + 1)]
    return {layer: (edges[i], edges[i + 1]) for i, layer in enumerate(layers)}


class LayerSketch:
    """A count sketch a layer, side by side in one vector.

    Inner products of the whole vector estimate those of the gradients, like one count sketch of its length where the
    layers share the gradient evenly; those of a part, the layer's: error² ≤ Σ_b (‖g_b‖ ‖h_b‖)² / k_b.
    """

    def __init__(self, parts: dict[str, tuple[int, int]], seed: int) -> None:
        self.parts = parts
        self.dim = max(stop for _, stop in parts.values())
        self._sketches = {layer: CountSketch(stop - start, seed) for layer, (start, stop) in parts.items()}

    def add(self, out: torch.Tensor, name: str, gradient: torch.Tensor, offset: int = 0) -> None:
        layer = _layer_of(name)
        start, stop = self.parts[layer]
        self._sketches[layer].add(out[start:stop], name, gradient, offset)

    def norm(self, vector: np.ndarray) -> float:
        return float(np.linalg.norm(vector.astype(np.float64)))


def _layer_of(name: str) -> str:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found.group(1) if found else "other"


class StrideSketch:
    """Every `stride`-th entry of the concatenated gradient (stride 1: all of it), in the order of parameter names."""

    def __init__(self, parameters: Iterable[tuple[str, int]], stride: int) -> None:
        self.stride = stride
        self._start: dict[str, int] = {}
        total = 0
        for name, size in sorted(parameters):
            self._start[name] = total
            total += size
        self.dim = -(-total // stride)

    def add(self, out: torch.Tensor, name: str, gradient: torch.Tensor, offset: int = 0) -> None:
        first = self._start[name] + offset
        skip = -first % self.stride
        picked = gradient.reshape(-1)[skip :: self.stride].to(torch.float32)
        row = (first + skip) // self.stride
        out[row : row + picked.numel()] += picked

    def norm(self, vector: np.ndarray) -> float:
        return float(np.linalg.norm(vector.astype(np.float64))) * self.stride**0.5


def _name_keys(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:8], "little", signed=True)


def _hash(
    first: int, count: int, keys: tuple[int, int], dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets in [0, dim) and signs of flat indices `first …`, from a 32-bit mix with multiplications that wrap.

    The finaliser is Wellons' "lowbias32"; the high half of the index enters through the key.
    """
    high = _mix_int(keys[1] ^ (first >> 31))
    x = torch.arange(first & 0x7FFFFFFF, (first & 0x7FFFFFFF) + count, dtype=torch.int64, device=device).to(
        torch.int32
    )
    x = x ^ keys[0]
    x = _mix(x)
    x = _mix(x ^ high)
    negative = x < 0
    bucket = (x & 0x7FFFFFFF).to(torch.int64)
    # Multiply-shift maps 31 random bits evenly onto [0, dim) for any dim, without a division.
    return (bucket * dim) >> 31, negative


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def _mix_int(value: int) -> int:
    return int(
        _mix(torch.tensor([((value + 0x80000000) % 0x100000000) - 0x80000000], dtype=torch.int64).to(torch.int32))[0]
    )

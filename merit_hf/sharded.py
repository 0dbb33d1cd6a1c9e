"""A model too large for one device, sharded over processes (FSDP2): who runs which batch, and adding it all up.

Every process holds a slice of each parameter and of its gradient. A read-out is linear, so each reads its slices out
where they lie in the whole parameter, and the read-outs are summed. Without sharding these functions do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.modeling_layers import GradientCheckpointingLayer


def shard_model(model: torch.nn.Module) -> None:
    """Shard `model` in place over all processes of the default group, layer by layer."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [*layers, model]:
        fully_shard(module)


def wrapper_name(model: torch.nn.Module) -> str | None:
    """What spreads a model's training over processes, by its class; None for a model by itself.

    Args:
        model: as the Trainer wrapped it. FSDP2 shards a model in place, and is called `fully_shard`.
    """
    if isinstance(model, FSDPModule):
        return "fully_shard"
    wraps = isinstance(getattr(model, "module", None), torch.nn.Module)
    return type(model).__name__ if wraps else None


def share_of(model: torch.nn.Module, batches: Sequence[list[int]]) -> Iterator[tuple[list[int], bool]]:
    """This process' batches, and whether each counts.

    Collective operations need every process in every step, so one that has run out of batches repeats one without
    counting it.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if isinstance(model, FSDPModule) else (0, 1)
    for first in range(0, len(batches), world_size):
        counts = first + rank < len(batches)
        yield batches[first + rank if counts else first], counts


def local_part(gradient: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The slice of a gradient that this process holds, and at which flat index of the whole it begins."""
    if not isinstance(gradient, DTensor):
        return gradient, 0
    _, offsets = compute_local_shape_and_global_offset(gradient.shape, gradient.device_mesh, gradient.placements)
    # Slices are of the first dimension, so they are contiguous in the flat whole.
    return gradient.to_local(), offsets[0] * math.prod(gradient.shape[1:])


def summed(
    model: torch.nn.Module, vector: torch.Tensor, square: float, counts: Sequence[float]
) -> tuple[torch.Tensor, float, list[float]]:
    """The read-out of a gradient's slices, the square of their norm, and `counts`, added up over the processes.

    FSDP averages gradients over the processes; the sum is wanted, since each counted its own terms.
    """
    if not isinstance(model, FSDPModule):
        return vector, square, list(counts)
    world_size = dist.get_world_size()
    totals = torch.tensor([square * world_size**2, *counts], dtype=torch.float64, device=vector.device)
    vector = vector * world_size
    for tensor in (vector, totals):
        dist.all_reduce(tensor)
    return vector, float(totals[0]), totals[1:].tolist()

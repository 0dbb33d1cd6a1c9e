"""How much memory gradients will take, before the first one is made; and whether that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import PreTrainedModel

from merit_hf.config import ConfigError
from merit_hf.gradients import GradientSettings, trained_parameters

# Of one layer, a forward pass keeps for each token about this many vectors of the hidden size (inputs, norms, queries,
# keys, values, attention's output) and of the MLP's inner size (gate, up, activation, product): Korthikanti et al.,
# "Reducing Activation Recomputation in Large Transformer Models" (2022), with attention that stores no matrix.
_HIDDEN_VECTORS = 10
_INNER_VECTORS = 4
# Logits, their log-probabilities, and the gradient of both.
_LOGIT_COPIES = 3
# What is left for the allocator and for what no formula sees.
_USABLE = 0.9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes beside the weights, which are loaded already; of one process.

    Attributes:
        gradients: of all trained parameters, or of the largest under `low_memory`; and once more of the largest, since
            a gradient that is just made lies beside those that it is added to (tied weights have two).
        activations: what the backward pass needs of the largest micro-batch's forward pass.
        logits: of its loss tokens.
        available: what the device has left.
    """

    gradients: int
    activations: int
    logits: int
    available: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits

    @property
    def fits(self) -> bool:
        return self.total <= _USABLE * self.available


def estimate_memory(
    model: PreTrainedModel,
    num_tokens: int,
    num_loss_tokens: int,
    settings: GradientSettings,
    world_size: int = 1,
    activation_width: int | None = None,
) -> MemoryEstimate:
    """What one micro-batch of `num_tokens` (padding included), of which `num_loss_tokens` bear a loss, will take.

    Args:
        world_size: the processes that share the model's weights and gradients.
        activation_width: bytes of a number in activations: 2 under autocast. Default: the weights'.
    """
    sizes = [parameter.numel() * parameter.element_size() for _, parameter in trained_parameters(model)]
    gradients = ((max(sizes) if settings.low_memory else sum(sizes)) + max(sizes)) // world_size
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = _HIDDEN_VECTORS * hidden + _INNER_VECTORS * inner
    num_layers = config.num_hidden_layers
    kept = num_layers * hidden + layer if settings.gradient_checkpointing else num_layers * layer
    width = activation_width or model.dtype.itemsize
    return MemoryEstimate(
        gradients=gradients,
        activations=num_tokens * kept * width,
        logits=num_loss_tokens * config.vocab_size * _LOGIT_COPIES * torch.float32.itemsize,
        available=available_memory(model.device),
    )


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`."""
    if device.type == "cuda":
        # What torch keeps for reuse counts as used there.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def fitting_settings(
    model: PreTrainedModel,
    batches: Sequence[tuple[int, int]],
    settings: GradientSettings,
    low_memory: bool | None,
    world_size: int = 1,
    activation_width: int | None = None,
) -> GradientSettings:
    """`settings`, with low memory where the gradients would not fit otherwise and nobody has decided about it.

    Args:
        batches: (tokens with padding, loss tokens) of every micro-batch.
        low_memory: as CONFIG says; None leaves it to what fits.
        world_size, activation_width: see [`estimate_memory`].

    Raises:
        ConfigError: it would not fit either way, with what would help.
    """
    tokens, loss_tokens = max(batches, key=lambda batch: batch[0] + batch[1])
    choices = [False, True] if low_memory is None else [low_memory]
    for choice in choices:
        chosen = replace(settings, low_memory=choice)
        estimate = estimate_memory(model, tokens, loss_tokens, chosen, world_size, activation_width)
        if estimate.fits:
            return chosen
    raise ConfigError(_too_large(estimate, tokens, chosen))


def _too_large(estimate: MemoryEstimate, tokens: int, settings: GradientSettings) -> str:
    cures = []
    if not settings.low_memory:
        cures.append("set plan.low_memory=true")
    if not settings.gradient_checkpointing:
        cures.append("set plan.gradient_checkpointing=true")
    if tokens <= settings.tokens_per_batch:
        cures.append(f"lower plan.tokens_per_batch (now {settings.tokens_per_batch})")
    else:
        cures.append("lower sft.max_length")
    return (
        f"the largest micro-batch ({tokens} tokens) needs about {estimate.total / 1e9:.1f} GB beside the weights "
        f"(gradients {estimate.gradients / 1e9:.1f}, activations {estimate.activations / 1e9:.1f}, logits "
        f"{estimate.logits / 1e9:.1f}); {estimate.available / 1e9:.1f} GB are there. Cure: {', '.join(cures)}, or "
        "shard the model over several devices with recipes/accelerate_configs/fsdp2.yaml."
    )

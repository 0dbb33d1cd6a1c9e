"""SFT's loss at full speed: the logits of the tokens that bear a loss, and nothing else.

TRL's own loss also measures entropy and accuracy for its logs, computes the logits twice and, without Triton, those of
the prompt too. The loss is the same number; a test holds the two to each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig, SFTTrainer


def loss_sum(trainer: SFTTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """SFT's loss of one collated batch, summed over its loss tokens (nats); differentiable.

    Losses other than the plain one (DFT, label smoothing, a router's auxiliary loss) are TRL's own computation.
    """
    model = cast(PreTrainedModel, trainer.model)
    head = model.get_output_embeddings()
    if head is None or not _is_plain(trainer):
        return trl_loss_sum(trainer, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    wanted = torch.zeros_like(batch["labels"], dtype=torch.bool)
    wanted[:, :-1] = targets != -100
    # The model's own forward goes on with the rows picked here, so scaling and capping of logits stay its own.
    with _picked(head, wanted), trainer.accelerator.autocast():
        logits = model(**inputs, use_cache=False).logits  # [number of loss tokens, vocabulary]
    return cross_entropy(logits.float(), targets[wanted[:, :-1]], reduction="sum")


def trl_loss_sum(trainer: SFTTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[`loss_sum`] as TRL computes it itself.

    A router's auxiliary loss is a mean over the batch, and so counts once for each of its loss tokens here.
    """
    num_tokens = (batch["labels"][:, 1:] != -100).sum().clamp(min=1) if trainer.aux_loss_enabled else torch.tensor(1)
    # The loop of a training sets it.
    trainer.current_gradient_accumulation_steps = 1
    with trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_tokens.float()) * num_tokens


def loss_sums(trainer: SFTTrainer, batch: dict[str, torch.Tensor]) -> tuple[float, list[float] | None]:
    """[`loss_sum`] of a batch without gradients, and its parts by row.

    The parts are None where the loss is no sum over tokens' log-probabilities: DFT, label smoothing, a router's
    auxiliary loss.
    """
    model = cast(PreTrainedModel, trainer.model)
    with torch.no_grad():
        if not _is_plain(trainer):
            return float(trl_loss_sum(trainer, batch)), None
        with trainer.accelerator.autocast():
            # The forward behind TRL's loss; asking the loss itself for its outputs would run the model twice.
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
    rows = (-outputs.log_probs).sum(dim=1, dtype=torch.float64).tolist()
    return sum(rows), rows


@contextlib.contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing in eval mode: layers keep their inputs alone and are run again for the backward pass.

    transformers does this for layers in training mode only, so the layers themselves are put there; the dropout inside
    them stays off.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    training = [layer.training for layer in layers]
    was_on = model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, before in zip(layers, training, strict=True):
            layer.training = before
        if not was_on:
            model.gradient_checkpointing_disable()


def _is_plain(trainer: SFTTrainer) -> bool:
    assert isinstance(trainer.args, SFTConfig)
    plain = trainer.args.loss_type == "nll" and trainer.label_smoother is None and not trainer.aux_loss_enabled
    return plain and trainer.compute_loss_func is None


@contextlib.contextmanager
def _picked(head: torch.nn.Module, wanted: torch.Tensor) -> Iterator[None]:
    def pick(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *rest = inputs
        return hidden[wanted.to(hidden.device)], *rest

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()

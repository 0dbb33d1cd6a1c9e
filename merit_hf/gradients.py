"""One mean gradient a dataset at the base checkpoint, of the loss that SFT minimises, and its read-out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from merit_hf import sharded
from merit_hf.config import MeritError
from merit_hf.loss import loss_sum, recomputing
from merit_hf.readouts import GradientReadout
from merit_hf.sft import collate
from merit_hf.sketch import Sketch


def sample_indices(num_rows: int, num_samples: int, seed: int) -> np.ndarray:
    """`min(num_samples, num_rows)` distinct row numbers in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:num_samples])


def batch_by_tokens(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Row numbers in batches whose padded size (rows × longest) stays within `tokens_per_batch`, longest first.

    Sorting by length leaves next to no padding. A row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * longest > tokens_per_batch:
            batches.append([])
            longest = max(1, lengths[index])
        batches[-1].append(index)
    return batches


def batches_of(lengths: Sequence[int], reduction: str, tokens_per_batch: int) -> list[list[int]]:
    """Row numbers in micro-batches; of one row each where every example has a mean of its own."""
    if reduction == "example_mean":
        return [[index] for index in range(len(lengths))]
    return batch_by_tokens(lengths, tokens_per_batch)


def trained_model(trainer: SFTTrainer) -> PreTrainedModel:
    """The model whose parameters the trainer changes."""
    assert trainer.model is not None
    return cast(PreTrainedModel, trainer.model)


def trained_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that SFT will change, by name, each tied one once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class GradientSettings:
    """How the passes are run; none of it changes the gradient beyond rounding.

    Attributes:
        tokens_per_batch: largest micro-batch, padding included, in tokens.
        low_memory: read every parameter's gradient out and free it as soon as it is there, so that never more than one
            is held. It is read out once a micro-batch instead of once a dataset.
        gradient_checkpointing: keep the layers' inputs only, and run each layer again for the backward pass.
    """

    tokens_per_batch: int = 2048
    low_memory: bool = False
    gradient_checkpointing: bool = False


def dataset_gradient(
    trainer: SFTTrainer,
    rows: datasets.Dataset,
    sketch: Sketch,
    reduction: str = "token_mean",
    settings: GradientSettings = GradientSettings(),
    on_batch: Callable[[int], None] = lambda tokens: None,
    precondition: Mapping[str, torch.Tensor] | None = None,
) -> GradientReadout:
    """The read-out of the mean gradient over tokenised `rows`; independent of batching and padding.

    `token_mean`: Σ loss over all rows ÷ number of loss tokens. `example_mean`: mean over rows of a row's own token
    mean, for which every row is a batch. `on_batch` is told the tokens of each finished batch. Where the model is
    sharded over processes, each runs its part of the batches, and all return the same. With `precondition`, entries
    are divided by those of the same name before they are read out, and parameters that are not in it are left out.

    Raises:
        MeritError: no row has a loss token, or the gradient is not finite.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    by_example = reduction == "example_mean"
    batches = batches_of(lengths, reduction, settings.tokens_per_batch)
    model = trained_model(trainer)
    total_loss, num_loss_tokens, num_terms = 0.0, 0.0, 0.0
    with _reading(model, sketch, settings, precondition) as reader:
        for indices, is_mine in sharded.share_of(model, batches):
            batch = collate(trainer, rows, indices)
            if not is_mine:
                batch["labels"].fill_(-100)
            loss_tokens = int((batch["labels"][:, 1:] != -100).sum())
            if loss_tokens or not is_mine:
                loss = loss_sum(trainer, batch)
                if by_example:
                    loss = loss / max(1, loss_tokens)
                loss.backward()
                total_loss += float(loss.detach())
            num_loss_tokens += loss_tokens
            num_terms += (1 if by_example else loss_tokens) if loss_tokens else 0
            on_batch(sum(lengths[i] for i in indices) if is_mine else 0)
        vector, square = reader.finish()
    counts = [total_loss, num_loss_tokens, num_terms]
    vector, square, (total_loss, num_loss_tokens, num_terms) = sharded.summed(model, vector, square, counts)
    if not num_terms:
        raise MeritError("none of the sampled examples has a loss token, so there is no gradient.")
    sketched = (vector / num_terms).cpu().numpy()
    # Micro-batches whose gradients are gone by the end leave the norm to the read-out, which keeps it on average.
    norm = sketch.norm(sketched) if settings.low_memory else square**0.5 / num_terms
    if not np.isfinite(norm):
        raise MeritError(
            f"the gradient at the base is not finite (norm {norm}); its loss is {total_loss / num_terms}."
        )
    return GradientReadout(
        sketched, norm, total_loss / num_terms, len(rows), sum(lengths), int(num_loss_tokens), len(batches)
    )


class _Reader:
    """Reads the gradients of a model out: at the end, or each as it comes."""

    def __init__(
        self, model: torch.nn.Module, sketch: Sketch, precondition: Mapping[str, torch.Tensor] | None
    ) -> None:
        self._sketch, self._precondition, self._parameters = sketch, precondition, trained_parameters(model)
        self._vector = torch.zeros(sketch.dim, dtype=torch.float32, device=self._parameters[0][1].device)
        self._square = 0.0

    def take(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Read one gradient out and free it."""
        if parameter.grad is None:
            return
        gradient, offset = sharded.local_part(parameter.grad)
        if self._precondition is not None and name in self._precondition:
            entries = self._precondition[name].reshape(-1)[offset : offset + gradient.numel()]
            gradient = gradient.reshape(-1) / entries
        if self._precondition is None or name in self._precondition:
            self._sketch.add(self._vector, name, gradient, offset)
            self._square += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        parameter.grad = None

    def take_each(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name, parameter in self._parameters:
            yield parameter.register_post_accumulate_grad_hook(lambda p, name=name: self.take(name, p))

    def finish(self) -> tuple[torch.Tensor, float]:
        """The read-out of the sum, float32 [dim], and the square of its norm (of its parts', where taken in parts)."""
        for name, parameter in self._parameters:
            self.take(name, parameter)
        return self._vector, self._square


@contextlib.contextmanager
def _reading(
    model: PreTrainedModel,
    sketch: Sketch,
    settings: GradientSettings,
    precondition: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[_Reader]:
    model.zero_grad(set_to_none=True)
    reader = _Reader(model, sketch, precondition)
    handles = list(reader.take_each()) if settings.low_memory else []
    try:
        with recomputing(model) if settings.gradient_checkpointing else contextlib.nullcontext():
            yield reader
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)

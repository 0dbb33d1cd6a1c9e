"""One mean gradient a dataset at the base checkpoint, of the loss that SFT minimises, and its read-out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
import torch
from trl import SFTTrainer

from merit_hf.config import MeritError
from merit_hf.readouts import GradientReadout
from merit_hf.sft import collate, loss_sum
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


def trained_model(trainer: SFTTrainer) -> torch.nn.Module:
    """The module whose parameters the trainer changes."""
    assert trainer.model is not None
    return trainer.model


def trained_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that SFT will change, by name, each tied one once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def dataset_gradient(
    trainer: SFTTrainer,
    rows: datasets.Dataset,
    sketch: Sketch,
    reduction: str = "token_mean",
    tokens_per_batch: int = 2048,
    on_batch: Callable[[int], None] = lambda tokens: None,
    precondition: Mapping[str, torch.Tensor] | None = None,
) -> GradientReadout:
    """The read-out of the mean gradient over tokenised `rows`; independent of batching and padding.

    `token_mean`: Σ loss over all rows ÷ number of loss tokens. `example_mean`: mean over rows of a row's own token
    mean, for which every row is a batch. `on_batch` is told the tokens of each finished batch. `precondition`: see
    [`read_out`].

    Raises:
        MeritError: no row has a loss token, or the gradient is not finite.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    by_example = reduction == "example_mean"
    batches = [[i] for i in range(len(rows))] if by_example else batch_by_tokens(lengths, tokens_per_batch)
    model = trained_model(trainer)
    model.zero_grad(set_to_none=True)
    total_loss, num_loss_tokens, num_terms = 0.0, 0, 0
    for indices in batches:
        batch = collate(trainer, rows, indices)
        loss_tokens = int((batch["labels"][:, 1:] != -100).sum())
        if loss_tokens:
            loss = loss_sum(trainer, batch)
            if by_example:
                loss = loss / loss_tokens
            loss.backward()
            total_loss += float(loss.detach())
        num_loss_tokens += loss_tokens
        num_terms += (1 if by_example else loss_tokens) if loss_tokens else 0
        on_batch(sum(lengths[i] for i in indices))
    if not num_terms:
        raise MeritError("none of the sampled examples has a loss token, so there is no gradient.")
    vector, norm = read_out(model, sketch, 1.0 / num_terms, precondition)
    model.zero_grad(set_to_none=True)
    if not np.isfinite(norm):
        raise MeritError(
            f"the gradient at the base is not finite (norm {norm}); its loss is {total_loss / num_terms}."
        )
    return GradientReadout(
        vector.cpu().numpy(), norm, total_loss / num_terms, len(rows), sum(lengths), num_loss_tokens, len(batches)
    )


def read_out(
    model: torch.nn.Module, sketch: Sketch, scale: float, precondition: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, float]:
    """Sketch of `scale` × the accumulated `.grad` of every trained parameter, and the norm of that gradient.

    With `precondition`, entries are divided by those of the same name before they are sketched, and parameters that
    are not in it are left out; the norm stays the gradient's own.
    """
    parameters = trained_parameters(model)
    vector = torch.zeros(sketch.dim, dtype=torch.float32, device=parameters[0][1].device)
    square = 0.0
    for name, parameter in parameters:
        if parameter.grad is None:
            continue
        if precondition is None:
            sketch.add(vector, name, parameter.grad)
        elif name in precondition:
            sketch.add(vector, name, parameter.grad / precondition[name])
        square += float(torch.linalg.vector_norm(parameter.grad, dtype=torch.float64)) ** 2
    return vector * scale, square**0.5 * scale

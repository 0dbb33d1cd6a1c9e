"""Adam's view of a gradient: every entry divided by the root of its second moment, before anything is compared.

LESS (Xia et al., 2024) compares such gradients, since Adam's step is m̂ / (√v̂ + ε), not the gradient. v̂ is one diagonal
for all datasets: taken from an optimizer that ran, or measured at the base over batches of the mixture, as Adam would
see them there. It is damped by a share of its tensor's mean, so that no entry is raised more than tenfold over its
tensor: an entry that no batch happened to touch has a second moment of zero, not an infinite weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from merit_hf.config import ConfigError, MeritError, PlanSection
from merit_hf.gradients import batch_by_tokens, sample_indices, trained_model, trained_parameters
from merit_hf.loss import loss_sum, recomputing
from merit_hf.mixture import PreparedDataset
from merit_hf.progress import Progress
from merit_hf.seeds import seed_of
from merit_hf.sft import collate, identity_fields, open_loss

_STATE_NAME = "optimizer.pt"
_DAMPING = 0.01


def adam_denominators(
    prepared: Sequence[PreparedDataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    section: PlanSection,
    root: Path,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """What every entry of a gradient is divided by, by parameter: √(v̂ + 0.01 · mean v̂ of the tensor) + ε.

    Raises:
        ConfigError: `plan.optimizer_state` is no Adam state of this model.
    """
    rows = datasets.concatenate_datasets([dataset.train for dataset in prepared])
    if section.optimizer_state is not None:
        with open_loss(model, tokenizer, args, rows.select(range(1))) as trainer:
            moments = state_moments(root / section.optimizer_state, trainer)
    else:
        moments = measured_moments(rows, model, tokenizer, args, section, progress)
    return denominators(moments, args.adam_epsilon)


def denominators(moments: Mapping[str, torch.Tensor], epsilon: float) -> dict[str, torch.Tensor]:
    """√(v̂ + 0.01 · mean v̂ of the tensor) + ε, by parameter. Parameters that never had a gradient are left out."""
    return {
        name: (moment + _DAMPING * moment.mean()).sqrt_().add_(epsilon)
        for name, moment in moments.items()
        if bool(moment.any())
    }


def measured_moments(
    rows: datasets.Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    section: PlanSection,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Mean square of the gradient of `precondition_batches` training batches of the mixture at the base, float32.

    A batch has the effective size of the training, since Adam squares the gradient of a batch, and its examples are
    drawn from all rows by `plan.seed`.
    """
    size = int(identity_fields(args)["effective_batch_size"])
    # A random order of random rows: consecutive ones make a batch.
    drawn = np.random.default_rng(seed_of(section.seed, "precondition", "order")).permutation(
        sample_indices(len(rows), section.precondition_batches * size, seed_of(section.seed, "precondition"))
    )
    moments: dict[str, torch.Tensor] = {}
    batches = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    counted = 0
    with progress.stage("Second moments", total=len(batches)) as stage:
        for indices in batches:
            batch_rows = rows.select(indices)
            recompute = recomputing(model) if section.gradient_checkpointing else contextlib.nullcontext()
            with open_loss(model, tokenizer, args, batch_rows) as trainer, recompute:
                micro = batch_by_tokens([len(ids) for ids in batch_rows["input_ids"]], section.tokens_per_batch)
                model_in_use = trained_model(trainer)
                model_in_use.zero_grad(set_to_none=True)
                num_loss_tokens = 0
                for micro_indices in micro:
                    batch = collate(trainer, batch_rows, micro_indices)
                    loss_sum(trainer, batch).backward()
                    num_loss_tokens += int((batch["labels"][:, 1:] != -100).sum())
                if num_loss_tokens:
                    counted += 1
                    _add_squares(moments, model_in_use, 1.0 / num_loss_tokens)
                model_in_use.zero_grad(set_to_none=True)
            stage.advance()
    if not counted:
        raise MeritError("plan.precondition=adam: no drawn example has a loss token. Raise plan.precondition_batches.")
    return {name: moment / counted for name, moment in moments.items()}


def _add_squares(moments: dict[str, torch.Tensor], model: torch.nn.Module, scale: float) -> None:
    for name, parameter in trained_parameters(model):
        if parameter.grad is not None:
            square = (parameter.grad.float() * scale).square_()
            moments[name] = moments[name].add_(square) if name in moments else square


def state_sha256(path: Path) -> str:
    """sha256 of the optimizer's file. Raises ConfigError where there is none."""
    with open(state_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_file(path: Path) -> Path:
    """The optimizer's file of a Trainer checkpoint, or `path` itself. Raises ConfigError where there is none."""
    file = path / _STATE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"plan.optimizer_state={str(path)!r}: no {_STATE_NAME} there. Give a Trainer checkpoint that has one, or "
            "the file."
        )
    return file


def state_moments(path: Path, trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """v̂ of an Adam run that a Trainer saved, by parameter name: exp_avg_sq / (1 − β₂ᵗ).

    A state numbers its parameters; the names follow from the order in which the Trainer gives them to the optimizer.

    Raises:
        ConfigError: no such file, no Adam state, or one of other parameters.
    """
    where, file = f"plan.optimizer_state={str(path)!r}", state_file(path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        groups, entries = state["param_groups"], state["state"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{where}: not an optimizer's state ({' '.join(str(error).split())[:120]}).") from error
    model = trained_model(trainer)
    decays = set(trainer.get_decay_parameter_names(model))
    parameters = trained_parameters(model)
    ordered = [[p for p in parameters if (p[0] in decays) == decay] for decay in (True, False)]
    if [len(group["params"]) for group in groups] != [len(group) for group in ordered]:
        raise ConfigError(
            f"{where}: it is of {sum(len(g['params']) for g in groups)} parameters, this model trains "
            f"{len(parameters)}. Give the state of a training of this base with the same `peft`."
        )
    moments = {}
    for saved, named in zip(groups, ordered, strict=True):
        for index, (name, parameter) in zip(saved["params"], named, strict=True):
            entry = entries.get(index, {})
            second = entry.get("exp_avg_sq")
            if second is None or second.shape != parameter.shape:
                found = "no second moment" if second is None else f"shape {tuple(second.shape)}"
                raise ConfigError(
                    f"{where}: {found} for {name}, expected {tuple(parameter.shape)}. Give the state of an Adam "
                    "training of this base."
                )
            correction = 1.0 - saved["betas"][1] ** float(entry["step"])
            moments[name] = second.to(parameter.device, torch.float32) / correction
    return moments

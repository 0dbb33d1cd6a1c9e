"""Which fields of SFTConfig decide the trained weights, and a group's share of them, so that no torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What decides the trained weights. Every other field of SFTConfig is placement: where and how the same training runs.
# The two batch fields are in neither list: their product is the identity `effective_batch_size`.
IDENTITY_FIELDS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "assistant_only_loss", "average_tokens_across_devices",
    "completion_only_loss", "data_seed", "dataloader_drop_last", "eos_token", "greater_is_better",
    "label_smoothing_factor", "learning_rate", "load_best_model_at_end", "loss_type", "lr_scheduler_kwargs",
    "lr_scheduler_type", "max_grad_norm", "max_length", "max_steps", "metric_for_best_model", "neftune_noise_alpha",
    "num_train_epochs", "optim", "optim_args", "optim_target_modules", "packing", "packing_strategy", "padding_free",
    "router_aux_loss_coef", "seed", "shuffle_dataset", "train_sampling_strategy", "truncation_mode", "warmup_steps",
    "weight_decay",
)  # fmt: skip
# Their product, over all processes, is the identity `effective_batch_size`.
BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What a plan records of a training besides: see `sft.identity_fields`.
DERIVED_FIELDS = ("effective_batch_size", "device_batch_size", "mixture_steps")
# Settings of a schedule that count steps: of the training of the whole mixture, so a group takes its share of them.
_STEP_KWARGS = ("num_decay_steps", "num_stable_steps", "timescale")


@dataclass(frozen=True)
class Budget:
    """What one training takes: optimizer steps and tokens, over all epochs."""

    num_steps: int
    num_input_tokens: int
    num_loss_tokens: int


def counts_steps(sft: Mapping[str, Any]) -> bool:
    """Whether the schedule is given in steps; `warmup_steps` below 1 is a share, which suits every length."""
    kwargs = sft.get("lr_scheduler_kwargs")
    return sft["warmup_steps"] >= 1 or (isinstance(kwargs, Mapping) and any(kwargs.get(key) for key in _STEP_KWARGS))


def group_fields(sft: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """A plan's identity fields as those of one group, which trains `num_steps` of them.

    `max_steps` becomes the group's own. What a schedule gives in steps covers the same share of the group's training
    as it would of the whole mixture's (`mixture_steps`), rounded up as transformers rounds a warm-up share. Plans
    without `mixture_steps` leave it as it is.
    """
    fields = {key: value for key, value in sft.items() if key != "mixture_steps"}
    if fields["max_steps"] > 0:
        fields["max_steps"] = num_steps
    mixture = sft.get("mixture_steps")
    if not mixture:
        return fields

    def share(steps: float) -> int:
        return -(-int(steps) * num_steps // mixture)

    if fields["warmup_steps"] >= 1:
        fields["warmup_steps"] = float(share(fields["warmup_steps"]))
    if isinstance(fields.get("lr_scheduler_kwargs"), Mapping):
        kwargs = fields["lr_scheduler_kwargs"]
        fields["lr_scheduler_kwargs"] = {
            key: share(value) if key in _STEP_KWARGS and value else value for key, value in kwargs.items()
        }
    return fields

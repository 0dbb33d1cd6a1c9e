"""Which fields of SFTConfig decide the trained weights. Names alone, so that a plan is vetted without torch."""

from __future__ import annotations

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
DERIVED_FIELDS = ("effective_batch_size", "device_batch_size")

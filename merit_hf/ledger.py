"""Tokens of a training: what it should process (replayed from the data) and what it did process (counted)."""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from trl import SFTConfig

from merit_hf.config import ConfigError
from merit_hf.identity import Budget as Budget


def replay(input_tokens: np.ndarray, loss_tokens: np.ndarray, args: SFTConfig) -> Budget:
    """The steps and tokens of training on rows with these counts under `args`, without training.

    Whole epochs are sums; a part of an epoch takes the first rows of that epoch's order, drawn by the sampler that the
    Trainer itself uses.

    Raises:
        ConfigError: part of an epoch under a sampling strategy whose order is not known beforehand.
    """
    num_rows = len(input_tokens)
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows_an_epoch = _rows_an_epoch(num_rows, args)
    num_steps = count_steps(num_rows, args)
    epochs, steps_left = divmod(num_steps, steps_an_epoch(num_rows, args))
    if rows_an_epoch == num_rows and steps_left == 0:
        return Budget(num_steps, epochs * int(input_tokens.sum()), epochs * int(loss_tokens.sum()))
    totals = [0, 0]
    for epoch in range(epochs + bool(steps_left)):
        count = rows_an_epoch if epoch < epochs else min(steps_left * effective, rows_an_epoch)
        order = epoch_order(num_rows, args, epoch)[:count]
        totals[0] += int(input_tokens[order].sum())
        totals[1] += int(loss_tokens[order].sum())
    return Budget(num_steps, *totals)


def count_steps(num_rows: int, args: SFTConfig) -> int:
    """Optimizer steps of training on so many rows; raises ConfigError where no batch is ever full."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_an_epoch(num_rows, args))


def steps_an_epoch(num_rows: int, args: SFTConfig) -> int:
    """Optimizer steps that pass once over so many rows; raises ConfigError where no batch is ever full."""
    effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return max(1, math.ceil(_rows_an_epoch(num_rows, args) / effective))


def _rows_an_epoch(num_rows: int, args: SFTConfig) -> int:
    if not args.dataloader_drop_last:
        return num_rows
    kept = num_rows // args.per_device_train_batch_size * args.per_device_train_batch_size
    if kept == 0:
        raise ConfigError(
            f"sft.dataloader_drop_last=true leaves nothing of {num_rows} rows at sft.per_device_train_batch_size="
            f"{args.per_device_train_batch_size}. Lower the batch size."
        )
    return kept


def epoch_order(num_rows: int, args: SFTConfig, epoch: int) -> np.ndarray:
    """The order in which the Trainer takes the rows in an epoch, int64 indices; ConfigError where it is not known."""
    if args.train_sampling_strategy == "sequential":
        return np.arange(num_rows)
    if args.train_sampling_strategy != "random":
        raise ConfigError(
            f"sft.train_sampling_strategy={args.train_sampling_strategy!r}: which rows a part of an epoch takes is "
            "not known beforehand, so its tokens cannot be replayed. Train whole epochs, or sample at random."
        )
    sampler = SeedableRandomSampler(range(num_rows), data_seed=args.data_seed)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, dtype=np.int64, count=num_rows)


class TokenLedger:
    """Counts the tokens of every training forward pass of a model, over all processes and restarts.

    Attributes:
        num_input_tokens: non-padding tokens. num_loss_tokens: those with a label that is predicted.
        num_padding_tokens: the rest of the batches.
    """

    FIELDS = ("num_input_tokens", "num_loss_tokens", "num_padding_tokens")

    def __init__(self) -> None:
        self._before = [0, 0, 0]
        self._since: torch.Tensor | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def start(self, model: nn.Module, before: dict[str, int] | None = None) -> None:
        """Watch `model` from now on, on top of the counts `before` (of the run that is resumed)."""
        self.stop()
        self._before = [(before or {}).get(field, 0) for field in self.FIELDS]
        self._since = None
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def total(self) -> dict[str, int]:
        """The counts so far, summed over processes: all of them must call this together."""
        since = self._since
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            since = torch.zeros(3, dtype=torch.int64) if since is None else since.clone()
            since = since.to(device)
            torch.distributed.all_reduce(since)
        values = [0, 0, 0] if since is None else since.tolist()
        return dict(zip(self.FIELDS, (a + b for a, b in zip(self._before, values, strict=True)), strict=True))

    def _count(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        input_ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
        # Evaluation, and the extra forward passes that TRL makes for its metrics, are not training.
        if not (module.training and torch.is_grad_enabled() and isinstance(input_ids, torch.Tensor)):
            return
        mask = kwargs.get("attention_mask")
        # Padding-free batches carry positions instead of a mask: every token is one of the data.
        inputs = (
            mask.sum() if isinstance(mask, torch.Tensor) else torch.tensor(input_ids.numel(), device=input_ids.device)
        )
        loss = (labels[..., 1:] != -100).sum() if isinstance(labels, torch.Tensor) else torch.zeros_like(inputs)
        counts = torch.stack([inputs, loss, input_ids.numel() - inputs]).to(torch.int64)
        self._since = counts if self._since is None else self._since + counts

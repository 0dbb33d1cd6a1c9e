"""`merit plan --dry-run`: what planning and training would take, from a short probe of the real model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from merit_hf.config import ConfigError, DatasetSection, MeritConfig, MeritError
from merit_hf.data import count_tokens
from merit_hf.gradients import GradientSettings, batch_by_tokens, sample_indices, trained_parameters
from merit_hf.groups import GRADIENT_SPLITS
from merit_hf.hub import resolve_model
from merit_hf.loss import loss_sum
from merit_hf.measure import plan_sketch
from merit_hf.memory import MemoryEstimate, estimate_memory, fitting_settings
from merit_hf.mixture import read_mixture
from merit_hf.planner import check_group_count
from merit_hf.precondition import state_file
from merit_hf.progress import Progress
from merit_hf.reading import approximate_rows
from merit_hf.seeds import seed_of
from merit_hf.sft import (
    build_args,
    check_trainable,
    collate,
    identity_fields,
    load_model,
    load_tokenizer,
    open_loss,
    take_chat_template,
    tokenize_rows,
)
from merit_hf.split_inputs import given_affinity
from merit_hf.streams import RowCount
from merit_hf.vision import takes_images

# Rows of a dataset that are tokenised, and seconds of forward and backward: enough for a figure, over in seconds.
_NUM_ROWS, _PROBE_SECONDS = 64, 5.0


@dataclass(frozen=True)
class Estimate:
    """What a plan and the trainings after it would take. Sizes in bytes, times in seconds.

    Attributes:
        num_parameters, num_trained: of the model, and of those that are trained.
        num_datasets, num_examples, num_input_tokens: of the mixture; tokens from up to 64 rows a dataset.
        token_error: standard error of `num_input_tokens`, from the spread of the sampled rows' lengths.
        streamed: rows of the datasets that are streamed without `num_examples`, held-out ones among them.
        skipped: datasets left out, with the reason, as far as the sampled rows tell.
        gradient_tokens: of the samples behind the gradients, `precondition` included; 0 where the split needs none.
        tokens_per_second: of forward and backward here, over `probe_tokens`. device: on what.
        parameter_bytes, gradient_bytes, activation_bytes: while planning, for micro-batches of `tokens_per_batch`, or
            of the longest sampled row.
        remedy: what the planner would say of them where all tokens bear a loss; empty where they fit.
        plan_bytes, checkpoint_bytes: on disk: the read-outs while planning, and all group checkpoints.
        group_tokens: of each group's training. group_flop: each group's floating point operations.
    """

    num_parameters: int
    num_trained: int
    num_datasets: int
    num_examples: int
    num_input_tokens: int
    token_error: float
    streamed: dict[str, RowCount]
    skipped: dict[str, str]
    gradient_tokens: int
    tokens_per_second: float
    probe_tokens: int
    device: str
    parameter_bytes: int
    gradient_bytes: int
    activation_bytes: int
    remedy: str
    plan_bytes: int
    checkpoint_bytes: int
    group_tokens: list[int]
    group_flop: list[float]

    @property
    def gradient_seconds(self) -> float:
        return self.gradient_tokens / self.tokens_per_second


def estimate_plan(config: MeritConfig, progress: Progress | None = None) -> Estimate:
    """Read the data, tokenise a sample of it, run a few micro-batches, and add up.

    Raises:
        ConfigError, MeritError: as [`MeritPlanner.plan`] does, for base and data.
    """
    progress = progress or Progress()
    sft, chat_template = take_chat_template(config.sft, config.root)
    args = build_args(sft)
    check_trainable(args, config.peft)
    section = config.base
    folder, _, _ = resolve_model(section.model_name_or_path, section.revision, config.root, "base.model_name_or_path")
    endless = [spec for spec in config.datasets if spec.streaming and spec.num_examples is None]
    specs = [_sampled(spec) if spec in endless else spec for spec in config.datasets]
    loaded, skipped = read_mixture(specs, config.root, args, progress, lambda: takes_images(folder))
    check_group_count(config, len(loaded), skipped)
    # What the planner refuses is not called possible.
    given_affinity(config, [dataset.name for dataset in loaded])
    if config.plan.optimizer_state is not None:
        state_file(config.root / config.plan.optimizer_state)
    streamed = {spec.name: _counted(spec, config.root) for spec in endless}
    trained = {spec.name: round(streamed[spec.name].number * (1 - _held_out_share(spec))) for spec in endless}
    sizes = [trained.get(dataset.name, len(dataset.train)) for dataset in loaded]
    tokenizer = load_tokenizer(folder, chat_template, any(dataset.images for dataset in loaded))
    model = load_model(folder, args, config.peft, config.base.freeze)
    sizes_of = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
    sketch_dim = plan_sketch(config.plan, sizes_of).dim if config.plan.split in GRADIENT_SPLITS else 0
    samples, passed, tokens, sampled, square, longest = [], [], [], [], 0.0, 0
    largest = config.plan.max_num_samples if config.plan.num_samples == "auto" else config.plan.num_samples
    with progress.stage("Tokenising a sample", total=len(loaded)) as stage:
        for dataset, size in zip(loaded, sizes, strict=True):
            weight = dataset.weight
            chosen = sample_indices(len(dataset.train), _NUM_ROWS, seed_of("estimate", dataset.name))
            rows = tokenize_rows(model, tokenizer, args, dataset.train.select(chosen)).rows
            # Rows that SFT drops have no tokens.
            lengths, counts = np.zeros(len(chosen)), count_tokens(rows)
            lengths[: len(rows)] = counts.input_tokens
            mean = float(lengths.mean())
            stage.advance()
            if size == len(chosen) and not counts.num_loss_tokens:
                skipped[dataset.name] = f"none of its {size} examples has a loss token"
                continue
            samples.append(rows)
            passed.append(round(size * weight))
            longest = max(longest, int(lengths.max()))
            tokens.append(mean * size * weight)
            sampled.append(mean * min(largest, size))
            if size > len(lengths) > 1:
                square += (size * weight * float(lengths.std(ddof=1))) ** 2 / len(lengths)
    check_group_count(config, len(samples), skipped)
    memory, remedy = _memory(config, args, model, longest)
    fullest = max(range(len(samples)), key=lambda number: tokens[number])
    with open_loss(model, tokenizer, args, samples[fullest]) as trainer:
        probed, seconds = _probe(trainer, samples[fullest], config.plan.tokens_per_batch)
    return _estimate(
        config, args, model, passed, tokens, square**0.5, streamed, skipped, sum(sampled), sketch_dim, memory, remedy,
        probed, seconds,
    )  # fmt: skip


def _sampled(spec: DatasetSection) -> DatasetSection:
    """As many of its rows as are looked at, none of them held out."""
    held_out = {"eval_path": None, "eval_split": None, "eval_fraction": 0.0}
    return spec.model_copy(update={"num_examples": _NUM_ROWS, **held_out})


def _held_out_share(spec: DatasetSection) -> float:
    return spec.eval_fraction if spec.eval_path is None and spec.eval_split is None else 0.0


def _counted(spec: DatasetSection, root: Path) -> RowCount:
    found = approximate_rows(spec, root)
    if found is None:
        raise ConfigError(
            f"datasets.{spec.name}: how many rows it has cannot be told without reading all of it (compressed files, "
            "a JSON list, or rows chosen by `where`). Set num_examples."
        )
    return found


def _probe(trainer: SFTTrainer, rows: datasets.Dataset, tokens_per_batch: int) -> tuple[int, float]:
    """Tokens and seconds of forward and backward, in micro-batches as large as a slow machine finishes in seconds."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    if not lengths:
        raise MeritError("none of the sampled examples has a loss token, so nothing can be timed.")

    def seconds_of(batch: list[int]) -> float:
        start = time.monotonic()
        loss_sum(trainer, collate(trainer, rows, batch)).backward()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.monotonic() - start

    # The first run also loads libraries; the second says how many tokens a second to expect.
    middle = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
    seconds_of([middle])
    rate = lengths[middle] / seconds_of([middle])
    batches = batch_by_tokens(lengths, min(tokens_per_batch, max(1, int(rate * _PROBE_SECONDS / 3))))
    done, seconds = 0, 0.0
    for number in range(max(3, len(batches))):
        batch = batches[number % len(batches)]
        seconds += seconds_of(batch)
        done += sum(lengths[index] for index in batch)
        if seconds > _PROBE_SECONDS:
            break
    return done, seconds


def _memory(config: MeritConfig, args: SFTConfig, model: PreTrainedModel, longest: int) -> tuple[MemoryEstimate, str]:
    """What the largest micro-batch takes beside the weights; and where it may not fit, what the planner says then."""
    section, remedy = config.plan, ""
    settings = GradientSettings(section.tokens_per_batch, section.low_memory or False, section.gradient_checkpointing)
    # A row longer than the budget is a batch of its own, and at most all tokens of a batch bear a loss.
    tokens = max(settings.tokens_per_batch, longest)
    autocast = 2 if args.bf16 or args.fp16 else None
    try:
        settings = fitting_settings(model, [(tokens, tokens)], settings, section.low_memory, activation_width=autocast)
    except ConfigError as error:
        remedy = str(error)
    return estimate_memory(model, tokens, tokens, settings, activation_width=autocast), remedy


def _estimate(
    config: MeritConfig,
    args: SFTConfig,
    model: PreTrainedModel,
    examples: Sequence[int],
    tokens: Sequence[float],
    token_error: float,
    streamed: dict[str, RowCount],
    skipped: dict[str, str],
    sampled: float,
    sketch_dim: int,
    memory: MemoryEstimate,
    remedy: str,
    probed: int,
    seconds: float,
) -> Estimate:
    parameters = list(model.parameters())
    trained = trained_parameters(model)
    total, num_trained = sum(p.numel() for p in parameters), sum(p.numel() for _, p in trained)
    needs_gradients = config.plan.split in GRADIENT_SPLITS
    batch = int(identity_fields(args)["effective_batch_size"])
    mean = sum(tokens) / sum(examples)
    if needs_gradients and config.plan.precondition == "adam" and config.plan.optimizer_state is None:
        sampled += min(config.plan.precondition_batches * batch, sum(examples)) * mean
    passes = args.max_steps * batch / sum(examples) if args.max_steps > 0 else args.num_train_epochs
    shares = np.array(config.plan.group_shares or [1.0] * config.num_groups)
    group_tokens = (shares / shares.sum() * sum(tokens) * passes).round().astype(np.int64).tolist()
    # A group checkpoint is saved in the width that it is trained in.
    saved = sum(p.numel() * p.element_size() for p in (dict(trained).values() if config.peft else parameters))
    return Estimate(
        num_parameters=total,
        num_trained=num_trained,
        num_datasets=len(examples),
        num_examples=sum(examples),
        num_input_tokens=round(sum(tokens)),
        token_error=token_error,
        streamed=streamed,
        skipped=skipped,
        gradient_tokens=round(sampled) if needs_gradients else 0,
        tokens_per_second=probed / seconds,
        probe_tokens=probed,
        device=str(args.device),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        gradient_bytes=memory.gradients,
        activation_bytes=memory.activations + memory.logits,
        remedy=remedy if needs_gradients else "",
        plan_bytes=2 * 2 * 4 * len(examples) * sketch_dim,
        checkpoint_bytes=config.num_groups * saved,
        group_tokens=group_tokens,
        # Forward and the backward through activations take 2 operations a parameter and token each, the weights'
        # own gradients 2 more of those that are trained: the usual 6 where all are.
        group_flop=[count * (4.0 * total + 2.0 * num_trained) for count in group_tokens],
    )


def estimate_lines(estimate: Estimate, teraflops: float) -> list[str]:
    """The estimate in words.

    Args:
        teraflops: what a GPU achieves in training, in 10¹² operations a second.
    """
    e = estimate
    lines = [
        f"{e.num_datasets} datasets, {e.num_examples:,} examples, about {e.num_input_tokens:,} tokens a pass, ± "
        f"{e.token_error:,.0f} (standard error, from up to {_NUM_ROWS} examples each).",
        *(
            f"Streamed: `{name}`, {'' if count.exact else 'about '}{count.number:,} rows by {count.source}. Set "
            f"datasets.{name}.num_examples to what is to be trained on."
            for name, count in e.streamed.items()
        ),
        *(f"Left out: {name} ({reason})." for name, reason in sorted(e.skipped.items())),
        f"Model: {e.num_parameters:,} parameters, {e.num_trained:,} of them trained.",
    ]
    if e.gradient_tokens:
        lines.append(
            f"Gradients: about {e.gradient_tokens:,} tokens in {_duration(e.gradient_seconds)} on one process here "
            f"({e.tokens_per_second:,.0f} tokens a second on {e.device}, measured over {e.probe_tokens:,})."
        )
        lines.append(
            f"Memory while planning: about {_size(e.parameter_bytes + e.gradient_bytes + e.activation_bytes)} "
            f"(parameters {_size(e.parameter_bytes)}, gradients {_size(e.gradient_bytes)}, activations by rule of "
            f"thumb {_size(e.activation_bytes)})."
        )
        if e.remedy:
            lines.append(f"This may not fit here: {e.remedy}")
    else:
        lines.append("Gradients: none, this split needs none.")
    lines.append(
        f"Disk: about {_size(e.plan_bytes)} for the plan, and {_size(e.checkpoint_bytes)} for the groups' finished "
        "checkpoints."
    )
    hours = [flop / (teraflops * 1e12) / 3600 for flop in e.group_flop]
    lines.append(
        f"Training at {teraflops:g} TFLOP/s a GPU, if groups hold exactly their shares: "
        + ", ".join(f"group {number} {value:.2g}" for number, value in enumerate(hours))
        + f" GPU-hours; {sum(hours):.2g} in all, by operations per token and parameter (6 where all are trained)."
    )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

"""The gradient read-out of every dataset of a mixture: resumable, and shared between planner processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from merit_hf.config import ConfigError, MeritError, PlanSection
from merit_hf.data import count_tokens, format_digest
from merit_hf.gradients import GradientSettings, batches_of, dataset_gradient, trained_parameters
from merit_hf.memory import fitting_settings
from merit_hf.mixture import PreparedDataset, check_against_plan
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.precondition import adam_denominators, state_sha256
from merit_hf.progress import Progress
from merit_hf.readouts import GradientReadout, load_readout, readout_path, save_readout
from merit_hf.reliability import next_sample_size, split_half
from merit_hf.seeds import seed_of
from merit_hf.sft import identity_fields, open_loss
from merit_hf.sketch import Sketch, make_sketch
from merit_hf.workers import Worker

# What of the SFT settings changes a gradient without changing the tokens.
_LOSS_FIELDS = ("loss_type", "label_smoothing_factor", "router_aux_loss_coef", "bf16", "fp16", "model_init_kwargs")
_READOUT_FIELDS = {
    "num_samples", "sketch", "sketch_dim", "sketch_by_layer", "stride", "reduction", "tokens_per_batch", "seed",
}  # fmt: skip
_AUTO_FIELDS = {"max_num_samples", "min_reliability"}
# `num_samples: auto` begins with so many: fewer say next to nothing of a reliability.
FIRST_SAMPLES = 32


@dataclass(frozen=True)
class _Job:
    """A dataset's examples in the order in which they are sampled, where its read-out lies, and its key.

    `rows` holds all that may be sampled, and every prefix of it is a sample: resuming, and another process, take the
    same examples. Its even positions are the first half and its odd ones the second, so that halves grow by prefixes
    too.
    """

    name: str
    num_input_tokens: int
    rows: datasets.Dataset
    path: Path
    key: str

    def num_tokens(self, start: int = 0) -> int:
        return sum(map(len, self.rows["input_ids"][start:]))

    def load(self) -> GradientReadout | None:
        return load_readout(self.path, self.key)


def measure_gradients(
    prepared: Sequence[PreparedDataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    section: PlanSection,
    weights_sha256: str,
    folder: Path,
    worker: Worker,
    progress: Progress,
    peft: dict[str, Any] | None = None,
    root: Path = Path(),
    freeze: Sequence[str] = (),
) -> tuple[list[GradientReadout], float]:
    """The read-out of every dataset, in order, and the seconds this call took.

    With a fresh adapter on the model the gradients are the adapter's: A's are exactly zero, since B is, and B's are a
    random projection of the dense ones by A, which `sft.seed` draws and which is the same for every dataset.

    `freeze` names the modules that do not train (see [`load_model`]).

    Read-outs in `folder` from an earlier try are kept where base, tokens, loss and read-out are the same. Several
    workers of one launch share the rest; each returns when all are done. `folder` exists until the plan is finished.

    Every sample is measured in two disjoint halves, whose weighted mean is the gradient. With `num_samples: auto` it
    grows until the halves agree (`min_reliability`), up to `max_num_samples` or the dataset's end.

    Raises:
        ConfigError: the read-outs would not fit on the disk, or the passes into memory.
        MeritError: a gradient is not finite (names the dataset).
    """
    start = time.monotonic()
    parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
    sketch = plan_sketch(section, parameters)
    _check_disk(len(prepared), sketch.dim, folder)
    moments = _moments_key(prepared, args, section, root)
    jobs = [
        _Job(d.name, d.counts.num_input_tokens, _sample(d, section), readout_path(folder, d.name), key)
        for d in prepared
        for key in [_key(d, args, section, weights_sha256, peft, moments, freeze)]
    ]
    missing = [job for job in jobs if job.load() is None]
    not_done = {job.path for job in missing}

    def is_done(job: _Job) -> bool:
        if job.path in not_done and job.load() is not None:
            not_done.discard(job.path)
        return job.path not in not_done

    def num_done() -> int:
        return sum(map(is_done, jobs))

    if len(missing) < len(jobs):
        progress.note(f"going on: {len(jobs) - len(missing)} of {len(jobs)} gradients are there already")
    precondition = None
    if worker.shards and section.precondition != "none":
        raise ConfigError(
            f"plan.precondition={section.precondition} is measured on whole models, and this launch shards the model "
            "over processes. Use a config without FSDP or DeepSpeed, or leave it out."
        )
    if missing and section.precondition == "adam":
        precondition = adam_denominators(prepared, model, tokenizer, args, section, root, progress)
    tokens = sum(job.num_tokens() for job in missing)
    settings = _settings(model, missing, args, section, worker)
    if settings.low_memory and section.low_memory is None:
        progress.note("the gradients of all parameters would not fit beside the model: plan.low_memory is on")
    with progress.stage("Gradients", total=tokens, unit="tokens") as stage:
        # The largest first, so that no process is left alone with one at the end.
        ordered = sorted(missing, key=lambda job: (-job.num_input_tokens, job.name))
        for job in worker.share(folder, ordered, lambda job: job.path.stem, is_done):
            stage.item(f"{job.name} ({num_done() + 1} of {len(jobs)})")
            try:
                with open_loss(model, tokenizer, args, job.rows) as trainer:
                    readout = _read_in_halves(
                        trainer, job.rows, sketch, section, settings, stage.advance, precondition
                    )
            except MeritError as error:
                raise MeritError(f"dataset `{job.name}`: {error}") from error
            # Examples that `auto` needed not are done, as far as the bar is concerned.
            stage.advance(job.num_tokens(readout.num_samples))
            if worker.is_main or not worker.shards:
                save_readout(job.path, job.key, readout)

    worker.wait(until=lambda: num_done() == len(jobs) or not folder.exists(), alive=num_done)
    done_now = [job.load() for job in jobs]
    return [readout for readout in done_now if readout is not None], time.monotonic() - start


def plan_sketch(section: PlanSection, parameters: Sequence[tuple[str, int]]) -> Sketch:
    """The sketch of a plan over `parameters`; ConfigError where it is too short for its layers."""
    kind, dim, by_layer = section.sketch, section.sketch_dim, section.sketch_by_layer
    try:
        return make_sketch(kind, parameters, dim, section.stride, section.seed, by_layer)
    except ValueError as error:
        raise ConfigError(f"plan.sketch_dim={dim}: {error}. Raise it, or leave plan.sketch_by_layer out.") from error


def _settings(
    model: PreTrainedModel, jobs: Sequence[_Job], args: SFTConfig, section: PlanSection, worker: Worker
) -> GradientSettings:
    """How to run the passes so that they fit into memory; ConfigError where they cannot."""
    wanted = GradientSettings(section.tokens_per_batch, section.low_memory or False, section.gradient_checkpointing)
    sizes = []
    for job in jobs:
        lengths = [len(ids) for ids in job.rows["input_ids"]]
        loss_tokens = [sum(label != -100 for label in labels) for labels in job.rows["labels"]]
        for batch in batches_of(lengths, section.reduction, section.tokens_per_batch):
            sizes.append((len(batch) * max(lengths[i] for i in batch), sum(loss_tokens[i] for i in batch)))
    if not sizes:
        return wanted
    sharing = worker.world_size if worker.shards else 1
    autocast = 2 if args.bf16 or args.fp16 else None
    return fitting_settings(model, sizes, wanted, section.low_memory, sharing, autocast)


def keep_readouts(
    parent: PartitionPlan,
    prepared: Sequence[PreparedDataset],
    args: SFTConfig,
    section: PlanSection,
    folder: Path,
    peft: dict[str, Any] | None = None,
    root: Path = Path(),
) -> None:
    """Put a plan's stored gradients into `folder`, where [`measure_gradients`] finds them done.

    Raises:
        MeritError: a dataset of the plan is not what was planned.
    """
    known = {dataset.name: dataset for dataset in parent.datasets}
    kept = [dataset for dataset in prepared if dataset.name in known and parent.load_sketches() is not None]
    moments = _moments_key(prepared, args, section, root)
    base = parent.base
    for dataset, readout in zip(kept, stored_readouts(parent, [dataset.name for dataset in kept]), strict=True):
        check_against_plan(dataset, known[dataset.name])
        key = _key(dataset, args, section, base["weights_sha256"], peft, moments, base.get("freeze", ()))
        path = readout_path(folder, dataset.name)
        if load_readout(path, key) is None:
            save_readout(path, key, readout)


def check_sketches(plan: PartitionPlan) -> None:
    """Raises MeritError where the sketches of a plan that was made of gradients are missing or cut short."""
    if plan.load_sketches() is None and any(dataset.gradient_norm is not None for dataset in plan.datasets):
        raise MeritError(f"{plan.folder}: the plan's sketches are missing. Restore sketches.safetensors.")


def stored_readouts(plan: PartitionPlan, names: Sequence[str]) -> list[GradientReadout]:
    """The read-outs that a plan holds of its datasets `names`. What they cost was paid: 0 tokens."""
    sketches, firsts = plan.load_sketches(), plan.load_first_halves()
    place = {name: row for row, name in enumerate(plan.names)}
    found = []
    for name in names:
        assert sketches is not None
        row = place[name]
        planned = plan.datasets[row]
        assert planned.gradient_norm is not None
        assert planned.base_loss is not None
        readout = GradientReadout(
            sketches[row], planned.gradient_norm, planned.base_loss, planned.num_sampled,
            num_input_tokens=0, num_loss_tokens=0, num_batches=0,
        )  # fmt: skip
        if firsts is not None and planned.first_half_share is not None:
            readout = replace(
                readout, first_half=firsts[row], first_share=planned.first_half_share,
                split_half_cosine=planned.split_half_cosine, reliability=planned.reliability,
            )  # fmt: skip
        found.append(readout)
    return found


def _read_in_halves(
    trainer: SFTTrainer,
    rows: datasets.Dataset,
    sketch: Sketch,
    section: PlanSection,
    settings: GradientSettings,
    on_batch: Callable[[int], None],
    precondition: Mapping[str, torch.Tensor] | None = None,
) -> GradientReadout:
    """The gradient over `rows`, or over the prefix that `num_samples: auto` settles on, measured half by half."""
    adaptive = section.num_samples == "auto"
    halves: list[GradientReadout | None] = [None, None]
    done, size = 0, min(FIRST_SAMPLES, len(rows)) if adaptive else len(rows)
    while True:
        for parity in (0, 1):
            # Ascending, as the batching of equal lengths follows the order of the rows.
            positions = [position for position in range(done, size) if position % 2 == parity]
            if positions:
                chunk = dataset_gradient(
                    trainer, rows.select(positions), sketch, section.reduction, settings, on_batch, precondition
                )
                half = halves[parity]
                halves[parity] = chunk if half is None else combine(half, chunk, section.reduction)
        whole = join_halves(halves[0], halves[1], section.reduction)
        done = size
        if done == len(rows) or (whole.reliability or 0.0) >= section.min_reliability:
            return whole
        size = next_sample_size(done, whole.reliability or 0.0, section.min_reliability, len(rows))


def join_halves(first: GradientReadout | None, second: GradientReadout | None, reduction: str) -> GradientReadout:
    """The whole sample's read-out, with its first half and what the two halves say of its reliability.

    Raises:
        ValueError: there is no first half.
    """
    if first is None:
        raise ValueError("a sample without examples has no gradient")
    if second is None:
        return replace(first, first_half=first.sketch)
    share = _weight(first, reduction) / (_weight(first, reduction) + _weight(second, reduction))
    cosine, reliability = split_half(first.sketch, second.sketch, share)
    return replace(
        combine(first, second, reduction),
        first_half=first.sketch,
        first_share=share,
        split_half_cosine=cosine,
        reliability=reliability,
    )


def combine(a: GradientReadout, b: GradientReadout, reduction: str) -> GradientReadout:
    """The read-out over the examples of both, which share none.

    A mean gradient is the mean of its parts, weighted by loss tokens or by examples; so is its read-out, which is
    linear. The norm follows from both norms and the read-outs' cosine, whose error is the read-out's:
    about 1/√k of the product of the two norms.
    """
    weight = _weight(a, reduction) / (_weight(a, reduction) + _weight(b, reduction))
    cosine, _ = split_half(a.sketch, b.sketch, weight)
    square = (weight * a.norm) ** 2 + ((1 - weight) * b.norm) ** 2
    square += 2 * weight * (1 - weight) * cosine * a.norm * b.norm
    return GradientReadout(
        sketch=np.float32(weight) * a.sketch + np.float32(1 - weight) * b.sketch,
        norm=max(0.0, square) ** 0.5,
        loss=weight * a.loss + (1 - weight) * b.loss,
        num_samples=a.num_samples + b.num_samples,
        num_input_tokens=a.num_input_tokens + b.num_input_tokens,
        num_loss_tokens=a.num_loss_tokens + b.num_loss_tokens,
        num_batches=a.num_batches + b.num_batches,
    )


def _weight(readout: GradientReadout, reduction: str) -> int:
    return readout.num_loss_tokens if reduction == "token_mean" else readout.num_samples


def _sample(dataset: PreparedDataset, section: PlanSection) -> datasets.Dataset:
    """Rows for the gradient, drawn among those with a loss token by (seed, dataset) alone, in the order drawn."""
    # A row that an epoch takes twice is no second example.
    loss_tokens = (
        dataset.counts.loss_tokens if dataset.loaded.weight == 1 else count_tokens(dataset.distinct).loss_tokens
    )
    usable = np.flatnonzero(loss_tokens)
    limit = section.max_num_samples if section.num_samples == "auto" else section.num_samples
    order = np.random.default_rng(seed_of(section.seed, dataset.name)).permutation(len(usable))
    return dataset.distinct.select(usable[order[:limit]])


def _key(
    dataset: PreparedDataset,
    args: SFTConfig,
    section: PlanSection,
    weights_sha256: str,
    peft: dict[str, Any] | None,
    moments: dict[str, Any],
    freeze: Sequence[str],
) -> str:
    return canonical_sha256(
        {
            "base": weights_sha256,
            "tokens": format_digest(dataset.counts.digest),
            "fingerprint": dataset.loaded.fingerprint,
            "loss": {field: str(getattr(args, field)) for field in _LOSS_FIELDS},
            "plan": section.model_dump(
                include=_READOUT_FIELDS | (_AUTO_FIELDS if section.num_samples == "auto" else set())
            ),
            **({"peft": peft, "seed": args.seed} if peft else {}),
            **moments,
            **({"freeze": freeze} if freeze else {}),
        }
    )


def _moments_key(
    prepared: Sequence[PreparedDataset], args: SFTConfig, section: PlanSection, root: Path
) -> dict[str, Any]:
    """What second moments follow from, for the key of a read-out: the optimizer's file, or the whole mixture."""
    if section.precondition == "none":
        return {}
    if section.optimizer_state is not None:
        source: Any = state_sha256(root / section.optimizer_state)
    else:
        source = {
            "tokens": {dataset.name: format_digest(dataset.counts.digest) for dataset in prepared},
            "num_batches": section.precondition_batches,
            "batch_size": identity_fields(args)["effective_batch_size"],
        }
    return {"precondition": section.precondition, "moments": source, "epsilon": args.adam_epsilon}


def _check_disk(num_datasets: int, dim: int, folder: Path) -> None:
    """The read-outs lie on the disk twice for a moment, while planning and in the plan; each with its first half."""
    needed, free = 2 * 2 * 4 * num_datasets * dim, shutil.disk_usage(folder.parent.parent).free
    if needed > 0.9 * free:
        raise ConfigError(
            f"{num_datasets} read-outs of {dim:,} numbers need {needed / 1e9:,.1f} GB on disk, {free / 1e9:,.1f} GB "
            "are free. Use plan.sketch=count_sketch, a larger plan.stride, or another --output."
        )

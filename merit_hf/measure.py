"""The gradient read-out of every dataset of a mixture: resumable, and shared between planner processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.config import ConfigError, MeritError, PlanSection
from merit_hf.data import format_digest, seed_of
from merit_hf.gradients import GradientSettings, batches_of, dataset_gradient, sample_indices, trained_parameters
from merit_hf.memory import fitting_settings
from merit_hf.mixture import PreparedDataset, check_against_plan
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.progress import Progress
from merit_hf.readouts import GradientReadout, load_readout, readout_path, save_readout
from merit_hf.sft import open_loss
from merit_hf.sketch import Sketch, make_sketch
from merit_hf.workers import Worker

# What of the SFT settings changes a gradient without changing the tokens.
_LOSS_FIELDS = ("loss_type", "label_smoothing_factor", "router_aux_loss_coef", "bf16", "fp16", "model_init_kwargs")
_READOUT_FIELDS = {
    "num_samples", "sketch", "sketch_dim", "sketch_by_layer", "stride", "reduction", "tokens_per_batch", "seed",
}  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """A dataset's sample, where its read-out lies, and the key it is valid under."""

    name: str
    num_input_tokens: int
    rows: datasets.Dataset
    path: Path
    key: str

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
) -> tuple[list[GradientReadout], float]:
    """The read-out of every dataset, in order, and the seconds this call took.

    With a fresh adapter on the model the gradients are the adapter's: A's are exactly zero, since B is, and B's are a
    random projection of the dense ones by A, which `sft.seed` draws and which is the same for every dataset.

    Read-outs in `folder` from an earlier try are kept where base, tokens, loss and read-out are the same. Several
    workers of one launch share the rest; each returns when all are done. `folder` exists until the plan is finished.

    Raises:
        ConfigError: the read-outs would not fit on the disk, or the passes into memory.
        MeritError: a gradient is not finite (names the dataset).
    """
    start = time.monotonic()
    parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
    sketch = plan_sketch(section, parameters)
    _check_disk(len(prepared), sketch.dim, folder)
    jobs = [
        _Job(d.name, d.counts.num_input_tokens, _sample(d, section), readout_path(folder, d.name), key)
        for d in prepared
        for key in [_key(d, args, section, weights_sha256, peft)]
    ]
    missing = [job for job in jobs if job.load() is None]
    if len(missing) < len(jobs):
        progress.note(f"going on: {len(jobs) - len(missing)} of {len(jobs)} gradients are there already")
    tokens = sum(sum(map(len, job.rows["input_ids"])) for job in missing)
    settings = _settings(model, missing, section, worker)
    if settings.low_memory and section.low_memory is None:
        progress.note("the gradients of all parameters would not fit beside the model: plan.low_memory is on")
    with progress.stage("Gradients", total=tokens, unit="tokens") as stage:
        # The largest first, so that no process is left alone with one at the end.
        ordered = sorted(missing, key=lambda job: (-job.num_input_tokens, job.name))
        for job in worker.share(folder, ordered, lambda job: job.path.stem, lambda job: job.load() is not None):
            done = sum(other.load() is not None for other in jobs)
            stage.item(f"{job.name} ({done + 1} of {len(jobs)})")
            try:
                with open_loss(model, tokenizer, args, job.rows) as trainer:
                    readout = dataset_gradient(trainer, job.rows, sketch, section.reduction, settings, stage.advance)
            except MeritError as error:
                raise MeritError(f"dataset `{job.name}`: {error}") from error
            if worker.is_main or not worker.shards:
                save_readout(job.path, job.key, readout)

    def num_done() -> int:
        return sum(job.load() is not None for job in jobs)

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


def _settings(model: PreTrainedModel, jobs: Sequence[_Job], section: PlanSection, worker: Worker) -> GradientSettings:
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
    return fitting_settings(model, sizes, wanted, section.low_memory, worker.world_size if worker.shards else 1)


def keep_readouts(
    parent: PartitionPlan,
    prepared: Sequence[PreparedDataset],
    args: SFTConfig,
    section: PlanSection,
    folder: Path,
    peft: dict[str, Any] | None = None,
) -> None:
    """Put a plan's stored gradients into `folder`, where [`measure_gradients`] finds them done.

    Raises:
        MeritError: a dataset of the plan is not what was planned.
    """
    sketches = parent.load_sketches()
    rows = {dataset.name: (index, dataset) for index, dataset in enumerate(parent.datasets)}
    for dataset in prepared:
        if sketches is None or dataset.name not in rows:
            continue
        index, planned = rows[dataset.name]
        check_against_plan(dataset, planned)
        key = _key(dataset, args, section, parent.base["weights_sha256"], peft)
        path = readout_path(folder, dataset.name)
        if load_readout(path, key) is None:
            assert planned.gradient_norm is not None
            assert planned.base_loss is not None
            # What it cost was paid by the parent.
            readout = GradientReadout(
                sketches[index], planned.gradient_norm, planned.base_loss, planned.num_sampled,
                num_input_tokens=0, num_loss_tokens=0, num_batches=0,
            )  # fmt: skip
            save_readout(path, key, readout)


def _sample(dataset: PreparedDataset, section: PlanSection) -> datasets.Dataset:
    """Rows for the gradient, drawn among those with a loss token by (seed, dataset) alone."""
    usable = np.flatnonzero(dataset.counts.loss_tokens)
    chosen = sample_indices(len(usable), section.num_samples, seed_of(section.seed, dataset.name))
    return dataset.train.select(usable[chosen])


def _key(
    dataset: PreparedDataset, args: SFTConfig, section: PlanSection, weights_sha256: str, peft: dict[str, Any] | None
) -> str:
    return canonical_sha256(
        {
            "base": weights_sha256,
            "tokens": format_digest(dataset.counts.digest),
            "fingerprint": dataset.loaded.fingerprint,
            "loss": {field: str(getattr(args, field)) for field in _LOSS_FIELDS},
            "plan": section.model_dump(include=_READOUT_FIELDS),
            **({"peft": peft, "seed": args.seed} if peft else {}),
        }
    )


def _check_disk(num_datasets: int, dim: int, folder: Path) -> None:
    """The read-outs lie on the disk twice for a moment: while planning, and in the plan."""
    needed, free = 2 * 4 * num_datasets * dim, shutil.disk_usage(folder.parent.parent).free
    if needed > 0.9 * free:
        raise ConfigError(
            f"{num_datasets} read-outs of {dim:,} numbers need {needed / 1e9:,.1f} GB on disk, {free / 1e9:,.1f} GB "
            "are free. Use plan.sketch=count_sketch, a larger plan.stride, or another --output."
        )

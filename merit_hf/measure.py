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
from merit_hf.gradients import GradientSettings, dataset_gradient, sample_indices, trained_parameters
from merit_hf.mixture import PreparedDataset
from merit_hf.plan import canonical_sha256
from merit_hf.progress import Progress
from merit_hf.readouts import GradientReadout, load_readout, readout_path, save_readout
from merit_hf.sft import open_loss
from merit_hf.sketch import make_sketch
from merit_hf.workers import Worker

# What of the SFT settings changes a gradient without changing the tokens.
_LOSS_FIELDS = ("loss_type", "label_smoothing_factor", "router_aux_loss_coef", "bf16", "fp16", "model_init_kwargs")
_READOUT_FIELDS = {"num_samples", "sketch", "sketch_dim", "stride", "reduction", "tokens_per_batch", "seed"}


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
    freeze: Sequence[str] = (),
) -> tuple[list[GradientReadout], float]:
    """The read-out of every dataset, in order, and the seconds this call took.

    With a fresh adapter on the model the gradients are the adapter's: A's are exactly zero, since B is, and B's are a
    random projection of the dense ones by A, which `sft.seed` draws and which is the same for every dataset.

    `freeze` names the modules that do not train (see [`load_model`]).

    Read-outs in `folder` from an earlier try are kept where base, tokens, loss and read-out are the same. Several
    workers of one launch share the rest; each returns when all are done. `folder` exists until the plan is finished.

    Raises:
        ConfigError: the read-outs would not fit on the disk. MeritError: a gradient is not finite (names the dataset).
    """
    start = time.monotonic()
    parameters = [(name, parameter.numel()) for name, parameter in trained_parameters(model)]
    sketch = make_sketch(section.sketch, parameters, section.sketch_dim, section.stride, section.seed)
    _check_disk(len(prepared), sketch.dim, folder)
    jobs = [
        _Job(d.name, d.counts.num_input_tokens, _sample(d, section), readout_path(folder, d.name), key)
        for d in prepared
        for key in [_key(d, args, section, weights_sha256, peft, freeze)]
    ]
    missing = [job for job in jobs if job.load() is None]
    if len(missing) < len(jobs):
        progress.note(f"going on: {len(jobs) - len(missing)} of {len(jobs)} gradients are there already")
    tokens = sum(sum(map(len, job.rows["input_ids"])) for job in missing)
    with progress.stage("Gradients", total=tokens, unit="tokens") as stage:
        # The largest first, so that no process is left alone with one at the end.
        for job in sorted(missing, key=lambda job: (-job.num_input_tokens, job.name)):
            if not worker.claim(folder, job.path.stem):
                continue
            done = sum(other.load() is not None for other in jobs)
            stage.item(f"{job.name} ({done + 1} of {len(jobs)})")
            try:
                with open_loss(model, tokenizer, args, job.rows) as trainer:
                    readout = dataset_gradient(
                        trainer,
                        job.rows,
                        sketch,
                        section.reduction,
                        GradientSettings(section.tokens_per_batch),
                        stage.advance,
                    )
            except MeritError as error:
                raise MeritError(f"dataset `{job.name}`: {error}") from error
            save_readout(job.path, job.key, readout)

    def num_done() -> int:
        return sum(job.load() is not None for job in jobs)

    worker.wait(until=lambda: num_done() == len(jobs) or not folder.exists(), alive=num_done)
    done_now = [job.load() for job in jobs]
    return [readout for readout in done_now if readout is not None], time.monotonic() - start


def _sample(dataset: PreparedDataset, section: PlanSection) -> datasets.Dataset:
    """Rows for the gradient, drawn among those with a loss token by (seed, dataset) alone."""
    usable = np.flatnonzero(dataset.counts.loss_tokens)
    chosen = sample_indices(len(usable), section.num_samples, seed_of(section.seed, dataset.name))
    return dataset.train.select(usable[chosen])


def _key(
    dataset: PreparedDataset,
    args: SFTConfig,
    section: PlanSection,
    weights_sha256: str,
    peft: dict[str, Any] | None,
    freeze: Sequence[str],
) -> str:
    return canonical_sha256(
        {
            "base": weights_sha256,
            "tokens": format_digest(dataset.counts.digest),
            "fingerprint": dataset.loaded.fingerprint,
            "loss": {field: str(getattr(args, field)) for field in _LOSS_FIELDS},
            "plan": section.model_dump(include=_READOUT_FIELDS),
            **({"peft": peft, "seed": args.seed} if peft else {}),
            **({"freeze": freeze} if freeze else {}),
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

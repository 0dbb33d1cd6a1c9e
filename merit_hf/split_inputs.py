"""What a split looks at besides gradients, as CONFIG names it: an affinity, texts, parts of oversized datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.affinity import read_affinity
from merit_hf.checkpoint import weights_sha256
from merit_hf.choices import whole_name
from merit_hf.config import MeritConfig
from merit_hf.embeddings import dataset_texts, encoder_points, tfidf_points
from merit_hf.groups import dataset_size
from merit_hf.hub import resolve_model
from merit_hf.mixture import PreparedDataset, prepare_mixture, read_mixture
from merit_hf.oversized import oversized_parts, with_parts
from merit_hf.precondition import state_sha256
from merit_hf.progress import Progress

# The keys of `plan` that a plan's inputs have held from the start.
_FIRST_KEYS = frozenset(
    (
        "split", "num_groups", "num_samples", "sketch", "sketch_dim", "stride", "reduction", "center", "balance",
        "axes", "seed",
    )
)  # fmt: skip
# How the passes are run, which does not decide what comes out.
_PLACEMENT = {"tokens_per_batch", "low_memory", "gradient_checkpointing"}


def plan_inputs(config: MeritConfig) -> dict[str, Any]:
    """The settings of `plan` that decide a plan. Files count by what they hold.

    Keys that came later count only where they are set, so that plans from before are still those of their inputs.
    """
    section = config.plan
    changed = section.model_dump(exclude_defaults=True)
    values = {
        key: value
        for key, value in section.model_dump(exclude=_PLACEMENT).items()
        if key in _FIRST_KEYS or key in changed
    }
    if section.affinity is not None:
        values["affinity"] = hashlib.sha256((config.root / section.affinity).read_bytes()).hexdigest()
    if section.optimizer_state is not None:
        values["optimizer_state"] = state_sha256(config.root / section.optimizer_state)
    if section.embedding_model is not None:
        values["embedding_model"] = weights_sha256(_encoder(config, section.embedding_model))
    return values


def given_affinity(config: MeritConfig, names: Sequence[str]) -> np.ndarray | None:
    """The matrix of `plan.affinity` between datasets `names`, [T, T]; None where there is none.

    Raises:
        ConfigError: see [`read_affinity`].
    """
    if config.plan.affinity is None:
        return None
    parts = {spec.name: spec.part for spec in config.datasets}
    # Datasets that were left out, or cut, since the file was written have their rows in it.
    every = sorted({whole_name(name, part) for name, part in parts.items()})
    orders = (sorted(parts), every)
    return read_affinity(config.root / config.plan.affinity, names, [parts[name] for name in names], orders)


def text_points(
    config: MeritConfig, prepared: Sequence[PreparedDataset], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray | None:
    """Embeddings of the datasets' texts, [T, dim]; None where the split does not look at them.

    Raises:
        MeritError: there are no texts, or no encoder.
    """
    section = config.plan
    if section.split != "kmeans_text":
        return None
    texts = [dataset_texts(dataset, tokenizer, section.seed) for dataset in prepared]
    if section.embedding_model is None:
        return tfidf_points(texts, section.seed)
    return encoder_points(texts, _encoder(config, section.embedding_model))


def cut_oversized(
    config: MeritConfig,
    prepared: Sequence[PreparedDataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    progress: Progress,
) -> tuple[MeritConfig, list[PreparedDataset]]:
    """CONFIG and datasets with parts in place of those that outweigh every group, where `plan.split_oversized` is set.

    Parts are read and tokenised as any dataset is, so that training finds what was planned.
    """
    section = config.plan
    if not section.split_oversized:
        return config, list(prepared)
    sizes = {dataset.name: dataset_size(dataset, section.balance) for dataset in prepared}
    examples = {dataset.name: dataset.counts.num_examples for dataset in prepared}
    # A part is what a cut left; cutting it again would take rows of the whole.
    whole = {spec.name for spec in config.datasets if spec.part is None}
    parts = oversized_parts(sizes, examples, section.group_shares or [1.0] * config.num_groups)
    parts = {name: count for name, count in parts.items() if name in whole}
    if not parts:
        return config, list(prepared)
    config = with_parts(config, parts)
    progress.note(", ".join(f"`{name}` is cut into {count} parts" for name, count in parts.items()))
    specs = [spec for spec in config.datasets if whole_name(spec.name, spec.part) in parts]
    loaded, _ = read_mixture(specs, config.root, args, progress)
    cut, _ = prepare_mixture(loaded, model, tokenizer, args, progress)
    kept = [dataset for dataset in prepared if dataset.name not in parts]
    return config, sorted([*kept, *cut], key=lambda dataset: dataset.name)


def _encoder(config: MeritConfig, name: str) -> Path:
    return resolve_model(name, None, config.root, "plan.embedding_model")[0]

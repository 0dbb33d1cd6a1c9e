"""What the gradients of a mixture come to: cosines, axes, groups, trust, and the rows of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from merit_hf import partition
from merit_hf.config import MeritConfig, MeritError
from merit_hf.conflict import axis_bounds, conflict_matrix, sketch_error, structure_p_value
from merit_hf.data import format_digest
from merit_hf.groups import split_datasets
from merit_hf.mixture import PreparedDataset
from merit_hf.plan import PlannedDataset
from merit_hf.readouts import GradientReadout
from merit_hf.reliability import debias_cosines
from merit_hf.split_inputs import given_affinity, text_points
from merit_hf.trust import assess


@dataclass(frozen=True)
class Findings:
    """What a plan says of its datasets, before their groups' trainings are counted.

    Attributes:
        datasets: in the order of names, with their groups.
        matrix, explained, bounds, trust: as in [`PartitionPlan`].
    """

    datasets: list[PlannedDataset]
    matrix: np.ndarray | None
    explained: list[float]
    bounds: dict[str, Any]
    trust: dict[str, Any]


def partition_mixture(
    config: MeritConfig,
    prepared: Sequence[PreparedDataset],
    readouts: Sequence[GradientReadout],
    tokenizer: PreTrainedTokenizerBase,
) -> Findings:
    """Split a mixture by `plan.split`, and say how far the split can be trusted.

    Args:
        readouts: of `prepared`, in order; empty where the split needs no gradients.

    Raises:
        MeritError: a dataset has no gradient, or the split cannot be made.
    """
    names = [dataset.name for dataset in prepared]
    matrix, noted = _cosines(names, readouts, config.plan.debias)
    coordinates, explained, bounds = _axes(config, matrix, readouts)
    affinity = given_affinity(config, names)
    points = text_points(config, prepared, tokenizer)
    tags = {spec.name: spec.tag for spec in config.datasets}
    unbounded = config.plan.model_copy(update={"max_imbalance": None})

    def split_again(matrix: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        some = [prepared[i] for i in chosen]
        try:
            return split_datasets(some, tags, matrix, config.plan, config.num_groups)
        except MeritError:
            # Some groups of re-drawn samples cannot keep the bound that the plan's groups keep.
            return split_datasets(some, tags, matrix, unbounded, config.num_groups)

    looked_at = matrix if affinity is None else affinity
    groups = split_datasets(prepared, tags, looked_at, config.plan, config.num_groups, coordinates, points)
    trust = assess(readouts, names, groups, split_again, bounds, config.plan, _all_sampled(prepared, readouts))
    datasets = planned_datasets(config, prepared, readouts, groups, coordinates, trust.probability)
    return Findings(datasets, matrix, explained, bounds, trust.facts | noted)


def planned_datasets(
    config: MeritConfig,
    prepared: Sequence[PreparedDataset],
    readouts: Sequence[GradientReadout],
    groups: np.ndarray,
    coordinates: np.ndarray | None,
    probability: Sequence[float | None] | None = None,
) -> list[PlannedDataset]:
    """The rows of datasets.parquet. `coordinates`: [T, r]; None where the split needs no gradients."""
    specs = {spec.name: spec for spec in config.datasets}
    rows = []
    for index, dataset in enumerate(prepared):
        readout = readouts[index] if readouts else None
        spec, loaded = specs[dataset.name], dataset.loaded
        rows.append(
            PlannedDataset(
                name=dataset.name,
                group=int(groups[index]),
                tag=spec.tag,
                format=loaded.format,
                fingerprint=loaded.fingerprint,
                tokens_digest=format_digest(dataset.counts.digest),
                num_examples=dataset.counts.num_examples,
                num_input_tokens=dataset.counts.num_input_tokens,
                num_loss_tokens=dataset.counts.num_loss_tokens,
                num_dropped=dataset.num_dropped,
                num_truncated=dataset.num_truncated,
                num_sampled=readout.num_samples if readout else 0,
                gradient_norm=readout.norm if readout else None,
                base_loss=readout.loss if readout else None,
                coordinates=[] if coordinates is None else coordinates[index].tolist(),
                repo_id=loaded.repo_id,
                config=spec.config,
                split=spec.split if loaded.repo_id else None,
                revision=loaded.revision,
                split_half_cosine=readout.split_half_cosine if readout else None,
                reliability=readout.reliability if readout else None,
                first_half_share=readout.first_share if readout else None,
                group_probability=probability[index] if probability else None,
            )
        )
    return rows


def _cosines(
    names: Sequence[str], readouts: Sequence[GradientReadout], debias: str
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """C by `plan.debias`, and what of the correction is to be noted."""
    if not readouts:
        return None, {}
    matrix = _matrix(names, [readout.sketch for readout in readouts])
    if debias == "none":
        return matrix, {}
    matrix, plain, clipped = debias_cosines(matrix, [readout.reliability for readout in readouts])
    return matrix, {"debias": {"uncorrected": [names[i] for i in plain], "clipped_pairs": clipped}}


def _all_sampled(prepared: Sequence[PreparedDataset], readouts: Sequence[GradientReadout]) -> bool:
    """No dataset has examples left that a larger sample could take."""
    usable = [int(np.count_nonzero(dataset.counts.loss_tokens)) for dataset in prepared]
    return all(readout.num_samples >= count for readout, count in zip(readouts, usable, strict=False))


def _axes(
    config: MeritConfig, matrix: np.ndarray | None, readouts: Sequence[GradientReadout]
) -> tuple[np.ndarray | None, list[float], dict[str, Any]]:
    """Coordinates of the datasets, explained shares and bounds of the axes. Decomposes the matrix once."""
    if matrix is None:
        return None, [], {}
    section = config.plan
    num_axes = partition.num_axes_for(config.num_groups)
    shown = max(2, num_axes)
    coordinates, singular_values = partition.principal_axes(matrix, shown, section.center)
    explained = partition.explained_shares(matrix, singular_values, shown, section.center)
    error = sketch_error(len(matrix), len(readouts[0].sketch), section.sketch)
    bounds = axis_bounds(singular_values, num_axes, error)
    if all(readout.reliability is None for readout in readouts):
        # Without halves there is only this to go by. It takes one direction that all share for structure.
        p_value = structure_p_value(matrix, section.seed)
        verdict = "unknown" if p_value is None else "structure" if p_value <= 0.05 else "noise"
        bounds |= {"structure_p_value": p_value, "verdict": verdict}
    return coordinates, explained, bounds


def _matrix(names: Sequence[str], sketches: Sequence[np.ndarray]) -> np.ndarray:
    try:
        return conflict_matrix(sketches)
    except ValueError as error:
        zero = [name for name, sketch in zip(names, sketches, strict=True) if not np.any(sketch)]
        raise MeritError(f"datasets {', '.join(zero)} have no gradient at the base: {error}.") from error

"""What was measured → the content of diagnosis.json, but for its verdict. Pure arrays; keys: docs/diagnose.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merit_hf.diagnosis import basin
from merit_hf.diagnosis.basin import Draws, Point, Survey

NUM_TENSORS = 20
_LAYER = re.compile(r"(?:^|\.)((?:layers?|h|blocks?)\.\d+)\.")


@dataclass(frozen=True)
class HeldOut:
    """Losses on held-out rows.

    Attributes:
        points: P places, in the order of `nats`.
        nats: float64 [P, num_rows], a row's loss summed over its tokens. tokens: [num_rows].
        spans: {dataset: slice of its rows}. groups: {dataset: group}.
    """

    points: Sequence[Point]
    nats: np.ndarray
    tokens: np.ndarray
    spans: Mapping[str, slice]
    groups: Mapping[str, int]


@dataclass(frozen=True)
class Weights:
    """Where the checkpoints lie, tensor by tensor.

    Attributes:
        names, sizes: of the N tensors.
        labels: S checkpoints, the groups first. grams: [N, S, S] inner products of θ − θ0. base_squares: [N].
        curvatures: [K, N], the part of each tensor in d_kᵀ H d_k of the mean loss; None where not measured.
    """

    names: Sequence[str]
    sizes: np.ndarray
    labels: Sequence[str]
    grams: np.ndarray
    base_squares: np.ndarray
    curvatures: np.ndarray | None = None


@dataclass(frozen=True)
class Pair:
    """Losses of the same rows twice, whose difference (second − first) counts: nats [2, num_rows], tokens, spans."""

    nats: np.ndarray
    tokens: np.ndarray
    spans: Mapping[str, slice]


@dataclass
class _Sums:
    """Draws summed over datasets."""

    losses: Any = 0.0
    count: int = 0
    resampled: bool = False

    def add(self, losses: np.ndarray, num_rows: int) -> None:
        self.losses = self.losses + losses
        self.count += 1
        self.resampled = self.resampled or num_rows > 1

    def draws(self, points: Sequence[Point]) -> Draws:
        return Draws(points, self.losses / self.count, self.resampled)


@dataclass
class Analysis:
    """The parts of diagnosis.json that are computed from losses and weights."""

    overall: dict[str, Any] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


def analyse_losses(
    survey: Survey,
    held_out: HeldOut,
    training: Mapping[int, Pair],
    prompts: Mapping[int, Pair],
    num_bootstrap: int,
    seed: int = 0,
) -> Analysis:
    """Gain, ρ, barriers, changes, exclusions and perturbations: per dataset, over all, and of each group on its own.

    Args:
        training: by group, base and group on training rows of its datasets; a group may be missing.
        prompts: by group, the group on held-out rows of its datasets, and on their answers under other prompts.
    """
    result = Analysis()
    everything = _Sums()
    by_group = {group: _Sums() for group in survey.weights}
    others = {group: _Sums() for group in survey.weights}
    for number, (name, span) in enumerate(held_out.spans.items()):
        tokens = held_out.tokens[span]
        losses = basin.resample(held_out.nats[:, span], tokens, num_bootstrap, seed + number)
        everything.add(losses, len(tokens))
        group = held_out.groups[name]
        for one in survey.weights:
            (by_group if one == group else others)[one].add(losses, len(tokens))
        result.datasets[name] = {
            "group": group,
            "num_examples": len(tokens),
            "num_loss_tokens": int(tokens.sum()),
            **_entry(survey, Draws(held_out.points, losses, len(tokens) > 1)),
        }
    result.overall = _entry(survey, everything.draws(held_out.points))
    for group, sums in by_group.items():
        own: dict[str, Any] = {"held_out": None, "first_half": None, "second_half": None}
        if sums.count:
            own = basin.progress_of(survey, sums.draws(held_out.points), group)
        without = None
        if others[group].count and survey.several:
            without = basin.exclusions(survey, others[group].draws(held_out.points))[str(group)]
        result.groups.append(
            {
                "group": group,
                "own": {
                    **own,
                    "training": _difference(training.get(group), num_bootstrap, seed),
                    "prompts": _difference(prompts.get(group), num_bootstrap, seed),
                },
                "exclude": result.overall["exclude"].get(str(group)),
                "exclude_for_others": without,
            }
        )
    return result


def analyse_weights(survey: Survey, weights: Weights) -> dict[str, Any]:
    """Displacements, and which groups, layers and tensors carry the variance; with curvatures, also by what it costs.

    Returns:
        {"geometry", "layers", "tensors", "by_group": [{"displacement", …}], "by_gradient": predicted gain or None}.
    """
    shares = np.array(list(survey.weights.values()))
    num_groups = len(shares)
    total = basin.with_mean(weights.grams.sum(axis=0), shares)
    labels = [*weights.labels[:num_groups], "mean", *weights.labels[num_groups:]]
    order = [*range(num_groups), len(total) - 1, *range(num_groups, len(total) - 1)]
    total = total[np.ix_(order, order)]
    norms = np.sqrt(np.maximum(np.diagonal(total), 0.0))
    by_tensor = basin.variance(weights.grams[:, :num_groups, :num_groups], shares)
    parts = None if weights.curvatures is None else 0.5 * shares[:, None] * weights.curvatures
    tensors = _tensor_rows(weights, by_tensor.sum(axis=1), None if parts is None else parts.sum(axis=0))
    group_squares = by_tensor.sum(axis=0)
    group_curvature = [None] * num_groups if parts is None else basin.shares(parts.sum(axis=1))
    return {
        "geometry": {
            "labels": labels,
            "norms": norms.tolist(),
            "cosines": basin.cosines(total).tolist(),
            "base_norm": float(np.sqrt(weights.base_squares.sum())),
            "merged_from_mean": _distance(total, labels, "merged", "mean"),
            "line_position": survey.line_position,
        },
        "layers": _with_shares(_layer_rows(tensors)),
        "tensors": _with_shares(tensors)[:NUM_TENSORS],
        "by_group": [
            {
                "displacement": float(norms[k]),
                "distance_from_mean": float(np.sqrt(group_squares[k] / shares[k])),
                "variance_share": share,
                "curvature_share": group_curvature[k],
            }
            for k, share in enumerate(basin.shares(group_squares))
        ],
        "by_gradient": None if parts is None else float(parts.sum()),
    }


def layer_of(name: str) -> str:
    """`layers.3` of `model.layers.3.mlp.up_proj.weight`; a tensor outside the layers is its own."""
    found = _LAYER.search(name)
    return found[1] if found else name


def rounded(value: Any) -> Any:
    """Every number to 6 significant digits, numpy's as Python's, what is not finite as None."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _entry(survey: Survey, draws: Draws) -> dict[str, Any]:
    return {
        "loss": {label: float(draws.at(point)[0]) for label, point in survey.models().items()},
        "gain": basin.gain(survey, draws) if survey.several else None,
        "barriers": basin.barriers(survey, draws),
        "changes": basin.changes(survey, draws),
        "exclude": basin.exclusions(survey, draws),
        "perturbation": basin.perturbation(survey, draws),
    }


def _difference(pair: Pair | None, num_bootstrap: int, seed: int) -> dict[str, float | None] | None:
    if pair is None:
        return None
    sums = _Sums()
    for number, span in enumerate(pair.spans.values()):
        tokens = pair.tokens[span]
        sums.add(basin.resample(pair.nats[:, span], tokens, num_bootstrap, seed + number), len(tokens))
    draws = sums.draws([])
    return draws.estimate(draws.losses[:, 1] - draws.losses[:, 0])


def _distance(gram: np.ndarray, labels: Sequence[str], one: str, two: str) -> float | None:
    if one not in labels or two not in labels:
        return None
    i, j = labels.index(one), labels.index(two)
    return float(np.sqrt(max(0.0, gram[i, i] + gram[j, j] - 2 * gram[i, j])))


def _tensor_rows(weights: Weights, variance: np.ndarray, curvature: np.ndarray | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "tensor": name,
            "num_parameters": int(size),
            "variance": float(variance[index]),
            "curvature": None if curvature is None else float(curvature[index]),
        }
        for index, (name, size) in enumerate(zip(weights.names, weights.sizes, strict=True))
    ]
    return sorted(rows, key=lambda row: (-row["variance"], row["tensor"]))


def _layer_rows(tensors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    layers: dict[str, dict[str, Any]] = {}
    for row in sorted(tensors, key=lambda row: _natural(row["tensor"])):
        name = layer_of(row["tensor"])
        layer = layers.setdefault(name, {"layer": name, "num_parameters": 0, "variance": 0.0, "curvature": None})
        layer["num_parameters"] += row["num_parameters"]
        layer["variance"] += row["variance"]
        if row["curvature"] is not None:
            layer["curvature"] = (layer["curvature"] or 0.0) + row["curvature"]
    return list(layers.values())


def _with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    variance = basin.shares(np.array([row["variance"] for row in rows]))
    known = bool(rows) and rows[0]["curvature"] is not None
    curvature = basin.shares(np.array([row["curvature"] for row in rows])) if known else [None] * len(rows)
    return [
        {**row, "variance_share": share, "curvature_share": cost}
        for row, share, cost in zip(rows, variance, curvature, strict=True)
    ]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]

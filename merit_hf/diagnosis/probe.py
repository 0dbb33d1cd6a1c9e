"""Measure what a diagnosis needs: one model moved from point to point, every finished measurement kept.

Nothing is computed from the numbers here; `analysis` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from trl import SFTConfig

from merit_hf.adapters import ADAPTER_NAME, adapter_settings, is_adapter
from merit_hf.align import Checkpoint
from merit_hf.checkpoint import read_model_config, weights_sha256
from merit_hf.diagnosis.analysis import HeldOut, Pair, Weights
from merit_hf.diagnosis.basin import Point, Survey, with_mean
from merit_hf.diagnosis.interpolate import Mover
from merit_hf.diagnosis.losses import LossRows, RowLosses, Store, float32_settings, read_loss_rows, under_other_prompts
from merit_hf.diagnosis.renamed import under_the_models_names
from merit_hf.plan import PartitionPlan, canonical_sha256
from merit_hf.progress import Progress, Stage
from merit_hf.sft import build_args, load_checkpoint, load_tokenizer, open_loss
from merit_hf.versions import library_versions

# Rows of these kinds lie behind one another; a dataset's are named by kind and dataset.
_HELD_OUT, _TRAINING, _OTHER_PROMPTS = "held-out ", "training ", "other prompts "
# What else than weights and rows decides a loss.
_LOSS_FIELDS = ("loss_type", "label_smoothing_factor", "router_aux_loss_coef")
_VERSIONS = ("torch", "transformers", "trl")


@dataclass(frozen=True)
class Probed:
    """What was measured.

    Attributes:
        survey: as it was asked for, with the place of the line point.
        held_out: losses at all its points. weights: None before training.
        training: by group, base and group on training rows of its datasets. prompts: by group, the group on their
            held-out rows, as they are and with every answer under another row's prompt.
        skipped: {dataset: why}. cost: counts for diagnosis.json.
    """

    survey: Survey
    held_out: HeldOut
    training: dict[int, Pair]
    prompts: dict[int, Pair]
    weights: Weights | None
    skipped: dict[str, str]
    cost: dict[str, Any]


def probe(
    plan: PartitionPlan,
    sources: Mapping[str, Checkpoint],
    survey: Survey,
    store: Store,
    num_samples: int,
    forward_only: bool,
    tokens_per_batch: int,
    progress: Progress,
    scratch: Path,
) -> Probed:
    """Measure `survey` on the plan's held-out rows.

    Args:
        sources: `base`, `group-k` for the survey's groups, and `merged` and `joint` where they are given.
        scratch: a folder that does not last, for architectures whose tensors are renamed while loading.
    """
    args = build_args(float32_settings(plan))
    base = sources["base"].folder
    tokenizer = load_tokenizer(base, plan.base.get("chat_template"), plan.has_images)
    # Never quantised: adapters are moved in the space of the weights that they are merged into.
    model = load_checkpoint(base, base, args)
    held_out, training, skipped = read_loss_rows(plan, model, tokenizer, args, num_samples, progress)
    rows = _all_rows(held_out, training)
    inputs = _inputs(sources, args, progress)
    with (
        under_the_models_names(model, sources, args, scratch, progress) as renamed,
        open_loss(model, tokenizer, args, rows.rows) as trainer,
    ):
        # Only now: the trainer may have put the model on an accelerator.
        bench = _Bench(
            plan, Mover(model, renamed), RowLosses(trainer, rows, tokens_per_batch), rows, store, inputs,
            progress,
        )  # fmt: skip
        return bench.measure(survey, list(held_out), skipped, forward_only)


def _all_rows(held_out: Mapping[str, datasets.Dataset], training: Mapping[str, datasets.Dataset]) -> LossRows:
    parts = {_HELD_OUT + name: part for name, part in held_out.items()}
    parts |= {_TRAINING + name: part for name, part in training.items()}
    for name, part in held_out.items():
        mismatched = under_other_prompts(part)
        if mismatched is not None:
            parts[_OTHER_PROMPTS + name] = mismatched.cast(part.features)
    return LossRows.of(parts)


@dataclass(frozen=True)
class _Bench:
    plan: PartitionPlan
    mover: Mover
    losses: RowLosses
    rows: LossRows
    store: Store
    inputs: dict[str, Any]
    progress: Progress

    def measure(self, survey: Survey, names: list[str], skipped: dict[str, str], forward_only: bool) -> Probed:
        labels = [f"group-{k}" for k in survey.weights]
        labels += [label for label in ("merged", "joint") if label in self.inputs["sources"]]
        grams = squares = None
        if labels:
            grams, squares = self._grams(labels)
            if "joint" in labels:
                survey = replace(survey, line_position=_line_position(survey, grams.sum(axis=0), labels))
        groups = {dataset.name: dataset.group for dataset in self.plan.datasets}
        own = {k: [name for name in names if groups[name] == k] for k in survey.weights}
        gradients = [] if forward_only or not survey.several else list(survey.weights)
        indices = self.rows.indices([_HELD_OUT + name for name in names])
        cost, tokens = self._announce(survey, indices, own, gradients)
        with self.progress.stage("Measuring", total=tokens, unit="tokens") as stage:
            nats = [self._losses(point, indices, stage) for point in survey.points()]
            pairs = {k: self._own_pairs(k, members, stage) for k, members in own.items()}
            curvatures = np.array([self._curvature(survey, k, names, stage) for k in gradients])
        spans = {name: self.rows.spans[_HELD_OUT + name] for name in names}
        held_out = HeldOut(survey.points(), np.array(nats), self.rows.num_loss_tokens[indices], spans, groups)
        weights = None
        if grams is not None and squares is not None:
            found = curvatures if gradients else None
            weights = Weights(self.mover.names, self.mover.sizes, labels, grams, squares, found)
        training, prompts = (_present({k: pair[i] for k, pair in pairs.items()}) for i in range(2))
        cost["num_reused"] = self.store.num_reused
        return Probed(survey, held_out, training, prompts, weights, skipped, cost)

    def _announce(
        self, survey: Survey, indices: list[int], own: Mapping[int, list[str]], gradients: list[int]
    ) -> tuple[dict[str, Any], int]:
        """Say what it will cost, before any loss is measured; the counts, and the tokens that are left to do."""
        points = survey.points()
        tokens = sum(self.rows.lengths[index] for index in indices)
        digest = self.rows.digest(indices)
        ready = sum(self.store.has(self._key("losses", point, digest)) for point in points)
        back = f", and {2 * len(gradients)} gradients over the same rows" if gradients else ""
        self.progress.note(
            f"{len(points)} points × {len(indices)} held-out rows ({tokens:,} tokens) = {len(points) * tokens:,} "
            f"tokens of forward passes, {self._own_tokens(own):,} more on the groups' own rows{back}. {ready} points "
            "are measured already."
        )
        counts = {
            "num_points": len(points),
            "num_gradients": 2 * len(gradients),
            "num_rows": len(indices),
            "tokens_per_point": tokens,
        }
        return counts, tokens * (len(points) - ready + 2 * len(gradients)) + self._own_tokens(own)

    def _grams(self, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The inner products, and ‖θ0‖² behind them; kept in one array."""
        key = {
            "kind": "grams",
            **self.inputs,
            "sources": [self.inputs["sources"][label] for label in ["base", *labels]],
        }
        found = self.store.load(key)
        size = len(labels)
        if found is None:
            with self.progress.stage(
                "Comparing weights", total=int(self.mover.sizes.sum()), unit="parameters"
            ) as stage:
                stage.item(f"{size} checkpoints against the base")
                grams, squares = self.mover.grams(labels, stage.advance)
            found = self.store.save(key, np.concatenate([grams.reshape(len(grams), -1), squares[:, None]], axis=1))
        return found[:, :-1].reshape(-1, size, size), found[:, -1]

    def _losses(self, point: Point, indices: list[int], stage: Stage) -> np.ndarray:
        key = self._key("losses", point, self.rows.digest(indices))
        found = self.store.load(key)
        if found is not None:
            return found
        stage.item(_spoken(point))
        self.mover.move_to(point)
        return self.store.save(key, self.losses.measure(indices, stage.advance))

    def _own_pairs(self, group: int, members: list[str], stage: Stage) -> list[Pair | None]:
        """Base → group on training rows; on the group, held-out rows → their answers under other prompts."""
        base, trained = Point.of({"base": 1.0}), Point.of({f"group-{group}": 1.0})
        return [
            self._pair([(base, _TRAINING), (trained, _TRAINING)], members, stage),
            self._pair([(trained, _HELD_OUT), (trained, _OTHER_PROMPTS)], members, stage),
        ]

    def _pair(self, ends: list[tuple[Point, str]], members: list[str], stage: Stage) -> Pair | None:
        """Losses at two ends, (point, kind of rows), over the members that have such rows."""
        shared = [name for name in members if all(kind + name in self.rows.spans for _, kind in ends)]
        if not shared:
            return None
        numbers = [self.rows.indices([kind + name for name in shared]) for _, kind in ends]
        nats = [self._losses(point, indices, stage) for (point, _), indices in zip(ends, numbers, strict=True)]
        spans, start = {}, 0
        for name in shared:
            count = len(self.rows.indices([ends[0][1] + name]))
            spans[name] = slice(start, start + count)
            start += count
        return Pair(np.array(nats), self.rows.num_loss_tokens[numbers[0]], spans)

    def _own_tokens(self, own: Mapping[int, list[str]]) -> int:
        kinds = (_TRAINING, _TRAINING, _HELD_OUT, _OTHER_PROMPTS)
        names = [kind + name for members in own.values() for name in members for kind in kinds]
        return sum(self.rows.lengths[index] for index in self.rows.indices([n for n in names if n in self.rows.spans]))

    def _curvature(self, survey: Survey, group: int, names: list[str], stage: Stage) -> np.ndarray:
        """d_kᵀ H d_k of the mean loss over datasets, tensor by tensor, from two gradients; [num_tensors].

        H d ≈ [∇L(θ̄ + εd) − ∇L(θ̄ − εd)] / 2ε: no double backward, which fused attention lacks.
        """
        step = min(survey.epsilons)
        direction = {f"group-{k}": -weight for k, weight in survey.weights.items()}
        direction[f"group-{group}"] += 1.0
        spans = [self.rows.indices([_HELD_OUT + name]) for name in names]
        dots = []
        for sign in (1, -1):
            point = survey.around(group, sign * step)
            key = self._key("gradient", point, [self.rows.digest(span) for span in spans])
            key["direction"] = sorted((self.inputs["sources"][label], value) for label, value in direction.items())
            found = self.store.load(key)
            if found is None:
                stage.item(f"gradient at {_spoken(point)}")
                self.mover.move_to(point)
                self.losses.backward(spans, stage.advance)
                found = self.store.save(key, self.mover.gradient_dots(direction))
            dots.append(found)
        return (dots[0] - dots[1]) / (2 * step)

    def _key(self, kind: str, point: Point, rows: Any) -> dict[str, Any]:
        sources = self.inputs["sources"]
        place = sorted((sources[label], value) for label, value in point.coefficients)
        noise = None if point.noise is None else list(point.noise)
        return {**self.inputs, "kind": kind, "sources": place, "noise": noise, "rows": rows}


def _present(pairs: Mapping[int, Pair | None]) -> dict[int, Pair]:
    return {group: pair for group, pair in pairs.items() if pair is not None}


def _inputs(sources: Mapping[str, Checkpoint], args: SFTConfig, progress: Progress) -> dict[str, Any]:
    """What a measurement depends on besides its point and its rows."""
    hashes: dict[str, str] = {}
    with progress.stage("Hashing checkpoints", total=len(sources)) as stage:
        for label, source in sources.items():
            stage.item(label)
            hashes[label] = _source_sha256(source.folder, hashes.get("base", ""))
            stage.advance()
    versions = library_versions()
    return {
        "sources": hashes,
        "config": read_model_config(Path(sources["base"].folder)),
        "loss": {name: getattr(args, name, None) for name in _LOSS_FIELDS},
        "device": str(args.device.type),
        "versions": {name: versions.get(name) for name in _VERSIONS},
    }


def _source_sha256(folder: Path, base_sha256: str) -> str:
    """Hash of the weights that a source stands for; an adapter's are its factors, their scaling and the base's."""
    if not is_adapter(folder):
        return weights_sha256(folder)
    return canonical_sha256([base_sha256, weights_sha256(folder, ADAPTER_NAME), adapter_settings(folder)])


def _line_position(survey: Survey, gram: np.ndarray, labels: list[str]) -> float:
    """t at which base + t (joint − base) is as far from the base as the mean is."""
    mean = with_mean(gram, np.array(list(survey.weights.values())))[-1, -1]
    joint = gram[labels.index("joint"), labels.index("joint")]
    return float(np.sqrt(mean / joint)) if joint > 0 else 0.0


def _spoken(point: Point) -> str:
    if point.noise is not None:
        return f"base with noise {point.noise[0]:g} (seed {point.noise[1]})"
    return " + ".join(f"{value:.3g} {label}" if value != 1 else label for label, value in point.coefficients)

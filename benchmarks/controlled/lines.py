"""Losses and answers along θ0 + λ (θ − θ0), by the diagnosis' own way of moving a model through weight space."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merit_hf.align import align
from merit_hf.diagnosis.basin import Point
from merit_hf.diagnosis.interpolate import Mover
from merit_hf.diagnosis.losses import LossRows, RowLosses, float32_settings, read_loss_rows
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_checkpoint, load_tokenizer, open_loss

OTHER_TENSORS = "embeddings and last norm"


@dataclass(frozen=True)
class Line:
    """losses: {λ: {dataset: nats a loss token}}. saved: {λ: folder of the model there}."""

    losses: dict[float, dict[str, float]]
    saved: dict[float, Path]


class Way:
    """The base on its way to a model: it is moved in place, measured on the held-out rows of `plan`, and saved.

    Args:
        plan: the yardstick; its rows are those of `merit evaluate` with the same `num_samples`.

    Raises:
        MeritError: the model does not fit the base, or a loss or weight is not finite.
    """

    def __init__(self, plan: PartitionPlan, model_folder: Path) -> None:
        self.plan, base = plan, plan.base_folder()
        self.args = build_args(float32_settings(plan))
        self.model = load_checkpoint(base, base, self.args)
        sources = dict(zip(("base", "end"), align(base, [model_folder]), strict=True))
        self.mover = Mover(self.model, sources)

    def displacement(self) -> float:
        """‖θ − θ0‖ of the model that the way leads to."""
        return float(np.sqrt(self.mover.grams(["end"])[0].sum()))

    def move_to(self, position: float, names: Sequence[str] | None = None) -> None:
        self.mover.move_to(Point.of({"base": 1 - position, "end": position}), names)

    @contextmanager
    def measuring(self, num_samples: int, tokens_per_batch: int, progress: Progress) -> Iterator[None]:
        """Open for [`losses`], in float32."""
        self.tokenizer = load_tokenizer(self.plan.base_folder(), self.plan.base.get("chat_template"))
        held_out, _, _ = read_loss_rows(self.plan, self.model, self.tokenizer, self.args, num_samples, progress)
        self.rows = LossRows.of(held_out)
        with open_loss(self.model, self.tokenizer, self.args, self.rows.rows) as trainer:
            self._measured = RowLosses(trainer, self.rows, tokens_per_batch)
            yield

    def losses(self) -> dict[str, float]:
        nats = self._measured.measure(range(len(self.rows.lengths)))
        return {
            name: float(nats[span].sum() / self.rows.num_loss_tokens[span].sum())
            for name, span in self.rows.spans.items()
        }

    def save(self, folder: Path) -> Path:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder


def measure_line(
    plan: PartitionPlan,
    model_folder: Path,
    lambdas: Sequence[float],
    num_samples: int,
    tokens_per_batch: int,
    progress: Progress,
    saved_at: Sequence[float] = (),
    scratch: Path | None = None,
) -> Line:
    """Move the base towards a model and beyond, and measure on the way.

    Args:
        saved_at: λs at which the model is also saved, in `scratch`.
    """
    way = Way(plan, model_folder)
    losses: dict[float, dict[str, float]] = {}
    saved: dict[float, Path] = {}
    with way.measuring(num_samples, tokens_per_batch, progress):
        for position in sorted({*lambdas, *saved_at}):
            way.move_to(position)
            if position in lambdas:
                losses[position] = way.losses()
            if position in saved_at and scratch is not None:
                saved[position] = way.save(scratch / f"at-{position:g}")
    return Line(losses, saved)


def choose_by_layer(
    plan: PartitionPlan,
    model_folder: Path,
    lambdas: Sequence[float],
    mixture: Sequence[str],
    num_samples: int,
    tokens_per_batch: int,
    progress: Progress,
    output: Path,
) -> dict[str, float]:
    """Save the model in `output` with a λ of its own for every layer, chosen on the rows of `plan`.

    One pass from the last layer to the first, each at its best λ for the mean loss over `mixture`, while those before
    it stay at 1 and those behind it where they were put.

    Returns:
        {layer: λ}
    """
    way = Way(plan, model_folder)
    layers = defaultdict(list)
    for name in way.mover.names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        layers[f"layer {int(found[1]):02}" if found else OTHER_TENSORS].append(name)
    chosen = {}
    with way.measuring(num_samples, tokens_per_batch, progress):
        way.move_to(1.0)
        for layer in sorted(layers, reverse=True):
            losses = {}
            for position in lambdas:
                way.move_to(position, layers[layer])
                found_losses = way.losses()
                losses[position] = float(np.mean([found_losses[name] for name in mixture]))
            chosen[layer] = min(losses, key=lambda position: losses[position])
            way.move_to(chosen[layer], layers[layer])
        way.save(output)
    return chosen

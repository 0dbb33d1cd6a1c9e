"""Losses and answers along θ0 + λ (θ − θ0), by the diagnosis' own way of moving a model through weight space."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Line:
    """losses: {λ: {dataset: nats a loss token}}. saved: {λ: folder of the model there}."""

    losses: dict[float, dict[str, float]]
    saved: dict[float, Path]


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
    """Move the base towards a model and beyond, and measure the held-out rows of `plan` on the way, in float32.

    Args:
        plan: the yardstick; its rows are those of `merit evaluate` with the same `num_samples`.
        saved_at: λs at which the model is also saved, in `scratch`.

    Raises:
        MeritError: the model does not fit the base, or a loss or weight is not finite.
    """
    args = build_args(float32_settings(plan))
    base = plan.base_folder()
    tokenizer = load_tokenizer(base, plan.base.get("chat_template"))
    model = load_checkpoint(base, base, args)
    held_out, _, _ = read_loss_rows(plan, model, tokenizer, args, num_samples, progress)
    rows = LossRows.of(held_out)
    sources = dict(zip(("base", "end"), align(base, [model_folder]), strict=True))
    losses: dict[float, dict[str, float]] = {}
    saved: dict[float, Path] = {}
    with open_loss(model, tokenizer, args, rows.rows) as trainer:
        mover, measured = Mover(model, sources), RowLosses(trainer, rows, tokens_per_batch)
        for position in sorted({*lambdas, *saved_at}):
            mover.move_to(Point.of({"base": 1 - position, "end": position}))
            if position in lambdas:
                nats = measured.measure(range(len(rows.lengths)))
                losses[position] = {
                    name: float(nats[span].sum() / rows.num_loss_tokens[span].sum())
                    for name, span in rows.spans.items()
                }
            if position in saved_at and scratch is not None:
                saved[position] = scratch / f"at-{position:g}"
                model.save_pretrained(saved[position])
                tokenizer.save_pretrained(saved[position])
    return Line(losses, saved)


def measure_displacement(plan: PartitionPlan, model_folder: Path) -> float:
    """‖θ − θ0‖ of a model.

    Raises:
        MeritError: it does not fit the base, or a weight is not finite.
    """
    base = plan.base_folder()
    model = load_checkpoint(base, base, build_args(float32_settings(plan)))
    mover = Mover(model, dict(zip(("base", "end"), align(base, [model_folder]), strict=True)))
    return float(np.sqrt(mover.grams(["end"])[0].sum()))

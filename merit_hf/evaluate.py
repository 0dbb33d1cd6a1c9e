"""Held-out loss of several models on every dataset of a plan, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.config import ConfigError
from merit_hf.data import seed_of
from merit_hf.gradients import batch_by_tokens, sample_indices
from merit_hf.mixture import plan_specs, prepare_dataset, read_mixture
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sft import build_args, collate, load_checkpoint, load_tokenizer, loss_sum, open_loss

EVALUATION_NAME = "evaluation.json"


def evaluate_models(
    plan: PartitionPlan,
    models: Mapping[str, Path],
    num_samples: int = 200,
    tokens_per_batch: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """SFT's loss on held-out rows: the token mean of every dataset, in nats, for every model.

    Args:
        plan ([`PartitionPlan`]): names the datasets; their held-out rows are tokenised as for training.
        models (`dict`): {label: folder of a checkpoint}.
        num_samples (`int`, *optional*, defaults to `200`): at most so many held-out rows a dataset.
        tokens_per_batch (`int`, *optional*, defaults to `4096`): padded tokens in a batch; does not change the losses.
        progress ([`Progress`], *optional*): where to show it.

    Returns:
        {"metric", "plan_sha256", "models": [label, …], "datasets": {name: {"group", "num_examples", "num_loss_tokens",
        "loss": {label: …}}}, "mean": {label: unweighted mean over the datasets}}.

    Raises:
        ConfigError: no dataset has held-out rows.
    """
    progress = progress or Progress()
    base = plan.base_folder()
    args = build_args(plan.config["sft"])
    tokenizer = load_tokenizer(base, plan.base.get("chat_template"))
    specs, root = plan_specs(plan, plan.names)
    loaded, _ = read_mixture(specs, root, args, progress)
    losses: dict[str, dict[str, float]] = {}
    rows: dict[str, datasets.Dataset] = {}
    for label, folder in models.items():
        model = load_checkpoint(folder, base, args)
        if not rows:
            rows = _held_out(loaded, model, tokenizer, args, num_samples)
        losses[label] = _losses(label, model, tokenizer, args, rows, tokens_per_batch, progress)
        del model
    groups = {dataset.name: dataset.group for dataset in plan.datasets}
    return {
        "metric": "held-out SFT loss, nats a token",
        "plan_sha256": plan.sha256,
        "models": list(models),
        "datasets": {
            name: {
                "group": groups[name],
                "num_examples": len(rows[name]),
                "num_loss_tokens": _num_loss_tokens(rows[name]),
                "loss": {label: losses[label][name] for label in models},
            }
            for name in rows
        },
        "mean": {label: float(np.mean([losses[label][name] for name in rows])) for label in models},
    }


def save_evaluation(evaluation: dict[str, Any], folder: Path) -> Path:
    """Write evaluation.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EVALUATION_NAME
    path.write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    return path


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """Datasets down, models across; bold is the lowest loss, underlined the dataset's own group."""
    labels = evaluation["models"]
    table = Table(title=f"{evaluation['metric']} (lower is better; bold: lowest, underlined: own group)")
    table.title_justify = "left"
    table.add_column("dataset", no_wrap=True)
    for label in ("group", *labels):
        table.add_column(label, justify="right", no_wrap=True)
    for name, row in evaluation["datasets"].items():
        lowest = min(row["loss"].values())
        cells = []
        for label in labels:
            style = "bold " if row["loss"][label] == lowest else ""
            style += "underline" if label == f"group-{row['group']}" else ""
            cells.append(Text(f"{row['loss'][label]:.3f}", style))
        table.add_row(Text(name), str(row["group"]), *cells)
    table.add_section()
    table.add_row("mean", "", *(f"{evaluation['mean'][label]:.3f}" for label in labels))
    return table


def _held_out(
    loaded: Sequence[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    num_samples: int,
) -> dict[str, datasets.Dataset]:
    rows = {}
    for dataset in loaded:
        if dataset.eval is None:
            continue
        held_out = prepare_dataset(dataset, model, tokenizer, args).eval
        if held_out is not None:
            rows[dataset.name] = held_out.select(
                sample_indices(len(held_out), num_samples, seed_of("evaluate", dataset.name))
            )
    if not rows:
        raise ConfigError("no dataset has held-out rows. Give `eval_path`, `eval_split` or `eval_fraction`.")
    return rows


def _losses(
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    rows: Mapping[str, datasets.Dataset],
    tokens_per_batch: int,
    progress: Progress,
) -> dict[str, float]:
    losses = {}
    total = sum(sum(map(len, held_out["input_ids"])) for held_out in rows.values())
    with progress.stage(f"Evaluating {label}", total=total, unit="tokens") as stage:
        for number, (name, held_out) in enumerate(rows.items(), 1):
            stage.item(f"{name} ({number} of {len(rows)})")
            lengths = [len(ids) for ids in held_out["input_ids"]]
            nats = 0.0
            with open_loss(model, tokenizer, args, held_out) as trainer, torch.no_grad():
                for indices in batch_by_tokens(lengths, tokens_per_batch):
                    nats += float(loss_sum(trainer, collate(trainer, held_out, indices)))
                    stage.advance(sum(lengths[i] for i in indices))
            losses[name] = nats / max(1, _num_loss_tokens(held_out))
    return losses


def _num_loss_tokens(rows: datasets.Dataset) -> int:
    return sum(sum(label != -100 for label in labels[1:]) for labels in rows["labels"])

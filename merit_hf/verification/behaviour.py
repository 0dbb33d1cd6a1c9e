"""Does a group checkpoint do better than the base on its own datasets? The check that needs data and forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf.config import MeritError
from merit_hf.gradients import batch_by_tokens, sample_indices
from merit_hf.loss import loss_sum
from merit_hf.mixture import prepare_group
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.seeds import seed_of
from merit_hf.sft import (
    build_args,
    chat_template_sha256,
    collate,
    load_checkpoint,
    load_model,
    load_tokenizer,
    open_loss,
)
from merit_hf.verification.checks import Check, compare, shorten
from merit_hf.vision import text_tokenizer

# Training and saving change these without changing what the weights mean.
_LOOSE_CONFIG = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "architectures",
    # TRL writes down how it trained a router.
    "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip


def side_checks(plan: PartitionPlan, folder: Path, base: Path) -> list[Check]:
    """Config, tokenizer and chat template are the base's: what the weights were trained to be used with.

    Both sides are read by the libraries here, so that other versions' spelling makes no difference. No code in the
    checkpoint is run.
    """
    checks: list[Check] = []
    try:
        # An adapter has no config of its own; the base's is used.
        pair = (base, folder if (folder / "config.json").exists() else base)
        ours, theirs = (_config(path) for path in pair)
        changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        expected = {key: ours.get(key) for key in changed[:3]} or "as the base's"
        found = {key: theirs.get(key) for key in changed[:3]} or "as the base's"
        checks.append(compare("model config", expected, found, not changed))
    except Exception as error:
        # The file is a stranger's, and the library answers nonsense in it with whatever it stumbles over.
        checks.append(Check("model config", "as the base's", shorten(str(error)), False))
    try:
        tokenizer, base_tokenizer = (load_tokenizer(path, images=plan.has_images) for path in (folder, base))
        same = _vocabulary(text_tokenizer(tokenizer)) == _vocabulary(text_tokenizer(base_tokenizer))
        template = chat_template_sha256(tokenizer)
    except Exception as error:
        return [*checks, Check("tokenizer", "as the base's", shorten(str(error)), False)]
    return [
        *checks,
        Check("tokenizer", "the base's vocabulary and merges", "the same" if same else "others", same),
        compare("chat template in the files", plan.base["chat_template_sha256"], template),
    ]


def _config(folder: Path) -> dict[str, Any]:
    """Every setting that means something, by its dotted name: models of several parts have a config in the config."""
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).to_dict()
    return dict(_settings(config, ""))


def _settings(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _LOOSE_CONFIG:
            continue
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def loss_check(
    plan: PartitionPlan, number: int, folder: Path, num_samples: int = 64, progress: Progress | None = None
) -> Check:
    """Mean held-out loss over the group's datasets: the checkpoint's must be below the base's.

    Args:
        num_samples: at most so many rows a dataset. Where a dataset has no held-out rows, rows that were trained on.

    Raises:
        ConfigError: a dataset is not on this machine. MeritError: the data here are not the planned ones.
    """
    progress = progress or Progress()
    base = plan.base_folder()
    args = build_args(plan.config["sft"])
    tokenizer = load_tokenizer(base, plan.base.get("chat_template"), plan.has_images)
    model = load_model(base, args)
    rows, trained_on = _sample_rows(plan, number, model, tokenizer, args, num_samples, progress)
    before = _losses(model, tokenizer, args, rows, progress, "base")
    del model
    try:
        model = load_checkpoint(folder, base, args)
    except MeritError as error:
        return Check("held-out loss", f"below the base's {_mean(before):.4f}", shorten(str(error)), False)
    after = _losses(model, tokenizer, args, rows, progress, f"group {number}")
    worst = max(rows, key=lambda name: after[name] - before[name])
    note = f"; rows of {', '.join(trained_on)} were trained on" if trained_on else ""
    return Check(
        "held-out loss",
        f"below the base's {_mean(before):.4f}",
        shorten(f"{_mean(after):.4f}; least gain on {worst}: {before[worst]:.4f} → {after[worst]:.4f}")
        + shorten(note),
        _mean(after) < _mean(before),
    )


def _sample_rows(
    plan: PartitionPlan,
    number: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    num_samples: int,
    progress: Progress,
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    rows, trained_on = {}, []
    for dataset in prepare_group(plan, number, model, tokenizer, args, progress):
        pool = dataset.eval
        if pool is None:
            pool = dataset.train
            trained_on.append(dataset.name)
        rows[dataset.name] = pool.select(sample_indices(len(pool), num_samples, seed_of("behaviour", dataset.name)))
    return rows, trained_on


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    rows: dict[str, datasets.Dataset],
    progress: Progress,
    label: str,
) -> dict[str, float]:
    losses = {}
    total = sum(sum(map(len, sample["input_ids"])) for sample in rows.values())
    with progress.stage(f"Loss of {label}", total=total, unit="tokens") as stage:
        for name, sample in rows.items():
            stage.item(name)
            lengths = [len(ids) for ids in sample["input_ids"]]
            nats = 0.0
            with open_loss(model, tokenizer, args, sample) as trainer, torch.no_grad():
                for indices in batch_by_tokens(lengths, 4096):
                    nats += float(loss_sum(trainer, collate(trainer, sample, indices)))
                    stage.advance(sum(lengths[i] for i in indices))
            losses[name] = nats / max(
                1, sum(sum(label != -100 for label in labels[1:]) for labels in sample["labels"])
            )
    return losses


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> object:
    """What turns text into ids and back, without the settings that a training leaves in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    import json

    content = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("truncation", "padding", "version")}

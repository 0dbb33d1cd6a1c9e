"""mix.json and mix.parquet beside a group checkpoint: which rows it was trained on, and in which order.

rows = datasets.load_dataset(...).select(mix["row"])     # of each dataset; nothing of ours is needed
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from trl import SFTConfig

from merit_hf.ledger import epoch_order
from merit_hf.mixture import PreparedDataset
from merit_hf.plan import PartitionPlan

SCHEMA_VERSION = 1
_SAMPLER = "accelerate.data_loader.SeedableRandomSampler"


def write_mix(
    plan: PartitionPlan, group: int, prepared: Sequence[PreparedDataset], num_rows: int, args: SFTConfig, folder: Path
) -> None:
    """Write the mix of a group's training into `folder`.

    mix.parquet has a row for every example of an epoch, in the order in which the trainer is given them: `dataset`,
    `row` (its place in the dataset's file or split, from 0), `num_input_tokens`, `num_loss_tokens`. mix.json says
    where each dataset comes from, what its share is, and how the Trainer orders the examples.

    Args:
        prepared: the group's datasets. num_rows: what the trainer holds of them; fewer than examples where it packs.
        args: of the training.
    """
    table = pa.table(
        {
            "dataset": pa.array([d.name for d in prepared for _ in d.mix]).dictionary_encode(),
            "row": np.concatenate([d.loaded.source[np.asarray(d.kept, dtype=np.int64)][d.mix] for d in prepared]),
            "num_input_tokens": np.concatenate([d.counts.input_tokens for d in prepared]),
            "num_loss_tokens": np.concatenate([d.counts.loss_tokens for d in prepared]),
        }
    )
    pq.write_table(table, folder / "mix.parquet")
    planned = plan.group(group)
    content = {
        "schema_version": SCHEMA_VERSION,
        "plan_sha256": plan.sha256,
        "group": group,
        "group_sha256": planned.group_sha256,
        "datasets": [_entry(plan, dataset, planned.num_input_tokens) for dataset in prepared],
        "num_examples_an_epoch": planned.num_examples,
        "num_steps": planned.num_steps,
        "order": _order(plan, group, num_rows, args),
    }
    (folder / "mix.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _entry(plan: PartitionPlan, dataset: PreparedDataset, total: int) -> dict[str, Any]:
    spec = next(entry for entry in plan.config["datasets"] if entry["name"] == dataset.name)
    loaded, counts = dataset.loaded, dataset.counts
    return {
        "name": dataset.name,
        "repo_id": loaded.repo_id,
        "config": spec["config"],
        "split": spec["split"],
        "revision": loaded.revision,
        "fingerprint": loaded.fingerprint,
        "weight": loaded.weight,
        "num_rows": len(dataset.distinct),
        "num_examples_an_epoch": counts.num_examples,
        "num_input_tokens_an_epoch": counts.num_input_tokens,
        "num_loss_tokens_an_epoch": counts.num_loss_tokens,
        "share_of_tokens": counts.num_input_tokens / total,
    }


def _order(plan: PartitionPlan, group: int, num_rows: int, args: SFTConfig) -> dict[str, Any]:
    """How the Trainer orders what it holds; with the sha256 of each epoch's indices (int64, little-endian)."""
    order: dict[str, Any] = {
        "num_rows": num_rows,
        "packing": args.packing_strategy if args.packing else None,
        "shuffle_dataset": args.shuffle_dataset,
        "strategy": args.train_sampling_strategy,
    }
    if args.train_sampling_strategy not in ("random", "sequential"):
        return order
    # Of all processes together, which `args` know only their own part of.
    device = plan.sft.get("device_batch_size", 1)
    an_epoch = max(1, math.ceil(num_rows // device * device / plan.sft["effective_batch_size"]))
    num_epochs = math.ceil(plan.group(group).num_steps / an_epoch)
    orders = (epoch_order(num_rows, args, epoch) for epoch in range(num_epochs))
    return {
        **order,
        "sampler": _SAMPLER if args.train_sampling_strategy == "random" else "none",
        "data_seed": args.data_seed,
        "epochs_sha256": [hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest() for indices in orders],
    }

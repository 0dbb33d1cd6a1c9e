"""The tiny LLaVA and tasks of recipes/llava-tiny, as folders for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_llava
import yaml


def make_vl_mixture(folder: Path, count: int = 11, tasks: tuple[str, ...] = tuple(make_llava.TASKS)) -> Path:
    """An untrained base and a CONFIG over the recipe's tasks: images and text. Returns CONFIG's path."""
    make_llava.make_base(folder / "base")
    entries: list[dict[str, Any]] = []
    for name in tasks:
        path = make_llava.write_task(name, count, folder / "data")
        held_out = make_llava.write_task(name, 4, folder / "data", seed=1, suffix="_eval")
        entries.append({"name": name, "path": f"data/{path.name}", "eval_path": f"data/{held_out.name}"})
    config = {
        "base": {"model_name_or_path": "base"},
        "datasets": entries,
        "plan": {"num_groups": 2, "num_samples": 8, "sketch_dim": 4096},
        "sft": {
            "learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": None,
            "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        },
    }  # fmt: skip
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path

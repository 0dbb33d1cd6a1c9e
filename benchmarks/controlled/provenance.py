"""What a result is of: its settings, what was fixed before it, the repository's commit, the machine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from experiment import Experiment


def digest(experiment: Experiment) -> str:
    """Of all that decides a result: everything but seeds, arms and learning rates to be tried, which may grow."""
    content = experiment.model_dump(
        mode="json", exclude={"seeds", "arms", "tune", "outcome", "gates", "conditions", "lines", "claims", "question"}
    )
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def fixed_beforehand(experiment: Experiment) -> dict[str, Any]:
    """What may not change any more once cells have been run; arms and seeds may be added."""
    fixed = experiment.model_dump(mode="json", include={"outcome", "gates", "lines"})
    # Pairs may be added with the arms that they name.
    pairs = {f"outcome.compare.{ours}.{theirs}": True for ours, theirs in fixed["outcome"].pop("compare")}
    arms = {
        f"arms.{arm.name}": arm.model_dump(mode="json", exclude={"diagnose", "plan_seeds", "order_seeds"})
        for arm in experiment.arms
    }
    return {**fixed, **pairs, **arms}


def commit() -> str:
    """The repository's commit, marked where files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")


def machine() -> str:
    """In words, without a name."""
    import torch

    if torch.cuda.is_available():
        return f"one {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

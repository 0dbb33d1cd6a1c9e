"""Conflict-aware splitting, independent fine-tuning and one weight merge, for the Hugging Face ecosystem."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit_hf.callback import MeritCallback as MeritCallback
    from merit_hf.config import ConfigError as ConfigError
    from merit_hf.config import MeritConfig as MeritConfig
    from merit_hf.config import MeritError as MeritError
    from merit_hf.diagnosis.diagnose import diagnose as diagnose
    from merit_hf.evaluation.evaluate import evaluate_models as evaluate_models
    from merit_hf.extend import extend_plan as extend_plan
    from merit_hf.group_merge import merge_groups as merge_groups
    from merit_hf.plan import PartitionPlan as PartitionPlan
    from merit_hf.planner import MeritPlanner as MeritPlanner
    from merit_hf.training import train_group as train_group
    from merit_hf.verification.verify import verify_checkpoint as verify_checkpoint

# Imported when first used: `merit --help` and reading a config need no torch.
_WHERE = {
    "ConfigError": "config",
    "MeritCallback": "callback",
    "MeritConfig": "config",
    "MeritError": "config",
    "MeritPlanner": "planner",
    "PartitionPlan": "plan",
    "diagnose": "diagnosis.diagnose",
    "evaluate_models": "evaluation.evaluate",
    "extend_plan": "extend",
    "merge_groups": "group_merge",
    "train_group": "training",
    "verify_checkpoint": "verification.verify",
}
__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)

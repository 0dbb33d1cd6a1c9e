"""What the fork server of `jobs` imports, so that no job has to."""

import torch

import merit_hf.cli
import merit_hf.evaluation.evaluate
import merit_hf.group_merge
import merit_hf.planner
import merit_hf.training

torch.set_num_threads(1)
__all__ = ["merit_hf"]

"""A model sharded over two processes (FSDP2 on gloo): the plan of one process, and half the weights."""

from __future__ import annotations

import json
from pathlib import Path

import jobs
import numpy as np
import pytest
from tiny import make_mixture

from merit_hf.plan import PartitionPlan
from merit_hf.readouts import open_sketches

FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_state_dict_type: FULL_STATE_DICT}
num_machines: 1
num_processes: 2
mixed_precision: "no"
main_training_function: main
"""
# What a process holds of the model while it plans, and whether it is really sharded.
LOOK = """
import json, sys
import torch
from torch.distributed.fsdp import FSDPModule
from merit_hf import gradients
plain = gradients._Reader.finish
def look(reader):
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for _, p in reader._parameters)
    whole = sum(p.numel() for _, p in reader._parameters)
    with open(f"seen-{torch.distributed.get_rank()}.json", "w") as file:
        json.dump({"local": local, "whole": whole, "world": torch.distributed.get_world_size()}, file)
    return plain(reader)
gradients._Reader.finish = look
from merit_hf.planner import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["plan.sketch=exact", "sft.packing=true", "plan.reduction=example_mean"]])
def test_a_sharded_model_makes_the_plan_of_a_whole_one(more: list[str], tmp_path: Path) -> None:
    # 9 rows and 16 rows in small batches: one process runs out of batches before the other.
    config = make_mixture(tmp_path, ("copy", "reverse", "count"), count=9, tokens_per_batch=60)
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    (tmp_path / "look.py").write_text(LOOK)
    alone = jobs.Job(jobs.plan, [config, tmp_path / "alone", more], tmp_path / "log")
    assert alone.wait() == 0, alone.output
    done = jobs.launch(
        ["--config_file", tmp_path / "fsdp.yaml", tmp_path / "look.py", config, *more, "--output", tmp_path / "plan",
         "--num-processes", 2], tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (PartitionPlan.from_pretrained(tmp_path / name) for name in ("alone", "plan"))
    assert two.sha256 == one.sha256
    first, second = (open_sketches(tmp_path / name / "sketches.safetensors") for name in ("alone", "plan"))
    assert np.abs(first - second).max() < 1e-5 * np.abs(first).max()
    for before, after in zip(one.datasets, two.datasets, strict=True):
        assert after.gradient_norm == pytest.approx(before.gradient_norm, rel=1e-5)
        assert after.base_loss == pytest.approx(before.base_loss, rel=1e-6)
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen-{rank}.json").read_text())
        assert seen["world"] == 2
        # An uneven first dimension leaves one slice a little larger than the other.
        assert 0.45 < seen["local"] / seen["whole"] < 0.55

"""Honest trainings of many kinds raise no alarm, and stay away from the limits by the margins that are stated here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, launch
from safetensors.torch import load_file, save_file
from tiny import as_chat, make_mixture, task_rows, write_jsonl

from merit_hf.config import MeritConfig
from merit_hf.manifest import hash_files
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.training import train_group
from merit_hf.verification.movement import measure_movement, step_bound
from merit_hf.verification.verify import verify_checkpoint

pytestmark = pytest.mark.slow
TASKS = ("copy", "reverse", "first", "upper")
QUIET = Progress(quiet=True)
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "small rate": ("sft.learning_rate=5e-5", "sft.seed=1"),
    "large rate": ("sft.learning_rate=1e-2", "sft.seed=2"),
    "sgd": ("sft.optim=sgd", "sft.learning_rate=0.3"),
    "strong decay": ("sft.weight_decay=0.5", "sft.lr_scheduler_type=cosine", "sft.seed=3"),
    "16 bits throughout": ('sft.model_init_kwargs={"dtype": "bfloat16"}', "sft.learning_rate=1e-2"),
}
# LoRA: verified and compared in test_peft.py and test_adapters.py.


def plan_of(folder: Path, *overrides: str) -> PartitionPlan:
    """Four groups of a task each; `upper` has a third of the rows of the others, so a third of their steps."""
    path = make_mixture(folder, TASKS, count=48, split="by_tag", num_groups=None)
    write_jsonl(folder / "data/upper.jsonl", [as_chat(row) for row in task_rows("upper", 16)])
    config = MeritConfig.from_yaml(path, ["sft.num_train_epochs=2", "sft.save_strategy='no'", *overrides])
    return MeritPlanner(config, QUIET).plan(folder / "plan")


@pytest.mark.parametrize("kind", KINDS)
def test_honest_groups_pass_with_a_margin(kind: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, *KINDS[kind])
    folders = [train_group(plan, k, tmp_path / str(k), progress=QUIET) for k in range(4)]
    steps = [plan.group(k).num_steps for k in range(4)]
    assert max(steps) == 3 * min(steps)
    for folder in folders:
        others = [other for other in folders if other != folder]
        level = "behaviour" if kind == "plain" else "weights"
        checks = verify_checkpoint(plan, folder, level, others)
        assert [check for check in checks if not check.ok] == [], kind
    found = measure_movement(plan.base_folder(), folders)
    norms = np.sqrt(found.squares.sum(axis=1))
    shares = np.sqrt(found.squares) / norms[:, None]
    cosines = found.gram / np.outer(norms, norms)
    np.fill_diagonal(cosines, np.nan)
    shares = np.maximum(shares, 0.005)
    apart = max(np.abs(np.log(shares[k] / np.median(np.delete(shares, k, 0), axis=0))).max() for k in range(4))
    far = []
    for k in range(4):
        bound = step_bound(plan.group_sft(k), steps[k])
        if bound is not None:
            far.append((found.largest[k] / (bound[0] + bound[1] * found.scale)).max())
    report = {
        "kind": kind, "tensor factor": float(np.exp(apart)), "least best cosine": float(np.nanmax(cosines,
            axis=1).min()),
        "highest cosine": float(np.nanmax(cosines)), "length": float(norms.max() / norms.min()),
        "step": float(max(far, default=0)),
    }  # fmt: skip
    print(json.dumps(report))
    assert report["tensor factor"] < (8 if kind == "sgd" else 2.5)
    assert report["least best cosine"] > 0.05 or kind == "sgd"
    assert report["highest cosine"] < 0.95
    assert report["length"] < 10


def test_two_processes_pass(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    honest = [train_group(plan, k, tmp_path / str(k), progress=QUIET) for k in (1, 2, 3)]
    cpu_2 = ["--config_file", ROOT / "recipes/accelerate_configs/cpu_2.yaml"]
    script = ROOT / "recipes/train_group.py"
    done = launch([*cpu_2, script, plan.folder, "--group", 0, "--output", tmp_path / "two",
                   "sft.per_device_train_batch_size=2", "--num-processes", 2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "two/merit.json").read_text())
    assert manifest["num_processes"] == 2
    assert [c for c in verify_checkpoint(plan, tmp_path / "two", "behaviour", honest) if not c.ok] == []


def test_a_move_the_wrong_way_passes_the_weights_and_fails_the_loss(tmp_path: Path) -> None:
    """θ0 − Δ moves as far, in the same tensors, along the same line: only its behaviour tells."""
    plan = plan_of(tmp_path)
    honest = [train_group(plan, k, tmp_path / str(k), progress=QUIET) for k in range(4)]
    forged = Path(shutil.copytree(honest[1], tmp_path / "forged"))
    base, trained = load_file(plan.base_folder() / "model.safetensors"), load_file(forged / "model.safetensors")
    turned = {name: 2 * base[name].float() - trained[name].float() for name in trained}
    save_file(turned, forged / "model.safetensors", {"format": "pt"})
    manifest = json.loads((forged / "merit.json").read_text())
    (forged / "merit.json").write_text(json.dumps({**manifest, "files": hash_files(forged)}))
    others = [folder for k, folder in enumerate(honest) if k != 1]
    failures = [check.name for check in verify_checkpoint(plan, forged, "behaviour", others) if not check.ok]
    assert failures == ["held-out loss"]

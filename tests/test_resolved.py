"""What a plan records of CONFIG: settings of now on a re-run, and no path of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_mixture

from merit_hf.config import ConfigError, MeritConfig
from merit_hf.plan import LOCAL_NAME, PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import build_args

QUIET = Progress(quiet=True)


def test_a_rerun_takes_up_what_does_not_decide_the_plan(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, tasks=("copy", "count"), count=6, split="random")
    first = MeritPlanner(MeritConfig.from_yaml(config), QUIET).plan(tmp_path / "plan")
    changed = ["sft.logging_steps=3", "merge.out_dtype=float32", "plan.tokens_per_batch=64"]
    again = MeritPlanner(MeritConfig.from_yaml(config, changed), QUIET).plan(tmp_path / "plan")
    assert again.sha256 == first.sha256
    loaded = PartitionPlan.from_pretrained(tmp_path / "plan")
    assert loaded.config["sft"]["logging_steps"] == 3
    assert loaded.config["merge"]["out_dtype"] == "float32"
    assert first.config["sft"]["logging_steps"] == 1


def test_files_that_settings_name_are_not_published(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, tasks=("copy", "count"), count=6, split="random")
    (tmp_path / "weights.yaml").write_text("{0: 3, 1: 1}")
    (tmp_path / "accelerator.json").write_text('{"even_batches": true}')
    names = [f"merge.weights={tmp_path}/weights.yaml", f"sft.accelerator_config={tmp_path}/accelerator.json"]
    plan = MeritPlanner(MeritConfig.from_yaml(config, names), QUIET).plan(tmp_path / "plan")
    for file in (tmp_path / "plan").rglob("*"):
        if file.is_file() and file.name != LOCAL_NAME:
            assert str(tmp_path).encode() not in file.read_bytes(), file
    assert plan.config["merge"]["weights"] == "file"
    local = json.loads((tmp_path / "plan" / LOCAL_NAME).read_text())
    assert local["merge_weights"] == str(tmp_path / "weights.yaml")
    assert local["sft"] == {"accelerator_config": str(tmp_path / "accelerator.json")}


@pytest.mark.parametrize("field", ["auto_find_batch_size", "ignore_data_skip", "save_only_model"])
def test_what_makes_a_training_unrepeatable_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"sft.{field}=true"):
        build_args({field: True})


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, tasks=("copy", "count"), count=6)
    text = config.read_text().replace("eval_path: data/copy_eval.jsonl", "eval_fraction: 2e-1")
    config.write_text(text.replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    checked = MeritConfig.from_yaml(config, ["sft.weight_decay=1e-2"])
    assert checked.datasets[0].eval_fraction == 0.2
    assert checked.sft["learning_rate"] == 1e-3
    assert checked.sft["weight_decay"] == 1e-2

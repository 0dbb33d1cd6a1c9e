"""Held-out losses while training: one a dataset, under its name, without a trace in what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from merit_hf.config import ConfigError
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.report.page import write_report
from merit_hf.sft import build_args
from merit_hf.training import train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
EVALUATE = {"eval_strategy": "steps", "eval_steps": 2}


def history(folder: Path, key: str) -> dict[int, float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[key] for entry in log if key in entry}


@pytest.fixture(scope="module")
def evaluated(tiny_plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Group 0, evaluated at the start and every two steps, reported to TensorBoard."""
    output = tmp_path_factory.mktemp("evaluated") / "0"
    placement = {**EVALUATE, "eval_on_start": True, "report_to": "tensorboard"}
    return train_group(tiny_plan, 0, output, placement, progress=QUIET)


def test_every_dataset_has_a_loss_under_its_name(evaluated: Path, tiny_plan: PartitionPlan) -> None:
    members = tiny_plan.group(0).datasets
    for name in members:
        losses = history(evaluated, f"eval_{name}_loss")
        assert list(losses) == [0, 2, 4, 6]
        assert losses[6] != losses[0]
    others = set(tiny_plan.names) - set(members)
    text = (evaluated / "trainer_state.json").read_text()
    assert not [name for name in others if f"eval_{name}_" in text]
    found = {entry["dataset"]: entry for entry in read_manifest(evaluated)["held_out_loss"]}
    assert list(found) == members
    for name in members:
        losses = history(evaluated, f"eval_{name}_loss")
        assert (found[name]["first_step"], found[name]["first"]) == (0, losses[0])
        assert (found[name]["last_step"], found[name]["last"]) == (6, losses[6])
    card = (evaluated / "README.md").read_text()
    assert f"| {members[0]} | {found[members[0]]['first']:.4f} (0) | {found[members[0]]['last']:.4f} (6) |" in card


def test_it_is_the_loss_that_merit_evaluate_measures(evaluated: Path, tiny_plan: PartitionPlan) -> None:
    """The same rows; TRL takes the mean over batches, of which there is one here."""
    measured = evaluate_models(tiny_plan, {"group-0": evaluated}, progress=QUIET, generate=False)
    for name in tiny_plan.group(0).datasets:
        found = measured["datasets"][name]["loss"]["group-0"]
        assert history(evaluated, f"eval_{name}_loss")[6] == pytest.approx(found, abs=2e-4)


def test_evaluation_leaves_no_trace_in_the_training(
    evaluated: Path, tiny_plan: PartitionPlan, tiny_groups: list[Path]
) -> None:
    plain = tiny_groups[0]
    assert (evaluated / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert history(evaluated, "loss") == history(plain, "loss")
    first, second = read_manifest(evaluated), read_manifest(plain)
    assert {key: value for key, value in first.items() if key != "held_out_loss"} == second
    assert failed(verify_checkpoint(tiny_plan, evaluated)) is None


def test_nor_where_the_training_draws_random_numbers(make_plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    """Dropout goes on as if nothing had been evaluated in between."""
    plan = make_plan("plan.split=random", "peft.r=4", "peft.lora_dropout=0.3", "peft.target_modules=[q_proj]")
    folders = [
        train_group(plan, 0, tmp_path / str(len(placement)), placement, progress=QUIET)
        for placement in ({}, {**EVALUATE, "eval_on_start": True})
    ]
    first, second = (folder / "adapter_model.safetensors" for folder in folders)
    assert first.read_bytes() == second.read_bytes()


def test_a_resume_keeps_the_losses_and_goes_on_with_them(
    evaluated: Path, tiny_plan: PartitionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placement = {**EVALUATE, "eval_on_start": True}
    train_group(tiny_plan, 0, tmp_path / "0", {**placement, "train.stop_at_step": 3}, progress=QUIET)
    train_group(tiny_plan, 0, tmp_path / "0", placement)
    name = tiny_plan.group(0).datasets[0]
    shown = capsys.readouterr().err
    assert "going on from checkpoint-3" in shown
    assert f"held-out loss of {name} {history(evaluated, f'eval_{name}_loss')[6]:.3f} at step 6" in shown
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (evaluated / "model.safetensors").read_bytes()
    assert history(tmp_path / "0", f"eval_{name}_loss")[6] == history(evaluated, f"eval_{name}_loss")[6]
    assert read_manifest(tmp_path / "0")["held_out_loss"][0]["first_step"] == 0


def test_tensorboard_finds_them(evaluated: Path) -> None:
    """The Trainer's own reporting, in a folder that stays with the checkpoint."""
    (folder,) = (evaluated / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in [entry["dataset"] for entry in read_manifest(evaluated)["held_out_loss"]]:
        losses = [event.value for event in events.Scalars(f"eval/{name}_loss")]
        assert losses == pytest.approx(list(history(evaluated, f"eval_{name}_loss").values()), abs=1e-6)
    (args,) = events.Tensors("args/text_summary")
    written = json.loads(args.tensor_proto.string_val[0])
    assert written["run_name"].endswith("-group-0")


def test_the_report_shows_them(evaluated: Path, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    shutil.copytree(str(tiny_plan.folder), tmp_path / "plan")
    shutil.copytree(evaluated, tmp_path / "groups" / "0")
    page = write_report(tmp_path).read_text()
    assert "Held-out loss while training" in page
    for entry in read_manifest(evaluated)["held_out_loss"]:
        assert f"{entry['first']:.4f}" in page
        assert f"{entry['last']:.4f}" in page


def test_all_datasets_of_the_plan(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    placement = {"eval_strategy": "epoch", "train.eval_datasets": "all", "train.eval_num_samples": 3}
    folder = train_group(tiny_plan, 0, tmp_path / "0", {**placement, "run_name": "mine"}, progress=QUIET)
    assert [entry["dataset"] for entry in read_manifest(folder)["held_out_loss"]] == tiny_plan.names


def test_without_held_out_rows_nothing_is_evaluated(
    tiny_plan: PartitionPlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    config = {**tiny_plan.config, "datasets": [
        {**entry, "eval_path": None, "eval_fraction": 0.0} for entry in tiny_plan.config["datasets"]
    ]}  # fmt: skip
    local = {**tiny_plan.local, "datasets": {
        name: {"path": entry["path"]} for name, entry in tiny_plan.local["datasets"].items()
    }}  # fmt: skip
    train_group(replace(tiny_plan, config=config, local=local), 0, tmp_path / "0", EVALUATE)
    assert "none of its datasets has held-out rows" in capsys.readouterr().err
    assert "held_out_loss" not in read_manifest(tmp_path / "0")


def test_the_best_checkpoint_is_not_what_is_merged() -> None:
    with pytest.raises(ConfigError, match=r"sft\.load_best_model_at_end=true: a group is its last step"):
        build_args({"load_best_model_at_end": True, **EVALUATE, "save_strategy": "steps", "save_steps": 2})

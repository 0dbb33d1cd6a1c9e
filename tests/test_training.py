"""One group trained: it is TRL's training, with the plan's data and settings and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merit_hf.config import ConfigError, MeritError
from merit_hf.manifest import read_manifest
from merit_hf.placement import parse_placement, parse_places
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.training import last_checkpoint, train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_every_parameter_moves_and_the_manifest_is_complete(tiny_plan: PartitionPlan, tiny_groups: list[Path]) -> None:
    base = load_file(tiny_plan.base_folder() / "model.safetensors")
    for number, folder in enumerate(tiny_groups):
        trained = load_file(folder / "model.safetensors")
        assert trained.keys() == base.keys()
        for name, tensor in trained.items():
            assert tensor.dtype == torch.float32, name
            assert not torch.equal(tensor, base[name].float()), name
        manifest, planned = read_manifest(folder), tiny_plan.group(number)
        assert (manifest["kind"], manifest["status"], manifest["group"]) == ("group", "complete", number)
        assert manifest["plan"]["sha256"] == tiny_plan.sha256
        assert manifest["num_input_tokens"] == planned.train_input_tokens
        assert manifest["num_loss_tokens"] == planned.train_loss_tokens
        assert manifest["num_steps"] == planned.num_steps == 6
        assert manifest["num_processes"] == 1
        assert manifest["final_loss"] == losses(folder)[-1]
        assert failed(verify_checkpoint(tiny_plan, folder)) is None
    first, second = (load_file(folder / "model.safetensors") for folder in tiny_groups)
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_the_checkpoint_is_a_usable_model_and_leaves_nothing_else_behind(tiny_groups: list[Path]) -> None:
    folder = tiny_groups[0]
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merit.json",
        "README.md",
    }
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert not folder.with_name("0.part").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "copy: cat"}], return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert answer.shape == (1, prompt["input_ids"].shape[1] + 2)


@pytest.fixture(scope="module")
def sgd_plan(make_plan: Callable[..., PartitionPlan]) -> PartitionPlan:
    """Plain SGD: Adam would blow rounding up where a gradient is next to nothing."""
    return make_plan("plan.split=random", "sft.optim=sgd", "sft.learning_rate=0.5", "sft.save_strategy='no'")


@pytest.fixture(scope="module")
def whole_batches(sgd_plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_group(sgd_plan, 0, tmp_path_factory.mktemp("whole") / "0", progress=QUIET)


@pytest.mark.parametrize("per_device", [1, 2])
def test_the_result_does_not_depend_on_placement(
    per_device: int, sgd_plan: PartitionPlan, whole_batches: Path, tmp_path: Path
) -> None:
    # The last batch of 2 rows accumulates too; accumulation follows from the plan's batch where it is not given.
    placement = {"per_device_train_batch_size": per_device, "gradient_checkpointing": True, "logging_steps": 2}
    folder = train_group(sgd_plan, 0, tmp_path / "0", placement, progress=QUIET)
    first, second = load_file(whole_batches / "model.safetensors"), load_file(folder / "model.safetensors")
    base = load_file(sgd_plan.base_folder() / "model.safetensors")
    for name in first:
        moved = (first[name] - base[name].float()).abs().max()
        assert (first[name] - second[name]).abs().max() < 1e-4 * moved, name
    single = losses(whole_batches)
    pairs = [(first + second) / 2 for first, second in zip(single[::2], single[1::2], strict=True)]
    assert losses(folder) == pytest.approx(pairs, abs=1e-4)
    assert failed(verify_checkpoint(sgd_plan, folder)) is None


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"learning_rate": 2e-3}, r"sft\.learning_rate is part of the plan's identity.*sft\.learning_rate=0\.002"),
        ({"seed": 1}, r"sft\.seed is part"),
        ({"packing": True}, r"sft\.packing is part"),
        ({"max_length": 32}, r"sft\.max_length is part"),
        (
            {"per_device_train_batch_size": 3},
            r"trains 4 examples a step; sft\.per_device_train_batch_size=3 × 1 accumulation × 1 processes is 3",
        ),
        ({"gradient_accumulation_steps": 3}, r"× 3 accumulation × 1 processes is 12.*product is 4"),
        ({"output_dir": "elsewhere"}, r"sft\.output_dir.*--output"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_placement_cannot_change_the_training(
    placement: dict[str, Any], message: str, tiny_plan: PartitionPlan, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_group(tiny_plan, 0, tmp_path / "0", placement, progress=QUIET)
    assert not list(tmp_path.iterdir())


def test_drop_last_fixes_the_batch_of_all_devices(make_plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    plan = make_plan("plan.split=random", "sft.dataloader_drop_last=true")
    # 22 rows in batches of 4 lose 2; one by one, accumulated to 4, they would lose none.
    with pytest.raises(
        ConfigError, match=r"does not fill a batch of 4 .*sft\.per_device_train_batch_size=1 × 1 processes"
    ):
        train_group(plan, 0, tmp_path / "0", {"per_device_train_batch_size": 1}, progress=QUIET)


def test_no_such_group(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    for number in (-1, 2):
        with pytest.raises(ConfigError, match="the plan has groups 0 to 1"):
            train_group(tiny_plan, number, tmp_path / "0", progress=QUIET)


def test_other_process_counts_are_refused(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    with pytest.raises(MeritError, match=r"2 processes were asked for, 1 are running.*use_cpu: true.*cpu_2\.yaml"):
        train_group(tiny_plan, 0, tmp_path / "0", num_processes=2, progress=QUIET)


def test_a_finished_checkpoint_is_left_alone(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_groups[0], tmp_path / "0"))
    leftover = tmp_path / "0.part"
    leftover.mkdir()
    (leftover / "optimizer.pt").write_bytes(b"left by a kill between the rename and the clean-up")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train_group(tiny_plan, 0, folder, progress=QUIET) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not leftover.exists()


def test_foreign_output_is_refused_and_kept(tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_groups[1], tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"other exists and is not group 0 of this plan .*Give another --output"):
        train_group(tiny_plan, 0, other, progress=QUIET)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("mine")
    with pytest.raises(ConfigError, match="notes exists and is not group 0"):
        train_group(tiny_plan, 0, notes, progress=QUIET)
    assert (notes / "diary.txt").read_text() == "mine"
    half = Path(shutil.copytree(tiny_groups[0], tmp_path / "half"))
    manifest = json.loads((half / "merit.json").read_text())
    (half / "merit.json").write_text(json.dumps({**manifest, "status": "training"}))
    with pytest.raises(ConfigError, match="half exists and is not"):
        train_group(tiny_plan, 0, half, progress=QUIET)


@pytest.mark.parametrize(
    "run", ['{"group_sha256": "of another plan"}', '{"group_sh', ""], ids=["other", "half", "empty"]
)
def test_checkpoints_of_another_plan_are_not_resumed(
    run: str, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    part = tmp_path / "0.part"
    shutil.copytree(tiny_groups[1], part / "checkpoint-4")
    (part / "run.json").write_text(run)
    folder = train_group(tiny_plan, 0, tmp_path / "0", progress=QUIET)
    assert (folder / "model.safetensors").read_bytes() == (tiny_groups[0] / "model.safetensors").read_bytes()
    assert read_manifest(folder)["num_input_tokens"] == tiny_plan.group(0).train_input_tokens


def test_changed_data_or_base_are_refused(tiny_config: Path, tmp_path: Path) -> None:
    from merit_hf.config import MeritConfig
    from merit_hf.planner import MeritPlanner

    mine = Path(shutil.copytree(tiny_config.parent, tmp_path / "mine"))
    config = MeritConfig.from_yaml(mine / tiny_config.name, ["plan.split=joint", "plan.num_groups=1"])
    plan = MeritPlanner(config, QUIET).plan(tmp_path / "plan")
    copy = mine / "data" / "copy.jsonl"
    kept = copy.read_text()
    copy.write_text(kept.replace("copy: ", "kopy: ", 1))
    with pytest.raises(MeritError, match=r"dataset `copy`: rows \(fingerprint\) differ from the plan"):
        train_group(plan, 0, tmp_path / "0", progress=QUIET)
    copy.write_text(kept)
    tokenizer = mine / "base" / "tokenizer.json"
    text = tokenizer.read_text()
    # Without its merges the same text gives more tokens.
    tokenizer.write_text(json.dumps({**(content := json.loads(text)), "model": {**content["model"], "merges": []}}))
    with pytest.raises(MeritError, match=r"dataset `copy`: input tokens differ from the plan"):
        train_group(plan, 0, tmp_path / "0", progress=QUIET)
    tokenizer.write_text(text)
    from tiny import make_base

    make_base(mine / "base", seed=1)
    with pytest.raises(MeritError, match=r"group 0: the model in .* has weights .* planned"):
        train_group(plan, 0, tmp_path / "0", progress=QUIET)
    copy.unlink()
    with pytest.raises(ConfigError, match=r"copy.*no such file"):
        train_group(plan, 0, tmp_path / "0", progress=QUIET)


def test_placement_on_the_command_line() -> None:
    assert parse_placement(["sft.per_device_train_batch_size=2", "sft.logging_steps=5"]) == {
        "per_device_train_batch_size": 2,
        "logging_steps": 5,
    }
    for text, message in (
        ("logging_steps=5", "expected sft.KEY=VALUE"),
        ("sft.logging_steps", "expected sft.KEY=VALUE"),
        ("sft.loging_steps=5", "`logging_steps`"),
        ("sft.logging_steps=often", "sft.logging_steps='often'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_placement([text])


def test_the_newest_complete_checkpoint_is_resumed(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-14").mkdir()
    (tmp_path / "checkpoint-14" / "trainer_state.json").write_text('{"global_step": 1')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("text", ["copy", "copy=", "=data/copy.jsonl"])
def test_a_place_of_data_without_name_or_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=PATH"):
        parse_places([text])
    assert parse_places(["copy=a=b.jsonl"]) == {"copy": "a=b.jsonl"}

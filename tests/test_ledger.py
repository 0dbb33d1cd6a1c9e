"""What a training should process is replayed from the data alone, what it does process is counted: the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import make_mixture
from torch import nn

from merit_hf.config import ConfigError, MeritConfig
from merit_hf.ledger import TokenLedger, replay
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.sft import build_args
from merit_hf.training import train_group

# 22 rows: at 4 a step, 2 are left for the last step of an epoch
TRAININGS: dict[str, list[str]] = {
    "one epoch": [],
    "several epochs": ["sft.num_train_epochs=3"],
    "part of an epoch": ["sft.num_train_epochs=0.4"],
    "epochs and a part": ["sft.num_train_epochs=2.3"],
    "max_steps, less than an epoch": ["sft.max_steps=7"],
    "max_steps, more than an epoch": ["sft.max_steps=17"],
    "accumulation": ["sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=3"],
    "accumulation, part of an epoch": [
        "sft.per_device_train_batch_size=1", "sft.gradient_accumulation_steps=4", "sft.num_train_epochs=1.5",
    ],
    "a batch larger than the data": ["sft.per_device_train_batch_size=64", "sft.num_train_epochs=2"],
    "drop_last": ["sft.dataloader_drop_last=true", "sft.num_train_epochs=2"],
    "drop_last, part of an epoch": ["sft.dataloader_drop_last=true", "sft.num_train_epochs=1.5"],
    "drop_last with accumulation": [
        "sft.dataloader_drop_last=true", "sft.per_device_train_batch_size=3", "sft.gradient_accumulation_steps=2",
        "sft.num_train_epochs=1.4",
    ],
    "packing": ["sft.packing=true", "sft.max_length=48", "sft.per_device_train_batch_size=2"],
    "packing, part of an epoch": [
        "sft.packing=true", "sft.max_length=48", "sft.per_device_train_batch_size=1", "sft.num_train_epochs=1.4",
    ],
    "packing by cutting": ["sft.packing=true", "sft.packing_strategy=wrapped", "sft.max_length=32"],
    "padding-free": ["sft.padding_free=true", "sft.max_length=null", "sft.num_train_epochs=1.5"],
    "in order": ["sft.train_sampling_strategy=sequential", "sft.num_train_epochs=0.6"],
    "shuffled beforehand": ["sft.shuffle_dataset=true", "sft.num_train_epochs=0.6"],
    "a data seed": ["sft.data_seed=7", "sft.num_train_epochs=0.6"],
    "truncation": ["sft.max_length=14", "sft.num_train_epochs=1.5"],
}  # fmt: skip


@pytest.fixture(scope="module")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CONFIG of one group of two tasks, nothing held out."""
    path = make_mixture(tmp_path_factory.mktemp("small"), ("copy", "count"), count=11)
    content = yaml.safe_load(path.read_text())
    for entry in content["datasets"]:
        entry.pop("eval_path")
        entry["eval_fraction"] = 0.0
    content["plan"] = {"split": "joint"}
    content["sft"].update(save_strategy="no", include_num_input_tokens_seen="non_padding")
    path.write_text(yaml.safe_dump(content))
    return path


def make_plan(config: Path, folder: Path, *overrides: str) -> PartitionPlan:
    return MeritPlanner(MeritConfig.from_yaml(config, overrides), Progress(quiet=True)).plan(folder)


FAST = {
    "epochs and a part", "max_steps, less than an epoch", "accumulation, part of an epoch",
    "drop_last with accumulation", "packing, part of an epoch", "padding-free", "in order",
}  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(overrides, id=name, marks=[] if name in FAST else [pytest.mark.slow])
        for name, overrides in TRAININGS.items()
    ],
)
def test_a_training_processes_what_the_plan_replayed(overrides: list[str], small_config: Path, tmp_path: Path) -> None:
    plan = make_plan(small_config, tmp_path / "plan", *overrides)
    group = plan.group(0)
    manifest = read_manifest(train_group(plan, 0, tmp_path / "0", progress=Progress(quiet=True)))

    assert manifest["num_input_tokens"] == group.train_input_tokens
    assert manifest["num_loss_tokens"] == group.train_loss_tokens
    assert manifest["num_steps"] == group.num_steps
    trainer_state = json.loads((tmp_path / "0" / "trainer_state.json").read_text())
    assert trainer_state["global_step"] == trainer_state["max_steps"] == group.num_steps
    if not (plan.sft["packing"] or plan.sft["padding_free"]):
        # transformers' own count, which knows nothing of packed rows.
        assert trainer_state["num_input_tokens_seen"] == group.train_input_tokens


def test_whole_epochs_are_multiples_and_parts_are_not(small_config: Path, tmp_path: Path) -> None:
    first = make_plan(small_config, tmp_path / "1").group(0)
    third = make_plan(small_config, tmp_path / "3", "sft.num_train_epochs=3").group(0)
    part = make_plan(small_config, tmp_path / "part", "sft.num_train_epochs=2.3").group(0)
    assert (first.train_input_tokens, first.train_loss_tokens) == (first.num_input_tokens, first.num_loss_tokens)
    assert (third.train_input_tokens, third.num_steps) == (3 * first.train_input_tokens, 18)
    assert part.num_steps == 14
    assert 2 * first.train_input_tokens < part.train_input_tokens < 3 * first.train_input_tokens


@pytest.mark.parametrize("max_steps", [2, 7, 8])
def test_max_steps_is_the_mixtures_and_shared_by_tokens(max_steps: int, tiny_config: Path, tmp_path: Path) -> None:
    plan = make_plan(tiny_config, tmp_path / "plan", "plan.split=random", f"sft.max_steps={max_steps}")
    assert sum(group.num_steps for group in plan.groups) == max_steps == plan.sft["max_steps"]
    total = sum(group.num_input_tokens for group in plan.groups)
    for group in plan.groups:
        assert abs(group.num_steps - max_steps * group.num_input_tokens / total) < 1
        assert plan.group_sft(group.group)["max_steps"] == group.num_steps
    total = sum(group.train_input_tokens for group in plan.groups)
    assert [group.weight for group in plan.groups] == [group.train_input_tokens / total for group in plan.groups]


def budget(rows: int = 10, **sft: object) -> tuple[int, int, int]:
    # Rows of 1, 2, 4 … tokens: the sum says which rows it holds.
    tokens = 2 ** np.arange(rows)
    found = replay(tokens, 3 * tokens, build_args({"per_device_train_batch_size": 4, **sft}, "unused"))
    assert found.num_loss_tokens == 3 * found.num_input_tokens
    return found.num_steps, found.num_input_tokens, bin(found.num_input_tokens).count("1")


def test_replay_counts_steps_as_the_trainer_does() -> None:
    assert budget(num_train_epochs=1) == (3, 2**10 - 1, 10)
    assert budget(num_train_epochs=1, dataloader_drop_last=True)[::2] == (2, 8)
    assert budget(num_train_epochs=0.5)[::2] == (2, 8)
    assert budget(num_train_epochs=1 / 3)[::2] == (1, 4)
    assert budget(max_steps=2)[::2] == (2, 8)
    assert budget(num_train_epochs=1, gradient_accumulation_steps=2)[::2] == (2, 10)
    assert budget(num_train_epochs=0.5, gradient_accumulation_steps=2)[::2] == (1, 8)
    assert budget(max_steps=2, train_sampling_strategy="sequential") == (2, 2**8 - 1, 8)
    assert budget(max_steps=1, seed=1) != budget(max_steps=1, seed=2)
    assert budget(max_steps=1, seed=1, data_seed=2) == budget(max_steps=1, seed=3, data_seed=2)


def test_replay_refuses_what_it_cannot_know() -> None:
    with pytest.raises(ConfigError, match=r"train_sampling_strategy.*whole epochs"):
        budget(num_train_epochs=0.5, train_sampling_strategy="group_by_length")
    assert budget(num_train_epochs=2, train_sampling_strategy="group_by_length") == (6, 2 * (2**10 - 1), 10)
    with pytest.raises(ConfigError, match=r"dataloader_drop_last=true leaves nothing of 3 rows"):
        budget(rows=3, dataloader_drop_last=True)


class Model(nn.Module):
    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return batch["input_ids"].sum()


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "labels": torch.tensor([[5, -100, 7, 8], [-100, 6, -100, -100]]),
}


def test_the_ledger_counts_training_passes_only() -> None:
    model, ledger = Model(), TokenLedger()
    ledger.start(model)
    model(**BATCH)
    # The first token of a sequence has a label here that nothing predicts.
    assert ledger.total() == {"num_input_tokens": 6, "num_loss_tokens": 3, "num_padding_tokens": 2}
    with torch.no_grad():
        model(**BATCH)
    model.eval()
    model(**BATCH)
    model.train()
    assert ledger.total()["num_input_tokens"] == 6
    model(**BATCH)
    assert ledger.total() == {"num_input_tokens": 12, "num_loss_tokens": 6, "num_padding_tokens": 4}
    ledger.stop()
    model(**BATCH)
    assert ledger.total()["num_input_tokens"] == 12


def test_the_ledger_goes_on_from_a_restored_count_and_counts_once() -> None:
    model, ledger = Model(), TokenLedger()
    ledger.start(model)
    ledger.start(model, {"num_input_tokens": 100, "num_loss_tokens": 50, "num_padding_tokens": 10})
    assert ledger.total() == {"num_input_tokens": 100, "num_loss_tokens": 50, "num_padding_tokens": 10}
    model(**BATCH)
    assert ledger.total() == {"num_input_tokens": 106, "num_loss_tokens": 53, "num_padding_tokens": 12}


def test_without_an_attention_mask_every_token_counts() -> None:
    model, ledger = Model(), TokenLedger()
    ledger.start(model)
    model(input_ids=BATCH["input_ids"][:1], labels=BATCH["labels"][:1], position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert ledger.total() == {"num_input_tokens": 4, "num_loss_tokens": 2, "num_padding_tokens": 0}

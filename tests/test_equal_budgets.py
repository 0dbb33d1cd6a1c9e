"""The groups of a plan, together, train on exactly the tokens that joint training does, by the ledger of each."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import jobs
import pytest
import torch
import yaml
from tiny import make_mixture
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from merit_hf.config import MeritConfig
from merit_hf.extend import extend_plan
from merit_hf.identity import group_fields
from merit_hf.ledger import TokenLedger
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.training import train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
# 2 groups of 24 rows, 48 jointly, 4 a step unless said otherwise.
TRAININGS: dict[str, dict[str, Any]] = {
    "batches of 4": {},
    "a last batch that is not full": {"per_device_train_batch_size": 5},
    "gradient accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5},
    "packing (bfd)": {"packing": True, "max_length": 48, "per_device_train_batch_size": 2},
    "packing (wrapped)": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "several epochs": {"num_train_epochs": 3, "per_device_train_batch_size": 5},
}
FAST = {"a last batch that is not full", "packing (bfd)"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_mixture(tmp_path_factory.mktemp("mixture"), count=12)
    content = yaml.safe_load(path.read_text())
    content["sft"]["save_strategy"] = "no"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def both(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PartitionPlan, PartitionPlan]]:
    """`both(warmup_steps=6)`: two groups of the mixture, and the same mixture in one."""

    def make(**sft: Any) -> tuple[PartitionPlan, PartitionPlan]:
        folder = tmp_path_factory.mktemp("plans")
        overrides = [f"sft.{key}={json.dumps(value)}" for key, value in sft.items()]
        found = [
            MeritPlanner(MeritConfig.from_yaml(config, [*overrides, *split]), QUIET).plan(folder / split[0][-5:])
            for split in (["plan.split=random"], ["plan.num_groups=1", "plan.split=joint"])
        ]
        return found[0], found[1]

    return make


def ledger(folder: Path) -> dict[str, int]:
    manifest = read_manifest(folder)
    return {field: manifest[field] for field in TokenLedger.FIELDS}


def log(folder: Path, key: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def raw_rows(plan: PartitionPlan, group: int) -> datasets.Dataset:
    files = [plan.local["datasets"][name]["path"] for name in plan.group(group).datasets]
    return datasets.concatenate_datasets([datasets.load_dataset("json", data_files=f, split="train") for f in files])


def plain_batches(plan: PartitionPlan, group: int, folder: Path) -> dict[str, int]:
    """What the batches of one epoch of a plain SFTTrainer hold."""
    base = plan.base_folder()
    args = SFTConfig(output_dir=str(folder), use_cpu=True, report_to="none", **{**plan.config["sft"], "bf16": False})
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=args,
        train_dataset=raw_rows(plan, group), processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    totals = [0, 0, 0]
    for batch in trainer.get_train_dataloader():
        real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        loss = int((batch["labels"][:, 1:] != -100).sum())
        for index, count in enumerate((real, loss, batch["input_ids"].numel() - real)):
            totals[index] += count
    return dict(zip(TokenLedger.FIELDS, totals, strict=True))


@pytest.mark.parametrize(
    "sft",
    [pytest.param(sft, id=n, marks=[] if n in FAST else [pytest.mark.slow]) for n, sft in TRAININGS.items()],
)
def test_groups_together_train_on_the_tokens_of_joint_training(
    sft: dict[str, Any], both: Callable[..., tuple[PartitionPlan, PartitionPlan]], tmp_path: Path
) -> None:
    split, joint = both(**sft)
    trainings = [(split, 0), (split, 1), (joint, 0)]
    found = []
    for index, (plan, number) in enumerate(trainings):
        folder = train_group(plan, number, tmp_path / str(index), progress=QUIET)
        found.append(ledger(folder))
        planned = plan.group(number)
        assert found[-1]["num_input_tokens"] == planned.train_input_tokens
        assert found[-1]["num_loss_tokens"] == planned.train_loss_tokens
        if sft.get("num_train_epochs", 1) == 1:
            assert found[-1] == plain_batches(plan, number, tmp_path / "plain")
    first, second, everything = found
    assert first["num_input_tokens"] + second["num_input_tokens"] == everything["num_input_tokens"]
    lost = 0
    if sft.get("packing_strategy") == "wrapped":
        # Every row that a cut makes begins with a token that nothing predicts.
        lost = sum(math.ceil(one["num_input_tokens"] / sft["max_length"]) for one in found[:2])
    assert abs(first["num_loss_tokens"] + second["num_loss_tokens"] - everything["num_loss_tokens"]) <= lost
    if sft.get("padding_free") or (sft.get("packing") and not lost):
        assert all(one["num_padding_tokens"] == 0 for one in found)
    assert [group.weight for group in split.groups] == [
        one["num_input_tokens"] / everything["num_input_tokens"] for one in (first, second)
    ]


def test_a_kill_and_a_resume_leave_the_budget_as_it_is(
    both: Callable[..., tuple[PartitionPlan, PartitionPlan]], tmp_path: Path
) -> None:
    split, joint = both(num_train_epochs=8, per_device_train_batch_size=5)
    placement = {"save_strategy": "steps", "save_steps": 2}
    state = tmp_path / "0.part" / "checkpoint-2" / "trainer_state.json"
    job = jobs.Job(jobs.train, [split.folder, 0, tmp_path / "0", placement], tmp_path / "log")
    assert job.kill_when(state.exists), job.output
    again = jobs.Job(jobs.train, [split.folder, 0, tmp_path / "0", placement], tmp_path / "log-again")
    assert again.wait() == 0, again.output
    assert "going on from checkpoint-" in again.output
    second = train_group(split, 1, tmp_path / "1", progress=QUIET)
    everything = ledger(train_group(joint, 0, tmp_path / "joint", progress=QUIET))
    for field in ("num_input_tokens", "num_loss_tokens"):
        assert ledger(tmp_path / "0")[field] + ledger(second)[field] == everything[field]


def launch_two(plan: PartitionPlan, group: int, output: Path, more: dict[str, Any] | None = None) -> None:
    """Two processes on gloo, as torchrun starts them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    placement = {"per_device_train_batch_size": 2, **(more or {})}
    workers = [
        jobs.Job(
            jobs.train, [plan.folder, group, output, placement], output.with_name(f"{output.name}-log-{rank}"),
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        assert worker.wait() == 0, worker.output
    assert read_manifest(output)["num_processes"] == 2


@pytest.mark.slow
def test_several_processes(both: Callable[..., tuple[PartitionPlan, PartitionPlan]], tmp_path: Path) -> None:
    split, joint = both()
    found = []
    for index, (plan, number) in enumerate([(split, 0), (split, 1), (joint, 0)]):
        launch_two(plan, number, tmp_path / str(index))
        found.append(ledger(tmp_path / str(index)))
    for field in ("num_input_tokens", "num_loss_tokens"):
        assert found[0][field] + found[1][field] == found[2][field]
    alone = ledger(train_group(split, 0, tmp_path / "alone", progress=QUIET))
    # Each process pads its own half of a batch.
    assert {**found[0], "num_padding_tokens": 0} == {**alone, "num_padding_tokens": 0}


@pytest.mark.parametrize("max_steps", [5, pytest.param(17, marks=pytest.mark.slow)])
def test_max_steps_are_shared_by_tokens(
    max_steps: int, both: Callable[..., tuple[PartitionPlan, PartitionPlan]], tmp_path: Path
) -> None:
    split, joint = both(max_steps=max_steps)
    steps = [group.num_steps for group in split.groups]
    assert sum(steps) == joint.group(0).num_steps == max_steps
    tokens = [group.num_input_tokens for group in split.groups]
    exact = [max_steps * count / sum(tokens) for count in tokens]
    # Largest remainder: whole parts first, the step that is left to the larger remainder.
    shares = [math.floor(share) for share in exact]
    shares[exact[1] - shares[1] > exact[0] - shares[0]] += max_steps - sum(shares)
    assert steps == shares
    for number in range(2):
        folder = train_group(split, number, tmp_path / str(number), progress=QUIET)
        assert ledger(folder)["num_input_tokens"] == split.group(number).train_input_tokens


# Of these settings the learning rate of every step is compared.
SCHEDULES: dict[str, dict[str, Any]] = {
    "warm-up in steps": {"warmup_steps": 6},
    "warm-up as a share": {"warmup_steps": 0.5},
    "cosine": {"warmup_steps": 4, "lr_scheduler_type": "cosine"},
    "warm-up in steps of max_steps": {"warmup_steps": 6, "max_steps": 12},
    "warmup_stable_decay": {
        "warmup_steps": 2, "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "sft",
    [
        pytest.param(sft, id=name, marks=[] if name == "warm-up in steps" else [pytest.mark.slow])
        for name, sft in SCHEDULES.items()
    ],
)
def test_a_groups_schedule_is_joint_trainings_over_its_own_steps(
    sft: dict[str, Any], both: Callable[..., tuple[PartitionPlan, PartitionPlan]], tmp_path: Path
) -> None:
    split, joint = both(**sft)
    assert [split.group(0).num_steps, joint.group(0).num_steps] == [6, 12]
    group, everything = (
        train_group(plan, 0, tmp_path / name, progress=QUIET) for plan, name in ((split, "0"), (joint, "joint"))
    )
    # Half as many steps: each is taken at the rate of every other step of joint training.
    assert log(group, "learning_rate") == pytest.approx(log(everything, "learning_rate")[::2], rel=1e-12)
    assert failed(verify_checkpoint(split, group)) is None
    assert failed(verify_checkpoint(joint, everything)) is None
    assert joint.group_sft(0)["warmup_steps"] == sft["warmup_steps"]


def test_shares_of_a_schedule_round_up_and_shares_of_it_stay() -> None:
    sft = {"max_steps": -1, "warmup_steps": 10.0, "lr_scheduler_kwargs": {"num_decay_steps": 7, "min_lr_ratio": 0.1}}
    found = group_fields({**sft, "mixture_steps": 30}, 10)
    assert found == {
        "max_steps": -1, "warmup_steps": 4.0, "lr_scheduler_kwargs": {"num_decay_steps": 3, "min_lr_ratio": 0.1},
    }  # fmt: skip
    assert group_fields(sft, 10) == sft, "plans from before recorded no steps of the mixture"
    assert group_fields({**sft, "warmup_steps": 0.3, "mixture_steps": 30}, 10)["warmup_steps"] == 0.3


def test_a_branch_that_is_added_later_warms_up_alike(config: Path, tmp_path: Path) -> None:
    overrides = ["plan.split=merit", "plan.num_groups=1", "sft.warmup_steps=6"]
    plan = MeritPlanner(MeritConfig.from_yaml(config, overrides), QUIET).plan(tmp_path / "plan")
    entries = yaml.safe_load(config.read_text())["datasets"][:1]
    new = {"name": "again", "path": str(config.parent / entries[0]["path"]), "eval_fraction": 0.0}
    extended = extend_plan(plan, [new], tmp_path / "extended", progress=QUIET)
    assert extended.group(0).group_sha256 == plan.group(0).group_sha256
    # 12 of 48 rows: 3 steps of 12.
    assert (extended.group(1).num_steps, extended.group_sft(1)["warmup_steps"]) == (3, 2.0)
    assert extended.group_sft(0)["warmup_steps"] == 6.0

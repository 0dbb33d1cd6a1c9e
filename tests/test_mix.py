"""Datasets with weights: whole rows, counted beforehand, the same everywhere; and the mix written out exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_callback import sft_script
from tiny import make_mixture
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.data import weighted_rows
from merit_hf.extend import extend_plan
from merit_hf.manifest import read_manifest
from merit_hf.pipeline import joint_config
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.repartition import repartition
from merit_hf.training import train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
WEIGHTS = {"copy": 2.5, "reverse": 0.5}


@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=60), weight=st.floats(0.01, 5), name=st.text(max_size=5)
)
def test_a_weight_takes_whole_rows_as_near_to_its_tokens_as_they_come(
    tokens: list[int], weight: float, name: str
) -> None:
    counts = np.array(tokens)
    rows = weighted_rows(counts, weight, name)
    passes = np.bincount(rows, minlength=len(tokens))
    assert set(passes) <= {int(weight), int(weight) + 1}
    taken = counts[rows].sum()
    # Half of one row away at most, unless that would leave nothing at all.
    assert abs(taken - weight * counts.sum()) <= counts.max() / 2 + 1e-6 * counts.sum() or len(rows) == 1
    assert np.array_equal(rows, weighted_rows(counts, weight, name))


def test_a_weight_of_one_is_every_row_once() -> None:
    assert weighted_rows(np.array([3, 1, 2]), 1.0, "any").tolist() == [0, 1, 2]
    assert weighted_rows(np.array([3, 1, 2]), 2.0, "any").tolist() == [0, 1, 2, 0, 1, 2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_mixture(tmp_path_factory.mktemp("mixture"), count=20, split="merit")
    content = yaml.safe_load(path.read_text())
    # Held-out rows are taken from these files, so that a row's place is not its number.
    for entry in content["datasets"]:
        entry.pop("eval_path")
        entry["eval_fraction"] = 0.2
    content["sft"].update(save_strategy="no", num_train_epochs=2)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def plain(config: Path, tmp_path_factory: pytest.TempPathFactory) -> PartitionPlan:
    return MeritPlanner(MeritConfig.from_yaml(config), QUIET).plan(tmp_path_factory.mktemp("plain") / "plan")


def weighted_config(config: Path, *overrides: str) -> MeritConfig:
    return MeritConfig.from_yaml(config, [*(f"datasets.{n}.weight={w}" for n, w in WEIGHTS.items()), *overrides])


@pytest.fixture(scope="module")
def weighted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> PartitionPlan:
    return MeritPlanner(weighted_config(config), QUIET).plan(tmp_path_factory.mktemp("weighted") / "plan")


@pytest.fixture(scope="module")
def trained(weighted: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trained")
    return [train_group(weighted, k, folder / str(k), progress=QUIET) for k in range(2)]


def test_tokens_are_in_proportion_and_known_beforehand(
    plain: PartitionPlan, weighted: PartitionPlan, trained: list[Path]
) -> None:
    for before, now in zip(plain.datasets, weighted.datasets, strict=True):
        weight = WEIGHTS.get(before.name, 1.0)
        assert now.num_input_tokens == pytest.approx(weight * before.num_input_tokens, abs=20)
        assert (now.tokens_digest == before.tokens_digest) == (weight == 1)
        # What is held out, and what the gradient is measured on, is as it was.
        assert now.fingerprint == before.fingerprint
        assert now.gradient_norm == before.gradient_norm
    for number, folder in enumerate(trained):
        planned, manifest = weighted.group(number), read_manifest(folder)
        assert manifest["num_input_tokens"] == planned.train_input_tokens == 2 * planned.num_input_tokens
        assert failed(verify_checkpoint(weighted, folder)) is None


def test_a_weight_is_part_of_the_identity_where_it_is_set(
    config: Path, plain: PartitionPlan, weighted: PartitionPlan, tmp_path: Path
) -> None:
    assert weighted.sha256 != plain.sha256
    same = MeritPlanner(MeritConfig.from_yaml(config, ["datasets.copy.weight=1"]), QUIET).plan(tmp_path / "plan")
    assert (same.sha256, same.inputs_sha256) == (plain.sha256, plain.inputs_sha256)
    with pytest.raises(ConfigError, match=r"holds the plan of other inputs.*weight"):
        MeritPlanner(weighted_config(config), QUIET).plan(tmp_path / "plan")
    for value, message in ((0, "greater than 0"), (-1, "greater than 0"), ("much", "number")):
        with pytest.raises(ConfigError, match=rf"datasets\.copy\.weight.*{message}"):
            MeritConfig.from_yaml(config, [f"datasets.copy.weight={value}"])


def test_joint_split_and_extend_keep_the_mix(config: Path, weighted: PartitionPlan, tmp_path: Path) -> None:
    total = sum(group.train_input_tokens for group in weighted.groups)
    joint = MeritPlanner(joint_config(weighted_config(config), weighted), QUIET).plan(tmp_path / "joint")
    assert joint.group(0).train_input_tokens == total
    random = repartition(weighted, tmp_path / "random", split="random", seed=3, progress=QUIET)
    assert sum(group.train_input_tokens for group in random.groups) == total
    assert [d.tokens_digest for d in random.datasets] == [d.tokens_digest for d in weighted.datasets]
    new = {"name": "again", "path": str(config.parent / "data/copy.jsonl"), "weight": 0.25}
    extended = extend_plan(weighted, [new], tmp_path / "extended", progress=QUIET)
    assert [g.group_sha256 for g in extended.groups[:2]] == [g.group_sha256 for g in weighted.groups]
    assert extended.group(2).num_examples < 8


def rebuilt_rows(mix: Path, files: dict[str, str]) -> datasets.Dataset:
    """The rows of mix.parquet, from the datasets' files alone."""
    table = pq.read_table(mix).to_pandas()
    rows = []
    for name, part in table.groupby("dataset", sort=False, observed=True):
        whole = datasets.load_dataset("json", data_files=files[str(name)], split="train")
        rows.append(whole.select(part["row"].to_list()))
    return datasets.concatenate_datasets(rows)


def test_anybody_can_rebuild_the_mix(
    weighted: PartitionPlan, trained: list[Path], tmp_path: Path, config: Path
) -> None:
    """From mix.parquet and the files, plain TRL has the same losses."""
    number = next(group.group for group in weighted.groups if "copy" in group.datasets)
    folder = trained[number]
    files = {name: str(config.parent / f"data/{name}.jsonl") for name in weighted.names}
    rows = rebuilt_rows(folder / "mix.parquet", files)
    base = weighted.base_folder()
    args = SFTConfig(
        output_dir=str(tmp_path / "plain"), use_cpu=True, report_to="none", **{**weighted.config["sft"], "bf16": False}
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=args, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.train()
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = [[e["loss"] for e in log if "loss" in e] for log in (state["log_history"], trainer.state.log_history)]
    assert losses[0] == losses[1]
    mix = json.loads((folder / "mix.json").read_text())
    sampler = trainer.get_train_dataloader()
    first = hashlib.sha256(np.array(list(sampler.batch_sampler.sampler), dtype="<i8").tobytes()).hexdigest()
    assert len(mix["order"]["epochs_sha256"]) == 2
    assert mix["order"]["num_rows"] == len(rows) == weighted.group(number).num_examples
    assert first == mix["order"]["epochs_sha256"][0]


def test_the_mix_says_where_everything_comes_from(weighted: PartitionPlan, trained: list[Path]) -> None:
    for number, folder in enumerate(trained):
        mix = json.loads((folder / "mix.json").read_text())
        assert mix["group_sha256"] == weighted.group(number).group_sha256
        assert [entry["name"] for entry in mix["datasets"]] == weighted.group(number).datasets
        table = pq.read_table(folder / "mix.parquet").to_pandas()
        for entry, planned in zip(mix["datasets"], weighted.members(number), strict=True):
            assert entry["weight"] == WEIGHTS.get(entry["name"], 1.0)
            assert entry["num_rows"] == 16
            mine = table[table["dataset"] == entry["name"]]
            assert len(mine) == planned.num_examples == entry["num_examples_an_epoch"]
            assert mine["num_input_tokens"].sum() == planned.num_input_tokens == entry["num_input_tokens_an_epoch"]
            assert mine["row"].between(0, 19).all()
            assert mine["row"].nunique() == (16 if entry["weight"] >= 1 else len(mine))
        assert sum(entry["share_of_tokens"] for entry in mix["datasets"]) == pytest.approx(1)
        text = (folder / "mix.json").read_text()
        assert str(weighted.base_folder().parent) not in text


def test_a_script_without_the_weights_is_refused(config: Path, weighted: PartitionPlan, tmp_path: Path) -> None:
    files = [str(config.parent / f"data/{name}.jsonl") for name in weighted.group(0).datasets]
    rows = datasets.load_dataset("json", data_files=files, split="train")
    trainer = sft_script(weighted, tmp_path, rows, num_train_epochs=2)
    with pytest.raises(MeritError, match="the training data are not the planned ones"):
        trainer.train()

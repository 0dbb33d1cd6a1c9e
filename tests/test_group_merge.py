"""merge_groups: which checkpoints belong together, with which weights, and what the merged folder says of itself."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import TEMPLATE, make_base

from merit_hf.checkpoint import weights_sha256
from merit_hf.config import ConfigError, MeritError
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import group_manifest, hash_files, write_manifest
from merit_hf.plan import PartitionPlan, PlannedDataset, PlannedGroup, canonical_sha256, group_identity

TOKENS = [600, 300, 100]
LOSS_TOKENS = [100, 200, 500]


def make_plan(base: Path) -> PartitionPlan:
    identity = {
        "repo_id": "some-org/base", "revision": "0" * 40, "weights_sha256": weights_sha256(base),
        "chat_template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(), "dtype": "bfloat16",
    }  # fmt: skip
    sft = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": -1, "max_length": 64, "effective_batch_size": 4}
    datasets = [
        PlannedDataset(f"set{k}", k, None, "chat", f"{k}" * 64, f"{k}" * 64, 10, TOKENS[k], LOSS_TOKENS[k])
        for k in range(3)
    ]
    groups = [
        PlannedGroup(
            group=k, datasets=[f"set{k}"], num_examples=10, num_input_tokens=TOKENS[k], num_loss_tokens=LOSS_TOKENS[k],
            num_steps=5, train_input_tokens=TOKENS[k], train_loss_tokens=LOSS_TOKENS[k],
            weight=TOKENS[k] / sum(TOKENS), group_sha256=group_identity(identity, [datasets[k]], sft),
        )
        for k in range(3)
    ]  # fmt: skip
    config = {"plan": {"split": "merit", "seed": 0, "num_groups": 3}, "merge": {}, "base": {}, "datasets": []}
    return PartitionPlan(config, identity, datasets, groups, sft, local={"base": str(base)})


def finish_group(plan: PartitionPlan, folder: Path, group: int) -> Path:
    """Put the manifest of a finished training of `group` into a checkpoint's folder."""
    planned = plan.group(group)
    ledger = {
        "num_input_tokens": planned.train_input_tokens, "num_loss_tokens": planned.train_loss_tokens,
        "num_padding_tokens": 0,
    }  # fmt: skip
    manifest = group_manifest(plan, group, ledger, planned.num_steps, plan.group_sft(group), "complete")
    write_manifest(folder, {**manifest, "files": hash_files(folder)})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionPlan, list[Path]]:
    root = tmp_path_factory.mktemp("trained")
    plan = make_plan(make_base(root / "base", seed=9))
    return plan, [finish_group(plan, make_base(root / f"group-{k}", seed=k), k) for k in range(3)]


def expected(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    loaded = [load_file(folder / "model.safetensors") for folder in folders]
    return {
        name: sum(w * tensors[name].double() for w, tensors in zip(weights, loaded, strict=True)) / sum(weights)
        for name in loaded[0]
    }


def assert_merged(output: Path, folders: list[Path], weights: list[float]) -> None:
    merged = load_file(output / "model.safetensors")
    for name, mean in expected(folders, weights).items():
        assert torch.allclose(merged[name].double(), mean, rtol=2**-8, atol=1e-12)


def manifest_of(output: Path) -> dict:
    return json.loads((output / "merit.json").read_text())


def test_groups_are_weighted_by_the_tokens_of_the_plan(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    stats = merge_groups(plan, [folders[2], folders[0], folders[1]], tmp_path / "out")
    assert_merged(tmp_path / "out", folders, TOKENS)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["kind"] == "merged"
    assert manifest["plan"]["sha256"] == plan.sha256
    assert manifest["base"]["weights_sha256"] == plan.base["weights_sha256"]
    assert [group["group"] for group in manifest["groups"]] == [0, 1, 2]
    assert [group["weight"] for group in manifest["groups"]] == [0.6, 0.3, 0.1]
    assert [group["num_input_tokens"] for group in manifest["groups"]] == TOKENS
    files = [json.loads((folder / "merit.json").read_text())["files"] for folder in folders]
    assert [group["files_sha256"] for group in manifest["groups"]] == [canonical_sha256(table) for table in files]
    assert (manifest["out_dtype"], manifest["engine"]) == ("bfloat16", "safetensors")
    assert manifest["stats"]["displacement"] == pytest.approx(stats.displacement, rel=1e-5)
    unhashed = {"merit.json", "README.md", "mergekit_config.yml"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == manifest["files"].keys() | unhashed
    assert manifest["files"] == {n: h for n, h in hash_files(tmp_path / "out").items() if n not in unhashed}
    config = yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())
    assert [model["model"] for model in config["models"]] == [str(folder) for folder in folders]


def test_no_local_path_in_what_is_published(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    merge_groups(plan, folders, tmp_path / "out")
    for name in ("merit.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path.parent) not in text
        assert str(folders[0].parent) not in text


def test_merging_again_writes_the_same_bytes(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    (tmp_path / "second.part").mkdir()
    (tmp_path / "second.part/model.safetensors").write_bytes(b"left by a killed merge")
    for name, order in (("first", folders), ("second", folders[::-1])):
        merge_groups(plan, order, tmp_path / name)
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    with pytest.raises(ConfigError, match="first: exists already"):
        merge_groups(plan, folders[:1], tmp_path / "first")  # told before what else is wrong


@pytest.mark.parametrize(
    ("weights", "values"),
    [
        ("loss_tokens", LOSS_TOKENS),
        ("uniform", [1, 1, 1]),
        ("{0: 3, 1: 2.5, 2: 1e-1}", [3, 2.5, 0.1]),
        ('{"0": 1, "1": 2, "2": 5}', [1, 2, 5]),
    ],
)
def test_other_weights(trained: tuple, tmp_path: Path, weights: str, values: list[float]) -> None:
    plan, folders = trained
    if weights.startswith("{"):
        (tmp_path / "weights.yaml").write_text(weights)
        weights = str(tmp_path / "weights.yaml")
    merge_groups(plan, folders, tmp_path / "out", weights=weights)
    assert_merged(tmp_path / "out", folders, values)
    found = [group["weight"] for group in manifest_of(tmp_path / "out")["groups"]]
    assert found == pytest.approx([value / sum(values) for value in values])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{0: 1, 1: 1}", "weights.yaml: no weight for group 2. Add it, or exclude the group"),
        ("{0: 1, 1: 1, 2: 1, 7: 1}", "weight for group 7; the plan has groups 0 to 2"),
        ("{0: 1, 1: much, 2: 1}", "group 1: weight 'much' is not a number"),
        ("{0: 1, 1: true, 2: 1}", "group 1: weight True is not a number"),
        ("{0: 1, 1: 0, 2: 1}", r"weights.yaml: group 1: weight 0\.0: expected a positive, finite number"),
        ("{0: 1, 1: -1, 2: 1}", r"weights.yaml: group 1: weight -1\.0: expected a positive, finite number"),
        ("[1, 1, 1]", "expected a mapping of group to weight, found a list"),
        ("{0: 1,", "not valid YAML or JSON"),
    ],
)
def test_bad_weight_files(trained: tuple, tmp_path: Path, content: str, message: str) -> None:
    plan, folders = trained
    (tmp_path / "weights.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        merge_groups(plan, folders, tmp_path / "out", weights=tmp_path / "weights.yaml")
    assert not (tmp_path / "out.part").exists()
    with pytest.raises(ConfigError, match="weights tokenz: expected tokens, loss_tokens, uniform, or a file"):
        merge_groups(plan, folders, tmp_path / "out", weights="tokenz")


def test_exclude_and_allow_missing_renormalise(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    merge_groups(plan, folders, tmp_path / "excluded", exclude=[1])
    merge_groups(plan, [folders[2], folders[0]], tmp_path / "missing", allow_missing=True)
    for name in ("excluded", "missing"):
        assert_merged(tmp_path / name, [folders[0], folders[2]], [600, 100])
        assert [group["group"] for group in manifest_of(tmp_path / name)["groups"]] == [0, 2]
        assert [group["weight"] for group in manifest_of(tmp_path / name)["groups"]] == [600 / 700, 100 / 700]


def test_which_groups_are_there_is_checked(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    copy = Path(shutil.copytree(folders[1], tmp_path / "copy"))
    stranger = Path(shutil.copytree(folders[1], tmp_path / "stranger"))
    write_manifest(stranger, {**manifest_of(stranger), "group": 5})
    cases = [
        (folders[:1], {}, "1 of 3 groups given, no checkpoint of group 1, 2. .*--allow-missing"),
        ([*folders, copy], {}, f"group 1 is given twice: {folders[1]} and {copy}"),
        ([*folders, stranger], {}, f"{stranger}: its merit.json names group 5, and the plan has groups 0 to 2"),
        (folders, {"exclude": [3]}, "group 3: the plan has groups 0 to 2"),
        (folders, {"exclude": [0, 1, 2]}, "no group is left to merge"),
        ([], {"allow_missing": True}, "no group is left to merge"),
        ([plan.local["base"]], {}, "no merit.json in it"),
    ]
    for given, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            merge_groups(plan, given, tmp_path / "out", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "stranger"}


def test_checkpoint_that_does_not_verify_is_refused(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    changed = Path(shutil.copytree(folders[1], tmp_path / "changed"))
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    message = re.escape(f"{changed}: does not verify: checksums is config.json has changed")
    with pytest.raises(MeritError, match=message):
        merge_groups(plan, [folders[0], changed, folders[2]], tmp_path / "out")
    merge_groups(plan, [folders[0], changed, folders[2]], tmp_path / "out", exclude=[1])
    short = Path(shutil.copytree(folders[1], tmp_path / "short"))
    write_manifest(short, {**manifest_of(short), "num_input_tokens": 299})
    with pytest.raises(MeritError, match="num_input_tokens is 299, expected 300"):
        merge_groups(plan, [folders[0], short, folders[2]], tmp_path / "other")
    assert not (tmp_path / "other.part").exists()


def test_wrong_base_is_refused(trained: tuple, tmp_path: Path) -> None:
    plan, folders = trained
    other = make_base(tmp_path / "other", seed=77)
    with pytest.raises(MeritError, match=f"{other}: not the plan's base: weights_sha256 {weights_sha256(other)[:12]}"):
        merge_groups(plan, folders, tmp_path / "out", base=other)
    moved = Path(shutil.copytree(plan.local["base"], tmp_path / "moved"))
    homeless = replace(plan, local={}, base={**plan.base, "repo_id": None, "revision": None})
    with pytest.raises(
        ConfigError, match=r"the plan's base was a local folder \(weights \w+\) and is not on this machine"
    ):
        merge_groups(homeless, folders, tmp_path / "out")
    merge_groups(homeless, folders, tmp_path / "out", base=moved)
    assert_merged(tmp_path / "out", folders, TOKENS)

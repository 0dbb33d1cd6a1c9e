"""Every check of a verification fails, by its name, when the thing that it checks was tampered with."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merit_hf.config import ConfigError, MeritError
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import hash_files, read_manifest, write_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.verification.checks import Check
from merit_hf.verification.verify import verify_checkpoint


@pytest.fixture
def checkpoint(tiny_groups: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_groups[0], tmp_path / "group-0"))


def failures(plan: PartitionPlan, folder: Path) -> dict[str, Check]:
    return {check.name: check for check in verify_checkpoint(plan, folder) if not check.ok}


def rewrite(folder: Path, **changes: Any) -> None:
    manifest = read_manifest(folder)
    write_manifest(folder, {**manifest, **changes})


def rehash(folder: Path) -> None:
    """What somebody does who changes a checkpoint and its manifest with it."""
    rewrite(folder, files=hash_files(folder))


def test_an_untouched_checkpoint_verifies(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    checks = verify_checkpoint(tiny_plan, checkpoint)
    assert all(check.ok for check in checks)
    assert [check.name for check in checks] == [
        "kind", "group", "status", "num_steps", "file names", "no pickled weights", "known files", "group_sha256",
        "base weights", "chat template", "datasets", "SFT settings", "num_input_tokens", "num_loss_tokens", "files",
        "tensors", "checksums", "model config", "tokenizer", "chat template in the files", "finite weights", "trained",
        "largest move",
    ]  # fmt: skip


def other_base(manifest: dict[str, Any], **changes: str) -> dict[str, Any]:
    return {"base": {**manifest["base"], **changes}}


def other_fingerprint(manifest: dict[str, Any]) -> dict[str, Any]:
    first, *rest = manifest["datasets"]
    return {"datasets": [{**first, "fingerprint": "0" * 64}, *rest]}


MANIFEST_CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "status": ("status", lambda m: {"status": "training"}),
    "group_sha256": ("group_sha256", lambda m: {"group_sha256": "0" * 64}),
    "base": ("base weights", lambda m: other_base(m, weights_sha256="0" * 64)),
    "template": ("chat template", lambda m: other_base(m, chat_template_sha256="0" * 64)),
    "fingerprint": ("datasets", other_fingerprint),
    "dataset missing": ("datasets", lambda m: {"datasets": m["datasets"][1:]}),
    "dataset added": ("datasets", lambda m: {"datasets": [*m["datasets"], {"name": "more", "fingerprint": "0" * 64}]}),
    "learning rate": ("SFT settings", lambda m: {"sft": {**m["sft"], "learning_rate": 2e-3}}),
    "setting missing": ("SFT settings", lambda m: {"sft": {k: v for k, v in m["sft"].items() if k != "seed"}}),
    "steps": ("num_steps", lambda m: {"num_steps": m["num_steps"] - 1}),
    "fewer tokens": ("num_input_tokens", lambda m: {"num_input_tokens": m["num_input_tokens"] - 1}),
    "more tokens": ("num_input_tokens", lambda m: {"num_input_tokens": m["num_input_tokens"] + 1}),
    "fewer loss tokens": ("num_loss_tokens", lambda m: {"num_loss_tokens": m["num_loss_tokens"] - 1}),
    "tokens missing": ("num_loss_tokens", lambda m: {"num_loss_tokens": None}),
    "no files": ("files", lambda m: {"files": {}}),
}


@pytest.mark.parametrize(("check", "change"), MANIFEST_CHANGES.values(), ids=MANIFEST_CHANGES)
def test_a_changed_manifest_fails_that_check_alone(
    check: str, change: Callable[[dict[str, Any]], dict[str, Any]], tiny_plan: PartitionPlan, checkpoint: Path
) -> None:
    rewrite(checkpoint, **change(read_manifest(checkpoint)))
    found = failures(tiny_plan, checkpoint)
    assert list(found) == [check]
    assert found[check].expected != found[check].found


def test_only_the_setting_that_differs_is_shown(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    rewrite(checkpoint, sft={**read_manifest(checkpoint)["sft"], "learning_rate": 2e-3})
    check = failures(tiny_plan, checkpoint)["SFT settings"]
    assert (check.expected, check.found) == ('{"learning_rate": 0.001}', '{"learning_rate": 0.002}')


def test_another_kind_or_group_stops_there(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    for changes, name in (
        ({"kind": "merged"}, "kind"),
        ({"group": 2}, "group"),
        ({"group": None}, "group"),
        ({"group": True}, "group"),
    ):
        shutil.copy(checkpoint / "merit.json", checkpoint / "kept")
        rewrite(checkpoint, **changes)
        assert list(failures(tiny_plan, checkpoint)) == [name], changes
        (checkpoint / "kept").replace(checkpoint / "merit.json")


def test_the_checkpoint_of_another_group_is_not_this_one(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    rewrite(checkpoint, group=1)
    assert {"group_sha256", "datasets", "num_input_tokens"} <= failures(tiny_plan, checkpoint).keys()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file(name: str, tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-2] ^= 1
    (checkpoint / name).write_bytes(content)
    found = failures(tiny_plan, checkpoint)
    assert list(found) == ["checksums"]
    assert found["checksums"].found == f"{name} has changed"


def test_a_missing_and_an_extra_file(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").rename(checkpoint / "notes.json")
    found = failures(tiny_plan, checkpoint)
    assert found["files"].found == "generation_config.json is missing; notes.json is not in the manifest"


def test_what_is_no_part_of_a_model_may_change(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("A card of the owner's.")
    (checkpoint / "trainer_state.json").unlink()
    (checkpoint / "optimizer.pt").write_bytes(b"kept for a resume")
    (checkpoint / ".gitattributes").write_text("added by the Hub")
    assert failures(tiny_plan, checkpoint) == {}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "model.pkl", "model.ckpt"])
def test_pickled_weights(name: str, tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    torch.save({}, checkpoint / name)
    rehash(checkpoint)
    found = failures(tiny_plan, checkpoint)
    assert list(found) == ["no pickled weights"]
    assert found["no pickled weights"].found == name


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rehash(folder)


NORM = "model.norm.weight"
TENSOR_CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "renamed": (
        lambda t: t.update({"model.norm.scale": t.pop(NORM)}),
        f"{NORM} is missing; model.norm.scale is not in the base",
    ),
    "missing": (lambda t: t.pop(NORM), f"{NORM} is missing"),
    "reshaped": (lambda t: t.update({NORM: t[NORM].reshape(1, -1)}), f"{NORM} has shape [1, 32], the base [32]"),
    "one more": (lambda t: t.update({"lm_head.bias": torch.zeros(2)}), "lm_head.bias is not in the base"),
}


@pytest.mark.parametrize(("edit", "message"), TENSOR_CHANGES.values(), ids=TENSOR_CHANGES)
def test_other_tensors_even_with_matching_hashes(
    edit: Callable[[dict[str, torch.Tensor]], Any], message: str, tiny_plan: PartitionPlan, checkpoint: Path
) -> None:
    edit_tensors(checkpoint, edit)
    found = failures(tiny_plan, checkpoint)
    assert list(found) == ["tensors"]
    assert found["tensors"].found == message


def test_many_other_tensors_are_counted(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in sorted(tensors)[1:8]:
            del tensors[name]

    edit_tensors(checkpoint, strip)
    assert failures(tiny_plan, checkpoint)["tensors"].found.endswith(" and 4 more")


def test_a_plan_of_other_data_fails_the_checkpoint(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    """The checkpoint is as it was; the plan it is held against is another one."""
    first, *rest = tiny_plan.groups
    other = dataclasses.replace(tiny_plan, groups=[dataclasses.replace(first, group_sha256="1" * 64), *rest])
    assert list(failures(other, checkpoint)) == ["group_sha256"]


def test_several_processes_may_repeat_rows_but_not_leave_any_out(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    tokens = tiny_plan.group(0).train_input_tokens
    slack = 4 * 64  # one epoch's last batch of 4, filled with the longest rows there can be
    for processes, count, ok in (
        (2, tokens, True), (2, tokens + 20, True), (2, tokens + slack, True), (2, tokens + slack + 1, False),
        (2, tokens - 1, False), (1, tokens + 20, False),
    ):  # fmt: skip
        rewrite(checkpoint, num_processes=processes, num_input_tokens=count)
        assert (failures(tiny_plan, checkpoint) == {}) is ok, (processes, count)


def test_nonsense_in_a_manifest_is_a_failed_check(tiny_plan: PartitionPlan, checkpoint: Path) -> None:
    for changes in (
        {"base": None},
        {"datasets": None},
        {"datasets": ["a"]},
        {"files": None},
        {"num_processes": "two"},
    ):
        shutil.copy(checkpoint / "merit.json", checkpoint.parent / "kept")
        rewrite(checkpoint, **changes)
        assert bool(failures(tiny_plan, checkpoint)) is ("num_processes" not in changes), changes
        shutil.copy(checkpoint.parent / "kept", checkpoint / "merit.json")


def test_an_unreadable_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no merit\.json in it.*merit train"):
        read_manifest(tmp_path)
    path = tmp_path / "merit.json"
    for text, message in (
        ("{", "not valid JSON"), ("[]", "schema_version 'list', expected 1"), ("{}", "schema_version None"),
        ('{"schema_version": 2}', "schema_version 2, expected 1"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(MeritError, match=message):
            read_manifest(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(MeritError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_a_merge_refuses_what_does_not_verify(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], checkpoint: Path
) -> None:
    rewrite(checkpoint, num_input_tokens=10**6)
    with pytest.raises(MeritError, match=r"does not verify: num_input_tokens is 1000000, expected"):
        merge_groups(tiny_plan, [checkpoint, tiny_groups[1]], checkpoint.parent / "merged")
    assert not (checkpoint.parent / "merged").exists()

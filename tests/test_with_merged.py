"""A merged model in the stead of its groups: add a branch to it, without the groups of others.

One on the Hub, and what is published of the result, are in test_publish.py.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging import load, mean64, needs_mergekit, run_mergekit
from test_group_merge import TOKENS, finish_group, make_plan
from tiny import as_chat, make_adapter, make_base, make_mixture, make_tokenizer, task_rows, write_jsonl
from typer.testing import CliRunner

from merit_hf.adapters import adapter_settings
from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import read_manifest, write_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME
from merit_hf.plan import PartitionPlan, group_identity


def first_groups(plan: PartitionPlan, count: int) -> PartitionPlan:
    """The plan that `plan` extends: its first groups."""
    total = sum(group.train_input_tokens for group in plan.groups[:count])
    groups = [replace(group, weight=group.train_input_tokens / total) for group in plan.groups[:count]]
    return replace(plan, groups=groups, datasets=plan.datasets[:count])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionPlan, list[Path], Path]:
    """A plan of three groups, their checkpoints, and the merged model of the plan of the first two."""
    root = tmp_path_factory.mktemp("trained")
    plan = make_plan(make_base(root / "base", seed=9))
    content = {"base": {"model_name_or_path": "org/base"}, "datasets": [{"name": n, "path": "x"} for n in plan.names]}
    plan.config = MeritConfig.from_dict({**content, "plan": {"num_groups": 3}}).model_dump(mode="json")
    groups = [finish_group(plan, make_base(root / f"group-{k}", seed=k), k) for k in range(3)]
    merge_groups(first_groups(plan, 2), groups[:2], root / "before", out_dtype="float32")
    return plan, groups, root / "before"


def test_adding_a_branch_is_merging_all_at_once(trained: tuple, tmp_path: Path) -> None:
    plan, groups, before = trained
    whole = merge_groups(plan, groups, tmp_path / "whole", out_dtype="float32")
    stats = merge_groups(plan, groups[2:], tmp_path / "added", out_dtype="float32", with_merged=before)
    exact = mean64(groups, TOKENS)
    for name, tensor in load(tmp_path / "added").items():
        # The earlier model was rounded to float32 once, and then this one.
        assert bool(((tensor.double() - exact[name]).abs() <= 2**-23 * exact[name].abs().max()).all())
    assert stats.displacement == pytest.approx(whole.displacement, rel=1e-6)
    made, expected = (read_manifest(tmp_path / name) for name in ("added", "whole"))
    for here, there in zip(made["groups"], expected["groups"], strict=True):
        assert here["weight"] == pytest.approx(there["weight"], rel=1e-12)
        assert {**here, "weight": 0} == {**there, "weight": 0}
    assert made["stats"]["group_displacements"] == expected["stats"]["group_displacements"]
    record = made["with_merged"]
    assert record["plan_sha256"] == first_groups(plan, 2).sha256 != plan.sha256 == made["plan"]["sha256"]
    assert (record["groups"], record["weight"]) == ([0, 1], pytest.approx(0.9))
    card = (tmp_path / "added" / "README.md").read_text()
    assert "Groups 0, 1 came in as one merged model, with the weight\n0.900000" in card
    assert "merit train PLAN --group 2 --output groups/2\n" in card
    assert "merit merge PLAN groups/2 --with-merged merged-before --output merged" in card
    assert "- model: merged-before" in card
    assert str(before.parent) not in card


def test_branch_after_branch_is_merging_all_at_once(trained: tuple, tmp_path: Path) -> None:
    """One group, another one to it, and the third one to both; with α at the end."""
    plan, groups, _ = trained
    merge_groups(first_groups(plan, 1), groups[:1], tmp_path / "1", out_dtype="float32")
    merge_groups(first_groups(plan, 2), groups[1:2], tmp_path / "2", out_dtype="float32", with_merged=tmp_path / "1")
    merge_groups(
        plan, groups[2:], tmp_path / "3", out_dtype="float32", with_merged=tmp_path / "2", interpolate_to_init=0.5
    )
    merge_groups(plan, groups, tmp_path / "whole", out_dtype="float32", interpolate_to_init=0.5)
    for name, tensor in load(tmp_path / "3").items():
        other = load(tmp_path / "whole")[name]
        assert bool(((tensor - other).abs() <= 2**-22 * other.abs().max()).all())
    assert [group["weight"] for group in read_manifest(tmp_path / "3")["groups"]] == pytest.approx([0.6, 0.3, 0.1])
    recipe = yaml.safe_load((tmp_path / "3" / MERGEKIT_CONFIG_NAME).read_text())
    assert [model["model"] for model in recipe["models"]] == [str(tmp_path / "2"), str(groups[2]), plan.local["base"]]


@needs_mergekit
def test_mergekit_makes_the_same_of_the_recipe(trained: tuple, tmp_path: Path) -> None:
    plan, groups, before = trained
    merge_groups(plan, groups[2:], tmp_path / "ours", out_dtype="float32", with_merged=before)
    theirs = run_mergekit(tmp_path / "ours" / MERGEKIT_CONFIG_NAME, tmp_path / "theirs")
    for name, tensor in load(tmp_path / "ours").items():
        torch.testing.assert_close(theirs[name], tensor, rtol=2**-22, atol=2**-22 * float(tensor.abs().max()))
    made = merge_groups(plan, groups[2:], tmp_path / "engine", engine="mergekit", with_merged=before)
    assert made.fractions == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("weights", ["uniform", "loss_tokens", "file"])
def test_other_weights_are_the_sums_of_the_groups(trained: tuple, weights: str, tmp_path: Path) -> None:
    plan, groups, _ = trained
    if weights == "file":
        (tmp_path / "weights.yaml").write_text("{0: 1, 1: 2, 2: 5}")
        weights = str(tmp_path / "weights.yaml")
        # The plan of the first two has no third group to weigh.
        (tmp_path / "two.yaml").write_text("{0: 10, 1: 20}")
    parent, own = first_groups(plan, 2), str(tmp_path / "two.yaml") if "/" in weights else weights
    merge_groups(parent, groups[:2], tmp_path / "before", weights=own, out_dtype="float32")
    merge_groups(plan, groups, tmp_path / "whole", weights=weights, out_dtype="float32")
    merge_groups(
        plan, groups[2:], tmp_path / "added", weights=weights, out_dtype="float32", with_merged=tmp_path / "before"
    )
    added, whole = (read_manifest(tmp_path / name) for name in ("added", "whole"))
    for here, there in zip(added["groups"], whole["groups"], strict=True):
        assert here["weight"] == pytest.approx(there["weight"])
    for name, tensor in load(tmp_path / "whole").items():
        torch.testing.assert_close(load(tmp_path / "added")[name], tensor, rtol=1e-6, atol=1e-6)


def changed(before: Path, folder: Path, **entries: Any) -> Path:
    copy = Path(shutil.copytree(before, folder))
    write_manifest(copy, {**read_manifest(copy), **entries})
    return copy


def test_what_is_no_mean_of_these_groups_is_refused_by_name(trained: tuple, tmp_path: Path) -> None:
    plan, groups, before = trained
    manifest = read_manifest(before)
    entries = manifest["groups"]
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "kind": ({"kind": "group"}, "kind is group, expected merged"),
        "plan": ({"plan": {"sha256": "0" * 64}}, "plan is 0000"),
        "base": ({"base": {**manifest["base"], "weights_sha256": "1" * 64}}, "base weights is 1111"),
        "method": ({"method": "ties"}, "method is ties, expected linear"),
        "alpha": ({"interpolate_to_init": 0.5}, r"interpolate_to_init is 0\.5, expected 1"),
        "adapters": ({"adapters": "svd"}, "adapters is svd, expected dense"),
        "weights": (
            {"groups": [{**entry, "weight": 0.5} for entry in entries]},
            r"weights is \[0\.5, 0\.5\], expected \[0\.666667, 0\.333333\]",
        ),
        "stranger": ({"groups": [{**entries[0], "group": 2}, entries[1]]}, r"groups is \[2, 1\], expected of 0 to 1"),
        "tokens": (
            {"groups": [{**entries[0], "num_input_tokens": 1}, entries[1]]},
            "num_input_tokens of group 0 is 1, expected 600",
        ),
        "types": ({"groups": [{**entries[0], "weight": "much"}, entries[1]]}, "groups is something else"),
        "twice": ({"groups": [entries[0], entries[0]]}, "groups is something else"),
        "lost": (
            {"files": {**manifest["files"], "model-00002-of-00002.safetensors": "0"}},
            "files is model-00002-of-00002.safetensors is missing",
        ),
    }
    for name, (update, said) in cases.items():
        folder = changed(before, tmp_path / name, **update)
        with pytest.raises(MeritError, match=f"^--with-merged {re.escape(str(folder))}: does not verify: {said}"):
            merge_groups(plan, groups[2:], tmp_path / "out", with_merged=folder)
    touched = Path(shutil.copytree(before, tmp_path / "touched"))
    with (touched / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(MeritError, match=r"checksums is model\.safetensors has changed"):
        merge_groups(plan, groups[2:], tmp_path / "out", with_merged=touched)
    calls: list[tuple[dict[str, Any], list[Path], str]] = [
        ({"with_merged": plan.local["base"]}, groups[2:], "no merit.json in it, so nothing says what it was merged"),
        ({"with_merged": "nowhere/at/all"}, groups[2:], "--with-merged: no folder `nowhere/at/all`"),
        ({"with_merged": before}, groups[1:], "group 1 is in the merged model already"),
        ({"with_merged": before, "exclude": [0]}, groups[2:], "--exclude 0: group 0 is in the merged model"),
        ({"with_merged": before}, [], "0 of 1 groups given, no checkpoint of group 2"),
        ({"with_merged": before, "engine": "mergekit", "method": "ties"}, groups[2:], "with_merged is for a mean"),
    ]
    for options, given, said in calls:
        with pytest.raises(ConfigError, match=said):
            merge_groups(plan, given, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))
    plan.save_pretrained(tmp_path / "plan")
    for extra in (["--soup"], ["--weights", "tokens", "--weights", "uniform"]):
        call = ["merge", str(tmp_path / "plan"), str(groups[2]), "--with-merged", str(before), *extra]
        done = CliRunner().invoke(app, [*call, "--output", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert "--with-merged takes one --weights and no --soup" in done.output


def succeed(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="merit")
    assert done.exit_code == 0, done.output
    return str(done.stdout)


@pytest.mark.slow
def test_the_road_of_a_branch_by_the_commands(tmp_path: Path) -> None:
    """Plan, groups and merged model are there, and a dataset turns up: with the groups, and with the model alone."""
    config = make_mixture(tmp_path, ("copy", "count"), count=8)
    run = tmp_path / "run"
    succeed("run", config, "merge.out_dtype=float32", "--output", run)
    write_jsonl(tmp_path / "data/upper.jsonl", [as_chat(row) for row in task_rows("upper", 8)])
    new = tmp_path / "new.yaml"
    new.write_text(
        yaml.safe_dump({"datasets": [{"name": "upper", "path": "data/upper.jsonl", "eval_fraction": 0.25}]})
    )
    added = tmp_path / "added"
    told = succeed("extend", run / "plan", "--datasets", new, "--output", added / "plan")
    assert f"Next: merit train {added}/plan --group 2 --output {added}/groups/2" in told
    shutil.copytree(run / "merged", added / "before")
    told = succeed("status", added / "plan")
    assert f"Next: merit train {added}/plan --group 2 --output {added}/groups/2" in told
    succeed("train", added / "plan", "--group", 2, "--output", added / "groups/2")
    groups = [run / "groups/0", run / "groups/1", added / "groups/2"]
    succeed("verify", added / "plan", *groups)
    told = succeed("status", added / "plan")
    call = f"merit merge {added}/plan {added}/groups/2 --with-merged {added}/before --output {added}/before-extended"
    assert f"Next: {call}" in told
    succeed("merge", added / "plan", *groups, "--output", tmp_path / "all")
    # The line that status gave, into the place where a run has it.
    told = succeed(*call.replace("before-extended", "merged").split()[1:])
    assert f"The merged model is in {added}/merged" in told
    plan = PartitionPlan.from_pretrained(added / "plan")
    weights = [group.train_input_tokens / sum(g.train_input_tokens for g in plan.groups) for group in plan.groups]
    for folder in (tmp_path / "all", added / "merged"):
        assert [group["weight"] for group in read_manifest(folder)["groups"]] == pytest.approx(weights)
    for name, tensor in load(tmp_path / "all").items():
        torch.testing.assert_close(load(added / "merged")[name], tensor, rtol=1e-6, atol=1e-7)
    assert f"All groups are merged: {added}/merged" in succeed("status", added / "plan")
    succeed("evaluate", added / "merged", "--plan", added / "plan", "--output", added, "--no-generate", "--card")
    succeed("report", added)
    page = (added / "report.html").read_text(encoding="utf-8")
    assert "in the merged model that came in" in page
    assert "Group 0, 1 came in as one merged model" in page
    assert "left out" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_lora_groups_go_into_a_merged_adapter_or_model(tmp_path: Path) -> None:
    """dense into dense, concat into concat and svd; a whole model goes into no adapter."""
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    base = make_base(tmp_path / "base", seed=3)
    plan = make_plan(base)
    groups = [make_adapter(base, tmp_path / f"in-{k}", k, 0.02, **lora) for k in range(3)]
    peft = adapter_settings(groups[0])
    plan = replace(plan, peft=peft, groups=[
        replace(g, group_sha256=group_identity(plan.base, plan.members(g.group), plan.sft, peft)) for g in plan.groups
    ])  # fmt: skip
    for k, folder in enumerate(groups):
        make_tokenizer().save_pretrained(folder)
        finish_group(plan, folder, k)
    parent = first_groups(plan, 2)
    for form in ("dense", "concat"):
        options = {"adapters": form} | ({"out_dtype": "float32"} if form == "dense" else {})
        merge_groups(parent, groups[:2], tmp_path / f"{form}-before", **options)
        merge_groups(plan, groups, tmp_path / f"{form}-all", **options)
        merge_groups(plan, groups[2:], tmp_path / f"{form}-added", **options, with_merged=tmp_path / f"{form}-before")
    for name, tensor in load(tmp_path / "dense-all").items():
        torch.testing.assert_close(load(tmp_path / "dense-added")[name], tensor, rtol=1e-6, atol=1e-7)
    every, added = (load(tmp_path / f"concat-{name}") for name in ("all", "added"))
    for name in every:
        if "lora_A" in name:
            down = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(added[down] @ added[name], every[down] @ every[name], rtol=1e-5, atol=1e-7)
    recipe = yaml.safe_load((tmp_path / "dense-added" / MERGEKIT_CONFIG_NAME).read_text())
    assert [isinstance(model["model"], dict) for model in recipe["models"]] == [False, True]
    merge_groups(
        plan, groups[2:], tmp_path / "svd", adapters="svd", svd_rank=4, with_merged=tmp_path / "concat-before"
    )
    with pytest.raises(MeritError, match="adapters is dense, expected concat"):
        merge_groups(plan, groups[2:], tmp_path / "x", adapters="concat", with_merged=tmp_path / "dense-before")

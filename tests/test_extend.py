"""`merit extend`: new datasets beside finished groups, or all groups anew; only what is new is measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import TEMPLATE, as_chat, make_base, make_mixture, task_rows, write_jsonl

from merit_hf import extend, tables
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.conflict import conflict_matrix, cross_cosines
from merit_hf.extend import changes, extend_plan
from merit_hf.extension import read_extension
from merit_hf.group_merge import merge_groups
from merit_hf.partition import principal_axes, split_by_conflict
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.projection import local_values, nearest_centroids, project_onto_axes, sides_of_cuts
from merit_hf.repartition import repartition
from merit_hf.training import train_group
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)
NEW = ("repeat", "upper")


def planned(config: Path, output: Path, *overrides: str) -> PartitionPlan:
    return MeritPlanner(MeritConfig.from_yaml(config, overrides), QUIET).plan(output)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CONFIG of four tasks, with files of two more beside it."""
    config = make_mixture(tmp_path_factory.mktemp("extend"), count=11)
    for task in NEW:
        write_jsonl(config.parent / f"data/{task}.jsonl", [as_chat(row) for row in task_rows(task, 11)])
    return config


@pytest.fixture(scope="module")
def plan(mixture: Path) -> PartitionPlan:
    return planned(mixture, mixture.parent / "plan")


@pytest.fixture
def entries(mixture: Path, tmp_path: Path) -> Callable[..., Path]:
    """`entries("repeat", sft={…})`: an extension file of these tasks."""

    def write(*tasks: str, **more: Any) -> Path:
        path = mixture.parent / f"{tmp_path.name}.yaml"
        listed = [{"name": task, "path": f"data/{task}.jsonl"} for task in tasks]
        path.write_text(yaml.safe_dump({"datasets": listed, **more}))
        return path

    return write


def test_project_leaves_every_group_and_adds_branches(
    plan: PartitionPlan, entries: Callable[..., Path], tmp_path: Path
) -> None:
    extended = extend_plan(plan, read_extension(entries(*NEW), plan), tmp_path / "out", progress=QUIET)
    assert extended.parent_sha256 == plan.sha256
    assert [g.group_sha256 for g in extended.groups[:2]] == [g.group_sha256 for g in plan.groups]
    assert [g.datasets for g in extended.groups[2:]] == [["repeat"], ["upper"]]
    assert sum(group.weight for group in extended.groups) == pytest.approx(1)
    old = {row.name: row for row in plan.datasets}
    assert all(row == old[row.name] for row in extended.datasets if row.name in old)
    assert {row.name: row.projected_group in (0, 1) for row in extended.datasets if row.name not in old} == {
        "repeat": True, "upper": True,
    }  # fmt: skip
    told = changes(plan, extended)
    assert told == {"added": {"repeat": 2, "upper": 3}, "moved": [], "to_train": [2, 3], "kept": [0, 1]}
    sketches = extended.load_sketches()
    assert np.allclose(extended.conflict_matrix, conflict_matrix(sketches), atol=1e-12)
    assert f"It extends plan `{plan.sha256}`" in (tmp_path / "out/README.md").read_text()
    again = extend_plan(plan, read_extension(entries(*NEW), plan), tmp_path / "out", progress=QUIET)
    assert again.sha256 == extended.sha256
    with pytest.raises(ConfigError, match="holds the plan of other inputs"):
        extend_plan(plan, read_extension(entries("upper"), plan), tmp_path / "out", progress=QUIET)


def test_adding_one_and_one_is_adding_two(plan: PartitionPlan, entries: Callable[..., Path], tmp_path: Path) -> None:
    both = extend_plan(plan, read_extension(entries(*NEW), plan), tmp_path / "both", progress=QUIET)
    one = extend_plan(plan, read_extension(entries("repeat"), plan), tmp_path / "one", progress=QUIET)
    two = extend_plan(one, read_extension(entries("upper"), one), tmp_path / "two", progress=QUIET)
    assert two.sha256 == both.sha256
    assert two.parent_sha256 == one.sha256 != both.parent_sha256
    assert np.array_equal(two.load_sketches(), both.load_sketches())
    for here, there in zip(two.datasets, both.datasets, strict=True):
        assert replace(here, coordinates=[]) == replace(there, coordinates=[])
        assert here.coordinates == pytest.approx(there.coordinates, abs=1e-9)
    assert np.allclose(two.conflict_matrix, both.conflict_matrix, atol=1e-12)
    assert changes(one, two)["to_train"] == [3], "a branch that was there is left alone"
    told = changes(plan, extend_plan(plan, read_extension(entries(*NEW), plan), tmp_path / "by", branches="group",
                                     progress=QUIET))  # fmt: skip
    assert len(set(told["added"].values())) == len({row.projected_group for row in both.datasets} - {None})


def test_a_large_plan_is_extended_without_its_matrix(
    plan: PartitionPlan, entries: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own limits, made small: six datasets are many, four are not, and a dataset lists one pair on each side."""
    monkeypatch.setattr(tables, "MAX_ALL_PAIRS", 4)
    monkeypatch.setattr(tables, "EXTREME_PAIRS", 1)
    monkeypatch.setattr(extend, "MAX_ALL_PAIRS", 4)
    one = extend_plan(plan, read_extension(entries("repeat"), plan), tmp_path / "one", progress=QUIET)
    two = extend_plan(one, read_extension(entries("upper"), one), tmp_path / "two", progress=QUIET)
    pairs = two.conflict_pairs()
    assert pairs is not None
    assert callable(two.__dict__[tables.LazyMatrix.NAME]), "neither loading nor the pairs need the matrix"
    matrix = conflict_matrix(two.load_sketches())
    expected = tables.conflict_pairs(matrix)
    assert np.array_equal((pairs.rows, pairs.columns), (expected.rows, expected.columns))
    assert np.allclose(pairs.cosines, expected.cosines, atol=1e-12)
    assert np.array_equal(two.conflict_matrix, matrix)
    pictures = [folder / "figures/conflict.png" for folder in (plan.folder, one.folder, two.folder)]
    assert len({picture.read_bytes() for picture in pictures}) == 1, "the picture of the matrix that was made"
    assert two.sha256 != one.sha256


def test_refit_is_the_plan_of_all_and_measures_the_new_only(
    plan: PartitionPlan, mixture: Path, entries: Callable[..., Path], tmp_path: Path
) -> None:
    refit = extend_plan(plan, read_extension(entries(*NEW), plan), tmp_path / "refit", "refit", progress=QUIET)
    content = yaml.safe_load(mixture.read_text())
    content["datasets"] += yaml.safe_load(entries(*NEW).read_text())["datasets"]
    (mixture.parent / "all.yaml").write_text(yaml.safe_dump(content))
    whole = planned(mixture.parent / "all.yaml", tmp_path / "whole")
    assert refit.sha256 == whole.sha256
    assert refit.datasets == whole.datasets
    assert np.array_equal(refit.load_sketches(), whole.load_sketches())
    assert 0 < refit.cost["tokens"] < whole.cost["tokens"]
    assert (refit.parent_sha256, whole.parent_sha256) == (plan.sha256, None)
    told = changes(plan, refit)
    assert set(told["added"]) == set(NEW)
    assert told["to_train"] == [0, 1], "two groups of six datasets are other groups than those of four"
    # Moved are those that left the company that most of their old group is in.
    homes = {row.name: row.group for row in refit.datasets}
    for group in plan.groups:
        staying = [name for name in group.datasets if name not in told["moved"]]
        assert len({homes[name] for name in staying}) <= 1


def test_a_killed_extension_goes_on_with_what_is_measured(
    plan: PartitionPlan, mixture: Path, tmp_path: Path, entries: Callable[..., Path]
) -> None:
    """The first new gradient is there, in the folder that a kill leaves; it is not measured again."""
    output = tmp_path / "out"
    bad = write_jsonl(mixture.parent / "data/none.jsonl", [])
    whole = extend_plan(plan, read_extension(entries(*NEW), plan), tmp_path / "whole", progress=QUIET)
    with pytest.raises(ConfigError, match="rows"):
        extend_plan(plan, [{"name": "none", "path": str(bad)}], output, progress=QUIET)
    assert not output.exists()
    made = extend_plan(plan, read_extension(entries(*NEW), plan), output, progress=QUIET)
    assert made.sha256 == whole.sha256
    assert not output.with_name("out.part").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"plan": {"sketch_dim": 8192}}, r"plan.sketch_dim=8192, but the plan was made with 4096"),
        ({"plan": {"seed": 1}}, r"plan.seed=1, but the plan was made with 0"),
        ({"plan": {"sketch": "exact"}}, r"plan.sketch='exact', but the plan was made with 'count_sketch'"),
        ({"sft": {"learning_rate": 0.5}}, r"sft.learning_rate=0.5, but the plan was made with 0.001"),
        ({"base": {"model_name_or_path": "other"}}, r"base.model_name_or_path=other: another base"),
        ({"sft": {"chat_template_path": "other.jinja"}}, r"sft.chat_template_path=other.jinja: another chat template"),
        ({"typo": 1}, r"unknown key `typo`"),
        ({"merge": {"weights": "uniform"}}, r"`merge:` is the plan's own.* Leave it out"),
        ({"datasets": []}, r"must list at least one dataset"),
    ],
)
def test_what_is_not_the_plans_is_refused_by_name(
    plan: PartitionPlan, mixture: Path, entries: Callable[..., Path], more: dict[str, Any], said: str
) -> None:
    if not (mixture.parent / "other").exists():
        make_base(mixture.parent / "other", seed=1)
        (mixture.parent / "other.jinja").write_text(TEMPLATE.replace("<|end|>", "<|end|> "))
    with pytest.raises(ConfigError, match=said):
        read_extension(entries("repeat", **more), plan)
    read_extension(entries("repeat", plan={"seed": 0}, base={"model_name_or_path": "base"}), plan)


def test_a_taken_name_another_base_and_a_plan_without_gradients_are_refused(
    plan: PartitionPlan, mixture: Path, entries: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has a dataset `copy` already"):
        extend_plan(plan, read_extension(entries("copy"), plan), tmp_path / "out", progress=QUIET)
    moved = PartitionPlan.from_pretrained(plan.folder)
    moved.local["base"] = str(make_base(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="another base: weights"):
        extend_plan(moved, read_extension(entries("upper"), plan), tmp_path / "out", progress=QUIET)
    drawn = planned(mixture, tmp_path / "random", "plan.split=random")
    with pytest.raises(ConfigError, match=r"plan.split=random stores no gradients"):
        extend_plan(drawn, read_extension(entries("upper"), plan), tmp_path / "out", progress=QUIET)
    for given, said in (
        ({"mode": "refti"}, r"^--mode refti: is not one of project, refit. Did you mean `refit`\?$"),
        ({"branches": "groups"}, r"^--branches groups: is not one of dataset, group"),
        ({"mode": "refit", "branches": "group"}, "--branches is for --mode project"),
    ):
        with pytest.raises(ConfigError, match=said):
            extend_plan(plan, [], tmp_path / "out", **given)


@pytest.mark.slow
def test_the_command_then_training_the_branch_and_merging_old_and_new(
    plan: PartitionPlan, entries: Callable[..., Path], tmp_path: Path
) -> None:
    """A checkpoint of the parent verifies against the extended plan, and all merge by their tokens."""
    call = [sys.executable, "-m", "merit_hf.cli", "extend", str(plan.folder), "--output", str(tmp_path / "plan")]
    told = subprocess.run([*call, "--datasets", str(entries("upper"))], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "Added upper: branch 2" in told.stdout
    assert "Groups 0, 1 are as they were; to train: 2" in told.stdout
    refused = subprocess.run([*call, "--datasets", str(entries("copy"))], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "has a dataset `copy` already" in refused.stderr
    assert "Traceback" not in refused.stderr
    extended = PartitionPlan.from_pretrained(tmp_path / "plan")
    groups = [train_group(plan, number, tmp_path / str(number), progress=QUIET) for number in (0, 1)]
    groups.append(train_group(extended, 2, tmp_path / "2", progress=QUIET))
    for group in groups:
        result = verify_checkpoint(extended, group)
        assert all(check.ok for check in result), [check for check in result if not check.ok]
    merge_groups(extended, groups, tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged/merit.json").read_text())
    assert [g["weight"] for g in manifest["groups"]] == pytest.approx([g.weight for g in extended.groups])


def test_a_bound_on_the_steps_is_kept_at_its_rate(mixture: Path, entries: Callable[..., Path], tmp_path: Path) -> None:
    bounded = planned(mixture, tmp_path / "plan", "sft.max_steps=12")
    extended = extend_plan(bounded, read_extension(entries(*NEW), bounded), tmp_path / "out", progress=QUIET)
    tokens = sum(group.num_input_tokens for group in bounded.groups)
    for group in extended.groups[2:]:
        assert group.num_steps == max(1, round(12 * group.num_input_tokens / tokens))
    assert [g.num_steps for g in extended.groups[:2]] == [g.num_steps for g in bounded.groups]


def sketches_of(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(5, 60))[rng.integers(0, 5, count)] + rng.normal(size=(count, 60))).astype(np.float32)


@pytest.mark.parametrize("center", ["column", "none", "double"])
@pytest.mark.parametrize("axes", ["global", "local"])
@pytest.mark.parametrize("num_groups", [2, 3, 8])
def test_a_dataset_of_the_plan_lands_where_it_is(center: str, axes: str, num_groups: int) -> None:
    rows = sketches_of(40, num_groups)
    matrix = conflict_matrix(rows)
    coordinates, _ = principal_axes(matrix, 3, center)
    groups = split_by_conflict(matrix, [1] * 40, num_groups, center, axes)
    cosines = cross_cosines(rows, rows)
    again = project_onto_axes(list(rows), coordinates, cosines, center)
    assert np.abs(again - coordinates).max() < 1e-8
    values = (
        local_values(list(rows), list(rows), center)
        if axes == "local"
        else lambda members, level: (coordinates[members, level], again[:, level])
    )
    assert np.array_equal(sides_of_cuts(groups, num_groups, 40, values), groups)


def test_a_new_dataset_falls_to_its_own_side() -> None:
    """Between two planted poles the side is known, whatever the length of the gradient."""
    pole = np.zeros(60, dtype=np.float32)
    pole[0] = 3.0
    noise = np.random.default_rng(0).normal(size=(30, 60)).astype(np.float32) * 0.3
    rows = noise + np.where(np.arange(30) % 2, 1, -1)[:, None].astype(np.float32) * pole
    matrix = conflict_matrix(rows)
    coordinates, _ = principal_axes(matrix, 1)
    groups = split_by_conflict(matrix, [1] * 30, 2)
    new = np.stack([5 * pole, -0.01 * pole])
    cosines = cross_cosines(rows, new)
    placed = project_onto_axes(list(rows), coordinates, cosines, "column")
    sides = sides_of_cuts(groups, 2, 2, lambda members, level: (coordinates[members, level], placed[:, level]))
    assert sides.tolist() == [groups[1], groups[0]]
    assert nearest_centroids(cosines, list(rows), groups).tolist() == [groups[1], groups[0]]


def test_a_damaged_plan_says_what_to_restore_before_anything_is_measured(
    plan: PartitionPlan, entries: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(str(plan.folder), tmp_path / "bare"))
    sketches = folder / "sketches.safetensors"

    def refused(said: str, split: bool = True) -> None:
        bare = PartitionPlan.from_pretrained(folder)
        with pytest.raises(MeritError, match=said):
            extend_plan(bare, read_extension(entries("upper"), bare), tmp_path / "out", progress=QUIET)
        if split:
            with pytest.raises(MeritError, match=said):
                repartition(bare, tmp_path / "out", progress=QUIET)

    (folder / "data/conflict.parquet").unlink()
    refused("conflict matrix is missing. Restore data/conflict.parquet", split=False)
    for length in (sketches.stat().st_size - 4, 30, 0):
        os.truncate(sketches, length)
        refused("sketches are cut short. Restore sketches.safetensors")
    sketches.unlink()
    refused("sketches are missing. Restore sketches.safetensors")
    assert not (tmp_path / "out.part").exists()

"""Options that meet: frozen modules, shares, bounds, layers and parts in plans that are made of plans."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import as_chat, make_mixture, task_rows, write_jsonl

from merit_hf.config import ConfigError, MeritConfig
from merit_hf.extend import extend_plan
from merit_hf.images import with_images
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.repartition import repartition

QUIET = Progress(quiet=True)
FROZEN = "model.embed_tokens"


def make_plan(folder: Path, output: str, *overrides: str, freeze: list[str] | None = None) -> PartitionPlan:
    config = folder / "mixture.yaml"
    if not config.exists():
        make_mixture(folder, ("copy", "reverse", "count", "first"), count=12)
    if freeze is not None:
        content = yaml.safe_load(config.read_text())
        content["base"]["freeze"] = freeze
        config = folder / "frozen.yaml"
        config.write_text(yaml.safe_dump(content))
    return MeritPlanner(MeritConfig.from_yaml(config, list(overrides)), QUIET).plan(folder / output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crossings")
    make_mixture(folder, ("copy", "reverse", "count", "first"), count=12)
    write_jsonl(folder / "upper.jsonl", [as_chat(row) for row in task_rows("upper", 12)])
    return folder


@pytest.fixture(scope="module")
def frozen(folder: Path) -> PartitionPlan:
    return make_plan(folder, "frozen", freeze=[FROZEN])


def entry(folder: Path) -> dict[str, str]:
    return {"name": "upper", "path": str(folder / "upper.jsonl")}


def test_what_is_frozen_stays_frozen_in_a_split_and_a_refit(
    folder: Path, frozen: PartitionPlan, tmp_path: Path
) -> None:
    assert frozen.base["freeze"] == [FROZEN]
    again = repartition(frozen, tmp_path / "again")
    assert (again.sha256, again.base["freeze"]) == (frozen.sha256, [FROZEN])
    assert again.trust == frozen.trust
    refitted = extend_plan(frozen, [entry(folder)], tmp_path / "refit", mode="refit", progress=QUIET)
    assert refitted.base["freeze"] == [FROZEN]
    new = next(dataset for dataset in refitted.datasets if dataset.name == "upper")
    # The others' gradients were taken over, not measured again without what is frozen.
    assert 0 < refitted.cost["tokens"] <= new.num_input_tokens
    kept = [refitted.names.index(name) for name in frozen.names]
    assert np.array_equal(refitted.load_sketches()[kept], frozen.load_sketches())
    assert np.array_equal(refitted.load_first_halves()[kept], frozen.load_first_halves())


def test_an_extension_says_nothing_else_of_what_is_frozen(folder: Path, frozen: PartitionPlan, tmp_path: Path) -> None:
    from merit_hf.extension import read_extension

    content = {
        "base": {"model_name_or_path": str(frozen.base_folder()), "freeze": []}, "datasets": [entry(folder)],
    }  # fmt: skip
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"base.freeze=\[\], the plan's is \['model.embed_tokens'\]"):
        read_extension(tmp_path / "new.yaml", frozen)


def test_a_plan_of_unequal_shares_is_extended(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, "shares", "plan.group_shares=[2,1]", "plan.num_groups=null")
    extended = extend_plan(plan, [entry(folder)], tmp_path / "project", progress=QUIET)
    assert [group.group_sha256 for group in extended.groups[:2]] == [group.group_sha256 for group in plan.groups]
    refitted = extend_plan(plan, [entry(folder)], tmp_path / "refit", mode="refit", progress=QUIET)
    assert refitted.num_groups == 2
    assert refitted.config["plan"]["group_shares"] == [2, 1]


def test_a_bound_is_kept_in_what_a_plan_is_judged_by_and_not_projected(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, "bounded", "plan.max_imbalance=1.5", "plan.num_groups=2")
    assert plan.trust["stability"]["adjusted_rand_index"] > -1
    with pytest.raises(ConfigError, match="--mode refit"):
        extend_plan(plan, [entry(folder)], tmp_path / "project", progress=QUIET)


def test_a_split_keeps_the_layout_of_its_sketches(frozen: PartitionPlan, tmp_path: Path) -> None:
    for override in ("plan.sketch_by_layer=true", "plan.max_num_samples=9", "plan.min_reliability=0.5"):
        with pytest.raises(ConfigError, match="keeps base, data, SFT settings and what gradients were measured with"):
            repartition(frozen, tmp_path / "other", overrides=[override])


def test_measured_second_moments_are_measured_again_with_new_datasets(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(folder, "adam", "plan.precondition=adam", "plan.precondition_batches=2")
    with pytest.raises(ConfigError, match="Use --mode refit, which measures all gradients again"):
        extend_plan(plan, [entry(folder)], tmp_path / "project", progress=QUIET)
    refitted = extend_plan(plan, [entry(folder)], tmp_path / "refit", mode="refit", progress=QUIET)
    kept = [refitted.names.index(name) for name in plan.names]
    assert not np.allclose(refitted.load_sketches()[kept], plan.load_sketches())


def test_rows_from_the_hub_name_no_image_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    named = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "red.png")}]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    ).cast_column("image", datasets.Image())
    with pytest.raises(ConfigError, match=r"row 0: names '.*red.png', which did not come with the dataset"):
        with_images(named, "image", None, "datasets.set")
    listed = datasets.Dataset.from_dict(
        {"image": [[{"bytes": None, "path": str(tmp_path / "red.png")}]]},
        features=datasets.Features({"image": datasets.List(datasets.Image(decode=False))}),
    ).cast_column("image", datasets.List(datasets.Image()))
    with pytest.raises(ConfigError, match="did not come with the dataset"):
        with_images(listed, "image", None, "datasets.set")
    # What a download put into the cache did come with it.
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "red.png", tmp_path / "hub" / "red.png")
    cached = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "hub" / "red.png")}]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    ).cast_column("image", datasets.Image())
    assert len(with_images(cached, "image", None, "datasets.set")) == 1

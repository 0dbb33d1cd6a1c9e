"""Several weightings in one call, and the greedy soup."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_group_merge import LOSS_TOKENS, TOKENS, assert_merged, finish_group
from test_group_merge import make_plan as make_groups_plan
from tiny import make_base
from typer.testing import CliRunner

from merit_hf.checkpoint import weights_sha256
from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import hash_files, read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sweep import choose_greedily, greedy_soup, merge_sweep

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionPlan, list[Path]]:
    root = tmp_path_factory.mktemp("trained")
    plan = make_groups_plan(make_base(root / "base", seed=9))
    content = {"base": {"model_name_or_path": "base"}, "datasets": [{"name": n, "path": "x"} for n in plan.names]}
    plan.config = MeritConfig.from_dict({**content, "plan": {"num_groups": 3}}).model_dump(mode="json")
    plan.save_pretrained(root / "plan")
    return plan, [finish_group(plan, make_base(root / f"group-{k}", seed=k), k) for k in range(3)]


# Several weightings


def test_a_folder_for_each_weighting(trained: tuple[PartitionPlan, list[Path]], tmp_path: Path) -> None:
    plan, folders = trained
    (tmp_path / "mine.yaml").write_text("{0: 1, 1: 2, 2: 5}")
    call = ["merge", str(folders[0].parent / "plan"), *map(str, folders), "--output", str(tmp_path / "out")]
    for weights in ("tokens", "loss_tokens", "uniform", str(tmp_path / "mine.yaml")):
        call += ["--weights", weights]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokens", "loss_tokens", "uniform", "mine"}
    for name, values in (
        ("tokens", TOKENS),
        ("loss_tokens", LOSS_TOKENS),
        ("uniform", [1, 1, 1]),
        ("mine", [1, 2, 5]),
    ):
        assert_merged(tmp_path / "out" / name, folders, values)
        found = [group["weight"] for group in read_manifest(tmp_path / "out" / name)["groups"]]
        assert found == pytest.approx([value / sum(values) for value in values])
        assert f"{name}: Merged" in done.output
    merge_groups(plan, folders, tmp_path / "single", weights="uniform")
    assert hash_files(tmp_path / "single") == hash_files(tmp_path / "out/uniform")
    assert f"merit evaluate {tmp_path / 'out/loss_tokens'} {tmp_path / 'out/mine'}" in done.output.replace("\n", " ")


def test_a_sweep_is_whole_or_not_there(trained: tuple[PartitionPlan, list[Path]], tmp_path: Path) -> None:
    plan, folders = trained
    merge_sweep(plan, folders, tmp_path / "out", ["tokens", "uniform"], exclude=[1])
    for name, values in (("tokens", [TOKENS[0], TOKENS[2]]), ("uniform", [1, 1])):
        assert_merged(tmp_path / "out" / name, [folders[0], folders[2]], values)
    (tmp_path / "uniform.yaml").write_text("{0: 1, 1: 1, 2: 1}")
    (tmp_path / "short.yaml").write_text("{0: 1}")
    broken = Path(shutil.copytree(folders[1], tmp_path / "broken"))
    (broken / "config.json").write_text("{}")
    cases = [
        (["uniform", str(tmp_path / "uniform.yaml")], folders, "two weightings are called `uniform`"),
        (["tokens", "tokens"], folders, "two weightings are called `tokens`"),
        (["tokens", str(tmp_path / "short.yaml")], folders, "no weight for group 1"),
        (["tokens", "uniform"], folders[:2], "2 of 3 groups given"),
        (["tokens", "uniform"], [folders[0], broken, folders[2]], "does not verify"),
    ]
    for weights, given_folders, message in cases:
        with pytest.raises(Exception, match=message):
            merge_sweep(plan, given_folders, tmp_path / "other", weights)
        assert not (tmp_path / "other").exists()
        assert not (tmp_path / "other.part").exists()


@pytest.mark.parametrize("more", [[], ["--soup"], ["--adapters", "concat"]])
def test_a_rank_without_svd_is_refused(
    more: list[str], trained: tuple[PartitionPlan, list[Path]], tmp_path: Path
) -> None:
    plan = str(trained[1][0].parent / "plan")
    call = ["merge", plan, "nowhere", "--output", str(tmp_path / "out"), "--svd-rank", "4", *more]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2, done.output
    assert "--svd-rank is for adapters svd" in done.stderr


# The greedy rule


def test_a_group_stays_only_where_the_loss_falls() -> None:
    losses = {0: 2.0, 1: 1.0, 2: 1.5, 3: 3.0}
    table = {(1, 2): 0.9, (0, 1, 2): 0.9, (1, 2, 3): 0.8}
    steps = choose_greedily(losses, lambda numbers: table[tuple(numbers)])
    assert [(step.group, step.groups, step.loss, step.kept) for step in steps] == [
        (1, [1], 1.0, True),
        (2, [1, 2], 0.9, True),
        (0, [0, 1, 2], 0.9, False),  # no lower is not lower
        (3, [1, 2, 3], 0.8, True),
    ]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_soup_is_never_worse_than_its_best_group(alone: list[float], random: object) -> None:
    known: dict[tuple[int, ...], float] = {}

    def loss_of(numbers: Sequence[int]) -> float:
        return known.setdefault(tuple(numbers), random.uniform(0.1, 10))  # type: ignore[attr-defined]

    steps = choose_greedily(dict(enumerate(alone)), loss_of)
    assert sorted(step.group for step in steps) == list(range(len(alone)))
    assert [alone[step.group] for step in steps] == sorted(alone)
    kept = [step for step in steps if step.kept]
    assert all(later.loss < earlier.loss for earlier, later in itertools.pairwise(kept))
    assert kept[-1].groups == sorted(step.group for step in kept)
    for number, step in enumerate(steps):
        if not step.kept:
            assert step.loss >= min(before.loss for before in steps[:number] if before.kept)


# The greedy soup of trained groups


def mean_loss(plan: PartitionPlan, folder: Path) -> float:
    return float(evaluate_models(plan, {"model": folder}, progress=QUIET)["mean"]["model"])


@pytest.fixture(scope="module")
def bold_plan(make_plan: Callable[..., PartitionPlan]) -> PartitionPlan:
    """A plan whose learning rate lets a weight go as far as the groups below do."""
    return make_plan("sft.learning_rate=0.02")


def displaced(plan: PartitionPlan, source: Path, output: Path, group: int, scale: float) -> Path:
    """Group `group`: the weights of `source` and `scale` times a noise that is the same for every group."""
    shutil.copytree(source, output)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor + scale * (2 * torch.rand(tensor.shape, generator=generator) - 1)).to(tensor.dtype)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return finish_group(plan, output, group)


def test_groups_that_help_each_other_are_both_kept(
    bold_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    """What is wrong with one is wrong the other way round with the other: their mean is right."""
    pair = [displaced(bold_plan, tiny_groups[0], tmp_path / f"half-{k}", k, (-1) ** k * 0.08) for k in range(2)]
    soup = greedy_soup(bold_plan, pair, tmp_path / "out", weights="uniform", progress=QUIET)
    alone = [mean_loss(bold_plan, folder) for folder in pair]
    merge_groups(bold_plan, pair, tmp_path / "both", weights="uniform")
    best = alone.index(min(alone))
    assert [(step.group, step.groups) for step in soup.steps] == [(best, [best]), (1 - best, [0, 1])]
    assert [step.loss for step in soup.steps] == pytest.approx([min(alone), mean_loss(bold_plan, tmp_path / "both")])
    assert [step.kept for step in soup.steps] == [True, True]
    assert soup.groups == [0, 1]
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "both")
    manifest = read_manifest(tmp_path / "out")
    assert manifest["soup"] == [
        {"group": step.group, "groups": step.groups, "loss": step.loss, "kept": step.kept} for step in soup.steps
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"half-0", "half-1", "out", "both"}
    with pytest.raises(ConfigError, match="exists already"):
        greedy_soup(bold_plan, pair, tmp_path / "out", progress=QUIET)


def test_a_group_that_spoils_the_mean_is_left_out(
    bold_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    groups = [
        displaced(bold_plan, tiny_groups[0], tmp_path / str(k), k, scale) for k, scale in enumerate((0.02, 0.08))
    ]
    bold_plan.save_pretrained(tmp_path / "plan")
    call = [str(tmp_path / "plan"), *map(str, groups)]
    done = CliRunner().invoke(app, ["merge", *call, "--output", str(tmp_path / "out"), "--soup"])
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / "out")
    assert [group["group"] for group in manifest["groups"]] == [0]
    assert [(step["group"], step["kept"]) for step in manifest["soup"]] == [(0, True), (1, False)]
    assert "left out" in done.output
    merge_groups(bold_plan, groups, tmp_path / "first", exclude=[1])
    assert weights_sha256(tmp_path / "out") == weights_sha256(tmp_path / "first")
    refused = CliRunner().invoke(
        app, ["merge", *call, "--output", str(tmp_path / "x"), "--soup", "--weights", "tokens", "--weights", "uniform"]
    )
    assert refused.exit_code == 2
    assert "--soup takes one --weights" in refused.output

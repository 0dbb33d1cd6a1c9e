"""`merit diagnose` of LoRA groups: in the space of the weights that base and adapter make, W + s·B·A."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_diagnose_verdicts import TAGS, TASKS, Rows, found, make_plan, upside_down
from tiny import WORDS, make_base, task_rows

from merit_hf import PartitionPlan, diagnose, merge_groups, train_group
from merit_hf.align import align
from merit_hf.diagnosis.basin import Point
from merit_hf.diagnosis.interpolate import Mover
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.manifest import read_manifest
from merit_hf.progress import Progress

QUIET = Progress(quiet=True)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def diagnosed(
    make_plan: Callable[..., PartitionPlan], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PartitionPlan, list[Path], Path, dict[str, dict[str, Any]]]:
    """Plan, LoRA groups, a folder with the three forms of their merge, and a diagnosis with each."""
    folder = tmp_path_factory.mktemp("lora")
    lora = ("peft.r=4", "peft.lora_alpha=16", "peft.target_modules=[q_proj, down_proj]")
    plan = make_plan(*lora, "sft.learning_rate=0.03")
    groups = [train_group(plan, k, folder / str(k), progress=QUIET) for k in range(2)]
    merge_groups(plan, groups, folder / "dense", out_dtype="float32")
    merge_groups(plan, groups, folder / "concat", adapters="concat")
    merge_groups(plan, groups, folder / "svd", adapters="svd", svd_rank=2)
    contents = {
        form: diagnose(
            plan, groups, folder / "d", merged=folder / form, joint=groups[1], num_samples=6, epsilons=(0.25, 1.0),
            forward_only=form != "dense", progress=QUIET,
        )
        for form in ("dense", "concat", "svd")
    }  # fmt: skip
    return plan, groups, folder, contents


def whole(plan: PartitionPlan, folder: Path) -> dict[str, torch.Tensor]:
    """{name: W + s·B·A − W in float64} of an adapter of r 4 and alpha 16 (or of a merged one, of scaling 1)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        stem: scale * tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double()
        for stem in stems
    }


def test_the_losses_are_those_that_peft_gives(diagnosed: Any) -> None:
    plan, groups, folder, contents = diagnosed
    models = {"base": plan.base_folder(), "group-0": groups[0], "group-1": groups[1]}
    for form, content in contents.items():
        expected = evaluate_models(
            plan, {**models, "merged": folder / form}, 6, generate=False, progress=QUIET
        )["datasets"]  # fmt: skip
        for name, entry in content["datasets"].items():
            for label in (*models, "merged"):
                assert entry["loss"][label] == pytest.approx(expected[name]["loss"][label], rel=2e-5), (form, label)
    exact = contents["dense"]["overall"]["loss"]
    assert exact["mean"] == pytest.approx(exact["merged"], rel=1e-6)
    assert len({round(exact[label], 5) for label in ("base", "group-0", "group-1", "mean")}) == 4


def test_distances_are_those_of_the_products_and_only_what_is_adapted_moves(diagnosed: Any) -> None:
    plan, groups, folder, contents = diagnosed
    moved = [whole(plan, group) for group in groups]
    weights = [group.weight for group in plan.groups]
    mean = {name: sum(w * part[name] for w, part in zip(weights, moved, strict=True)) for name in moved[0]}

    def norm(parts: dict[str, torch.Tensor]) -> float:
        return sum(float(part.norm()) ** 2 for part in parts.values()) ** 0.5

    for form, content in contents.items():
        geometry = content["geometry"]
        assert geometry["labels"] == ["group-0", "group-1", "mean", "merged", "joint"]
        assert geometry["norms"][:3] == pytest.approx([norm(moved[0]), norm(moved[1]), norm(mean)], rel=1e-5)
        assert content["settings"]["adapters"] == form
        parts = [w * norm({n: p[n] - mean[n] for n in p}) ** 2 for w, p in zip(weights, moved, strict=True)]
        assert [row["variance_share"] for row in content["groups"]] == pytest.approx([p / sum(parts) for p in parts])
        still = {row["tensor"] for row in content["tensors"] if row["variance"] == 0}
        assert not any("q_proj" in name or "down_proj" in name for name in still)
        assert sum(row["variance"] for row in content["layers"]) == pytest.approx(sum(parts), rel=1e-4)
    # What svd cut off is told by the merge and found by the diagnosis.
    cut = read_manifest(folder / "svd")["stats"]["relative_error"]
    apart = {form: content["geometry"]["merged_from_mean"] / norm(mean) for form, content in contents.items()}
    assert apart["svd"] == pytest.approx(cut, rel=1e-3)
    assert apart["dense"] < 1e-5
    assert apart["concat"] < 1e-5
    finding = found(contents["svd"])["not_the_mean"]
    assert "--svd-rank" in finding["remedy"]
    assert "not_the_mean" not in found(contents["concat"])


def test_gradients_of_the_whole_weights_predict_the_gain(diagnosed: Any) -> None:
    gain = diagnosed[3]["dense"]["overall"]["gain"]
    assert gain["predicted_by_gradient"] == pytest.approx(gain["ladder"][0]["predicted"]["value"], rel=0.05)


def test_what_an_adapter_stands_for_decides_what_is_measured_again(diagnosed: Any, tmp_path: Path) -> None:
    plan, groups, folder, _ = diagnosed
    shutil.copytree(folder / "d", tmp_path / "d")
    options: dict[str, Any] = {"num_samples": 6, "epsilons": (0.25, 1.0), "forward_only": True, "progress": QUIET}
    again = diagnose(plan, groups, tmp_path / "d", **options)
    kept = len(list((tmp_path / "d" / "measurements").iterdir())) - 1
    assert again["cost"]["num_reused"] >= again["cost"]["num_points"]
    assert kept == len(list((folder / "d" / "measurements").iterdir())), "the inner products alone are new"
    # The same factors with another alpha are another model.
    shutil.copytree(groups[0], tmp_path / "0")
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    (tmp_path / "0" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 32}))
    doubled = diagnose(plan, [tmp_path / "0", groups[1]], tmp_path / "d", **options)
    assert doubled["overall"]["loss"]["group-0"] != again["overall"]["loss"]["group-0"]
    assert doubled["overall"]["loss"]["group-1"] == again["overall"]["loss"]["group-1"]
    assert doubled["geometry"]["norms"][0] == pytest.approx(2 * again["geometry"]["norms"][0], rel=1e-5)
    assert "adapter" in doubled["groups"][0]["checks_failed"][0]


@pytest.mark.parametrize("settings", [{"use_rslora": True, "rank_pattern": {"c_proj": 3}}, {"fan_in_fan_out": True}])
def test_a_layer_that_stores_its_weight_turned_is_moved_as_peft_merges_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """GPT-2's Conv1D keeps [in, out]."""
    config = tr.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=96, n_positions=32)
    torch.manual_seed(0)
    tr.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for number in range(2):
        lora = get_peft_model(
            tr.GPT2LMHeadModel.from_pretrained(tmp_path / "base"),
            LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn", "c_proj"], **settings),
        )
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        lora.save_pretrained(tmp_path / str(number))
    labels = ("base", "group-0", "group-1")
    sources = dict(zip(labels, align(tmp_path / "base", [tmp_path / "0", tmp_path / "1"]), strict=True))
    model = tr.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    wholes = [
        PeftModel.from_pretrained(tr.GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / str(number))
        .merge_and_unload()
        .state_dict()
        for number in range(2)
    ]
    Mover(model, sources).move_to(Point.of({"group-0": 1.5, "group-1": -0.5}))
    for name, tensor in model.state_dict().items():
        exact = 1.5 * wholes[0][name].double() - 0.5 * wholes[1][name].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def warm_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    train, held_out = ({task: task_rows(task, *size) for task in TASKS} for size in ((150, 0), (8, 1)))
    sft = {"learning_rate": 3e-3, "num_train_epochs": 4}
    plan = make_plan(folder, make_base(folder / "raw", dtype=torch.float32), sft, {"split": "joint"}, train, held_out)
    return train_group(plan, 0, folder / "0", progress=QUIET)


@pytest.fixture(scope="module")
def scenario(warm_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`scenario(learning_rate, train, held_out)`: the diagnosis of two LoRA groups; the last two replace rows."""

    def run(learning_rate: float, train: Rows | None = None, held_out: Rows | None = None) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("scenario")
        rows = {task: task_rows(task, 60) for task in TAGS} | (train or {})
        unseen = {task: task_rows(task, 24, seed=1) for task in TAGS} | (held_out or {})
        split = {"split": "by_tag", "num_groups": 2}
        plan = make_plan(folder, warm_base, {"learning_rate": learning_rate}, split, rows, unseen, LORA)
        groups = [train_group(plan, k, folder / str(k), progress=QUIET) for k in range(2)]
        merge_groups(plan, groups, folder / "merged", adapters="concat")
        return diagnose(plan, groups, folder / "d", merged=folder / "merged", forward_only=True, progress=QUIET)

    return run


@pytest.mark.slow
def test_a_healthy_merge_of_adapters(scenario: Callable[..., Any]) -> None:
    content = scenario(2e-3)
    assert content["verdict"]["status"] == "healthy"
    assert set(found(content)) == {"quadratic", "flat_base"}
    assert content["overall"]["gain"]["measured"]["low"] > 0.01


@pytest.mark.slow
def test_adapters_trained_too_fast(scenario: Callable[..., Any]) -> None:
    content = scenario(3e-1)
    assert found(content)["diverged"]["groups"] == [0, 1]
    assert content["verdict"]["remedy"].startswith("Lower sft.learning_rate (0.3 now)")


@pytest.mark.slow
def test_adapters_trained_on_wrong_answers(scenario: Callable[..., Any]) -> None:
    train = {task: [upside_down(row) for row in task_rows(task, 60)] for task in ("first", "upper")}
    finding = found(scenario(2e-3, train))["wrong_data"]
    assert (finding["groups"], finding["datasets"]) == ([1], ["first", "upper"])
    assert "`--exclude 1`: measured, the mean loss changes by −" in finding["remedy"]


@pytest.mark.slow
def test_an_adapter_of_noise(scenario: Callable[..., Any]) -> None:
    def noise(task: str, count: int, seed: int) -> list[dict[str, str]]:
        rng = random.Random(f"{task}-{seed}")
        return [
            {**row, "completion": " ".join(rng.choice(WORDS) for _ in range(4))}
            for row in task_rows(task, count, seed)
        ]

    rows = ({task: noise(task, *size) for task in ("first", "upper")} for size in ((60, 0), (24, 1)))
    content = scenario(2e-3, *rows)
    assert found(content)["noise"]["groups"] == [1]
    assert content["groups"][1]["own"]["held_out"]["high"] < -1.0

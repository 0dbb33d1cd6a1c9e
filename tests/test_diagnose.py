"""`merit diagnose` on real checkpoints: its numbers are those of the models, and a stopped one goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from merit_hf import diagnose
from merit_hf.cli import app
from merit_hf.config import ConfigError
from merit_hf.diagnosis.losses import LossRows, RowLosses, float32_settings, read_loss_rows, under_other_prompts
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.group_merge import merge_groups
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.sft import build_args, load_model, load_tokenizer, open_loss
from merit_hf.training import train_group

QUIET = Progress(quiet=True)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "diagnose.md"


@pytest.fixture(scope="module")
def merged(tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_groups(tiny_plan, tiny_groups, folder, out_dtype="float32")
    return folder


@pytest.fixture(scope="module")
def joint(make_plan: Callable[..., PartitionPlan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = make_plan("plan.split=joint", "plan.num_groups=1")
    return train_group(plan, 0, tmp_path_factory.mktemp("joint") / "0", progress=QUIET)


@pytest.fixture(scope="module")
def diagnosed(
    tiny_plan: PartitionPlan,
    tiny_groups: list[Path],
    merged: Path,
    joint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("diagnosis") / "diagnosis"
    return folder, diagnose(tiny_plan, tiny_groups[::-1], folder, merged=merged, joint=joint, progress=QUIET)


def test_the_losses_are_those_of_the_checkpoints(
    diagnosed: tuple[Path, dict[str, Any]],
    tiny_plan: PartitionPlan,
    tiny_groups: list[Path],
    merged: Path,
    joint: Path,
) -> None:
    _, content = diagnosed
    models = {"base": tiny_plan.base_folder(), "joint": joint, "merged": merged}
    models |= {f"group-{k}": folder for k, folder in enumerate(tiny_groups)}
    evaluation = evaluate_models(tiny_plan, models, progress=QUIET)
    for name, entry in content["datasets"].items():
        expected = evaluation["datasets"][name]
        assert {key: entry[key] for key in ("group", "num_examples", "num_loss_tokens")} == {
            key: expected[key] for key in ("group", "num_examples", "num_loss_tokens")
        }
        for label in models:
            assert entry["loss"][label] == pytest.approx(expected["loss"][label], rel=2e-5), (name, label)
        # The mean in float64 and the merged checkpoint are the same model.
        assert entry["loss"]["mean"] == pytest.approx(entry["loss"]["merged"], rel=2e-5)
    for label in models:
        assert content["overall"]["loss"][label] == pytest.approx(evaluation["mean"][label], rel=2e-5)
    assert content["models"] == ["base", "joint", "line", "group-0", "group-1", "mean", "merged"]


def test_gain_changes_and_exclusions_follow_from_the_losses(
    diagnosed: tuple[Path, dict[str, Any]], tiny_plan: PartitionPlan
) -> None:
    _, content = diagnosed
    weights = {row["group"]: row["weight"] for row in content["groups"]}
    assert weights == pytest.approx({group.group: group.weight for group in tiny_plan.groups}, rel=1e-5)
    for entry in (*content["datasets"].values(), content["overall"]):
        loss = entry["loss"]
        gain = sum(weight * loss[f"group-{k}"] for k, weight in weights.items()) - loss["mean"]
        assert entry["gain"]["measured"]["value"] == pytest.approx(gain, abs=2e-5)
        assert entry["changes"]["mean-line"]["value"] == pytest.approx(loss["mean"] - loss["line"], abs=2e-5)
        # Of two groups, the mean without one is the other.
        assert entry["exclude"]["0"]["value"] == pytest.approx(loss["group-1"] - loss["mean"], abs=2e-5)
        for barrier in entry["barriers"]:
            assert barrier["losses"][0] == pytest.approx(loss[barrier["from"]], rel=1e-5)
            assert barrier["losses"][-1] == pytest.approx(loss[barrier["to"]], rel=1e-5)
        for step in entry["gain"]["ladder"]:
            if step["rho"]:
                ratio = entry["gain"]["measured"]["value"] / step["predicted"]["value"]
                assert step["rho"]["value"] == pytest.approx(ratio, rel=1e-2)


def test_gradients_predict_what_second_differences_predict(diagnosed: tuple[Path, dict[str, Any]]) -> None:
    gain = diagnosed[1]["overall"]["gain"]
    assert gain["predicted_by_gradient"] == pytest.approx(gain["ladder"][0]["predicted"]["value"], rel=0.03)
    layers = diagnosed[1]["layers"]
    assert sum(row["curvature"] for row in layers) == pytest.approx(gain["predicted_by_gradient"], rel=1e-4)
    shares = [row["curvature_share"] for row in diagnosed[1]["groups"]]
    assert shares == pytest.approx(gain["by_group"], abs=0.03)


def test_distances_and_shares_are_those_of_the_weights(
    diagnosed: tuple[Path, dict[str, Any]], tiny_plan: PartitionPlan, tiny_groups: list[Path], joint: Path
) -> None:
    _, content = diagnosed
    base = load_file(tiny_plan.base_folder() / "model.safetensors")
    moved = [
        torch.cat(
            [
                (load_file(folder / "model.safetensors")[name].double() - base[name].double()).reshape(-1)
                for name in base
            ]
        )
        for folder in (*tiny_groups, joint)
    ]
    weights = [group.weight for group in tiny_plan.groups]
    mean = sum(weight * vector for weight, vector in zip(weights, moved, strict=False))
    geometry = content["geometry"]
    assert geometry["labels"] == ["group-0", "group-1", "mean", "merged", "joint"]
    assert geometry["norms"][:3] == pytest.approx([float(v.norm()) for v in (moved[0], moved[1], mean)], rel=1e-5)
    assert geometry["cosines"][0][1] == pytest.approx(
        float(torch.cosine_similarity(moved[0], moved[1], dim=0)), abs=1e-5
    )
    assert geometry["line_position"] == pytest.approx(float(mean.norm() / moved[2].norm()), rel=1e-5)
    assert geometry["merged_from_mean"] < 1e-4 * geometry["norms"][2]
    parts = [weight * float((vector - mean).norm()) ** 2 for weight, vector in zip(weights, moved, strict=False)]
    assert [row["variance_share"] for row in content["groups"]] == pytest.approx(
        np.array(parts) / sum(parts), rel=1e-4
    )
    assert sum(row["variance"] for row in content["layers"]) == pytest.approx(sum(parts), rel=1e-4)
    assert [row["layer"] for row in content["layers"]] == [
        "model.embed_tokens.weight", "layers.0", "layers.1", "model.norm.weight",
    ]  # fmt: skip
    assert sum(row["num_parameters"] for row in content["layers"]) == len(mean)


def test_the_file_is_the_result_and_every_key_is_documented(diagnosed: tuple[Path, dict[str, Any]]) -> None:
    folder, content = diagnosed
    assert json.loads((folder / "diagnosis.json").read_text()) == content
    text = DOCS.read_text(encoding="utf-8")
    datasets, labels = set(content["datasets"]), {*content["models"], *content["overall"]["changes"], "0", "1"}

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*(keys(item) for item in value.values()))
        return set().union(*(keys(item) for item in value)) if isinstance(value, list) else set()

    undocumented = {
        key
        for key in keys(content) - datasets - labels - set(content["base"])
        if not re.search(rf"[`\"]{key}[`\"]", text)
    }
    assert undocumented == set()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert content["verdict"]["status"] in readme.splitlines()[0]
    assert all(name in readme for name in datasets)


def test_the_same_call_measures_nothing_again_and_one_that_lost_a_file_measures_that(
    diagnosed: tuple[Path, dict[str, Any]],
    tiny_plan: PartitionPlan,
    tiny_groups: list[Path],
    merged: Path,
    joint: Path,
    tmp_path: Path,
) -> None:
    folder, content = diagnosed
    shutil.copytree(folder, tmp_path / "d")
    kept = sorted((tmp_path / "d" / "measurements").iterdir())
    times = {path: path.stat().st_mtime_ns for path in kept}
    kept[0].unlink()
    kept[1].write_bytes(b"half a file")
    again = diagnose(tiny_plan, tiny_groups, tmp_path / "d", merged=merged, joint=joint, progress=QUIET)
    assert {key: again[key] for key in again if key != "cost"} == {
        key: content[key] for key in content if key != "cost"
    }
    changed = [path for path in kept if path.stat().st_mtime_ns != times[path]]
    assert changed == kept[:2]
    assert again["cost"]["num_reused"] == len(kept) - 2


def test_another_checkpoint_is_measured_anew_and_what_it_does_not_touch_is_kept(
    diagnosed: tuple[Path, dict[str, Any]], tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    folder, content = diagnosed
    shutil.copytree(folder / "measurements", tmp_path / "d" / "measurements")
    # Group 1 in the place of the joint model: its own points are new, the groups' are not.
    found = diagnose(tiny_plan, tiny_groups, tmp_path / "d", joint=tiny_groups[1], forward_only=True, progress=QUIET)
    assert found["overall"]["loss"]["joint"] == content["overall"]["loss"]["group-1"]
    new = len(list((tmp_path / "d" / "measurements").iterdir())) - len(list((folder / "measurements").iterdir()))
    assert new == 2, "the line point, and the inner products"


def test_before_training_a_base_that_was_never_trained_is_found_out(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    content = diagnose(tiny_plan, (), tmp_path / "d", progress=QUIET)
    assert content["kind"] == "base"
    assert not {"groups", "layers", "tensors", "geometry"} & content.keys()
    assert [finding["code"] for finding in content["verdict"]["findings"]] == ["untrained_base"]
    assert content["verdict"]["status"] == "caution"
    assert "Warm it up" in content["verdict"]["remedy"]
    for entry in content["datasets"].values():
        assert entry["loss"].keys() == {"base"}
        assert [row["sigma"] for row in entry["perturbation"]] == [0.01, 0.05, 0.1]


def test_one_group_alone_is_its_own_mean(tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path) -> None:
    content = diagnose(tiny_plan, tiny_groups[1:], tmp_path / "d", forward_only=True, path_points=3, progress=QUIET)
    (row,) = content["groups"]
    assert (row["group"], row["weight"], row["exclude"]) == (1, 1.0, None)
    assert content["overall"]["gain"] is None
    assert content["overall"]["loss"]["mean"] == content["overall"]["loss"]["group-1"]
    assert [(b["from"], b["to"]) for b in content["overall"]["barriers"]] == [("base", "group-1")]
    assert content["settings"]["path_positions"] == [0.25, 0.5, 0.75]
    assert {part["curvature"] for part in content["layers"]} == {None}
    assert content["cost"]["num_gradients"] == 0


def test_a_checkpoint_that_does_not_verify_is_diagnosed_and_named(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_groups[0], tmp_path / "0")
    manifest = json.loads((tmp_path / "0" / "merit.json").read_text())
    manifest["datasets"][0]["fingerprint"] = "0" * 64
    (tmp_path / "0" / "merit.json").write_text(json.dumps(manifest))
    content = diagnose(tiny_plan, [tmp_path / "0", tiny_groups[1]], tmp_path / "d", forward_only=True, progress=QUIET)
    assert content["groups"][0]["checks_failed"][0].startswith("datasets is ")
    assert content["groups"][1]["checks_failed"] == []
    found = {finding["code"]: finding for finding in content["verdict"]["findings"]}
    assert found["not_verified"]["groups"] == [0]
    assert content["verdict"]["status"] == "problem"


def test_what_cannot_be_diagnosed_is_refused_before_a_model_is_loaded(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], merged: Path, tmp_path: Path
) -> None:
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([tiny_groups[0], tiny_groups[0]], {}, "group 0 is given twice"),
        ([merged], {}, "names group None"),
        ([], {"merged": merged}, "without its groups"),
        (tiny_groups[:1], {"merged": merged}, "merged from group 1 too"),
        (tiny_groups, {"merged": tiny_groups[0]}, "merit.json is of a group"),
        (tiny_groups, {"epsilons": (0.5, -1.0)}, "epsilons"),
        (tiny_groups, {"path_points": 2}, "expected an odd number"),
        ([tmp_path], {}, "no merit.json"),
    ]
    for checkpoints, options, said in cases:
        with pytest.raises(ConfigError, match=said):
            diagnose(tiny_plan, checkpoints, tmp_path / "d", progress=QUIET, **options)
    assert not (tmp_path / "d").exists()
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/d"):
        with pytest.raises(ConfigError, match="file: is a file, where a folder is needed"):
            diagnose(tiny_plan, tiny_groups, output, progress=QUIET)


@pytest.fixture(scope="module")
def measured_rows(tiny_plan: PartitionPlan) -> tuple[Any, ...]:
    args = build_args(float32_settings(tiny_plan))
    tokenizer = load_tokenizer(tiny_plan.base_folder(), tiny_plan.base.get("chat_template"))
    model = load_model(tiny_plan.base_folder(), args)
    held_out, training, skipped = read_loss_rows(tiny_plan, model, tokenizer, args, 5, QUIET)
    assert skipped == {}
    assert {len(rows) for rows in (*held_out.values(), *training.values())} == {5}
    return model, tokenizer, args, LossRows.of(held_out)


def test_row_losses_do_not_depend_on_the_batch_and_sum_to_sfts_loss(measured_rows: tuple[Any, ...]) -> None:
    model, tokenizer, args, rows = measured_rows
    indices = rows.indices(list(rows.spans))
    with open_loss(model, tokenizer, args, rows.rows) as trainer:
        alone = RowLosses(trainer, rows, tokens_per_batch=1).measure(indices)
        together = RowLosses(trainer, rows, tokens_per_batch=4096).measure(indices[::-1])[::-1]
        inputs = {key: torch.tensor([rows.rows[3][key]]) for key in ("input_ids", "labels")}
        plain = model(**inputs).loss
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone[3] / rows.num_loss_tokens[3] == pytest.approx(float(plain), rel=1e-5)


def test_a_loss_that_is_not_the_sum_of_its_tokens_is_measured_row_by_row(
    make_plan: Callable[..., PartitionPlan], measured_rows: tuple[Any, ...]
) -> None:
    _, tokenizer, _, rows = measured_rows
    args = build_args({**float32_settings(make_plan()), "loss_type": "dft"})
    model = load_model(make_plan().base_folder(), args)
    indices = rows.indices(list(rows.spans))
    with open_loss(model, tokenizer, args, rows.rows) as trainer:
        alone = RowLosses(trainer, rows, tokens_per_batch=1).measure(indices)
        together = RowLosses(trainer, rows, tokens_per_batch=4096).measure(indices)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_answers_move_under_other_prompts_and_lose_nothing(measured_rows: tuple[Any, ...]) -> None:
    *_, rows = measured_rows
    part = rows.rows.select(rows.indices(["copy"]))
    moved = under_other_prompts(part)
    assert moved is not None
    for index in range(len(part)):
        row, other, following = part[index], moved[index], part[(index + 1) % len(part)]
        start, ahead = (next(i for i, label in enumerate(r["labels"]) if label != -100) for r in (row, following))
        assert other["input_ids"] == following["input_ids"][:ahead] + row["input_ids"][start:]
        assert other["labels"] == [-100] * ahead + row["labels"][start:]
    assert under_other_prompts(part.select([0])) is None
    assert under_other_prompts(part.select([0, 0])) is None, "one prompt for all"
    whole = part.map(lambda row: {"labels": row["input_ids"]})
    assert under_other_prompts(whole) is None, "no prompt"


def test_on_the_command_line(tiny_plan: PartitionPlan, tiny_groups: list[Path], merged: Path, tmp_path: Path) -> None:
    groups = [str(folder) for folder in tiny_groups]
    call = ["diagnose", str(tiny_plan.folder), *groups, "--merged", str(merged), "--output", str(tmp_path / "d")]
    done = CliRunner().invoke(app, [*call, "--forward-only", "--num-samples", "3", "--epsilon", "0.5"])
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "d" / "diagnosis.json").read_text())
    assert content["settings"]["epsilons"] == [0.5]
    assert {entry["num_examples"] for entry in content["datasets"].values()} == {3}
    assert content["verdict"]["remedy"] in done.output
    assert "points × 12 held-out rows" in done.output, "the cost is told"
    done = CliRunner().invoke(app, [*call, "--joint", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "Traceback" not in done.output

"""Models side by side: the loss is SFT's, the prompts are training's, and nothing is measured twice."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import as_chat, make_base, make_mixture, task_rows, write_jsonl
from typer.testing import CliRunner, Result

from merit_hf.cli import app
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.evaluation.evaluate import evaluate_models, merged_models, save_evaluation
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import hash_files, read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.training import train_group

QUIET = Progress(quiet=True)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def merged(tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_groups(tiny_plan, tiny_groups, folder)
    return folder


@pytest.fixture(scope="module")
def models(tiny_plan: PartitionPlan, tiny_groups: list[Path], merged: Path) -> dict[str, Path]:
    return {"base": tiny_plan.base_folder(), "group-0": tiny_groups[0], "merged": merged}


def evaluate(plan: PartitionPlan, models: dict[str, Path], **how: Any) -> dict[str, Any]:
    return evaluate_models(plan, models, **{"progress": QUIET, "max_new_tokens": 6, **how})


@pytest.fixture(scope="module")
def evaluated(
    tiny_plan: PartitionPlan, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """An evaluation and its folder. Read only."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluation = evaluate(tiny_plan, models, output=folder)
    save_evaluation(evaluation, folder)
    return evaluation, folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_numbers_are_those_of_the_predictions(evaluated: tuple[dict[str, Any], Path]) -> None:
    evaluation, folder = evaluated
    rows = lines(folder)
    assert len(rows) == 4 * 8 * 3
    for name, entry in evaluation["datasets"].items():
        for label in evaluation["models"]:
            mine = [row for row in rows if (row["dataset"], row["model"]) == (name, label)]
            assert [row["example"] for row in mine] == list(range(8))
            tokens = [row["num_loss_tokens"] for row in mine]
            nats = sum(row["loss"] * count for row, count in zip(mine, tokens, strict=True))
            assert entry["num_loss_tokens"] == sum(tokens)
            assert entry["loss"][label] == pytest.approx(nats / sum(tokens))
            assert entry["score"][label] == sum(row["score"] for row in mine) / 8
            ratio = sum(r["num_answer_tokens"] for r in mine) / sum(r["num_reference_tokens"] for r in mine)
            assert entry["length_ratio"][label] == pytest.approx(ratio)
            assert entry["hit_max_new_tokens"][label] == sum(row["hit_max_new_tokens"] for row in mine) / 8
        gap = entry["differences"]["merged"]["base"]["loss"]
        assert gap["difference"] == pytest.approx(entry["loss"]["merged"] - entry["loss"]["base"])
        assert gap["low"] <= gap["difference"] <= gap["high"]
        assert "base" not in entry["differences"]
    keys = [(row["dataset"], row["example"]) for row in rows]
    assert keys == sorted(keys), "all answers to a prompt stand together"
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation


def test_the_batch_changes_nothing(
    evaluated: tuple[dict[str, Any], Path], tiny_plan: PartitionPlan, models: dict[str, Path], tmp_path: Path
) -> None:
    evaluation, folder = evaluated
    again = evaluate(tiny_plan, models, output=tmp_path, tokens_per_batch=40)
    assert [row["answer"] for row in lines(tmp_path)] == [row["answer"] for row in lines(folder)]
    for name, entry in evaluation["datasets"].items():
        assert again["datasets"][name]["loss"] == pytest.approx(entry["loss"], rel=1e-6)
        for key in ("score", "length_ratio", "hit_max_new_tokens"):
            assert again["datasets"][name][key] == entry[key]


def test_the_schema_is_the_documented_one(evaluated: tuple[dict[str, Any], Path]) -> None:
    evaluation, folder = evaluated
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    schema = re.findall(r"```\n(schema_version.*?)```", text, flags=re.DOTALL)[0]
    assert re.findall(r"^(\w+)", schema, flags=re.MULTILINE) == list(evaluation)
    entry = next(iter(evaluation["datasets"].values()))
    assert re.findall(r"^  (\w+)", schema, flags=re.MULTILINE) == list(entry)
    columns = re.findall(r"```\n(dataset, group.*?)```", text, flags=re.DOTALL)[0]
    for key in lines(folder)[0]:
        assert re.search(rf"\b{key}\b", columns), key


def zero_weights(folder: Path) -> None:
    """A checkpoint of other weights that, by name, size and time of its files, is the same."""
    path = folder / "model.safetensors"
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-2000] + bytes(2000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_is_known_is_not_measured_again(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    group = Path(shutil.copytree(tiny_groups[0], tmp_path / "group"))
    models = {"base": tiny_plan.base_folder(), "group-0": group}
    first = evaluate(tiny_plan, models, output=tmp_path / "out")
    zero_weights(group)
    assert evaluate(tiny_plan, models, output=tmp_path / "out") == first, "loaded again, it would be another model"
    other = evaluate(tiny_plan, models, output=tmp_path / "other")
    assert other["mean"] != first["mean"]

    cache = tmp_path / "out" / "evaluation_cache"
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 2 * 4 * 2, "a file a model, dataset and kind"
    # One that was not finished; a half-written one is never there.
    lost = sorted(cache.glob("answers-*"))[0]
    lost.unlink()
    evaluate(tiny_plan, {**models, "group-1": tiny_groups[1]}, output=tmp_path / "out")
    after = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} >= {lost.name}
    assert len(after) == len(before) + 4 * 2
    assert all(after[name] == before[name] for name in before if name != lost.name)
    # Another limit is another answer and the same loss; another metric is neither.
    evaluate(tiny_plan, models, output=tmp_path / "out", max_new_tokens=3, metrics={"copy": "chrf"})
    new = {path.name for path in cache.iterdir()} - set(after)
    assert len(new) == 8
    assert all(name.startswith("answers-") for name in new)
    # Touched weights are new weights.
    os.utime(group / "model.safetensors")
    changed = evaluate(tiny_plan, models, output=tmp_path / "out")
    assert changed["mean"] == pytest.approx(other["mean"])


def test_without_answers_there_are_losses_only(
    evaluated: tuple[dict[str, Any], Path], tiny_plan: PartitionPlan, models: dict[str, Path], tmp_path: Path
) -> None:
    found = evaluate(tiny_plan, models, generate=False, output=tmp_path)
    assert found["mean"] == evaluated[0]["mean"]
    assert found["mean_score"] is None
    assert found["settings"]["max_new_tokens"] is None
    entry = found["datasets"]["copy"]
    assert list(entry) == list(evaluated[0]["datasets"]["copy"])
    empty = ("metric", "metric_from", "score", "free_form", "reference_tokens", "answer_tokens", "length_ratio")
    assert {key: entry[key] for key in empty} == dict.fromkeys(empty)
    assert set(entry["differences"]["merged"]["base"]) == {"loss"}
    assert not (tmp_path / "predictions.jsonl").exists()


def test_a_metric_of_the_call_comes_before_the_plans(tiny_plan: PartitionPlan, models: dict[str, Path]) -> None:
    entries = [{**e, "metric": "rougeL"} if e["name"] == "first" else e for e in tiny_plan.config["datasets"]]
    plan = replace(tiny_plan, config={**tiny_plan.config, "datasets": entries})
    assert plan.sha256 == tiny_plan.sha256
    found = evaluate(plan, {"base": models["base"]}, metrics={"copy": "chrf", "count": "none"})["datasets"]
    told = {name: (entry["metric"], entry["metric_from"]) for name, entry in found.items()}
    assert told == {
        "copy": ("chrf", "call"), "count": ("none", "call"), "first": ("rougeL", "config"),
        "reverse": ("exact_match", "data"),
    }  # fmt: skip
    assert found["count"]["score"] is None
    assert found["count"]["length_ratio"] is not None
    with pytest.raises(ConfigError, match=r"`nope`: the plan has no such dataset"):
        evaluate(plan, models, metrics={"nope": "chrf"})


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartitionPlan, Path]:
    """A plan whose held-out rows are its few training rows, and the one group that learnt them by heart."""
    folder = tmp_path_factory.mktemp("learnt")
    make_base(folder / "base", hidden_size=64, intermediate_size=128)
    write_jsonl(folder / "rows.jsonl", [as_chat(row) for row in task_rows("first", 8)])
    # Cut to 24 tokens, one row has no loss token left: its prompt alone is longer.
    long = {"prompt": "red " * 40, "completion": "blue"}
    write_jsonl(folder / "eval.jsonl", [as_chat(long), *(as_chat(row) for row in task_rows("first", 8))])
    config = {
        "base": {"model_name_or_path": "base"},
        "datasets": [{"name": "first", "path": "rows.jsonl", "eval_path": "eval.jsonl"}],
        "plan": {"split": "joint"},
        "sft": {"learning_rate": 1e-2, "num_train_epochs": 60, "per_device_train_batch_size": 8, "max_length": 24,
                "lr_scheduler_type": "constant", "save_strategy": "no"},
    }  # fmt: skip
    (folder / "mixture.yaml").write_text(yaml.safe_dump(config))
    plan = MeritPlanner(MeritConfig.from_yaml(folder / "mixture.yaml"), QUIET).plan(folder / "plan")
    return plan, train_group(plan, 0, folder / "group", progress=QUIET)


def test_what_was_learnt_by_heart_is_answered_and_ended(learnt: tuple[PartitionPlan, Path], tmp_path: Path) -> None:
    """And the row that SFT drops has an answer, but no loss: the others keep theirs."""
    plan, group = learnt
    found = evaluate(plan, {"base": plan.base_folder(), "group-0": group}, output=tmp_path, max_new_tokens=20)
    entry = found["datasets"]["first"]
    assert (entry["num_examples"], entry["num_answers"]) == (8, 9)
    rows = [row for row in lines(tmp_path) if row["model"] == "group-0"]
    assert [row["loss"] is None for row in rows] == [True] + [False] * 8
    assert all(row["loss"] < 0.1 for row in rows[1:])
    assert [(row["answer"], row["score"]) for row in rows[1:]] == [(row["reference"], 1) for row in rows[1:]]
    assert not any(row["hit_max_new_tokens"] for row in rows[1:])
    assert [row["num_answer_tokens"] for row in rows[1:]] == [row["num_reference_tokens"] for row in rows[1:]]
    assert entry["score"]["base"] == 0
    assert entry["differences"]["group-0"]["base"]["score"]["low"] > 0


def merit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="merit")


def test_the_card_gets_the_numbers_and_the_hashes_stay(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], merged: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(merged, tmp_path / "merged"))
    before, manifest = hash_files(copy), read_manifest(copy)
    call = ("evaluate", f"one={tiny_groups[1]}", copy, "--plan", tiny_plan.folder, "--output", tmp_path / "out")
    done = merit(*call, "--card", "--max-new-tokens", 3, "--metric", "copy=chrf")
    assert done.exit_code == 0, done.output
    assert hash_files(copy) == before
    assert before.items() >= manifest["files"].items()
    assert read_manifest(copy) == manifest
    evaluation = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert evaluation["models"] == ["base", "one", "merged"]
    card = (copy / "README.md").read_text()
    for text in ("## Answers", "| copy | chrf |", f"{evaluation['mean']['one']:.3f}", "length, merged"):
        assert text in card
    assert f"{evaluation['datasets']['copy']['score']['merged']:.3f}" in card
    for text in ("Score of the answers", "merged against base, loss:", "predictions.jsonl", "The card is in"):
        assert text in done.stdout, text
    with pytest.raises(ConfigError, match="none of the models was merged from plan"):
        merged_models(tiny_plan, {"group-0": tiny_groups[0]})


def test_labels(tiny_plan: PartitionPlan, tiny_groups: list[Path], learnt: tuple[PartitionPlan, Path]) -> None:
    from merit_hf.summary import label_models, split_label

    assert split_label("joint=a/b") == ("joint", "a/b")
    assert split_label("org/name@main") == (None, "org/name@main")
    assert split_label(str(tiny_groups[0])) == (None, str(tiny_groups[0]))
    folder = tiny_groups[0]
    assert list(label_models([(None, "a", folder), ("mine", "b", folder), (None, "c", folder)], tiny_plan)) == [
        "group-0", "mine", "group-0-2",
    ]  # fmt: skip
    # A group that holds all of a plan's datasets is its joint model; of a plan with one group it is that group.
    joint = learnt[1]
    assert list(label_models([(None, "a", joint)], learnt[0])) == ["group-0"]
    several = replace(learnt[0], groups=[*learnt[0].groups, *learnt[0].groups])
    assert list(label_models([(None, "a", joint)], several)) == ["joint"]
    for label in ("base", "", "x"):
        with pytest.raises(ConfigError, match="label"):
            label_models([("x", "a", folder), (label, "b", folder)], tiny_plan)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metric", "copy"], "--metric copy: expected NAME=METRIC"),
        (["--metric", "copy=bleu"], "--metric copy='bleu' is not one of"),
        (["--metric", "nope=chrf"], "the plan has no such dataset"),
        (["--card"], "--card: none of the models was merged"),
        (["--tasks", "x"], "--tasks is an option of the harness"),
        (["--output", __file__], "is a file, where a folder is needed"),
        (["--limit", "3"], "--limit is an option of the harness"),
        (["--harness", "lm-eval"], "needs --tasks"),
        (["--harness", "helm", "--tasks", "x"], "expected lm-eval"),
        (["--harness", "lm-eval", "--tasks", "x", "--include-path", "nowhere"], "no such folder"),
    ],
)
def test_a_wrong_call_is_told_before_anything_is_loaded(
    options: list[str], said: str, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = merit("evaluate", tiny_groups[0], "--plan", tiny_plan.folder, "--output", out, *options)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert not out.exists()


def test_a_model_that_is_not_there_is_told_before_anything_is_loaded(
    tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    half, empty = tmp_path / "half", tmp_path / "empty"
    for folder in (half, empty):
        folder.mkdir()
    (half / "adapter_config.json").write_text("{}")
    for place, said in (("nowhere", "no such folder"), ("empty", "no model.safetensors"), ("half", "no adapter_m")):
        with pytest.raises(MeritError, match=said):
            evaluate(tiny_plan, {"base": tiny_plan.base_folder(), "x": tmp_path / place}, output=tmp_path / "out")
    for place, code in ((tmp_path / "nowhere", 2), (empty, 1)):
        done = merit("evaluate", tiny_groups[0], place, "--plan", tiny_plan.folder, "--output", tmp_path / "out")
        assert done.exit_code == code, done.output
        assert isinstance(done.exception, SystemExit)
        assert len(done.stderr.strip().splitlines()) == 1
        assert str(place) in done.stderr
        assert "CHECKPOINT" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_mixture_file_may_name_the_metric(tmp_path: Path) -> None:
    """It is taken up by a plan that is there, whose identity stays."""
    path = make_mixture(tmp_path, ("copy", "first"), count=6, split="random")
    before = MeritPlanner(MeritConfig.from_yaml(path), QUIET).plan(tmp_path / "plan")
    after = MeritPlanner(MeritConfig.from_yaml(path, ["datasets.copy.metric=chrf"]), QUIET).plan(tmp_path / "plan")
    assert after.sha256 == before.sha256
    assert [group.group_sha256 for group in after.groups] == [group.group_sha256 for group in before.groups]
    assert evaluate(after, {"base": after.base_folder()})["datasets"]["copy"]["metric"] == "chrf"

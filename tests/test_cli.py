"""The `merit` command: exit codes, one-line errors, and the whole road on a tiny mixture."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from tiny import make_mixture
from typer.testing import CliRunner, Result

from merit_hf.cli import app
from merit_hf.entry import exit_on_error
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan


def merit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="merit")


def succeed(*arguments: object) -> str:
    result = merit(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refusal(code: int, *arguments: object) -> str:
    """The one line of an error."""
    result = merit(*arguments)
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("merit: error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.rstrip().endswith(errors[0])
    assert "Traceback" not in result.output
    return errors[0]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """{name: (inode, time of the last change)} of every file below `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mixture.yaml, and plan, groups, merged and evaluation.json by one command after another."""
    folder = tmp_path_factory.mktemp("road")
    make_mixture(folder, count=10)
    succeed("plan", folder / "mixture.yaml", "--output", folder / "plan")
    succeed("train", folder / "plan", "--group", "all", "--output", folder / "groups")
    succeed("merge", folder / "plan", folder / "groups/0", folder / "groups/1", "--output", folder / "merged")
    models = [folder / "groups/0", folder / "groups/1", folder / "merged"]
    call = ("evaluate", *models, "--plan", folder / "plan", "--output", folder, "--max-new-tokens", 4)
    (folder / "table").write_text(succeed(*call))
    return folder


def test_the_road_command_by_command(road: Path) -> None:
    plan = PartitionPlan.from_pretrained(road / "plan")
    assert plan.num_groups == 2
    for number in range(2):
        assert read_manifest(road / "groups" / str(number))["status"] == "complete"
    merged = read_manifest(road / "merged")
    assert [group["group"] for group in merged["groups"]] == [0, 1]
    assert [group["weight"] for group in merged["groups"]] == [group.weight for group in plan.groups]
    evaluation = json.loads((road / "evaluation.json").read_text())
    assert evaluation["models"] == ["base", "group-0", "group-1", "merged"]
    assert set(evaluation["datasets"]) == set(plan.names)
    for name, row in evaluation["datasets"].items():
        # Training a group on a dataset helps on that dataset's held-out rows.
        assert row["loss"][f"group-{row['group']}"] < row["loss"]["base"], name
    table = (road / "table").read_text()
    for label in [*evaluation["models"], *plan.names, "mean", f"{evaluation['mean']['merged']:.3f}"]:
        assert label in table, label


def test_every_command_says_what_comes_next(road: Path, tmp_path: Path) -> None:
    """And the line that it gives works."""
    folder = Path(shutil.copytree(road, tmp_path / "next", ignore=shutil.ignore_patterns("merged", "groups", "plan")))
    output: Any = succeed("plan", folder / "mixture.yaml", "--output", folder / "plan", "plan.split=random")
    for command in ("train", "merge", "evaluate"):
        following = re.search(r"Next: merit (.+)", output)
        assert following is not None, output
        words = following.group(1).split()
        assert words[0] == command
        # Long answers of a model that has learnt nothing would only take time.
        output = succeed(*words, *(["--max-new-tokens", "4"] if command == "evaluate" else []))
    assert f"The numbers are in {folder / 'evaluation/evaluation.json'}" in output


def test_the_plan_says_what_it_found(road: Path) -> None:
    output = succeed("plan", road / "mixture.yaml", "--output", road / "plan")
    plan = PartitionPlan.from_pretrained(road / "plan")
    assert f"Plan {plan.sha256[:12]}" in output
    for group in plan.groups:
        assert ", ".join(group.datasets) in output
    assert "Cosines between datasets" in output


@pytest.mark.parametrize("relative", [False, True])
def test_running_again_changes_nothing(
    relative: bool, road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another working directory, and with relative paths."""
    monkeypatch.chdir(road.parent if relative else tmp_path)
    folder = Path(road.name) if relative else road
    before = state(road)
    succeed("plan", folder / "mixture.yaml", "--output", folder / "plan")
    succeed("train", folder / "plan", "--group", "all", "--output", folder / "groups")
    succeed("train", folder / "plan", "--group", "1", "--output", folder / "groups/1")
    assert state(road) == before
    assert not list(tmp_path.iterdir())


def test_verify_prints_a_line_a_check(road: Path, tmp_path: Path) -> None:
    groups = [road / "groups/0", road / "groups/1"]
    output = succeed("verify", road / "plan", *groups)
    for group in groups:
        lines = [line for line in output.splitlines() if f" {group}: " in line]
        assert len(lines) == 26
        assert all(line.startswith("ok ") for line in lines)
        assert any(": num_input_tokens: expected " in line for line in lines)
    assert "2 of 2 checkpoints verify" in output

    changed = Path(shutil.copytree(road / "groups/0", tmp_path / "changed"))
    manifest = read_manifest(changed)
    (changed / "merit.json").write_text(json.dumps({**manifest, "num_steps": 1}))
    result = merit("verify", road / "plan", changed, groups[1])
    assert result.exit_code == 1
    wrong = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert wrong == [f"FAILED {changed}: num_steps: expected {manifest['num_steps']}; found 1"]
    assert "1 of 2 checkpoints verify" in result.stdout


def test_two_merged_models_get_numbered_columns(road: Path, tmp_path: Path) -> None:
    shutil.copytree(road / "merged", tmp_path / "copy")
    call = ("evaluate", road / "merged", tmp_path / "copy", "--plan", road / "plan", "--output", tmp_path)
    succeed(*call, "--no-generate")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["models"] == ["base", "merged", "merged-2"]
    before = json.loads((road / "evaluation.json").read_text())
    for name, row in evaluation["datasets"].items():
        assert row["loss"]["merged"] == row["loss"]["merged-2"] == before["datasets"][name]["loss"]["merged"]


def test_evaluate_leaves_nothing_in_the_working_directory(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    succeed(
        "evaluate",
        road / "merged",
        "--plan",
        road / "plan",
        "--output",
        tmp_path / "out",
        "--num-samples",
        1,
        "--max-new-tokens",
        4,
    )
    assert not list((tmp_path / "here").iterdir())


def wrong_calls(road: Path) -> dict[str, tuple[list[object], str]]:
    config, plan, groups = road / "mixture.yaml", road / "plan", [road / "groups/0", road / "groups/1"]
    out = ["--output", road / "refused"]
    return {
        "no config": (["plan", road / "none.yaml", *out], "no such file"),
        "unknown key": (["plan", config, *out, "plan.num_group=2"], "Did you mean `num_groups`"),
        "bad override": (["plan", config, *out, "plan.num_groups"], "expected key=value"),
        "too many groups": (["plan", config, *out, "plan.num_groups=5"], "there are 4 datasets"),
        "no data file": (["plan", config, *out, "datasets.copy.path=data/kopy.jsonl"], "Did you mean `copy.jsonl`"),
        "no base": (["plan", config, *out, "base.model_name_or_path=./none"], "no folder"),
        "padding-free unpacked": (["plan", config, *out, "sft.padding_free=true"], "sft.packing=true"),
        "another plan there": (["plan", config, "--output", plan, "plan.seed=1"], "plan.seed: 0 there, 1 here"),
        "no plan": (["train", road / "data", "--group", "0", *out], "no plan.json in it"),
        "group name": (["train", plan, "--group", "one", *out], "a number from 0 to 1, or `all`"),
        "no such group": (["train", plan, "--group", "7", *out], "the plan has groups 0 to 1"),
        "negative group": (["train", plan, "--group", "-1", *out], "--group -1"),
        "identity override": (["train", plan, "sft.seed=1", "--group", "0", *out], "part of the plan's identity"),
        "no sft prefix": (["train", plan, "logging_steps=1", "--group", "0", *out], "expected sft.KEY=VALUE"),
        "output taken": (["train", plan, "--group", "0", "--output", groups[1]], "is not group 0 of this plan"),
        "no accelerate config": (
            ["train", plan, "--group", "0", *out, "--accelerate-config", "none.yaml"], "no such file",
        ),
        "a group missing": (["merge", plan, groups[0], *out], "1 of 2 groups given, no checkpoint of group 1"),
        "a group twice": (["merge", plan, groups[0], groups[0], *out], "group 0 is given twice"),
        "no checkpoint": (["merge", plan, groups[0], road / "data", *out], "no merit.json in it"),
        "merge onto something": (["merge", plan, *groups, "--output", road / "merged"], "exists already"),
        "unknown engine": (["merge", plan, *groups, *out, "--engine", "zip"], "zip"),
        "unknown weights": (["merge", plan, *groups, *out, "--weights", "none"], "tokens, loss_tokens, uniform"),
        "unknown dtype": (["merge", plan, *groups, *out, "--out-dtype", "int8"], "int8"),
        "exclude a stranger": (["merge", plan, *groups, *out, "--exclude", "5"], "the plan has groups 0 to 1"),
        "verify no checkpoint": (["verify", plan, road / "data"], "no merit.json in it"),
        "verify a plan": (["verify", groups[0], groups[0]], "no plan.json in it"),
        "evaluate no plan": (["evaluate", road / "merged", "--plan", road / "data", *out], "no plan.json in it"),
        "run with a bad key": (["run", config, *out, "merge.weight=tokens"], "Did you mean `weights`"),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrong_calls(Path()))
def test_a_wrong_call_is_one_line_and_exit_2(name: str, road: Path) -> None:
    arguments, message = wrong_calls(road)[name]
    assert message in refusal(2, *arguments)
    assert not (road / "refused").exists()


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["plan", "x.yaml"], ["train", "plan"], ["merge", "plan"], ["nonsense"], ["plan", "x", "--nonsense"],
     ["evaluate", "m", "--output", "o"], ["evaluate", "m", "--plan", "p", "--output", "o", "--num-samples", "0"]],
    ids=" ".join,
)  # fmt: skip
def test_typers_own_refusals_exit_2_too(arguments: list[str]) -> None:
    result = merit(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def failures(road: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """Calls that are right, of things that are broken."""
    broken_plan = Path(shutil.copytree(road / "plan", folder / "plan"))
    content = json.loads((broken_plan / "plan.json").read_text())
    (broken_plan / "plan.json").write_text(json.dumps({**content, "sha256": "0" * 64}))
    broken = Path(shutil.copytree(road / "groups/0", folder / "0"))
    (broken / "model.safetensors").write_bytes(b"cut short")
    out = ["--output", folder / "out"]
    return {
        "output below a file": (
            ["plan", road / "mixture.yaml", "--output", road / "mixture.yaml/plan"],
            f"{road / 'mixture.yaml/plan.part'}/gradients: Not a directory. Give a path",
        ),
        "plan changed": (["train", broken_plan, "--group", "0", *out], "records sha256 000000000000"),
        "weights changed": (
            ["merge", road / "plan", broken, road / "groups/1", *out],
            "model.safetensors: not a complete safetensors file",
        ),
        "weights unreadable": (["evaluate", broken, "--plan", road / "plan", *out], str(broken)),
    }


@pytest.mark.parametrize("name", ["output below a file", "plan changed", "weights changed", "weights unreadable"])
def test_a_failure_is_one_line_and_exit_1(name: str, road: Path, tmp_path: Path) -> None:
    arguments, message = failures(road, tmp_path)[name]
    assert message in refusal(1, *arguments)
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_system_names_its_path_and_a_librarys_own_is_to_be_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error, said in (
        (OSError(errno.ENOSPC, "No space left on device"), "disk: No space left on device. Free some"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), "there: Permission denied. Give a path"),
        (ConnectionError("no route"), "unexpected ConnectionError: no route. Run it with --debug"),
    ):
        with pytest.raises(SystemExit, match="1"), exit_on_error():
            raise error
        assert said in capsys.readouterr().err


def test_verify_of_unreadable_weights_is_a_failed_check(road: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(road / "groups/0", tmp_path / "0"))
    (broken / "model.safetensors").write_bytes(b"cut short")
    result = merit("verify", road / "plan", broken)
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert [line.split(": ")[1] for line in failed] == ["tensors"]
    assert "not a complete safetensors file" in failed[0]
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback(road: Path, tmp_path: Path) -> None:
    calls = [
        (2, ["plan", tmp_path / "none.yaml", "--output", tmp_path / "o"]),
        (2, ["train", tmp_path, "--group", "0", "--output", tmp_path / "o"]),
        (2, ["merge", tmp_path, tmp_path, "--output", tmp_path / "o"]),
        (2, ["verify", road / "plan", tmp_path]),
        (2, ["evaluate", tmp_path, "--plan", tmp_path, "--output", tmp_path / "o"]),
        (2, ["run", tmp_path / "none.yaml", "--output", tmp_path / "o"]),
    ]
    for code, arguments in calls:
        refusal(code, *arguments)
        result = merit(*arguments, "--debug")
        assert result.exit_code == code
        assert "Traceback (most recent call last)" in result.stderr
        assert "ConfigError" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("merit: error: ")


@pytest.mark.parametrize("command", ["plan", "train", "merge", "verify", "evaluate", "report", "run"])
def test_help(command: str) -> None:
    output = succeed(command, "--help")
    assert "--debug" in output
    assert f"merit {command}" in output
    assert command in succeed("--help")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole `merit run --joint`, in `runs/tiny`."""
    folder = tmp_path_factory.mktemp("run")
    make_mixture(folder, count=10)
    # Paths in CONFIG refer to its folder, whatever the working directory.
    (folder / "table").write_text(succeed("run", folder / "mixture.yaml", "--joint", "--output", folder / "runs/tiny"))
    return folder


def test_run_goes_the_whole_road(run_folder: Path) -> None:
    output = run_folder / "runs/tiny"
    names = {path.name for path in output.iterdir()}
    assert {"plan", "groups", "merged", "joint", "evaluation.json", "report.html"} <= names
    assert not list(output.rglob("*.part"))
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation["models"] == ["base", "joint", "group-0", "group-1", "merged"]
    table = (run_folder / "table").read_text()
    for text in ("Plan ", "joint", "mean", str(output / "merged"), f"Next: merit verify {output / 'plan'}"):
        assert text in table, text
    joint = PartitionPlan.from_pretrained(output / "joint" / "plan")
    plan = PartitionPlan.from_pretrained(output / "plan")
    assert sum(group.train_input_tokens for group in plan.groups) == joint.groups[0].train_input_tokens
    card = (output / "merged" / "README.md").read_text()
    assert f"{evaluation['mean']['merged']:.3f}" in card
    assert "(figures/held_out_loss.png)" in card
    assert (output / "merged" / "figures" / "held_out_loss.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "2 of 2 groups are trained" in page
    assert f"mean held-out loss {evaluation['mean']['merged']:.3f} against" in page
    assert str(run_folder) not in page
    following = re.search(r"Next: merit (verify .+)", table)
    assert following is not None
    succeed(*following.group(1).split())


def test_run_again_is_a_no_op(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = state(run_folder / "runs")
    output = succeed("run", run_folder / "mixture.yaml", "--joint", "--output", run_folder / "runs/tiny")
    assert state(run_folder / "runs") == before
    assert output == (run_folder / "table").read_text()


def test_run_makes_what_is_missing_again(run_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "copy"))
    output = folder / "runs/tiny"
    weights = (output / "merged/model.safetensors").read_bytes()
    kept = state(output / "groups/0")
    shutil.rmtree(output / "groups/1")
    shutil.rmtree(output / "merged")
    # The mixture lies in another folder now; what the plan was made of is the same.
    succeed("run", folder / "mixture.yaml", "--joint", "--output", output)
    assert (output / "merged/model.safetensors").read_bytes() == weights
    assert state(output / "groups/0") == kept


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.seed=1", "plan.seed: 0 there, 1 here"),
        ("sft.learning_rate=0.002", "sft.learning_rate: 0.001 there, 0.002 here"),
        ("merge.weights=uniform", "merge.weights: "),
        ("merge.out_dtype=float32", "merge.out_dtype: None there, 'float32' here"),
        ("merge.engine=mergekit", "merge.engine: 'safetensors' there, 'mergekit' here"),
    ],
)
def test_a_changed_config_never_takes_over_an_old_run(override: str, message: str, run_folder: Path) -> None:
    before = state(run_folder / "runs")
    assert message in refusal(2, "run", run_folder / "mixture.yaml", override, "--output", run_folder / "runs/tiny")
    assert state(run_folder / "runs") == before


def test_run_without_held_out_rows(tmp_path: Path) -> None:
    path = make_mixture(tmp_path, ("copy", "count"), count=6, split="random")
    content = yaml.safe_load(path.read_text())
    for entry in content["datasets"]:
        entry.pop("eval_path")
        entry["eval_fraction"] = 0.0
    path.write_text(yaml.safe_dump(content))
    output = succeed("run", path, "--output", tmp_path / "out")
    assert "Merged:" in output
    assert not (tmp_path / "out/evaluation.json").exists()


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    config = make_mixture(tmp_path, count=40, tokens_per_batch=1)
    job = jobs.Job(jobs.merit, [["plan", config, "--output", tmp_path / "plan"]], tmp_path / "log")
    while "Gradients:" not in job.output:
        assert job.is_alive(), job.output
    os.kill(job.pid, signal.SIGINT)
    assert job.wait() == 130, job.output
    assert job.output.splitlines()[-1] == "merit: error: interrupted. Run the same command again to go on."
    assert "Traceback" not in job.output
    assert not (tmp_path / "plan").exists()
    succeed("plan", config, "--output", tmp_path / "plan")

"""The controlled experiment as a command: refused by its gates, killed while it trains, resumed, and told in words."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment import cells, read_experiment
from material import Material
from record import read_rows
from results import write_results
from run import main
from warmup import build_base, check_held_out, documents

from merit_hf.checkpoint import weights_sha256
from merit_hf.config import ConfigError
from merit_hf.progress import Progress
from merit_hf.training import last_checkpoint

HERE = Path(__file__).resolve().parent.parent / "benchmarks" / "controlled"
KINDS = ("joint", "soup-2", "examples-2", "merit-2", "negative-2", "layers-2", "rounds-2")


def small_experiment(folder: Path) -> Path:
    """smoke.yaml with one pair of seeds, fewer arms and one learning rate for the joint runs."""
    content = yaml.safe_load((HERE / "smoke.yaml").read_text())
    content["seeds"] = {"plan": [0], "order": [0]}
    content["arms"] = [arm for arm in content["arms"] if arm["name"] in KINDS]
    content["arms"][0]["learning_rate"] = 3e-3
    content["base"]["warmup"]["bf16"] = True
    content["lines"] = {"of": ["joint", "merit-2"], "lambdas": [0.5, 1.0, 1.5], "answers_at": [0.5]}
    content["outcome"] = {"lines": ["joint"], "compare": [["merit-2", "negative-2"]]}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def kill_when(arguments: list[str], ready: Callable[[], bool]) -> None:
    """SIGKILL a script of the experiment as soon as `ready`."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not ready():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


@pytest.mark.slow
def test_a_run_is_refused_by_a_gate_killed_and_resumed_and_repeats_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = small_experiment(tmp_path), tmp_path / "out"
    file, arguments = output / "results.jsonl", [str(path), "--output", str(output)]

    # Choosing looks at no test row: there is none.
    main([*arguments, "--until", "tune", "--force"])
    assert {row["split"] for row in read_rows(file) if row["phase"] == "tune"} == {"val"}
    assert not (output / "data" / "test").exists()
    chosen = next(row for row in read_rows(file) if row["phase"] == "choice")
    assert chosen["value"] == float(min(chosen["grid"], key=chosen["grid"].__getitem__))

    # A model that has learnt nothing fails a gate, which is named; no seed is spent, no test row written.
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 1
    told = capsys.readouterr().err
    assert "exact_match is 0, needed at least 0.2" in told
    assert "--force" in told
    assert not (output / "data" / "test").exists()
    assert not [row for row in read_rows(file) if row["phase"] == "run"]

    # Killed in the middle of a training, once the joint cell is recorded; its workers go with it.
    before = file.read_bytes()
    kill_when(
        [str(HERE / "run.py"), *arguments, "--force", "--workers", "2"],
        lambda: (
            b'"cell": "joint-o0"' in file.read_bytes()
            and bool(list((output / "work").glob("*/groups/*.part/checkpoint-*")))
        ),
    )
    killed = file.read_bytes()
    assert killed.startswith(before)
    main([*arguments, "--force", "--workers", "2"])
    assert file.read_bytes().startswith(killed)

    experiment = read_experiment(path)[""]
    rates = {arm.name: 3e-3 if arm.kind != "split" else chosen["value"] for arm in experiment.arms}
    rows = [row for row in read_rows(file) if row["phase"] == "run"]
    assert {row["cell"] for row in rows} == {"base", *(cell.name for cell in cells(experiment, rates))}
    marks = ("cell", "dataset", "split", "metric", "lambda", "group")
    assert len({tuple(row.get(mark) for mark in marks) for row in rows}) == len(rows)
    check_rows(rows, experiment)

    whole = file.read_bytes()
    content = yaml.safe_load(path.read_text())
    for name, change, said in (
        ("other arm", {"arms": [{**content["arms"][0], "batch": 2}, *content["arms"][1:]]}, "`arms.joint` was fixed"),
        ("other grid", {"tune": {"learning_rates": [1e-3]}}, "a learning rate has been chosen"),
        ("other gate", {"gates": {**content["gates"], "joint_gain": 0}}, "`gates` was fixed before"),
    ):
        other = tmp_path / f"{name}.yaml"
        other.write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(SystemExit):
            main([str(other), "--output", str(output), "--force"])
        assert said in capsys.readouterr().err
    file.write_bytes(whole.replace(b'"base_sha256": "', b'"base_sha256": "0', 1))
    with pytest.raises(SystemExit):
        main([*arguments, "--force"])
    assert "holds results of another base" in capsys.readouterr().err
    file.write_bytes(whole)
    main([*arguments, "--force"])
    assert file.read_bytes() == whole, "a finished experiment is not run again"
    assert not list((output / "work").glob("merit-2*")), "models are removed when their rows are there"

    text = write_results([file], tmp_path).read_text(encoding="utf-8")
    assert "# Trials of the chain: no results" in text
    assert "exact_match | 0.000 | at least 0.2 | **failed**" in text


@pytest.mark.slow
def test_a_warm_up_that_was_killed_goes_on_to_the_same_base_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    path, output = small_experiment(tmp_path), tmp_path / "out"
    part = output / "base.part"
    kill_when(
        [str(HERE / "warmup.py"), str(path), "--output", str(output)],
        lambda: last_checkpoint(part / "run") is not None,
    )
    experiment = read_experiment(path)[""]
    excluded = Material(experiment, output, output / "base").excluded()
    assert experiment.base.warmup is not None
    build_base(experiment.base.warmup, output / "base", excluded, Progress(quiet=True))
    assert not part.exists()
    other = build_base(experiment.base.warmup, tmp_path / "straight", excluded, Progress(quiet=True))
    assert weights_sha256(output / "base") == weights_sha256(other)
    texts = "".join(documents(experiment.base.warmup, excluded))
    material = Material(experiment, output, other)
    names = experiment.data.held_out
    held = [prompt for name in names for split in ("val", "test") for prompt, _ in material.rows(name, split)]
    assert not [prompt for prompt in held if f"<|user|>{prompt}<|end|>" in texts]
    assert "<|user|>" in texts

    check_held_out(other, excluded)
    with pytest.raises(ConfigError, match="may have seen 1 of the"):
        check_held_out(other, {*excluded, "A prompt of another experiment."})


def check_rows(rows: list[dict[str, Any]], experiment: Any) -> None:
    """The ledger, killed trainings included; the line through the model; what was measured where."""
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault(row["arm"], []).append(row)
    joint = by_cell["joint"][0]["tokens"]
    assert joint["input"] > 1000
    for arm in ("examples-2", "merit-2", "negative-2", "rounds-2"):
        assert by_cell[arm][0]["tokens"] == joint, "packed rows: the same tokens, and no padding"
    assert by_cell["soup-2"][0]["tokens"]["input"] == pytest.approx(joint["input"], rel=0.15)
    names = {*experiment.data.datasets, *experiment.data.held_out}
    for arm, found in by_cell.items():
        plain = [row for row in found if row.get("lambda") is None and row.get("group") is None and row["dataset"]]
        for split in ("val", "test") if arm == "base" else ("test",):
            assert {row["dataset"] for row in plain if row["split"] == split and row["metric"] == "loss"} == names
        assert {row["dataset"] for row in plain if row["metric"] == "score"} == names
        assert {row["split"] for row in plain if row["metric"] == "score"} == {"test"}
        assert arm == "base" or found[0]["displacement"] > 0
    for arm in ("joint", "merit-2"):
        for split in ("val", "test"):
            at = {
                place: {r["dataset"]: r["value"] for r in by_cell[arm] if r["split"] == split and r["metric"] == "loss"
                        and r.get("group") is None and r.get("lambda") == place}
                for place in (None, 0.5, 1.0, 1.5)
            }  # fmt: skip
            if split == "test":
                assert at[1.0] == pytest.approx(at[None], rel=1e-4), "at λ = 1 stands the model itself"
            assert set(at[0.5]) == names
            assert at[0.5] != at[1.0] != at[1.5]
        answered = [row for row in by_cell[arm] if row.get("lambda") == 0.5 and row["metric"] == "score"]
        assert bool(answered) == (arm in experiment.outcome.lines)
    chosen = {r["metric"]: r["value"] for r in by_cell["layers-2"] if r["metric"].startswith("lambda@layer")}
    assert chosen.keys() >= {"lambda@layer 00", "lambda@layer 01"}
    assert set(chosen.values()) <= {0.5, 1.0, 1.5}
    facts = {row["metric"] for row in by_cell["merit-2"] if row["dataset"] is None}
    assert {"within_group_cosine", "eigengap", "plan_agreement", "measured_gain", "predicted_gain@1"} <= facts
    assert {row.get("group") for row in by_cell["merit-2"]} >= {0, 1}

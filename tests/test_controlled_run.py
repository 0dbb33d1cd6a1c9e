"""The controlled experiment as a command: refused by its gates, killed while it trains, resumed, and told in words."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiment import cells, read_experiment
from record import read_rows
from results import write_results

HERE = Path(__file__).resolve().parent.parent / "benchmarks" / "controlled"
KINDS = ("joint", "soup-2", "examples-2", "merit-2", "negative-2")


def small_experiment(folder: Path) -> Path:
    """smoke.yaml with one pair of seeds, fewer arms and one learning rate for the joint runs."""
    content = yaml.safe_load((HERE / "smoke.yaml").read_text())
    content["seeds"] = {"plan": [0], "order": [0]}
    content["arms"] = [arm for arm in content["arms"] if arm["name"] in KINDS]
    content["arms"][0]["learning_rate"] = 3e-3
    content["lines"] = {"of": ["joint", "merit-2"], "lambdas": [0.5, 1.0, 1.5], "answers_at": [0.5]}
    content["outcome"] = {"lines": ["joint"], "compare": [["merit-2", "negative-2"]]}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(path: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, str(HERE / "run.py"), str(path), "--output", str(output), *options]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True)


def kill_while_training(arguments: list[str], output: Path, done: str, checkpoint: str) -> None:
    """SIGKILL once cell `done` is recorded and a training after it has left a checkpoint."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            file = output / "results.jsonl"
            known = file.exists() and f'"cell": "{done}"' in file.read_text(encoding="utf-8", errors="replace")
            if known and list((output / "work").glob(checkpoint)):
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_is_refused_by_a_gate_killed_and_resumed_and_repeats_and_loses_nothing(tmp_path: Path) -> None:
    path, output = small_experiment(tmp_path), tmp_path / "out"
    file = output / "results.jsonl"

    # Choosing looks at no test row: there is none.
    done = run(path, output, "--until", "tune", "--force")
    assert done.returncode == 0, done.stderr
    assert {row["split"] for row in read_rows(file) if row["phase"] == "tune"} == {"val"}
    assert not (output / "data" / "test").exists()
    chosen = next(row for row in read_rows(file) if row["phase"] == "choice")
    losses = chosen["grid"]
    assert chosen["value"] == float(min(losses, key=losses.__getitem__))

    # A model that has learnt nothing fails a gate, which is named; no seed is spent, no test row written.
    done = run(path, output)
    assert done.returncode == 1
    assert "exact_match is 0, needed at least 0.2" in done.stderr
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (output / "data" / "test").exists()
    assert not [row for row in read_rows(file) if row["phase"] == "run"]

    before = file.read_bytes()
    kill_while_training(command(path, output, "--force"), output, "joint-o0", "soup-2*/groups/*.part/checkpoint-*")
    killed = file.read_bytes()
    assert killed.startswith(before)
    kill_while_training(
        command(path, output, "--force"), output, "soup-2-o0", "examples-2*/groups/*.part/checkpoint-*"
    )
    done = run(path, output, "--force")
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(killed)

    experiment = read_experiment(path)[""]
    rates = {arm.name: 3e-3 if arm.kind != "split" else chosen["value"] for arm in experiment.arms}
    rows = [row for row in read_rows(file) if row["phase"] == "run"]
    assert {row["cell"] for row in rows} == {"base", *(cell.name for cell in cells(experiment, rates))}
    keys = [json.dumps([row["cell"], row["dataset"], row["split"], row["metric"], row.get("lambda"), row.get("group")])
            for row in rows]  # fmt: skip
    assert len(set(keys)) == len(keys)
    check_rows(rows, experiment)

    whole = file.read_bytes()
    assert run(path, output, "--force").returncode == 0
    assert file.read_bytes() == whole, "a finished experiment is not run again"
    assert not list((output / "work").glob("merit-2*")), "models are removed when their rows are there"

    text = write_results([file], tmp_path).read_text(encoding="utf-8")
    assert "# Trials of the chain: no results" in text
    assert "exact_match | 0.000 | at least 0.2 | **failed**" in text


def check_rows(rows: list[dict[str, Any]], experiment: Any) -> None:
    """The ledger, killed trainings included; the line through the model; what was measured where."""
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_cell.setdefault(row["arm"], []).append(row)
    joint = by_cell["joint"][0]["tokens"]
    assert joint["input"] > 1000
    for arm in ("examples-2", "merit-2", "negative-2"):
        assert by_cell[arm][0]["tokens"] == joint, "packed rows: the same tokens, and no padding"
    assert by_cell["soup-2"][0]["tokens"]["input"] == pytest.approx(joint["input"], rel=0.15)
    names = {*experiment.data.datasets, *experiment.data.held_out}
    for arm, found in by_cell.items():
        plain = [row for row in found if row.get("lambda") is None and row.get("group") is None and row["dataset"]]
        for split in ("val", "test"):
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
            assert at[1.0] == pytest.approx(at[None], rel=1e-4), "at λ = 1 stands the model itself"
            assert at[0.5] != at[1.0] != at[1.5]
    facts = {row["metric"] for row in by_cell["merit-2"] if row["dataset"] is None}
    assert {"within_group_cosine", "eigengap", "plan_agreement", "measured_gain", "predicted_gain@1"} <= facts
    assert {row.get("group") for row in by_cell["merit-2"]} >= {0, 1}

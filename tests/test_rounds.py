"""run.rounds: merge, go on from there; every row once, the tokens of one run, and kills that change nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from merging import load, mean64
from test_cli import refusal, state, succeed
from tiny import make_mixture

from merit_hf.checkpoint import weights_sha256
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.data import load_rows
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.rounds import check_rows, round_config

ALPHA = 0.5
ROUNDS = ["run.rounds=2", f"merge.interpolate_to_init={ALPHA}", "merge.out_dtype=float32"]
TOKENS = ("num_input_tokens", "num_loss_tokens")


def rows_of(config: MeritConfig) -> dict[str, list[str]]:
    """{whole dataset: its training rows} of a round."""
    return {
        spec.name.partition("#")[0]: [json.dumps(row) for row in load_rows(spec, config.root).train]
        for spec in config.datasets
    }


@pytest.mark.parametrize("rounds", [2, 3])
def test_every_row_is_in_one_round_and_groups_are_kept(
    tiny_plan: PartitionPlan, tiny_config: Path, rounds: int, tmp_path: Path
) -> None:
    config = MeritConfig.from_yaml(tiny_config, [f"run.rounds={rounds}", "sft.max_steps=11"])
    check_rows(config, tiny_plan)
    made = [round_config(config, tiny_plan, k, tmp_path if k > 1 else None) for k in range(1, rounds + 1)]
    whole, shares = rows_of(config), [rows_of(own) for own in made]
    for name, rows in whole.items():
        together = [row for share in shares for row in share[name]]
        assert sorted(together) == sorted(rows)
        assert max(len(share[name]) for share in shares) - min(len(share[name]) for share in shares) <= 1
    assert sum(own.sft["max_steps"] for own in made) == 11
    groups = {dataset.name: dataset.group for dataset in tiny_plan.datasets}
    for number, own in enumerate(made, start=1):
        assert own.plan.split == "by_tag"
        tags = sorted({spec.tag for spec in own.datasets})
        assert {spec.name.partition("#")[0]: tags.index(spec.tag) for spec in own.datasets} == groups
        assert own.base.model_name_or_path == ("base" if number == 1 else str(tmp_path))
        assert own.sft | {"max_steps": 0} == config.sft | {"max_steps": 0}


def test_shares_of_parts_are_parts_of_the_whole(tmp_path: Path) -> None:
    path = make_mixture(tmp_path, ("copy", "count"), count=11, split="random")
    content = yaml.safe_load(path.read_text())
    first = content["datasets"][0]
    content["datasets"] = [{**first, "name": f"copy#{k}", "part": f"{k}/2"} for k in (1, 2)]
    path.write_text(yaml.safe_dump(content))
    succeed("plan", path, "--output", tmp_path / "plan")
    config = MeritConfig.from_yaml(path, ["run.rounds=2"])
    plan = PartitionPlan.from_pretrained(tmp_path / "plan")
    made = [round_config(config, plan, number, None) for number in (1, 2)]
    parts = [[(spec.name, spec.part) for spec in own.datasets] for own in made]
    assert parts == [[("copy#1", "1/4"), ("copy#2", "2/4")], [("copy#3", "3/4"), ("copy#4", "4/4")]]
    for number, spec in enumerate(config.datasets):
        rows = {json.dumps(row) for row in load_rows(spec, tmp_path).train}
        assert rows == {json.dumps(row) for own in made for row in load_rows(own.datasets[number], tmp_path).train}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"run": {"rounds": 0}}, "run.rounds=0"),
        ({"run": {"rounds": 1.5}}, "run.rounds=1.5"),
        ({"run": {"round": 2}}, "unknown key `run.round` (value 2). Did you mean `rounds`?"),
        ({"run": {"replan": True}}, "run.replan=true means something after a first round"),
        ({"run": {"rounds": 4}, "sft": {"max_steps": 3}}, "run.rounds=4 share sft.max_steps=3"),
        ({"run": {"rounds": 2}, "hub": {"push": True}}, "run.rounds=2 with hub.push=true"),
        (
            {"run": {"rounds": 2}, "peft": {"r": 4}, "merge": {"adapters": "concat"}},
            "run.rounds=2 with merge.adapters=concat",
        ),
    ],
)
def test_what_makes_no_rounds_is_refused(content: dict[str, Any], said: str) -> None:
    base = {"base": {"model_name_or_path": "base"}, "datasets": [{"name": "a", "path": "x"}]}
    with pytest.raises(ConfigError, match=re.escape(said)):
        MeritConfig.from_dict({**base, **content})


def test_a_dataset_with_fewer_rows_than_rounds_is_named(tiny_plan: PartitionPlan, tiny_config: Path) -> None:
    config = MeritConfig.from_yaml(tiny_config, ["run.rounds=12"])
    with pytest.raises(ConfigError, match=r"run\.rounds=12, but dataset `copy` has 11 examples"):
        check_rows(config, tiny_plan)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mixture.yaml and, in run/, a finished run of two rounds with a joint baseline."""
    folder = tmp_path_factory.mktemp("rounds")
    make_mixture(folder, ("copy", "count"), count=10)
    job = jobs.Job(jobs.merit, [["run", folder / "mixture.yaml", *ROUNDS, "--joint", "--output", folder / "run"]],
                   folder / "log")  # fmt: skip
    assert job.wait() == 0, job.output
    return folder


@pytest.mark.slow
def test_rounds_go_on_from_what_was_merged_at_the_tokens_of_one_run(finished: Path) -> None:
    run = finished / "run"
    plans = [PartitionPlan.from_pretrained(run / place) for place in ("plan", "rounds/1/plan", "rounds/2/plan")]
    merged = [run / "rounds/1/merged", run / "merged"]
    assert (run / "rounds/2/merged").resolve() == run / "merged"
    assert plans[1].base["weights_sha256"] == plans[0].base["weights_sha256"]
    assert plans[2].base["weights_sha256"] == weights_sha256(merged[0])
    joint = read_manifest(run / "joint/groups/0")
    groups = [[run / f"rounds/{number}/groups/{k}" for k in range(2)] for number in (1, 2)]
    for field in TOKENS:
        assert sum(read_manifest(folder)[field] for both in groups for folder in both) == joint[field]
    for number, (plan, both, folder) in enumerate(zip(plans[1:], groups, merged, strict=True), start=1):
        assert [group.datasets for group in plan.groups] == [
            [f"{name}#{number}" for name in group.datasets] for group in plans[0].groups
        ]
        manifest = read_manifest(folder)
        assert manifest["plan"]["sha256"] == plan.sha256
        assert manifest["base"]["weights_sha256"] == plan.base["weights_sha256"]
        assert (manifest["round"]["number"], manifest["round"]["plan_sha256"]) == (number, plans[0].sha256)
        # θ_r = θ_{r−1} + α (θ̄_r − θ_{r−1})
        origin = load(finished / "base" if number == 1 else merged[0])
        mean = mean64(both, [group.train_input_tokens for group in plan.groups])
        for name, tensor in load(folder).items():
            exact = origin[name].double() * (1 - ALPHA) + ALPHA * mean[name]
            assert bool(((tensor.double() - exact).abs() <= 2**-23 * exact.abs().max()).all())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["models"] == ["base", "joint", "round-1", "merged"]
    assert set(evaluation["datasets"]) == set(plans[0].names), "on all held-out rows"
    assert evaluation["mean"]["merged"] < evaluation["mean"]["round-1"] < evaluation["mean"]["base"]
    card = (run / "merged/README.md").read_text()
    assert "This is round 2 of 2" in card
    assert "so that those whose gradients conflict are kept apart" in card
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in ("round 1: 0", "round 2: 1", "In the last of 2 rounds, 2 of 2 groups", "from what round 1 has merged"):
        assert text in page, text
    assert "left out" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "Rounds: " in (finished / "log").read_text()
    assert f"trained in 2 rounds: merit status {run / 'rounds/2/plan'}" in succeed("status", run / "plan")
    assert f"All groups are merged: {run / 'rounds/2/merged'}" in succeed("status", run / "rounds/2/plan")
    succeed("verify", run / "rounds/2/plan", *groups[1])


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_never_taken_over(finished: Path) -> None:
    before = state(finished / "run")
    call = ["run", finished / "mixture.yaml", *ROUNDS, "--output", finished / "run"]
    for override, said in (
        ("run.rounds=1", "run.rounds: 2 there, 1 here"),
        ("run.rounds=3", "run.rounds: 2 there, 3 here"),
        ("run.replan=true", "run.replan: False there, True here"),
        ("merge.interpolate_to_init=1", "merge.interpolate_to_init: 0.5 there, 1.0 here"),
        ("merge.weights=uniform", "merge.weights: 'tokens' there, 'uniform' here"),
        ("sft.learning_rate=0.002", "sft.learning_rate: 0.001 there, 0.002 here"),
    ):
        assert said in refusal(2, *call, override)
    succeed(*call, "--joint")
    assert state(finished / "run") == before


@pytest.mark.slow
def test_a_kill_in_the_second_round_changes_nothing(finished: Path, tmp_path: Path) -> None:
    """Killed while the second round trains, and again while it merges."""
    folder = tmp_path / "again"
    for name in ("base", "data", "mixture.yaml"):
        source = finished / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, _made(folder) / name)
    call = [["run", folder / "mixture.yaml", *ROUNDS, "--joint", "--output", folder / "run"]]
    training = folder / "run/rounds/2/groups/1.part"
    job = jobs.Job(jobs.merit, call, tmp_path / "log-1")
    assert job.kill_when(training.exists, seconds=300), job.output
    assert not (folder / "run/merged").exists()
    kept = state(folder / "run/rounds/1")
    job = jobs.Job(jobs.merit, call, tmp_path / "log-2")
    assert job.kill_when(lambda: (folder / "run/merged.part").exists(), seconds=300), job.output
    job = jobs.Job(jobs.merit, call, tmp_path / "log-3")
    assert job.wait() == 0, job.output
    assert state(folder / "run/rounds/1") == kept
    assert not list((folder / "run").rglob("*.part"))
    for place in ("rounds/1/merged", "rounds/2/groups/0", "rounds/2/groups/1", "merged"):
        ours, theirs = load(folder / "run" / place), load(finished / "run" / place)
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs), place


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.slow
def test_replanned_rounds_split_by_gradients_at_their_own_base(finished: Path, tmp_path: Path) -> None:
    call = [
        "run",
        finished / "mixture.yaml",
        *ROUNDS,
        "run.replan=true",
        "sft.max_steps=5",
        "--output",
        tmp_path / "run",
    ]
    job = jobs.Job(jobs.merit, [call], tmp_path / "log")
    assert job.wait() == 0, job.output
    plans = [PartitionPlan.from_pretrained(tmp_path / "run/rounds" / str(number) / "plan") for number in (1, 2)]
    assert [plan.is_measured for plan in plans] == [False, True]
    assert [plan.config["plan"]["split"] for plan in plans] == ["by_tag", "merit"]
    assert plans[1].base["weights_sha256"] == weights_sha256(tmp_path / "run/rounds/1/merged")
    assert [sum(group.num_steps for group in plan.groups) for plan in plans] == [2, 3]
    assert read_manifest(tmp_path / "run/merged")["round"]["replan"] is True

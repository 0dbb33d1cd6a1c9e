"""The controlled experiment without a model: data, YAMLs, the matrix and the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import results
import run
import yaml
from experiment import Cell, Experiment, cells, read_experiment, seed_pairs, tuning_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from material import TEST, TRAIN, VAL, Material, split_pairs
from record import Record, read_rows
from results import write_results
from tasks import TASKS, make_examples

from merit_hf.config import ConfigError
from merit_hf.sft import build_args

HERE = Path(__file__).resolve().parent.parent / "benchmarks" / "controlled"
YAMLS = sorted(HERE.glob("*.yaml"))

# ---------------------------------------------------------------- data


def test_tasks_are_the_same_in_every_call_and_parts_share_nothing() -> None:
    for name in ("number_fr", "words_reversed", "sum_roman", "chat_en", "caesar_cipher"):
        pairs = make_examples(name, 60, 0)
        assert pairs == make_examples(name, 60, 0) != make_examples(name, 60, 1)
        parts = split_pairs(pairs, 10, 15)
        prompts = [{prompt.casefold() for prompt, _ in parts[split]} for split in (TEST, VAL, TRAIN)]
        assert [len(part) for part in prompts] == [15, 10, 35]
        assert len(set.union(*prompts)) == 60


@pytest.mark.parametrize("family", ["numbers", "dates", "records", "words"])
def test_with_full_conflict_a_familys_prompts_are_the_same_and_their_answers_are_not(family: str) -> None:
    members = [name for name, task in TASKS.items() if task.family == family][:4]
    made = [make_examples(name, 30, 0, conflict=1.0) for name in members]
    prompts = [[prompt for prompt, _ in pairs] for pairs in made]
    assert all(other == prompts[0] for other in prompts)
    answers = list(zip(*([answer for _, answer in pairs] for pairs in made), strict=True))
    assert sum(len(set(row)) == len(members) for row in answers) >= 25
    # Without conflict every prompt says whose answer is wanted, of the same things.
    told = [[prompt for prompt, _ in make_examples(name, 30, 0)] for name in members]
    assert not set(told[0]) & set(told[1])
    half = [prompt for prompt, _ in make_examples(members[0], 200, 0, conflict=0.5)]
    bare = {prompt for prompt, _ in make_examples(members[0], 200, 0, conflict=1.0)}
    assert 60 < sum(prompt in bare for prompt in half) < 140


def test_an_unknown_task_is_told() -> None:
    with pytest.raises(ConfigError, match="no task `number_xx`"):
        make_examples("number_xx", 3, 0)


# ---------------------------------------------------------------- the YAMLs and the matrix


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_parses_and_every_cell_of_it_is_a_valid_config(path: Path, tmp_path: Path) -> None:
    for condition, experiment in read_experiment(path).items():
        assert set(experiment.data.datasets + experiment.data.held_out) <= set(TASKS)
        material = Material(experiment, tmp_path / path.stem / condition, tmp_path / "base")
        rates = {arm.name: 1e-4 for arm in experiment.arms}
        wanted = list(cells(experiment, rates))
        assert len({cell.name for cell in wanted}) == len(wanted)
        for arm in experiment.arms:
            if arm.kind in ("joint", "soup", "split") and arm.affinity is None:
                cell = Cell(arm.name, *seed_pairs(experiment, arm)[0], 1e-4)
                configs = material.of_cell(cell, None)
                assert len(configs) == (arm.groups if arm.kind == "soup" else 1)
                args = build_args({**configs[0].sft, "bf16": False})
                whole = args.per_device_train_batch_size * args.gradient_accumulation_steps
                planned = experiment.sft["per_device_train_batch_size"]
                assert whole == planned * arm.batch
        assert {cell.arm for cell in tuning_cells(experiment)} == {
            arm.name for arm in experiment.arms if arm.tuned_as is None and arm.learning_rate is None
        }


def smoke() -> Experiment:
    return read_experiment(HERE / "smoke.yaml")[""]


def test_cells_come_seed_by_seed_and_every_arm_has_its_own() -> None:
    experiment = smoke()
    names = [cell.name for cell in cells(experiment, {arm.name: 1e-3 for arm in experiment.arms})]
    assert names.index("merit-2-p0-o0") < names.index("random-2-p1-o0")
    assert names.count("joint-o0") == 1
    assert "examples-2-p1-o0" not in names
    assert {"random-2-p0-o0", "random-2-p1-o0", "merit-2-p0-o0", "merit-2-p1-o0"} <= set(names)
    tuned = tuning_cells(experiment)
    assert [(cell.arm, cell.learning_rate) for cell in tuned] == [
        ("joint", 1e-3), ("joint", 3e-3), ("merit-2", 1e-3), ("merit-2", 3e-3)
    ]  # fmt: skip
    assert not {cell.name for cell in tuned} & set(names)
    # What tuning trained is what the matrix needs.
    assert Cell("joint", None, 0, 1e-3).work == tuned[0].work


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"arms": [{"name": "a", "kind": "split", "groups": 2}]}, "kind split needs one"),
        ({"lines": {"of": ["nothing"]}}, "there is no arm `nothing`"),
        ({"lines": {"of": ["joint", "joint-2x-batch"], "lambdas": [0.5]}}, "has no 1"),
        ({"data": {"held_out": ["number_fr"]}}, "held out of it"),
        ({"tune": {"learning_rates": []}}, "tune.learning_rates"),
        ({"nonsense": 1}, "nonsense"),
        ({"plan": {"num_samples": 24}}, "2 plan seeds draw the same samples, since plan.num_samples is 24"),
        ({"base": {"model": "smollm2"}}, "give one of `model` and `warmup`"),
    ],
)
def test_a_mistake_in_a_yaml_is_told_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = yaml.safe_load((HERE / "smoke.yaml").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key in content else value
    if "arms" in change:
        content |= {"lines": {"of": ["a"]}, "outcome": {"lines": ["a"]}, "gates": {"joint": "a", "merit": "a"}}
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        read_experiment(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_conditions_go_over_the_experiment_and_eight_groups_need_many_datasets(tmp_path: Path) -> None:
    found = read_experiment(HERE / "cause.yaml")
    assert [found[name].data.conflict for name in ("opposed_25", "opposed_100")] == [0.25, 1.0]
    assert found["opposed_50_longer"].sft["num_train_epochs"] == 6
    assert found["opposed_50_longer"].sft["packing"] is True
    # Twelve random splits, none of them twice, each with one of three orders.
    cells = seed_pairs(found["alike"], found["alike"].arm("random-4"))
    assert (len(cells), len({plan for plan, _ in cells}), {order for _, order in cells}) == (12, 12, {0, 1, 2})
    content = yaml.safe_load((HERE / "smollm2.yaml").read_text())
    content["arms"].append({"name": "merit-8", "kind": "split", "split": "merit", "groups": 8})
    path = tmp_path / "eight.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="48 datasets"):
        read_experiment(path)


def test_calls_that_cannot_work_are_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, arguments, said in (
        (
            run.main,
            [str(HERE / "cause.yaml"), "--output", str(tmp_path / "out"), "--only", "nothing"],
            "no such condition",
        ),
        (run.main, [str(tmp_path / "nothing.yaml"), "--output", str(tmp_path / "out")], "nothing.yaml"),
        (results.main, [str(tmp_path / "nothing.jsonl"), "--output", str(tmp_path / "out")], "no results there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            script(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="no finished cell"):
        write_results([tmp_path / "empty.jsonl"], tmp_path / "out")


def test_every_example_is_in_one_random_part_and_test_rows_are_written_last(tmp_path: Path) -> None:
    experiment = smoke()
    material = Material(experiment, tmp_path, tmp_path / "base")
    material._write((TRAIN, VAL))
    assert material.sealed
    assert "test" not in {path.name for path in (tmp_path / "data").iterdir()}
    config = material.of_cell(Cell("examples-2", 0, 0, 1e-3), None)[0]
    parts = [Path(spec.path).read_text().splitlines() for spec in config.datasets]
    assert [spec.tag for spec in config.datasets] == ["0", "1"]
    whole = [line for name in experiment.data.datasets for line in (tmp_path / f"data/train/{name}.jsonl").open()]
    assert sorted(line.strip() for line in whole) == sorted(parts[0] + parts[1])
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    other = material.of_cell(Cell("examples-2", 1, 0, 1e-3), None)[0]
    assert Path(other.datasets[0].path).read_text().splitlines() != parts[0]
    material.unseal()
    seen = {line for split in (TRAIN, VAL) for line in (tmp_path / f"data/{split}/number_fr.jsonl").open()}
    assert not seen & set((tmp_path / "data/test/number_fr.jsonl").open())
    assert len(set((tmp_path / "data/test/number_fr.jsonl").open())) == experiment.data.test


# ---------------------------------------------------------------- the record


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1))
def test_a_record_cut_anywhere_holds_whole_cells_and_goes_on(
    cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("record")
    with Record(folder) as record:
        for number in range(4):
            record.append(f"cell-{number}", [{"value": f"é{i}"} for i in range(number + 1)])
        raw = record.path.read_bytes()
    record.path.write_bytes(raw[: int(cut * len(raw))])
    with Record(folder) as record:
        whole = len(record.cells)
        assert record.cells == {f"cell-{number}" for number in range(whole)}
        assert len(record.rows) == whole * (whole + 1) // 2
        for number in range(whole, 4):
            record.append(f"cell-{number}", [{"value": f"é{i}"} for i in range(number + 1)])
    assert record.path.read_bytes() == raw


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Record(tmp_path), pytest.raises(ConfigError, match="another run"):
        Record(tmp_path)
    with pytest.raises(ConfigError, match="no results there"):
        read_rows(tmp_path / "nothing.jsonl")

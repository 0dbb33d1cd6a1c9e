"""A training that was stopped before its planned steps: published, gone on with, or merged at what it trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jobs
import pytest
from test_callback import sft_script
from transformers import TrainerCallback

from merit_hf.config import ConfigError, MeritError
from merit_hf.group_merge import merge_groups
from merit_hf.ledger import Budget
from merit_hf.manifest import read_manifest
from merit_hf.placement import parse_placement
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.training import train_group
from merit_hf.verification.checks import failed
from merit_hf.verification.partial import Replays
from merit_hf.verification.verify import verify_checkpoint

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def stopped(tiny_plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Group 0, stopped at step 4 of 6, with what it would go on from. Copy the folder that holds both."""
    output = tmp_path_factory.mktemp("stopped") / "0"
    return train_group(tiny_plan, 0, output, {"train.stop_at_step": 4}, progress=QUIET)


def copied(stopped: Path, folder: Path) -> Path:
    shutil.copytree(stopped.parent, folder / "groups")
    return folder / "groups" / stopped.name


def steps_of(folder: Path, plan: PartitionPlan) -> Budget:
    """The tokens of the batches that were trained, counted by transformers as it trains."""
    manifest = read_manifest(folder)
    return Budget(manifest["num_steps"], manifest["num_input_tokens"], manifest["num_loss_tokens"])


def test_it_says_what_it_is(stopped: Path, tiny_plan: PartitionPlan) -> None:
    manifest = read_manifest(stopped)
    assert (manifest["status"], manifest["num_steps"], bool(manifest["files"])) == ("stopped", 4, True)
    planned = tiny_plan.group(0)
    assert 0 < manifest["num_input_tokens"] < planned.train_input_tokens
    card = (stopped / "README.md").read_text()
    assert "stopped** at step 4 of 6" in card.replace("\n", " ")
    assert "merit merge PLAN CHECKPOINT... --output merged --allow-partial" in card
    assert not list(stopped.glob("*.pt"))


def test_it_is_refused_until_asked_for(stopped: Path, tiny_plan: PartitionPlan) -> None:
    check = failed(verify_checkpoint(tiny_plan, stopped))
    assert check is not None
    assert (check.name, check.found) == ("status", "stopped at step 4 of 6")
    assert "merit train" in check.expected
    assert "--allow-partial" in check.expected
    assert failed(verify_checkpoint(tiny_plan, stopped, allow_partial=True, progress=QUIET)) is None


def test_its_tokens_are_replayed_from_the_data(stopped: Path, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    replays = Replays(tiny_plan, QUIET)
    assert replays(0, 4) == steps_of(stopped, tiny_plan)
    whole = tiny_plan.group(0)
    assert replays(0, 6) == Budget(6, whole.train_input_tokens, whole.train_loss_tokens)
    liar = copied(stopped, tmp_path)
    manifest = read_manifest(liar)
    for changed in (
        {"num_input_tokens": manifest["num_input_tokens"] + 1}, {"num_steps": 5}, {"num_loss_tokens": 1},
    ):  # fmt: skip
        (liar / "merit.json").write_text(json.dumps({**manifest, **changed}))
        check = failed(verify_checkpoint(tiny_plan, liar, allow_partial=True, progress=QUIET))
        assert check is not None, changed
        assert check.name in ("num_input_tokens", "num_loss_tokens"), changed
    for steps in (0, 6, 7, "4", True):
        (liar / "merit.json").write_text(json.dumps({**manifest, "num_steps": steps}))
        check = failed(verify_checkpoint(tiny_plan, liar, allow_partial=True, progress=QUIET))
        assert check is not None, steps
        assert check.name in ("status", "num_steps"), steps


def test_it_goes_on_and_ends_as_if_it_had_not_been_stopped(
    stopped: Path, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    assert train_group(tiny_plan, 0, folder, {"train.stop_at_step": 3}, progress=QUIET) == folder
    assert (folder / "model.safetensors").read_bytes() == before, "there is nothing to stop any more"
    assert train_group(tiny_plan, 0, folder, progress=QUIET) == folder
    assert read_manifest(folder) == read_manifest(tiny_groups[0])
    assert (folder / "model.safetensors").read_bytes() == (tiny_groups[0] / "model.safetensors").read_bytes()
    assert not folder.with_name("0.part").exists()


def test_without_what_it_goes_on_from_it_is_kept(stopped: Path, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    folder = copied(stopped, tmp_path)
    shutil.rmtree(folder.with_name("0.part"))
    with pytest.raises(ConfigError, match=r"group 0 stopped at step 4 of 6.*--allow-partial.*or delete it"):
        train_group(tiny_plan, 0, folder, progress=QUIET)
    assert folder.exists()


def test_what_a_lost_machine_saved_is_published_without_another_step(
    stopped: Path, tiny_plan: PartitionPlan, tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    # A machine that is lost leaves its saves alone.
    shutil.rmtree(folder)
    (folder.with_name("0.part") / "STOP").touch()
    train_group(tiny_plan, 0, folder, progress=QUIET)
    manifest = read_manifest(folder)
    assert (manifest["status"], manifest["num_steps"]) == ("stopped", 4)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert {"mix.json", "mix.parquet", "trainer_state.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.pt*"))
    assert failed(verify_checkpoint(tiny_plan, folder, allow_partial=True, progress=QUIET)) is None
    assert not (folder.with_name("0.part") / "STOP").exists()


def test_a_file_and_a_clock_stop_it_too(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    folder = train_group(tiny_plan, 0, tmp_path / "0", {"train.max_hours": 1e-9}, progress=QUIET)
    assert (read_manifest(folder)["status"], read_manifest(folder)["num_steps"]) == ("stopped", 1)
    (tmp_path / "1.part").mkdir()
    run = {"group_sha256": tiny_plan.group(1).group_sha256}
    (tmp_path / "1.part" / "run.json").write_text(json.dumps(run))
    (tmp_path / "1.part" / "STOP").touch()
    folder = train_group(tiny_plan, 1, tmp_path / "1", progress=QUIET)
    assert (read_manifest(folder)["status"], read_manifest(folder)["num_steps"]) == ("stopped", 1)


def test_the_merge_weighs_it_by_the_tokens_of_its_steps(
    stopped: Path, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(
        MeritError, match=r"not finished: stopped at step 4 of 6\. Go on .*--allow-partial.*plan again"
    ):
        merge_groups(tiny_plan, [stopped, tiny_groups[1]], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    stats = merge_groups(tiny_plan, [stopped, tiny_groups[1]], tmp_path / "merged", allow_partial=True)
    tokens = [read_manifest(folder)["num_input_tokens"] for folder in (stopped, tiny_groups[1])]
    assert stats.fractions == [count / sum(tokens) for count in tokens]
    first, second = read_manifest(tmp_path / "merged")["groups"]
    assert (first["stopped_at_step"], first["planned_steps"]) == (4, 6)
    assert "stopped_at_step" not in second
    card = " ".join((tmp_path / "merged" / "README.md").read_text().split())
    assert "Group 0 was stopped at step 4 of 6 that were planned." in card
    assert "--allow-partial" in card


def test_any_script_that_ends_early_leaves_such_a_checkpoint(
    tiny_plan: PartitionPlan, stopped: Path, tmp_path: Path
) -> None:
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            control.should_training_stop = state.global_step == 4

    trainer = sft_script(tiny_plan, tmp_path, save_strategy="no")
    trainer.add_callback(Enough())
    trainer.train()
    trainer.save_model()
    assert steps_of(tmp_path, tiny_plan) == steps_of(stopped, tiny_plan)
    assert failed(verify_checkpoint(tiny_plan, tmp_path, allow_partial=True, progress=QUIET)) is None


def test_on_the_command_line(stopped: Path, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()  # as groups/* has it
    groups = [str(stopped), str(tiny_groups[1]), str(tmp_path / "jobs")]
    for options, code in (([], 1), (["--allow-partial"], 0)):
        job = jobs.Job(jobs.merit, [["verify", tiny_plan.folder, *groups, *options]], tmp_path / f"verify-{code}")
        assert job.wait() == code, job.output
    job = jobs.Job(
        jobs.merit, [["merge", tiny_plan.folder, *groups, "--output", tmp_path / "m", "--allow-partial"]],
        tmp_path / "merge",
    )  # fmt: skip
    assert job.wait() == 0, job.output


def test_a_launcher_tells_it_from_one_that_failed(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "home")}
    train = ["train", tiny_plan.folder, "--group", "all", "--output", tmp_path / "groups", "--jobs", "2"]
    job = jobs.Job(jobs.merit, [[*train, "train.stop_at_step=4"]], tmp_path / "train", home)
    assert job.wait() == 0, job.output
    told = "Stopped before its planned steps: group 0, 1. Next: "
    assert f"{told}run it again without the stop to go on, or merit merge" in " ".join(job.output.split())
    job = jobs.Job(jobs.merit, [["status", tiny_plan.folder]], tmp_path / "status", home)
    assert job.wait() == 0, job.output
    assert "stopped, step 4" in job.output
    assert f"{told}merit train" in " ".join(job.output.split())


@pytest.mark.parametrize(("name", "said"), [("wandbb", "transformers knows .*wandb"), ("codecarbon", "not installed")])
def test_where_to_report_is_no_matter_of_the_data(
    name: str, said: str, tiny_plan: PartitionPlan, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"^sft\.report_to={name}: .*{said}"):
        train_group(tiny_plan, 0, tmp_path / "0", {"report_to": name}, progress=QUIET)


def test_the_keys_are_checked() -> None:
    assert parse_placement(["train.max_hours=2.5", "sft.save_steps=3"]) == {"train.max_hours": 2.5, "save_steps": 3}
    for text, message in (
        ("train.stop_at_steps=3", r"unknown key `train\.stop_at_steps`.*`stop_at_step`"),
        ("train.stop_at_step=0", r"train\.stop_at_step=0: .*greater"),
        ("train.eval_datasets=mine", r"train\.eval_datasets='mine'"),
        ("train.max_hours", r"expected sft\.KEY=VALUE.* train\.KEY=VALUE"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_placement([text])


def test_the_steps_of_several_processes_end_together(make_plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    from test_equal_budgets import launch_two

    plan = make_plan()
    launch_two(plan, 0, tmp_path / "0", {"train.stop_at_step": 3})
    assert read_manifest(tmp_path / "0")["num_steps"] == 3
    assert failed(verify_checkpoint(plan, tmp_path / "0", allow_partial=True, progress=QUIET)) is None

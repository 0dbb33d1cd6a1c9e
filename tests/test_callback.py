"""MeritCallback in anybody's script: a plain SFTTrainer's and a plain transformers Trainer's."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from tiny import make_base
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from merit_hf import MeritCallback, PartitionPlan
from merit_hf.config import ConfigError, MeritError
from merit_hf.group_merge import merge_groups
from merit_hf.manifest import read_manifest
from merit_hf.verification.checks import failed
from merit_hf.verification.verify import verify_checkpoint

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1,
    "save_strategy": "steps", "save_steps": 2, "bf16": False, "use_cpu": True, "report_to": "none",
}  # fmt: skip


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def raw_rows(plan: PartitionPlan, group: int) -> datasets.Dataset:
    files = [plan.local["datasets"][name]["path"] for name in plan.group(group).datasets]
    return datasets.concatenate_datasets([datasets.load_dataset("json", data_files=f, split="train") for f in files])


def sft_script(plan: PartitionPlan, output: Path, rows: datasets.Dataset | None = None, **settings: Any) -> SFTTrainer:
    """The README's script, up to the trainer."""
    model, tokenizer = load(plan.base_folder())
    args = SFTConfig(output_dir=str(output), **{**SETTINGS, "max_length": 64, **settings})
    rows = raw_rows(plan, 0) if rows is None else rows
    return SFTTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[MeritCallback(plan, group=0)]
    )


def tokenise(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * len(prompt) + ids[len(prompt) :],
    }


def plain_script(plan: PartitionPlan, output: Path, rows: datasets.Dataset | None = None, **settings: Any) -> Trainer:
    """A script of transformers' own Trainer, which tokenises by itself."""
    model, tokenizer = load(plan.base_folder())
    raw = raw_rows(plan, 0) if rows is None else rows
    data = raw.map(tokenise, fn_kwargs={"tokenizer": tokenizer}, remove_columns=raw.column_names)
    args = TrainingArguments(output_dir=str(output), **{**SETTINGS, **settings})
    return Trainer(
        model, args=args, train_dataset=data, processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[MeritCallback(plan, group=0)],
    )  # fmt: skip


SCRIPTS: dict[str, Callable[..., Trainer]] = {"SFTTrainer": sft_script, "Trainer": plain_script}


@pytest.fixture(scope="module", params=SCRIPTS)
def trained(
    request: pytest.FixtureRequest, tiny_plan: PartitionPlan, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of a finished script."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    trainer = SCRIPTS[request.param](tiny_plan, output)
    trainer.train()
    trainer.save_model()
    return output


def test_the_saved_model_is_the_group(trained: Path, tiny_plan: PartitionPlan, tiny_groups: list[Path]) -> None:
    assert [check for check in verify_checkpoint(tiny_plan, trained) if not check.ok] == []
    ours = load_file(tiny_groups[0] / "model.safetensors")
    theirs = load_file(trained / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-4, msg=name)
    manifest, recipe = read_manifest(trained), read_manifest(tiny_groups[0])
    assert manifest["sft"] == recipe["sft"] == tiny_plan.group_sft(0)
    for field in ("group_sha256", "num_input_tokens", "num_loss_tokens", "num_steps", "datasets", "base"):
        assert manifest[field] == recipe[field], field


def test_every_save_carries_manifest_and_card(trained: Path, tiny_plan: PartitionPlan) -> None:
    planned, before = tiny_plan.group(0), 0
    for step in (2, 4, 6):
        folder = trained / f"checkpoint-{step}"
        manifest = read_manifest(folder)
        assert (manifest["status"], manifest["num_steps"]) == ("training", step)
        assert manifest["group_sha256"] == planned.group_sha256
        assert before < manifest["num_input_tokens"] <= planned.train_input_tokens
        before = manifest["num_input_tokens"]
        assert "group 0" in (folder / "README.md").read_text().lower()
        check = failed(verify_checkpoint(tiny_plan, folder))
        assert check is not None
        assert check.name == "status"
    assert before == planned.train_input_tokens
    card = (trained / "README.md").read_text()
    assert "group 0" in card.lower()
    assert all(name in card for name in planned.datasets)
    assert str(tiny_plan.base_folder()) not in card


def test_a_group_from_a_foreign_script_merges(
    trained: Path, tiny_plan: PartitionPlan, tiny_groups: list[Path], tmp_path: Path
) -> None:
    merge_groups(tiny_plan, [trained, tiny_groups[1]], tmp_path / "merged")
    assert read_manifest(tmp_path / "merged")["kind"] == "merged"


# what is changed in the script, and what the refusal names
SETTINGS_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": (
        {"learning_rate": 2e-3},
        r"group 0: learning_rate is 0\.002, planned 0\.001\. Set learning_rate",
    ),
    "epochs": ({"num_train_epochs": 2}, r"num_train_epochs is 2.*planned 1"),
    "seed": ({"seed": 7}, r"data_seed is 7, planned 42"),
    "schedule": ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type is 'cosine', planned 'linear'"),
    "optimizer": ({"optim": "sgd"}, r"optim is 'sgd', planned"),
    "weight decay": ({"weight_decay": 0.1}, r"weight_decay is 0\.1, planned 0\.0"),
    "steps": ({"max_steps": 3}, r"max_steps is 3, planned -1"),
    "batch": (
        {"per_device_train_batch_size": 8},
        r"effective_batch_size is 8, planned 4\. Make per_device_train_batch_size × gradient_accumulation_steps",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(("settings", "message"), SETTINGS_REFUSED.values(), ids=SETTINGS_REFUSED)
def test_other_settings_are_refused_by_name(
    script: Callable[..., Trainer], settings: dict[str, Any], message: str, tiny_plan: PartitionPlan, tmp_path: Path
) -> None:
    trainer = script(tiny_plan, tmp_path, **settings)
    with pytest.raises(MeritError, match=message):
        trainer.train()
    assert not list(tmp_path.glob("**/merit.json"))


def test_other_sft_settings_are_refused_by_name(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    with pytest.raises(MeritError, match=r"packing is True, planned False"):
        sft_script(tiny_plan, tmp_path, packing=True).train()
    with pytest.raises(MeritError, match=r"max_length is 32, planned 64"):
        sft_script(tiny_plan, tmp_path, max_length=32).train()


def test_the_same_training_in_other_batches_is_accepted(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    trainer = sft_script(tiny_plan, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    trainer.save_model()
    assert failed(verify_checkpoint(tiny_plan, tmp_path)) is None


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_other_data_are_refused(script: Callable[..., Trainer], tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    names = ", ".join(tiny_plan.group(0).datasets)
    message = rf"group 0: the training data are not the planned ones.* of {names}\."
    with pytest.raises(MeritError, match=message):
        script(tiny_plan, tmp_path, raw_rows(tiny_plan, 1)).train()
    rows = raw_rows(tiny_plan, 0)
    with pytest.raises(MeritError, match=r"21 rows with"):
        script(tiny_plan, tmp_path, rows.select(range(21))).train()
    # As many tokens as planned, one of them another one.
    answers = [dict(row) for row in rows]
    answers[0]["completion"] = [{"role": "assistant", "content": row_content(rows[0])[::-1]}]
    with pytest.raises(MeritError, match=message):
        script(tiny_plan, tmp_path, datasets.Dataset.from_list(answers)).train()


def row_content(row: dict[str, Any]) -> str:
    return str(row["completion"][0]["content"])


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_order_of_the_rows_is_free(
    script: Callable[..., Trainer], tiny_plan: PartitionPlan, tmp_path: Path
) -> None:
    rows = raw_rows(tiny_plan, 0)
    trainer = script(tiny_plan, tmp_path, rows.select(range(len(rows) - 1, -1, -1)), save_strategy="no")
    trainer.train()
    trainer.save_model()
    assert failed(verify_checkpoint(tiny_plan, tmp_path)) is None


def test_labels_are_part_of_the_data(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    """Training on the prompts as well has the same tokens and another loss."""
    trainer = plain_script(tiny_plan, tmp_path)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises(MeritError, match="the training data are not the planned ones"):
        trainer.train()


def test_data_that_cannot_be_checked_are_refused(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    trainer = plain_script(tiny_plan, tmp_path)
    trainer.train_dataset = list(trainer.train_dataset)
    with pytest.raises(MeritError, match=r"not a tokenised `datasets\.Dataset`.*Do not stream"):
        trainer.train()


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_another_base_is_refused(script: Callable[..., Trainer], tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    elsewhere = dataclasses.replace(tiny_plan, local={**tiny_plan.local, "base": str(other)})
    with pytest.raises(
        MeritError, match=r"group 0: the model in .*other has weights \w+, planned \w+\. Every group starts"
    ):
        script(elsewhere, tmp_path / "run").train()


def test_a_copy_of_the_base_is_the_base(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    """What counts are the weights, not where they lie or how they are sharded."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_plan.base_folder()), load(tiny_plan.base_folder())[1]
    base.save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 1
    elsewhere = dataclasses.replace(tiny_plan, local={**tiny_plan.local, "base": str(tmp_path / "copy")})
    trainer = sft_script(elsewhere, tmp_path / "run", save_strategy="no")
    trainer.train()
    trainer.save_model()
    assert failed(verify_checkpoint(tiny_plan, tmp_path / "run")) is None


def test_a_model_from_nowhere_is_refused(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    base, tokenizer = load(tiny_plan.base_folder())
    args = SFTConfig(output_dir=str(tmp_path), **{**SETTINGS, "max_length": 64})
    base.config._name_or_path = ""
    trainer = SFTTrainer(
        LlamaForCausalLM(base.config), args=args, train_dataset=raw_rows(tiny_plan, 0), processing_class=tokenizer,
        callbacks=[MeritCallback(tiny_plan, 0)],
    )  # fmt: skip
    with pytest.raises(MeritError, match=r"the model comes from an unknown place.*Load the plan's base"):
        trainer.train()


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_another_template_is_refused(script: Callable[..., Trainer], tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    trainer = script(tiny_plan, tmp_path)
    trainer.processing_class.chat_template = "{{ messages }}"
    with pytest.raises(
        MeritError, match=r"group 0: the chat template has sha256 \w+, planned \w+\. Use the base's own"
    ):
        trainer.train()


def test_no_such_group(tiny_plan: PartitionPlan) -> None:
    with pytest.raises(ConfigError, match="group 2: the plan has groups 0 to 1"):
        MeritCallback(tiny_plan, 2)


def test_an_unfinished_training_never_claims_to_be_complete(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    trainer = sft_script(tiny_plan, tmp_path)
    trainer.save_model(str(tmp_path / "early"))
    assert read_manifest(tmp_path / "early")["status"] == "training"
    assert read_manifest(tmp_path / "early")["num_input_tokens"] == 0


def test_evaluation_is_not_counted(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_plan.base_folder())
    args = SFTConfig(
        output_dir=str(tmp_path), **{**SETTINGS, "max_length": 64, "eval_strategy": "steps", "eval_steps": 2}
    )
    trainer = SFTTrainer(
        model, args=args, train_dataset=raw_rows(tiny_plan, 0), eval_dataset=raw_rows(tiny_plan, 1),
        processing_class=tokenizer, callbacks=[MeritCallback(tiny_plan, 0)],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    assert failed(verify_checkpoint(tiny_plan, tmp_path)) is None


def test_the_ledger_survives_a_resume_in_the_script(tiny_plan: PartitionPlan, trained: Path, tmp_path: Path) -> None:
    trainer = sft_script(tiny_plan, tmp_path)
    trainer.train(resume_from_checkpoint=str(trained / "checkpoint-4"))
    trainer.save_model()
    assert failed(verify_checkpoint(tiny_plan, tmp_path)) is None
    # Nothing left to train: the last checkpoint is the result, its loss and its tokens too.
    again = sft_script(tiny_plan, tmp_path / "again")
    again.train(resume_from_checkpoint=str(trained / "checkpoint-6"))
    again.save_model()
    assert failed(verify_checkpoint(tiny_plan, tmp_path / "again")) is None
    # Of a plain Trainer, whose loss is rounded in another order than TRL's.
    losses = [read_manifest(folder)["final_loss"] for folder in (tmp_path / "again", tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_resume_without_a_ledger_is_refused(tiny_plan: PartitionPlan, trained: Path, tmp_path: Path) -> None:
    import shutil

    checkpoint = Path(shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"].pop("MeritCallback")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(MeritError, match=r"checkpoint to resume from \(step 4\) was not trained under this plan"):
        sft_script(tiny_plan, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))


def test_one_model_object_does_not_train_two_groups(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    """The second group would start from the first one's weights."""
    trainer = sft_script(tiny_plan, tmp_path, save_strategy="no")
    trainer.train()
    tokenizer = trainer.processing_class
    again = SFTTrainer(
        trainer.model, args=trainer.args, train_dataset=raw_rows(tiny_plan, 1), processing_class=tokenizer,
        callbacks=[MeritCallback(tiny_plan, 1)],
    )  # fmt: skip
    with pytest.raises(MeritError, match=r"group 1: this model has been trained already.*Load the base anew"):
        again.train()


def test_the_script_in_the_readme(make_plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    plan = make_plan("plan.split=random", "sft.use_cpu=true", "sft.bf16=false", "sft.report_to=none")
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "MeritCallback(" in block]
    assert len(script.strip().splitlines()) <= 12
    files = [plan.local["datasets"][name]["path"] for name in plan.group(0).datasets]
    for pattern, here in (
        (r'"runs/plan"', plan.folder), (r"\[\"data/.*?\]", files), (r'"runs/groups/0"', tmp_path / "0"),
        (r'SFTTrainer\("[^"]*"', plan.base_folder()),
    ):  # fmt: skip
        text = repr(here if isinstance(here, list) else str(here))
        script, count = re.subn(pattern, ("SFTTrainer(" if "Trainer" in pattern else "") + text, script)
        assert count == 1, pattern
    exec(compile(script, "README.md", "exec"), {})
    assert failed(verify_checkpoint(plan, tmp_path / "0")) is None


PUSH = """
import sys
from pathlib import Path
from merit_hf import PartitionPlan
from test_callback import SCRIPTS
script, plan, output = sys.argv[1:]
hub = {"push_to_hub": True, "hub_model_id": "alice/group-0", "hub_always_push": True}
trainer = SCRIPTS[script](PartitionPlan.from_pretrained(plan), Path(output), **hub)
trainer.train()
trainer.push_to_hub()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_push_carries_manifest_and_card(script: str, tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    with HubServer() as hub:
        done = hub.run(PUSH, script, str(tiny_plan.folder), str(tmp_path / "run"), PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        api = hub.api("alice")
        pushes = 0
        for commit in api.list_repo_commits("alice/group-0"):
            files = api.list_repo_files("alice/group-0", revision=commit.commit_id)
            if "model.safetensors" in files:
                assert {"merit.json", "README.md"} <= set(files), commit.title
                pushes += 1
        assert pushes >= 2
        folder = Path(api.snapshot_download("alice/group-0", cache_dir=tmp_path / "cache"))
        assert failed(verify_checkpoint(tiny_plan, folder)) is None
        assert "group 0" in (folder / "README.md").read_text().lower()


def test_the_callback_needs_a_trainer(tiny_plan: PartitionPlan, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(MeritError, match="callback of a transformers Trainer"):
        MeritCallback(tiny_plan, 0).on_init_end(args, None, None)  # type: ignore[arg-type]

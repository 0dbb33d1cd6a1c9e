"""A group's training is plain TRL's: a script without any of our code, on the same rows, logs the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import make_base, task_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from merit_hf.config import MeritConfig
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.training import train_group

QUIET = Progress(quiet=True)
TASKS = ("copy", "reverse")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
SFT = {
    "learning_rate": 5e-3, "num_train_epochs": 2, "per_device_train_batch_size": 5, "max_length": 64,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0.1,
    "max_grad_norm": 0.5, "weight_decay": 0.01,
}  # fmt: skip
# what the rows are, what is trained, and with which further settings
CASES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "text": ("text", None, {}),
    "prompt-completion": ("prompt-completion", None, {}),
    "messages": ("messages", None, {"gradient_accumulation_steps": 2}),
    "LoRA with dropout": ("prompt-completion", LORA, {}),
    "packing": ("text", None, {"packing": True, "max_length": 48, "per_device_train_batch_size": 2}),
}


def shaped(row: dict[str, str], form: str) -> dict[str, Any]:
    if form == "text":
        return {"text": f"{row['prompt']} = {row['completion']}"}
    if form == "messages":
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}
    return row


def plain_trl(folder: Path, sft: dict[str, Any], peft: dict[str, Any] | None) -> SFTTrainer:
    """What anybody would write with TRL alone; returns the trainer after training."""
    rows = datasets.concatenate_datasets(
        [datasets.load_dataset("json", data_files=str(folder / f"{task}.jsonl"), split="train") for task in TASKS]
    )
    args = SFTConfig(output_dir=str(folder / "plain"), use_cpu=True, bf16=False, report_to="none", **sft)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), args=args, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **peft) if peft else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(("form", "peft", "changed"), CASES.values(), ids=CASES)
def test_the_losses_are_those_of_plain_trl(
    form: str, peft: dict[str, Any] | None, changed: dict[str, Any], tmp_path: Path
) -> None:
    make_base(tmp_path / "base")
    sft = {**SFT, **changed}
    for task in TASKS:
        write_jsonl(tmp_path / f"{task}.jsonl", [shaped(row, form) for row in task_rows(task, 12)])
    content = {
        "base": {"model_name_or_path": "base"},
        "datasets": [{"name": task, "path": f"{task}.jsonl", "eval_fraction": 0.0} for task in TASKS],
        "plan": {"split": "joint"},
        "sft": sft,
        **({"peft": peft} if peft else {}),
    }
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(content))
    plan = MeritPlanner(MeritConfig.from_yaml(tmp_path / "mixture.yaml"), QUIET).plan(tmp_path / "plan")
    ours = train_group(plan, 0, tmp_path / "0", progress=QUIET)

    trainer = plain_trl(tmp_path, sft, peft)
    theirs = trainer.state.log_history
    state = json.loads((ours / "trainer_state.json").read_text())
    assert state["global_step"] == trainer.state.global_step == plan.group(0).num_steps > 3
    for key in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy"):
        found = [[entry[key] for entry in history if key in entry] for history in (state["log_history"], theirs)]
        assert len(found[0]) == trainer.state.global_step, key
        assert found[0] == found[1], key
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    trained, plain = load_file(ours / name), load_file(tmp_path / "plain" / name)
    assert trained.keys() == plain.keys()
    assert all(torch.equal(trained[key], plain[key]) for key in trained)

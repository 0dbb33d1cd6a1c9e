"""A tiny Llama with its own tokenizer and chat template, and mixtures of synthetic tasks: real files, no network."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "red", "blue", "green", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "cat", "dog",
    "bird", "fish", "sun", "moon", "star", "tree",
]  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def make_base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    """A tiny base checkpoint of a tied Llama, as on the Hub: bfloat16 safetensors with tokenizer and side files."""
    tokenizer = make_tokenizer()
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **config})).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task_rows(task: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt and completion strings of one of a few synthetic tasks: copy, reverse, repeat, count, first, upper."""
    rng = random.Random(f"{task}-{seed}")
    rows = []
    for _ in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 5))]
        answer = {
            "copy": " ".join(words), "reverse": " ".join(reversed(words)), "repeat": " ".join(words * 2),
            "count": str(len(words)), "first": words[0], "upper": " ".join(words).upper(),
        }[task]  # fmt: skip
        rows.append({"prompt": f"{task}: {' '.join(words)}", "completion": answer})
    return rows


def as_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_mixture(
    folder: Path, tasks: tuple[str, ...] = ("copy", "reverse", "count", "first"), count: int = 24, **plan: object
) -> Path:
    """A base, conversational train and eval files a task, and a CONFIG over them; returns CONFIG's path."""
    import yaml

    make_base(folder / "base")
    entries = []
    for task in tasks:
        write_jsonl(folder / f"data/{task}.jsonl", [as_chat(row) for row in task_rows(task, count)])
        write_jsonl(folder / f"data/{task}_eval.jsonl", [as_chat(row) for row in task_rows(task, 8, seed=1)])
        entries.append(
            {"name": task, "path": f"data/{task}.jsonl", "eval_path": f"data/{task}_eval.jsonl", "tag": task[0]}
        )
    config = {
        "base": {"model_name_or_path": "base"},
        "datasets": entries,
        "plan": {"num_groups": 2, "num_samples": 8, "sketch_dim": 4096, **plan},
        "sft": {
            "learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": 64,
            "gradient_checkpointing": False, "logging_steps": 1, "save_steps": 2,
        },
    }  # fmt: skip
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def make_adapter(base: Path, folder: Path, seed: int, scale: float = 1.0, **lora: object) -> Path:
    """A LoRA adapter on `base` whose A and B are both drawn from `seed`, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **lora)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder

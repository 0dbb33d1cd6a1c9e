"""A small Llama with a tokenizer of its own, warmed up on tasks and source code: a base that has learnt something.

    cd benchmarks/controlled
    python warmup.py tiny.yaml cause.yaml --output ../../runs/controlled/tiny

makes OUTPUT/base by the first YAML's recipe. It can be killed at any time; the same command goes on. What no arm may
have seen (the validation and test rows of all tasks of all the YAMLs) is not in the corpus, and is named in
OUTPUT/base/held_out.json; the source files are those of Python's packages, since the tasks about code are made of its
single modules.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from experiment import Warmup, read_experiment
from tasks import make_examples

from merit_hf.config import ConfigError
from merit_hf.entry import exit_on_error
from merit_hf.plan_identity import canonical_sha256
from merit_hf.progress import Progress
from merit_hf.quiet import quiet_libraries
from merit_hf.training import last_checkpoint

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHUNK = 1200  # characters of a piece of source text
CONTEXT = 1024
HELD_OUT = "held_out.json"


def documents(warmup: Warmup, excluded: Collection[str]) -> list[str]:
    """The corpus in a seeded order: chats of the tasks, and pieces of source files."""
    found = []
    for name in warmup.tasks:
        pairs = make_examples(name, warmup.examples, warmup.seed + 1)
        found += [
            f"<|user|>{prompt}<|end|><|assistant|>{answer}<|end|>"
            for prompt, answer in pairs
            if prompt not in excluded
        ]
    found += [f"{piece}<|end|>" for piece in source_pieces(int(warmup.text_megabytes * 1e6))]
    Random(warmup.seed).shuffle(found)
    return found


def source_pieces(limit: int) -> Iterator[str]:
    """Pieces of the standard library's packages, `limit` characters in all."""
    taken = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*/**/*.py")):
        if {"site-packages", "dist-packages", "pydoc_data", "test", "tests"} & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), CHUNK):
            if taken >= limit:
                return
            yield text[start : start + CHUNK]
            taken += CHUNK


def make_tokenizer(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE,
        model_max_length=CONTEXT,
    )  # fmt: skip


def make_model(warmup: Warmup, tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(warmup.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=warmup.hidden_size, intermediate_size=warmup.intermediate_size,
            num_hidden_layers=warmup.num_layers, num_attention_heads=warmup.num_heads,
            num_key_value_heads=warmup.num_heads, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


def build_base(warmup: Warmup, folder: Path, excluded: Collection[str], progress: Progress) -> Path:
    """Tokenizer, corpus and training, each kept in `folder`.part as soon as it is there; `folder` appears at the end.

    Args:
        excluded: prompts that the corpus must not hold.
    """
    if folder.exists():
        return folder
    import datasets
    import torch
    from transformers import AutoTokenizer, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    part = folder.with_name(f"{folder.name}.part")
    _same_recipe(part, {**warmup.model_dump(), "held_out": canonical_sha256(sorted(excluded))})
    if not (part / "blocks.npy").exists():
        texts = documents(warmup, excluded)
        tokenizer = make_tokenizer(texts[: max(1000, len(texts) // 10)], warmup.vocab_size)
        tokenizer.save_pretrained(part / "tokenizer")
        ids = [np.array(row, dtype=np.uint16) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        stream = np.concatenate(ids)
        blocks = stream[: len(stream) // warmup.length * warmup.length].reshape(-1, warmup.length)
        np.save(part / "blocks.part.npy", blocks)
        os.replace(part / "blocks.part.npy", part / "blocks.npy")
    tokenizer = AutoTokenizer.from_pretrained(part / "tokenizer")
    blocks = np.load(part / "blocks.npy")
    steps = -(-warmup.tokens // (warmup.batch_size * warmup.length))
    passes = steps * warmup.batch_size / len(blocks)
    progress.note(
        f"Warm-up: {steps:,} steps of {warmup.batch_size} × {warmup.length} tokens, {warmup.tokens:,} in all: "
        f"{passes:.1f} passes over {blocks.size:,} tokens."
    )
    rows = datasets.Dataset.from_dict({"input_ids": blocks.astype(np.int64)})
    rows = rows.with_format("torch")
    args = TrainingArguments(
        output_dir=str(part / "run"), max_steps=steps, per_device_train_batch_size=warmup.micro_batch_size,
        gradient_accumulation_steps=warmup.batch_size // warmup.micro_batch_size, bf16=warmup.bf16,
        torch_compile=warmup.compile,
        learning_rate=warmup.learning_rate, lr_scheduler_type="cosine", warmup_steps=max(1, steps // 50),
        weight_decay=0.1, adam_beta2=0.95, seed=warmup.seed, data_seed=warmup.seed, save_steps=warmup.save_steps,
        save_total_limit=2, logging_steps=20, report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    model = make_model(warmup, tokenizer)
    with progress.stage("Warm-up", total=steps, unit="steps") as stage:
        trainer = Trainer(model, args, train_dataset=rows, data_collator=_collate, callbacks=[_shown(stage, warmup)])
        trainer.remove_callback(PrinterCallback)
        checkpoint = last_checkpoint(part / "run")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.to("cpu").save_pretrained(part / "final")
    tokenizer.save_pretrained(part / "final")
    (part / "final" / HELD_OUT).write_text(json.dumps(sorted(excluded), ensure_ascii=False), encoding="utf-8")
    os.rename(part / "final", folder)
    shutil.rmtree(part)
    return folder


def check_held_out(folder: Path, held_out: Collection[str]) -> None:
    """That a base which was made here has not seen what is held out now.

    Raises:
        ConfigError: it may have.
    """
    path = folder / HELD_OUT
    if not path.is_file():
        return
    seen = {*held_out} - {*json.loads(path.read_text(encoding="utf-8"))}
    if seen:
        raise ConfigError(
            f"{folder} may have seen {len(seen)} of the {len({*held_out})} prompts that are held out here, such as "
            f"{min(seen)[:60]!r}. Make it again, and name this experiment's YAML to warmup.py as well."
        )


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _shown(stage: Any, warmup: Warmup) -> Any:
    """A callback that shows steps, loss and tokens a second."""
    from transformers import TrainerCallback

    class Shown(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                tokens = (state.global_step - self.first) * warmup.batch_size * warmup.length
                rate = tokens / (time.monotonic() - self.start)
                left = (state.max_steps - state.global_step) * warmup.batch_size * warmup.length / rate / 3600
                stage.update(state.global_step, state.max_steps)
                loss = float(logs["loss"])
                stage.item(f"step {state.global_step}, loss {loss:.3f}, {rate:,.0f} tokens/s, {left:.2f} h left")

    return Shown()


def _same_recipe(part: Path, content: dict[str, Any]) -> None:
    """Work that another recipe left is not gone on with."""
    part.mkdir(parents=True, exist_ok=True)
    recipe, wanted = part / "recipe.json", json.dumps(content)
    if recipe.exists() and recipe.read_text(encoding="utf-8") != wanted:
        raise ConfigError(
            f"{part} was begun with other settings, or held out other prompts. Delete it, or give another --output."
        )
    recipe.write_text(wanted, encoding="utf-8")


def main() -> None:
    from material import Material

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="It can be killed, and goes on.")
    parser.add_argument("experiment", type=Path, help="the YAML of the experiment whose base this is")
    parser.add_argument("others", type=Path, nargs="*", help="YAMLs of experiments that start from the same base")
    parser.add_argument("--output", type=Path, required=True, help="the experiment's folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args()
    quiet_libraries()
    with exit_on_error(options.debug):
        experiments = read_experiment(options.experiment)
        warmup, folder = next(iter(experiments.values())).base.warmup, options.output / "base"
        if warmup is None:
            raise ConfigError(f"{options.experiment}: base has no `warmup`, so there is nothing to make.")
        every = [e for path in [options.experiment, *options.others] for e in read_experiment(path).values()]
        excluded = set().union(*(Material(e, options.output, folder).excluded() for e in every))
        base = build_base(warmup, folder, excluded, Progress())
        sys.stderr.write(f"The base is in {base}.\n")


if __name__ == "__main__":
    main()

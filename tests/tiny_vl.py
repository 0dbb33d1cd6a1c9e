"""A tiny LLaVA with a real processor, and tasks that only an image decides: real files, no network."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import torch
import yaml
from PIL import Image
from tiny import WORDS, as_chat, task_rows, write_jsonl
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

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
SIZE, PATCH = 16, 8
# Of an image: its patches, without the class token.
TOKENS_AN_IMAGE = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join([*WORDS, *COLOURS])] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def make_vl_base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny base checkpoint of a LLaVA, as on the Hub: bfloat16 safetensors with its processor."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    ).to(dtype)  # fmt: skip
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(colour: str, rng: random.Random) -> Image.Image:
    """A square of one colour, a little off and noisy, so that no two pictures are the same."""
    image = Image.new("RGB", (SIZE, SIZE))
    off = rng.randint(-15, 15)
    image.putdata([tuple(max(0, min(255, c + off + rng.randint(-9, 9))) for c in COLOURS[colour])
                   for _ in range(SIZE * SIZE)])  # fmt: skip
    return image


def png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def colour_rows(count: int, folder: Path, seed: int = 0, images: int = 1, question: str = "colour?") -> list[dict]:
    """Chat rows that name PNG files in `folder` by paths relative to its parent; the answer is in the images alone."""
    rng = random.Random(f"{question}-{seed}-{images}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        names = [list(COLOURS)[(number + i * rng.randint(0, 3)) % len(COLOURS)] for i in range(images)]
        files = [folder / f"{seed}-{images}-{number}-{i}.png" for i in range(images)]
        for name, file in zip(names, files, strict=True):
            picture(name, rng).save(file)
        answer = " ".join(names) if question == "colour?" else f"it is {' and '.join(names)}"
        row = as_chat({"prompt": question, "completion": answer})
        rows.append({**row, "images": [str(file.relative_to(folder.parent)) for file in files]})
    return rows


def make_vl_mixture(folder: Path, count: int = 24, epochs: float = 1, **sections: dict) -> Path:
    """A base and a CONFIG over three tasks with images, one with two a row, and one of text; returns CONFIG's path."""
    make_vl_base(folder / "base")
    data, entries = folder / "data", []
    made = {
        "colour": lambda n, seed: colour_rows(n, data / "colour", seed),
        "sentence": lambda n, seed: colour_rows(n, data / "sentence", seed, question="what is it?"),
        "two": lambda n, seed: colour_rows(n, data / "two", seed, images=2),
        "copy": lambda n, seed: [as_chat(row) for row in task_rows("copy", n, seed)],
    }
    for name, make in made.items():
        write_jsonl(data / f"{name}.jsonl", make(count, 0))
        write_jsonl(data / f"{name}_eval.jsonl", make(8, 1))
        entries.append({"name": name, "path": f"data/{name}.jsonl", "eval_path": f"data/{name}_eval.jsonl"})
    config = {
        "base": {"model_name_or_path": "base", **sections.get("base", {})},
        "datasets": entries,
        "plan": {"num_groups": 2, "num_samples": 8, "sketch_dim": 4096, **sections.get("plan", {})},
        "sft": {
            "learning_rate": 1e-3, "num_train_epochs": epochs, "per_device_train_batch_size": 4, "max_length": None,
            "gradient_checkpointing": False, "logging_steps": 1, "save_steps": 2, **sections.get("sft", {}),
        },
    }  # fmt: skip
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path

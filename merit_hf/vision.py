"""Bases that read images: their class and processor, their rows as TRL's vision collator takes them, frozen modules.

TRL tokenises rows with images only when it collates a batch, so they stay beside the tokens here: `input_ids` and
`labels` are what its collator makes of the row alone, with every image expanded to its placeholder tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from trl import maybe_convert_to_chatml

from merit_hf.checkpoint import read_model_config, read_tensor_index
from merit_hf.config import ConfigError, MeritError
from merit_hf.fields import nearest
from merit_hf.images import IMAGES, undecoded

_TEXT = datasets.Value("string")
# One form for all datasets of a mixture, so that the rows of a group can be put together.
_MESSAGES = datasets.List({"role": _TEXT, "content": datasets.List({"type": _TEXT, "text": _TEXT})})


def takes_images(folder: str | Path) -> bool:
    """Whether the checkpoint in `folder` is a model that reads images and text and writes text."""
    config = read_model_config(Path(folder))
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(config.get("model_type")))
    return name in (config.get("architectures") or [])


def auto_class(folder: str | Path) -> Any:
    """The Auto class that loads the checkpoint in `folder` for SFT."""
    return AutoModelForImageTextToText if takes_images(folder) else AutoModelForCausalLM


def load_processor(folder: str | Path) -> Any:
    """The base's processor: its tokenizer and image processor in one, which TRL takes in a tokenizer's place.

    Raises:
        MeritError: there is none that reads images.
    """
    try:
        processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())
        raise MeritError(f"{folder}: no processor can be loaded from the base: {said}") from error
    if not is_processor(processor) or getattr(processor, "image_processor", None) is None:
        raise MeritError(
            f"{folder}: the base has no processor for images. Give a base with one, or data without images."
        )
    if processor.chat_template is None:
        # Where a repo keeps it with the tokenizer, the processor alone would have none.
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def is_processor(processing: Any) -> bool:
    """Whether what stands in the tokenizer's place is a processor, and the rows therefore hold images."""
    return isinstance(processing, ProcessorMixin)


def text_tokenizer(processing: Any) -> Any:
    """The tokenizer in a processor, or the tokenizer itself."""
    return processing.tokenizer if is_processor(processing) else processing


def freeze_modules(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Take the modules at `prefixes` (names in the model, such as `model.vision_tower`) out of training.

    Raises:
        ConfigError: a prefix names no module with parameters, or nothing would be left to train.
    """
    for prefix in prefixes:
        found = [p for name, p in model.named_parameters() if is_under(name, prefix)]
        if not found:
            depth = prefix.count(".") + 1
            known = sorted({".".join(name.split(".")[:-1][:depth]) for name, _ in model.named_parameters()})
            raise ConfigError(f"base.freeze: the model has no module `{prefix}`. {nearest(prefix, known)}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"base.freeze={list(prefixes)}: nothing would be left to train. Name fewer modules.")


def frozen_tensors(folder: Path, prefixes: Sequence[str]) -> set[str]:
    """Names, in the files of the checkpoint in `folder`, of the tensors that freezing `prefixes` leaves as they are.

    transformers loads some architectures under other names than they are saved under.
    """
    model = auto_class(folder).from_pretrained(str(folder), device_map="meta", trust_remote_code=False)
    frozen = [name for name, _ in model.named_parameters() if any(is_under(name, prefix) for prefix in prefixes)]
    names = saved_names(model)
    return {names[name] for name in frozen}


def image_tensors(folder: Path) -> set[str]:
    """Names, in the files of the checkpoint in `folder`, of the tensors that are not the language model's."""
    model = auto_class(folder).from_pretrained(str(folder), device_map="meta", trust_remote_code=False)
    parts = [model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()]
    text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    names = saved_names(model)
    return {names[name] for name, parameter in model.named_parameters() if id(parameter) not in text}


def saved_names(model: Any) -> dict[str, str]:
    """{name in the model: name in a checkpoint's files} of its tensors; the same where saving rearranges them."""
    held = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(held)).items()}
    return {name: saved.get(id(tensor), name) for name, tensor in held.items()}


def is_still_the_base(model: nn.Module, base: Callable[[], Path]) -> bool:
    """Whether every trained tensor that transformers renames while loading is, number by number, the base's.

    Args:
        base: where the base lies; asked only where tensors are renamed.
    """
    names = saved_names(model)
    trained = {names[name]: p for name, p in model.named_parameters() if p.requires_grad and names[name] != name}
    if not trained:
        return False
    folder = base()
    index = read_tensor_index(folder)
    for name, tensor in trained.items():
        if name in index:
            with safe_open(str(folder / index[name].file), framework="pt") as file:
                if not torch.equal(file.get_tensor(name).to(tensor.dtype), tensor.detach().cpu()):
                    return False
    return True


def names_of_trained(model: Any) -> set[str]:
    """Parameters that a fresh model of this class and config would train; built without weights."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    return {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}


def is_under(name: str, prefix: str) -> bool:
    """Whether parameter `name` lies in the module `prefix`, or is it."""
    return f"{name}.".startswith(f"{prefix}.")


def vision_rows(rows: datasets.Dataset, processor: Any) -> datasets.Dataset:
    """Rows as read, in the form of TRL's vision collator: messages of content blocks, and `images`, maybe none.

    Images that no block stands for are put before the text of the first user message, as TRL does.

    Raises:
        ConfigError: plain text instead of messages, content of another kind, or an image token written in a text.
    """
    names = rows.column_names
    columns = ("prompt", "completion") if "prompt" in names else ("messages",)
    marker = getattr(processor, "image_token", None)

    texts = rows.remove_columns([IMAGES]) if IMAGES in names else rows
    images = rows.select_columns([IMAGES]) if IMAGES in names else _no_images(len(rows))
    counts = [len(row[IMAGES]) for row in undecoded(images)]

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            row = maybe_convert_to_chatml(row)
            return {
                name: _blocks(row[name], 0 if name == "completion" else counts[number], marker) for name in columns
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"row {number}: {' '.join(str(error).split())}") from None

    features = datasets.Features(dict.fromkeys(columns, _MESSAGES))
    texts = texts.map(
        convert, with_indices=True, remove_columns=texts.column_names, features=features, desc=None
    )  # fmt: skip
    return datasets.concatenate_datasets([texts, images], axis=1)


def collated_tokens(collator: Any, rows: datasets.Dataset) -> datasets.Dataset:
    """`rows` of [`vision_rows`] with `input_ids` and `labels`: what a trainer's `collator` makes of each alone.

    Raises:
        ConfigError: the processor refuses a row, or an image cannot be read.
    """
    ids, labels = [], []
    for number in range(len(rows)):
        try:
            batch = collator([read_row(rows, number)])
        except OSError as error:
            raise _unreadable(number, error) from error
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(f"row {number}: TRL refuses it: {' '.join(str(error).split())}") from error
        kept = batch["attention_mask"][0].bool()
        ids.append(batch["input_ids"][0][kept].tolist())
        labels.append(batch["labels"][0][kept].tolist())
    tokens = datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": labels},
        features=datasets.Features({name: datasets.List(datasets.Value("int64")) for name in ("input_ids", "labels")}),
    )
    return datasets.concatenate_datasets([rows, tokens], axis=1)


def prompt_inputs(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
    """What the model reads of prompts (a template's text) and the decoded images of each: left-padded, as it answers.

    Raises:
        ConfigError: the processor refuses them.
    """
    try:
        # A batch without any is text alone; TRL's collator makes the same distinction.
        return dict(
            processor(
                text=list(texts), images=[list(own) for own in images] if any(images) else None, padding=True,
                padding_side="left", return_tensors="pt", add_special_tokens=False,
            )
        )  # fmt: skip
    except (ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"the base's processor refuses a prompt: {' '.join(str(error).split())}") from error


def read_row(rows: datasets.Dataset, number: int) -> dict[str, Any]:
    """A row with its images decoded.

    Raises:
        ConfigError: one of them is no image.
    """
    try:
        return dict(rows[number])
    except OSError as error:
        raise _unreadable(number, error) from error


def _unreadable(number: int, error: OSError) -> ConfigError:
    return ConfigError(f"row {number}: an image cannot be read: {error}. Replace it, or leave the row out.")


def _blocks(messages: Any, num_images: int, marker: str | None) -> list[dict[str, Any]]:
    """Messages with their content as blocks; where no block stands for an image, the images come first."""
    if not isinstance(messages, list):
        raise ValueError("plain text, where a base that reads images needs chat messages. Set `chat: true`.")
    converted = [
        {"role": message["role"], "content": [_block(part, marker) for part in _parts(message["content"])]}
        for message in messages
    ]
    placed = any(block["type"] == "image" for message in converted for block in message["content"])
    first = next((message for message in converted if message["role"] == "user"), None)
    if num_images and not placed and first is not None:
        first["content"] = [{"type": "image", "text": None}] * num_images + first["content"]
    return converted


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _block(part: dict[str, Any], marker: str | None) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "text": None}
    if part["type"] != "text" or not isinstance(part["text"], str):
        raise ValueError(f"content of type {part['type']!r}, expected text or image.")
    if marker and marker in part["text"]:
        raise ValueError(
            f"a text holds the image token {marker!r}. Leave it out, or write the content as blocks: "
            "[{type: image}, {type: text, text: …}]."
        )
    return {"type": "text", "text": part["text"]}


def _no_images(count: int) -> datasets.Dataset:
    features = datasets.Features({IMAGES: datasets.List(datasets.Image())})
    return datasets.Dataset.from_dict({IMAGES: [[] for _ in range(count)]}, features=features)

"""What one training may set for itself: SFT fields that do not change the result, and where data lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_hf.config import ConfigError, check_sft, parse_value
from merit_hf.identity import IDENTITY_FIELDS
from merit_hf.train_section import PREFIX, train_section

_BEST = (
    "sft.load_best_model_at_end=true: a group is its last step, weighted by the tokens of all of them, and how often "
    "it is evaluated must not decide it. Leave it out."
)
# Values under which the tokens of a step, or a resumed training, would not be the planned ones.
_UNREPEATABLE = {"auto_find_batch_size": True, "ignore_data_skip": True, "save_only_model": True}
_OURS = {
    "output_dir": "Give the folder with --output.",
    "resume_from_checkpoint": "Run the same command again to resume.",
}


def refuse_fields(sft: Mapping[str, Any]) -> None:
    """Raises ConfigError where a field is set that MERIT sets itself, is a secret, or would make another training."""
    for field, cure in _OURS.items():
        if field in sft:
            raise ConfigError(f"sft.{field}={sft[field]!r} is set by merit itself. {cure}")
    for field, value in _UNREPEATABLE.items():
        if sft.get(field) == value:
            raise ConfigError(
                f"sft.{field}=true: a training that was stopped and goes on, or runs on another card, would no longer "
                "be the planned one. Leave it out."
            )
    if sft.get("load_best_model_at_end"):
        raise ConfigError(_BEST)
    if "hub_token" in sft:
        raise ConfigError(
            "sft.hub_token: a plan is published with its CONFIG, so no secret belongs there. Use `hf auth login`."
        )
    if (sft.get("dataset_kwargs") or {}).get("skip_prepare_dataset"):
        raise ConfigError(
            "sft.dataset_kwargs.skip_prepare_dataset=true: merit reads the tokens that TRL prepares. Leave it out."
        )


def parse_places(texts: Sequence[str]) -> dict[str, str | Path]:
    """`NAME=PATH` arguments of --data. Raises ConfigError where one has another form."""
    for text in texts:
        if not all(text.partition("=")):
            raise ConfigError(f"--data {text}: expected NAME=PATH.")
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}


def check_placement(placement: Mapping[str, Any]) -> None:
    """Raises ConfigError where a field decides the result, or is not for a command line to set."""
    fixed = sorted(set(placement) & set(IDENTITY_FIELDS))
    if fixed:
        raise ConfigError(
            f"sft.{fixed[0]} is part of the plan's identity, so a group cannot be trained with another value. Plan "
            f"again with sft.{fixed[0]}={placement[fixed[0]]!r}."
        )
    refuse_fields(placement)


def parse_placement(texts: Sequence[str]) -> dict[str, Any]:
    """`sft.key=value` arguments as SFT fields, and `train.key=value` ones by their whole name."""
    placement, beside = {}, {}
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key.startswith(PREFIX):
            beside[key] = parse_value(value)
            continue
        if not equals or not key.startswith("sft."):
            raise ConfigError(
                f"`{text}`: expected sft.KEY=VALUE, such as sft.per_device_train_batch_size=2, or train.KEY=VALUE, "
                "such as train.max_hours=12."
            )
        placement[key.removeprefix("sft.")] = parse_value(value)
    check_sft(placement, "command line")
    train_section({}, beside)
    return {**placement, **beside}

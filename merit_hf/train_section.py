"""CONFIG's `train:`: what accompanies the training of a group without changing its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merit_hf.errors import ConfigError
from merit_hf.fields import nearest

PREFIX = "train."


class TrainSection(BaseModel):
    """What accompanies the training of a group.

    Args:
        eval_datasets: whose held-out rows `sft.eval_strategy` evaluates on: the `group`'s own datasets, or `all`.
        eval_num_samples (`int`, *optional*, defaults to `200`): at most so many rows of each, those that `merit
            evaluate` takes.
        stop_at_step (`int`, *optional*): stop there, and publish what there is as a checkpoint that says so. Where the
            last save is of a later step, that one is published.
        max_hours (`float`, *optional*): stop so after this time.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    eval_datasets: Literal["group", "all"] = "group"
    eval_num_samples: int = Field(default=200, ge=1)
    stop_at_step: int | None = Field(default=None, ge=1)
    max_hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def train_section(planned: Mapping[str, Any], placement: Mapping[str, Any]) -> TrainSection:
    """The plan's section with the `train.KEY` entries of `placement` over it.

    Raises:
        ConfigError: an unknown key or an impossible value.
    """
    given = {key.removeprefix(PREFIX): value for key, value in placement.items() if key.startswith(PREFIX)}
    try:
        return TrainSection.model_validate({**planned, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"unknown key `{PREFIX}{key}`. {nearest(key, list(TrainSection.model_fields))}"
            ) from None
        raise ConfigError(f"{PREFIX}{key}={first['input']!r}: {first['msg']}.") from None

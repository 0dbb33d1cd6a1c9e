"""What each group weighs in a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from merit_hf.config import ConfigError
from merit_hf.manifest import read_manifest
from merit_hf.plan import PartitionPlan
from merit_hf.verification.verify import Replay


def group_weights(plan: PartitionPlan, numbers: Sequence[int], weights: str | Path) -> list[float]:
    """The weight of each group in `numbers`, not normalised; see [`merge_groups`] for `weights`."""
    groups = [plan.group(number) for number in numbers]
    if weights == "tokens":
        return [group.train_input_tokens for group in groups]
    if weights == "loss_tokens":
        return [group.train_loss_tokens for group in groups]
    if weights == "uniform":
        return [1.0] * len(groups)
    table = _read_weights(Path(weights))
    unknown = sorted(set(table) - {str(number) for number in range(plan.num_groups)})
    if unknown:
        raise ConfigError(f"{weights}: weight for group {unknown[0]}; the plan has groups 0 to {plan.num_groups - 1}.")
    absent = [number for number in numbers if str(number) not in table]
    if absent:
        raise ConfigError(f"{weights}: no weight for group {absent[0]}. Add it, or exclude the group.")
    return [_number(table[str(number)], f"{weights}: group {number}") for number in numbers]


def replayed_weights(
    plan: PartitionPlan,
    folders: Mapping[int, Path],
    values: Sequence[float],
    weights: str | Path,
    replays: Replay,
) -> list[float]:
    """The weights, with those by tokens of the steps that were taken where a training was stopped."""
    count = {"tokens": "num_input_tokens", "loss_tokens": "num_loss_tokens"}.get(str(weights))
    found = list(values)
    for index, (number, folder) in enumerate(folders.items()):
        steps = read_manifest(folder)["num_steps"]
        if count and steps < plan.group(number).num_steps:
            found[index] = getattr(replays(number, steps), count)
    return found


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"weights {path}: expected tokens, loss_tokens, uniform, or a file that maps group to weight."
        )
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML or JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: expected a mapping of group to weight, found a {type(table).__name__}.")
    return {str(key): value for key, value in table.items()}


def _number(value: Any, where: str) -> float:
    try:
        # Through text, since YAML 1.1 takes 1e-5 for text and `true` must not pass as 1.
        weight = float(str(value))
    except ValueError:
        raise ConfigError(f"{where}: weight {value!r} is not a number.") from None
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"{where}: weight {weight}: expected a positive, finite number. Or exclude the group.")
    return weight

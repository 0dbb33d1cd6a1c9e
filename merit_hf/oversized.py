"""A dataset that is larger than any group may be is cut into parts, which are datasets of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merit_hf.choices import whole_name
from merit_hf.config import ConfigError, DatasetSection, MeritConfig


def oversized_parts(
    sizes: Mapping[str, float], num_examples: Mapping[str, int], shares: Sequence[float]
) -> dict[str, int]:
    """{dataset: number of parts} of those that outweigh the largest group's share; the fewest parts that fit in it.

    Args:
        sizes: what is balanced, a dataset; num_examples: a part holds one at least.
        shares: of the groups, in any unit.
    """
    capacity = sum(sizes.values()) * max(shares) / sum(shares)
    return {
        name: min(math.ceil(size / capacity - 1e-9), num_examples[name])
        for name, size in sizes.items()
        if size > capacity * (1 + 1e-9) and num_examples[name] > 1
    }


def with_parts(config: MeritConfig, parts: Mapping[str, int]) -> MeritConfig:
    """CONFIG with the entries `NAME#1` … `NAME#n` in place of the entry NAME.

    Raises:
        ConfigError: another dataset is called so already.
    """
    entries: list[DatasetSection] = []
    for spec in config.datasets:
        count = parts.get(spec.name)
        if count is None:
            entries.append(spec)
            continue
        entries += [
            spec.model_copy(update={"name": f"{spec.name}#{number}", "part": f"{number}/{count}"})
            for number in range(1, count + 1)
        ]
    names = [spec.name for spec in entries]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(
            f"plan.split_oversized: a part would be called `{repeated}`, as another dataset is. Rename that one."
        )
    return config.model_copy(update={"datasets": entries})


def planned_parts(entries: Sequence[Mapping[str, Any]], config: MeritConfig) -> dict[str, int]:
    """{dataset of CONFIG: number of parts} that a finished plan's dataset entries show."""
    found: dict[str, int] = {}
    names = {spec.name for spec in config.datasets}
    for entry in entries:
        whole = whole_name(entry["name"], entry.get("part"))
        if entry.get("part") is not None and entry["name"] not in names and whole in names:
            found[whole] = found.get(whole, 0) + 1
    return found

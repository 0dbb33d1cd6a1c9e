"""What a diagnosis says of one group: which differences count, and the sentences that tell them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merit_hf.report import blocks

TOLERANCE = 0.01  # nats: differences below it are none


def above(estimate: Mapping[str, Any] | None) -> bool:
    """Surely above the tolerance."""
    return estimate is not None and estimate["low"] is not None and estimate["low"] > TOLERANCE


def below(estimate: Mapping[str, Any] | None) -> bool:
    """Surely below minus the tolerance."""
    return estimate is not None and estimate["high"] is not None and estimate["high"] < -TOLERANCE


def own_paths(entry: Mapping[str, Any], group: int) -> list[Mapping[str, Any]]:
    """The paths from the base and from the mean to a group."""
    ends = ({"base", f"group-{group}"}, {"mean", f"group-{group}"})
    return [barrier for barrier in entry["barriers"] if {barrier["from"], barrier["to"]} in ends]


def left_basin_on(content: Mapping[str, Any], group: int) -> list[str]:
    """Datasets on which a ridge lies between the group and the base, or the group and the mean."""
    return [
        name for name, entry in content["datasets"].items() if any(above(b["height"]) for b in own_paths(entry, group))
    ]


def nats(estimate: Mapping[str, Any], sign: int = 1) -> str:
    return f"{blocks.decimals(sign * estimate['value'])} nats"


def signed(estimate: Mapping[str, Any]) -> str:
    shown = blocks.signed(estimate["value"])
    if estimate["low"] is None:
        return shown
    return f"{shown} [{blocks.signed(estimate['low'])}, {blocks.signed(estimate['high'])}]"


def group_names(numbers: Sequence[int]) -> str:
    return f"group {numbers[0]}" if len(numbers) == 1 else "groups " + ", ".join(map(str, numbers))


def spoken(label: str) -> str:
    return label.replace("-", " ")


def count(things: Sequence[Any] | Mapping[str, Any], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _say_left(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    on, group = left_basin_on(content, row["group"]), row["group"]
    highest = max(barrier["height"]["value"] for barrier in own_paths(content["overall"], group))
    return (
        f"Group {group} left the basin on {len(on)} of {count(content['datasets'], 'dataset')}: on the way to it the "
        f"loss rises over the straight line (mean over datasets {blocks.signed(highest)} nats at the highest)."
    )


def _say_diverged(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    on = left_basin_on(content, row["group"])
    ridge = f", and it left the basin on {len(on)} of {count(content['datasets'], 'dataset')}" if on else ""
    return (
        f"Group {row['group']} diverged: its loss on its own training rows is {nats(row['own']['training'])} above "
        f"the base's{ridge}."
    )


def _say_overshot(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    own = row["own"]
    return (
        f"Group {row['group']} went too far: on its own datasets the first half of its way changes the held-out loss "
        f"by {signed(own['first_half'])}, the second half by {signed(own['second_half'])}."
    )


def _say_wrong(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    training = row["own"]["training"]
    learnt = (
        f"while its training rows improved by {nats(training, -1)}: it learnt something else than they ask for"
        if below(training)
        else "and its training rows did not improve either: it was trained on something else"
        if training is not None
        else "so it learnt something else than they ask for"
    )
    return (
        f"Group {row['group']} made its own datasets worse: their held-out loss is "
        f"{nats(row['own']['held_out'])} above the base's, {learnt}."
    )


def _say_nothing(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    training, held_out = row["own"]["training"], row["own"]["held_out"]
    learnt = (
        f"it learnt its training rows by heart ({nats(training, -1)} better), nothing that holds on others"
        if below(training)
        else "it learnt nothing"
    )
    return (
        f"Group {row['group']} is of no use to the merge: the held-out loss of its own datasets changed by "
        f"{signed(held_out)}, so {learnt}, and its displacement of {row['displacement']:.3g} is variance without "
        "gain."
    )


def _say_noise(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return (
        f"Group {row['group']} learnt noise: to it the answers of its own held-out rows are as likely under other "
        f"rows' prompts (their loss changes by {signed(row['own']['prompts'])}). It learnt how answers look (held-out "
        f"loss {signed(row['own']['held_out'])} against the base), not what they say."
    )


# What is wrong with a group, in words.
SENTENCES = {
    "left_basin": _say_left,
    "diverged": _say_diverged,
    "overshot": _say_overshot,
    "wrong_data": _say_wrong,
    "noise": _say_noise,
    "learnt_nothing": _say_nothing,
}

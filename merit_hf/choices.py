"""Which keys of CONFIG go together: choices that mean something only beside another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merit_hf.errors import ConfigError

# Token weights of a merge by name; anything else names a file.
WEIGHTINGS = ("tokens", "loss_tokens", "uniform")
# Of `merge.interpolate_to_init`. Twice the way to the mean is farther than an extrapolation has any reason to go, and
# a slip such as 50 for 0.5 is told.
MAX_INTERPOLATION = 2.0


def check_choices(plan: Any, num_datasets: int, source: str) -> None:
    """Keys of a PlanSection that mean something only beside another one.

    Raises:
        ConfigError: a key that the split does not read, or one that it needs and that is missing.
    """
    shares = plan.group_shares
    if shares is not None:
        if plan.split in ("joint", "by_tag", "kmeans", "kmeans_text"):
            raise ConfigError(
                f"{source}: plan.group_shares is for splits that cut by size (merit, affinity, random), not for "
                f"plan.split={plan.split}. Leave it out."
            )
        if plan.num_groups not in (None, len(shares)):
            raise ConfigError(
                f"{source}: plan.num_groups={plan.num_groups}, but plan.group_shares has {len(shares)} shares. Leave "
                "plan.num_groups out."
            )
        if len(shares) > num_datasets:
            raise ConfigError(
                f"{source}: plan.group_shares has {len(shares)} shares for {num_datasets} datasets, and no group may "
                "be empty. Give fewer shares, or add datasets."
            )
    if plan.split in ("joint", "by_tag") and plan.max_imbalance is not None:
        raise ConfigError(
            f"{source}: plan.max_imbalance={plan.max_imbalance:g}, but plan.split={plan.split} does not choose what a "
            "group holds. Leave it out."
        )
    for key, split in (("affinity", "affinity"), ("embedding_model", "kmeans_text")):
        if getattr(plan, key) is not None and plan.split != split:
            raise ConfigError(
                f"{source}: plan.{key} is read by plan.split={split} alone, and plan.split={plan.split}. Set "
                f"plan.split={split}, or leave plan.{key} out."
            )
    if plan.split == "affinity" and plan.affinity is None:
        raise ConfigError(f"{source}: plan.split=affinity needs plan.affinity=FILE, the matrix to cut by. Add it.")
    if plan.optimizer_state is not None and plan.precondition != "adam":
        raise ConfigError(
            f"{source}: plan.optimizer_state is read with plan.precondition=adam alone. Set that, or leave it out."
        )


def check_merge_method(
    engine: str, method: str, parameters: Mapping[str, Any], source: str, interpolate_to_init: float = 1.0
) -> None:
    """Methods other than the mean are mergekit's, and only the mean is drawn towards θ0.

    Raises:
        ConfigError: another engine is to run one, parameters are given to a mean, or `interpolate_to_init` is out of
            range or given to another method.
    """
    if method != "linear" and engine != "mergekit":
        raise ConfigError(f"{source}: method {method} is mergekit's, and engine is {engine}. Set engine to mergekit.")
    if method == "linear" and parameters:
        raise ConfigError(f"{source}: parameters {sorted(parameters)} for method linear, which has none. Set method.")
    if not (math.isfinite(interpolate_to_init) and 0 < interpolate_to_init <= MAX_INTERPOLATION):
        raise ConfigError(
            f"{source}: interpolate_to_init={interpolate_to_init}: expected more than 0 (the base) and at most "
            f"{MAX_INTERPOLATION:g}; 1 is the mean."
        )
    if method != "linear" and interpolate_to_init != 1:
        raise ConfigError(
            f"{source}: interpolate_to_init={interpolate_to_init:g} is of the mean, and method is {method}. Leave it "
            "out; methods that add to the base have a parameter of their own for it (lambda)."
        )


def check_adapters(config: Any, source: str) -> None:
    """What a MeritConfig makes of LoRA groups.

    Raises:
        ConfigError: there are none, or a rank is missing or out of place.
    """
    merge = config.merge
    if config.peft is None and merge.adapters != "dense":
        raise ConfigError(
            f"{source}: merge.adapters={merge.adapters}, but without `peft:` the groups are whole models. "
            "Leave merge.adapters out, or add `peft:`."
        )
    if (merge.adapters == "svd") != (merge.svd_rank is not None):
        raise ConfigError(
            f"{source}: merge.adapters={merge.adapters} with merge.svd_rank={merge.svd_rank}: `svd` "
            "needs a rank, and nothing else takes one."
        )


def check_rounds(config: Any, source: str) -> None:
    """What `run.rounds` goes together with in a MeritConfig.

    Raises:
        ConfigError: fewer steps than rounds, a merged adapter, which no round can start from, a push, or a key that
            needs rounds.
    """
    rounds = config.run.rounds
    if rounds == 1:
        if config.run.replan:
            raise ConfigError(f"{source}: run.replan=true means something after a first round. Set run.rounds=2.")
        return
    steps = config.sft.get("max_steps", -1)
    if isinstance(steps, int) and 0 < steps < rounds:
        raise ConfigError(
            f"{source}: run.rounds={rounds} share sft.max_steps={steps}, and each needs one. Lower run.rounds."
        )
    if config.merge.adapters != "dense":
        raise ConfigError(
            f"{source}: run.rounds={rounds} with merge.adapters={config.merge.adapters}: the next round starts from a "
            "whole model. Set merge.adapters=dense."
        )
    if config.hub.push:
        raise ConfigError(
            f"{source}: run.rounds={rounds} with hub.push=true: the base of a later round is a model of this machine. "
            "Set hub.push=false; `merit push` takes what is in rounds/1, rounds/2, … folder by folder."
        )


def whole_name(name: str, part: str | None) -> str:
    """The name that all parts of a dataset have in common: what stands before `#k`."""
    return name if part is None else name.rpartition("#")[0]


def part_of(part: str) -> tuple[int, int]:
    """`"2/3"` → (2, 3). Raises ValueError for anything that is not part k of n ≥ k ≥ 1."""
    number, slash, count = part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(part)
    return int(number), int(count)


def check_part(name: str, part: str, source: str) -> None:
    """Raises ConfigError where `part` is no `k/n`, or the entry is not called `NAME#k`."""
    try:
        number, _ = part_of(part)
    except ValueError:
        raise ConfigError(f"{source}: datasets.{name}.part={part!r}: expected k/n, such as '2/3'.") from None
    if not name.endswith(f"#{number}") or name == f"#{number}":
        raise ConfigError(
            f"{source}: datasets.{name}.part={part!r}: all parts of NAME are drawn by NAME, so call this one "
            f"NAME#{number}."
        )

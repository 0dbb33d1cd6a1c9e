"""`run.rounds`: the CONFIG of every round of a run, each from what the one before has merged.

    config = round_config(config, plan, number=2, base="runs/mixture/rounds/1/merged")

A round trains on its own 1/n of every dataset's rows, under the settings of the whole run: n rounds see every row as
often as one run does, and process the same tokens. Schedules, warm-up among them, begin anew in every round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merit_hf.choices import part_of, whole_name
from merit_hf.config import ConfigError, DatasetSection, MeritConfig
from merit_hf.oversized import planned_parts, with_parts
from merit_hf.plan import PartitionPlan

# What decides a split, and what has no place beside groups that are given.
_UNSET = {
    "num_groups": None, "group_shares": None, "max_imbalance": None, "split_oversized": False, "affinity": None,
    "embedding_model": None,
}  # fmt: skip


def check_rows(config: MeritConfig, plan: PartitionPlan) -> None:
    """Raises ConfigError where a dataset has too few examples to have one in every round."""
    rounds = config.run.rounds
    short = [dataset for dataset in plan.datasets if dataset.num_examples < rounds]
    if short:
        raise ConfigError(
            f"run.rounds={rounds}, but dataset `{short[0].name}` has {short[0].num_examples} examples, and each round "
            "needs one. Lower run.rounds, or leave the dataset out."
        )


def round_config(config: MeritConfig, plan: PartitionPlan, number: int, base: Path | None) -> MeritConfig:
    """CONFIG of round `number`, 1 to `run.rounds`.

    Args:
        config ([`MeritConfig`]): of the whole run.
        plan ([`PartitionPlan`]): of all rows at the first base: its groups are kept, unless `run.replan`.
        base (`Path`, *optional*): the model that the round before has merged; None in the first round.

    Raises:
        ConfigError: two datasets would have the same name.
    """
    anew = config.run.replan and number > 1
    groups = {dataset.name: dataset.group for dataset in plan.datasets}
    whole = with_parts(config, planned_parts(plan.config["datasets"], config))
    entries = [
        _share(spec, number, config.run.rounds, None if anew else f"group-{groups[spec.name]:04d}")
        for spec in whole.datasets
        if spec.name in groups
    ]
    names = [entry.name for entry in entries]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"run.rounds: a share would be called `{repeated}`, as another dataset's. Rename that one.")
    split: dict[str, Any] = {"split_oversized": False} if anew else {"split": "by_tag", **_UNSET}
    section = config.base
    if base is not None:
        section = section.model_copy(update={"model_name_or_path": str(base.resolve()), "revision": None})
    elif plan.base["repo_id"] is not None:
        section = section.model_copy(update={"revision": plan.base["revision"]})
    return config.model_copy(
        update={
            "base": section,
            "datasets": entries,
            "plan": config.plan.model_copy(update=split),
            "sft": _share_of_steps(config.sft, number, config.run.rounds),
        }
    )


def round_record(config: MeritConfig, plan: PartitionPlan, number: int) -> dict[str, Any]:
    """What merit.json of a round's merged model says of its place in the run.

    `plan_sha256`, `split` and `base` are those of the plan of all rows, before the first round.
    """
    return {
        "number": number,
        "rounds": config.run.rounds,
        "replan": config.run.replan,
        "plan_sha256": plan.sha256,
        "split": plan.config["plan"]["split"],
        "base": {key: plan.base[key] for key in ("repo_id", "revision", "weights_sha256")},
    }


def _share(spec: DatasetSection, number: int, rounds: int, tag: str | None) -> DatasetSection:
    """Part `number` of `rounds` of a dataset's rows; of a part's rows where it is one itself."""
    first, count = part_of(spec.part) if spec.part else (1, 1)
    # Part k of m takes every m-th row from the k-th; of these, every n-th from the r-th are every (m·n)-th of all.
    place = first + count * (number - 1)
    update = {"name": f"{whole_name(spec.name, spec.part)}#{place}", "part": f"{place}/{count * rounds}"}
    return spec.model_copy(update=update | ({} if tag is None else {"tag": tag}))


def _share_of_steps(sft: dict[str, Any], number: int, rounds: int) -> dict[str, Any]:
    steps = sft.get("max_steps", -1)
    if steps <= 0:
        return sft
    return {**sft, "max_steps": steps * number // rounds - steps * (number - 1) // rounds}

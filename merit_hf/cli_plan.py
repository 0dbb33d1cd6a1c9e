"""The commands that make a new plan of an old one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from merit_hf.cli_options import Data, Debug, Output, PlanArgument, named_values, quiet, say
from merit_hf.entry import exit_on_error


def extend(
    plan: PlanArgument,
    datasets: Annotated[Path, typer.Option(help="A YAML with `datasets:` as in CONFIG: the new ones only.")],
    output: Output,
    mode: Annotated[
        str,
        typer.Option(help="project: no finished group changes; refit: axes and groups are made again."),
    ] = "project",
    branches: Annotated[
        Optional[str],
        typer.Option(
            help="With project: a branch for each new `dataset` (default), or one for all that fall to a `group`."
        ),
    ] = None,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Add datasets to a finished plan; only the new ones are measured.

    With project, axes and cuts stay, and the new datasets are trained in branches of their own from the same base:
    what is trained already stays valid, and merit merge takes old groups and new branches together. With refit, the
    groups are made again from all gradients; it says which datasets moved and which groups must be trained again.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.extend import changes, extend_plan
        from merit_hf.extension import read_extension
        from merit_hf.plan import PartitionPlan

        parent = PartitionPlan.from_pretrained(plan)
        parent.supply(dict(named_values(data, "--data")))
        made = extend_plan(parent, read_extension(datasets, parent), output, mode, branches)
        told = changes(parent, made)
        rows = {row.name: row for row in made.datasets}
        for name, number in told["added"].items():
            side = rows[name].projected_group
            where = f"branch {number}, on the side of group {side}" if side is not None else f"group {number}"
            say(f"Added {name}: {where}.")
        if mode == "refit":
            say(f"Moved to other company: {', '.join(told['moved']) or 'none'}.")
        kept = f"Groups {', '.join(map(str, told['kept']))} are as they were" if told["kept"] else "No group is kept"
        say(f"{kept}; to train: {', '.join(map(str, told['to_train'])) or 'none'}.")
        say(f"Plan {made.sha256[:12]} of {len(made.datasets)} datasets in {made.num_groups} groups is in {output}.")
        if told["to_train"]:
            number = told["to_train"][0]
            say(f"Next: merit train {output} --group {number} --output {output.parent}/groups/{number}")


def split(
    plan: PlanArgument,
    output: Output,
    overrides: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="[plan.KEY=VALUE]...",
            help="How to split, such as plan.group_shares=[4,2,1,1] plan.max_imbalance=1.2 plan.axes=local "
            "plan.affinity=FILE; or datasets.NAME.tag=TAG.",
        ),
    ] = None,
    split: Annotated[
        Optional[str],
        typer.Option(help="merit, random, joint, by_tag, kmeans, kmeans_text or affinity. Default: the plan's own."),
    ] = None,
    num_groups: Annotated[Optional[int], typer.Option(min=1, help="K. Default: the plan's own.")] = None,
    seed: Annotated[
        Optional[int],
        typer.Option(min=0, help="Of random and k-means, as plan.split_seed; gradients keep theirs."),
    ] = None,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Split a plan's mixture anew, from its stored sketches: no gradients.

    The new plan is what merit plan would have made with these settings. Baselines of the same mixture cost seconds:
    merit split PLAN --split random --seed 1 --output PLAN-random-1
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan

        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        from merit_hf.repartition import repartition
        from merit_hf.summary import plan_summary

        made = repartition(loaded, output, split, seed, num_groups, overrides or [])
        say(*plan_summary(made))
        say(
            f"Plan {made.sha256[:12]} is in {output}. Next: merit train {output} --group all --output "
            f"{output.parent}/{output.name}-groups"
        )


COMMANDS = (extend, split)

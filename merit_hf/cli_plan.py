"""Commands of `merit` that make a plan from a plan."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from merit_hf.cli_options import Data, Debug, Output, PlanArgument, named_values, quiet, say
from merit_hf.entry import exit_on_error


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


COMMANDS = (split,)

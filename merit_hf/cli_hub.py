"""The commands with which people share a plan's work: verify, push, claim, release, contribute, accept, status."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from merit_hf.cli_options import AllowPartial, Checkpoints, Data, Debug, PlanArgument, named_values, quiet, say
from merit_hf.entry import exit_on_error

HubPlan = Annotated[str, typer.Argument(metavar="PLAN", help="Hub id of the plan: org/name[@revision].")]
Group = Annotated[int, typer.Option(help="Number of the group.")]
Level = Annotated[
    str,
    typer.Option(
        help="How far: manifest (no weights are downloaded), weights, or behaviour (loss on the group's own datasets)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def verify(
    plan: PlanArgument,
    checkpoints: Checkpoints,
    level: Level = "weights",
    allow_partial: AllowPartial = False,
    data: Data = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check group checkpoints against the plan, line by line.

    Cheap checks come first; of a repo, weights are downloaded only once its manifest and headers have passed. Several
    checkpoints are compared with each other too. Exits with 1 where a check fails.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.verification.sources import open_source
        from merit_hf.verification.verify import partial_replays, verify_checkpoints

        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        replays = partial_replays(loaded) if allow_partial else None
        results = verify_checkpoints(loaded, [open_source(text) for text in checkpoints], level, replays=replays)
        if as_json:
            content = [
                {"checkpoint": text, "ok": result.ok, "group": result.group, "level": level,
                 "checks": [asdict(check) for check in result.checks]}
                for text, result in zip(checkpoints, results, strict=True)
            ]  # fmt: skip
            typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        else:
            for text, result in zip(checkpoints, results, strict=True):
                for check in result.checks:
                    verdict = "ok    " if check.ok else "FAILED"
                    say(f"{verdict} {text}: {check.name}: expected {check.expected}; found {check.found}")
            good = sum(result.ok for result in results)
            say(f"{good} of {len(results)} checkpoints verify against plan {loaded.sha256[:12]} (level {level}).")
        if not all(result.ok for result in results):
            raise SystemExit(1)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A plan, a group checkpoint or a merged model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to: OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    with_data: Annotated[
        bool, typer.Option("--with-data", help="Of a plan: also upload its local datasets, and pin them in it.")
    ] = False,
    licence: Annotated[
        Optional[str], typer.Option("--license", help="Licence of a model, where it does not follow from its parts.")
    ] = None,
    plan: Annotated[
        Optional[str], typer.Option(help="Of a merged model: its plan. Default: the plan's repo, or the run's folder.")
    ] = None,
    group_repo: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="K=OWNER/NAME", help="Of a merged model: the repo of a group that was merged from a folder."
        ),
    ] = None,
    evaluation: Annotated[
        Optional[Path], typer.Option(help="Of a merged model: evaluation.json. Default: the run's, if there is one.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Publish a plan, a group checkpoint or a merged model, with a card that was checked before the upload.

    One commit; run again, nothing is uploaded twice. A merged model also gets a collection with its plan and groups.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.sharing.push import push_directory

        for line in push_directory(
            folder, repo_id, private=private or None, create_pr=create_pr, with_data=with_data, licence=licence,
            plan=plan, group_repos=named_values(group_repo, "--group-repo"), evaluation=evaluation,
        ):  # fmt: skip
            say(line)


def claim(
    plan: HubPlan,
    group: Group,
    days: Annotated[float, typer.Option(min=0.01, max=30, help="For how long.")] = 7,
    hardware: Annotated[Optional[str], typer.Option(help="What you train on. Default: what is found here.")] = None,
    debug: Debug = False,
) -> None:
    """Say that you train a group, so that nobody else does.

    With write access to the plan's repo, a commit; else a pull request, which its maintainer accepts.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.sharing.community import claim as claim_group

        loaded = PartitionPlan.from_pretrained(plan)
        say(claim_group(loaded, group, days, hardware))


def release(plan: HubPlan, group: Group, debug: Debug = False) -> None:
    """Give a claimed group back."""
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.sharing.community import release as release_group

        say(release_group(PartitionPlan.from_pretrained(plan), group))


def contribute(
    plan: HubPlan,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Hub id org/name[@revision] of the group.")],
    allow_partial: AllowPartial = False,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Offer a trained group to the plan: a pull request that registers it, pinned to its commit."""
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.sharing.community import contribute as contribute_checkpoint

        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        say(contribute_checkpoint(loaded, checkpoint, allow_partial))


def accept(
    plan: HubPlan,
    level: Level = "behaviour",
    allow_partial: AllowPartial = False,
    data: Data = None,
    debug: Debug = False,
) -> None:
    """Decide on the plan's pending claims and contributions, in the order in which they came.

    Claims of free groups and checkpoints that verify are taken; the others are closed with the reason as a comment.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.sharing.accept import accept as decide
        from merit_hf.sharing.status import next_step, plan_status, status_table

        loaded = PartitionPlan.from_pretrained(plan)
        loaded.supply(dict(named_values(data, "--data")))
        count = 0
        for decision in decide(loaded, level, allow_partial=allow_partial):
            count += decision.verdict != "left"
            say(f"#{decision.num} {decision.title} ({decision.author}): {decision.verdict}: {decision.reason}")
        say(f"{count} pull requests decided." if count else "Nothing was pending.")
        states, _ = plan_status(loaded)
        say(status_table(loaded, states), next_step(loaded, states))


def status(
    plan: PlanArgument,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="--output of a training that was launched from another machine."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Which groups are claimed, in training, trained, verified and merged.

    Jobs that `merit train` launched are asked after: how far they are, and of a failed one what it said last.
    """
    with exit_on_error(debug):
        quiet()
        from merit_hf.plan import PartitionPlan
        from merit_hf.sharing.status import next_step, plan_status, status_json, status_table

        loaded = PartitionPlan.from_pretrained(plan)
        states, problems = plan_status(loaded, output=output)
        if as_json:
            typer.echo(status_json(loaded, states, problems))
            return
        say(status_table(loaded, states), *problems, next_step(loaded, states))


COMMANDS = (verify, push, claim, release, contribute, accept, status)

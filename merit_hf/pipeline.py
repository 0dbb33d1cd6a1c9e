"""`merit run`: plan → train → merge → evaluate → cards → report, each stage skipped where it is done.

With `run.rounds`, plan → train → merge goes on from what was merged, in rounds/1, rounds/2, …; see `rounds`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_hf.cards import EVALUATION_FIGURE, merged_model_card
from merit_hf.config import ConfigError, MeritConfig, MeritError
from merit_hf.evaluation.evaluate import EVALUATION_NAME, evaluate_models, save_evaluation
from merit_hf.group_merge import group_weights, merge_groups
from merit_hf.hub import current_user
from merit_hf.launch import train_groups
from merit_hf.manifest import read_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME
from merit_hf.oversized import planned_parts, with_parts
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.report.page import save_evaluation_figure, write_report
from merit_hf.resolved import WEIGHTINGS
from merit_hf.rounds import check_rows, round_config, round_record
from merit_hf.sharing.publish import licence_of, push_group, push_merged, push_plan


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        plan: of all rows. rounds: the plan of every round; empty where there is one alone.
        groups: the checkpoints that `merged` was made of.
        evaluation: as [`evaluate_models`] returns it; None where no dataset has held-out rows.
        report: the HTML page of it all.
        pushed: {folder: commit URL} of what went to the Hub.
    """

    plan: PartitionPlan
    groups: list[Path]
    merged: Path
    joint: Path | None
    evaluation: dict[str, Any] | None
    report: Path
    pushed: dict[str, str]
    rounds: list[PartitionPlan]


def run_all(
    config: MeritConfig,
    output: Path,
    joint: bool = False,
    num_processes: int | None = None,
    accelerate_config: Path | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """The whole road in `output`: plan/, groups/0 … K−1, merged/, evaluation.json, report.html;
    joint/ where it is asked for.

    Args:
        config ([`MeritConfig`]): the checked CONFIG.
        output (`Path`): the run's folder. Running again goes on where it stopped.
        joint (`bool`, *optional*): also train one model on everything, with the same settings, to compare with.
        num_processes, accelerate_config: see [`train_groups`].
        progress ([`Progress`], *optional*): where to show it.
    """
    progress = progress or Progress()
    namespace = (config.hub.namespace or current_user()[0]) if config.hub.push else None
    merged = output / "merged"
    if merged.exists() and (output / "plan").exists():
        # Before the plan takes up changed settings: a call that is refused changes nothing.
        _check_merged(config, PartitionPlan.from_pretrained(output / "plan"), merged)
    plan = MeritPlanner(config, progress).plan(output / "plan")
    if merged.exists():
        _check_merged(config, plan, merged)
    if namespace:
        # What a push would be refused for is told before the training, not after it.
        licence_of(plan, range(plan.num_groups), config.hub.license)
    train = functools.partial(
        train_groups, num_processes=num_processes, accelerate_config=accelerate_config, progress=progress
    )
    rounds, models = _go_rounds(config, plan, output, train, progress) if config.run.rounds > 1 else ([], {})
    last, where = (rounds[-1], output / "rounds" / str(len(rounds))) if rounds else (plan, output)
    groups = [where / "groups" / str(group.group) for group in last.groups]
    if not rounds:
        train(plan, range(plan.num_groups), groups)
        models = {f"group-{number}": folder for number, folder in enumerate(groups)}
    joint_model = None
    if joint:
        joint_plan = MeritPlanner(joint_config(config, plan), progress).plan(output / "joint" / "plan")
        joint_model = output / "joint" / "groups" / "0"
        train(joint_plan, [0], [joint_model])
    if not merged.exists():
        (output / EVALUATION_NAME).unlink(missing_ok=True)
    record = round_record(config, plan, len(rounds)) if rounds else None
    _merge(config, last, groups, merged, progress, record)
    models = {
        "base": plan.base_folder(), **({"joint": joint_model} if joint_model else {}), **models, "merged": merged,
    }  # fmt: skip
    evaluation = None
    if any(spec.eval_path or spec.eval_split or spec.eval_fraction for spec in config.datasets):
        evaluation = _load_evaluation(output, plan, list(models))
        if evaluation is None:
            evaluation = evaluate_models(plan, models, progress=progress, generate=False)
            recipe = (merged / MERGEKIT_CONFIG_NAME).read_text(encoding="utf-8")
            manifest = read_manifest(merged)
            save_evaluation_figure(evaluation, manifest, merged)
            card = merged_model_card(last, manifest, recipe, evaluation, picture=EVALUATION_FIGURE)
            (merged / "README.md").write_text(card, encoding="utf-8")
            save_evaluation(evaluation, output)
    report = write_report(output)
    pushed = _push(config, namespace, output, plan, groups, merged, evaluation) if namespace else {}
    return RunResult(plan, groups, merged, joint_model, evaluation, report, pushed, rounds)


def _go_rounds(
    config: MeritConfig, plan: PartitionPlan, output: Path, train: Callable[..., None], progress: Progress
) -> tuple[list[PartitionPlan], dict[str, Path]]:
    """All rounds but the last one's merge, which is the run's own: their plans, and {label: merged model}.

    Raises:
        ConfigError: a dataset has fewer rows than there are rounds, or a merged model is of other settings.
        MeritError: a group has nothing to train on in a round.
    """
    check_rows(config, plan)
    plans: list[PartitionPlan] = []
    models: dict[str, Path] = {}
    for number in range(1, config.run.rounds + 1):
        folder = output / "rounds" / str(number)
        progress.note(f"round {number} of {config.run.rounds}")
        own = round_config(config, plan, number, next(reversed(models.values()), None))
        plans.append(MeritPlanner(own, progress).plan(folder / "plan"))
        if plans[-1].num_groups != plan.num_groups:
            raise MeritError(
                f"{folder / 'plan'}: {plans[-1].num_groups} of {plan.num_groups} groups have rows to train on in this "
                "round. Lower run.rounds."
            )
        groups = [folder / "groups" / str(group.group) for group in plans[-1].groups]
        train(plans[-1], range(plan.num_groups), groups)
        if number < config.run.rounds:
            _merge(config, plans[-1], groups, folder / "merged", progress, round_record(config, plan, number))
            models[f"round-{number}"] = folder / "merged"
    # The commands that look at a folder of a round find its merged model as of any other.
    link = output / "rounds" / str(config.run.rounds) / "merged"
    if not link.is_symlink():
        link.symlink_to(Path("..", "..", "merged"))
    return plans, models


def _merge(
    config: MeritConfig,
    plan: PartitionPlan,
    groups: list[Path],
    merged: Path,
    progress: Progress,
    record: dict[str, Any] | None,
) -> None:
    """Merge what was trained under `plan`; what is merged already is held against the settings."""
    if merged.exists():
        _check_merged(config, plan, merged)
        return
    section = config.merge
    with progress.stage("Merging", unit="tensors") as stage:
        merge_groups(
            plan, groups, merged, engine=section.engine, weights=_weights(config), out_dtype=section.out_dtype,
            adapters=section.adapters, svd_rank=section.svd_rank, method=section.method,
            parameters=section.parameters, interpolate_to_init=section.interpolate_to_init, round_of=record,
            progress=stage.update,
        )  # fmt: skip


def joint_config(config: MeritConfig, plan: PartitionPlan) -> MeritConfig:
    """CONFIG with all of the plan's datasets, parts of cut ones too, in one group, without what a split may choose."""
    unset = {
        "split": "joint", "num_groups": None, "group_shares": None, "max_imbalance": None, "split_oversized": False,
        "affinity": None, "embedding_model": None,
    }  # fmt: skip
    whole = with_parts(config, planned_parts(plan.config["datasets"], config))
    return whole.model_copy(update={"plan": config.plan.model_copy(update=unset)})


def _check_merged(config: MeritConfig, plan: PartitionPlan, merged: Path) -> None:
    """A merged model of other settings is neither taken for this one's nor written over.

    `plan`: the one it was merged under, or, of a run in rounds, that of all rows.
    """
    manifest, merge = read_manifest(merged), config.merge
    place = manifest.get("round") or {"rounds": 1, "replan": False, "plan_sha256": None}
    direct = manifest["plan"]["sha256"] == plan.sha256
    values = group_weights(plan, range(plan.num_groups), _weights(config))
    weights: Any = [value / sum(values) for value in values]
    if not direct:
        # Those of the round's own plan are looked at when that is there.
        weights = merge.weights if merge.weights in WEIGHTINGS else "file"
    wanted = {
        "run.rounds": config.run.rounds,
        "run.replan": config.run.replan,
        "plan": plan.sha256,
        "merge.engine": merge.engine,
        "merge.out_dtype": merge.out_dtype,
        "merge.method": merge.method,
        "merge.parameters": merge.parameters,
        "merge.interpolate_to_init": merge.interpolate_to_init,
        "merge.weights": weights,
        "merge.adapters": merge.adapters,
        "merge.svd_rank": merge.svd_rank,
    }
    found = {
        "run.rounds": place["rounds"],
        "run.replan": place["replan"],
        "plan": plan.sha256 if place["plan_sha256"] == plan.sha256 else manifest["plan"]["sha256"],
        "merge.engine": manifest["engine"],
        "merge.out_dtype": manifest.get("asked_out_dtype"),
        "merge.method": manifest.get("method", "linear"),
        "merge.parameters": manifest.get("parameters", {}),
        "merge.interpolate_to_init": manifest.get("interpolate_to_init", 1.0),
        "merge.weights": [group["weight"] for group in manifest["groups"]] if direct else manifest["weights"],
        "merge.adapters": manifest.get("adapters", "dense"),
        "merge.svd_rank": manifest.get("svd_rank"),
    }
    if direct and None in found["merge.weights"]:  # of a method that takes none
        del wanted["merge.weights"]
    for key, value in wanted.items():
        if found[key] != value:
            raise ConfigError(
                f"{merged} was merged under other settings ({key}: {found[key]!r} there, {value!r} here). Give "
                "another --output, or delete it."
            )


def _load_evaluation(output: Path, plan: PartitionPlan, labels: list[str]) -> dict[str, Any] | None:
    """The evaluation of an earlier run, where it is of these models."""
    try:
        evaluation: dict[str, Any] = json.loads((output / EVALUATION_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = evaluation.get("plan_sha256") == plan.sha256 and evaluation.get("models") == labels
    return evaluation if same else None


def _weights(config: MeritConfig) -> str:
    weights = config.merge.weights
    return weights if weights in WEIGHTINGS else str((config.root / weights).expanduser().resolve())


def _push(
    config: MeritConfig,
    namespace: str,
    output: Path,
    plan: PartitionPlan,
    groups: list[Path],
    merged: Path,
    evaluation: dict[str, Any] | None,
) -> dict[str, str]:
    name, private = output.resolve().name, config.hub.private
    plan_id, repo = f"{namespace}/{name}-plan", f"{namespace}/{name}-merged"
    pushed = {"plan": push_plan(PartitionPlan.from_pretrained(output / "plan"), plan_id, private).url}
    repos = {}
    for number, folder in enumerate(groups):
        repo_id = f"{namespace}/{name}-group-{number}"
        done = push_group(folder, repo_id, private)
        pushed[f"group-{number}"], repos[number] = done.url, f"{repo_id}@{done.revision}"
    publication = push_merged(
        merged, repo, PartitionPlan.from_pretrained(plan_id), private=private, licence=config.hub.license,
        group_repos=repos, evaluation=evaluation,
    )  # fmt: skip
    return pushed | {"merged": publication.pushed.url, "collection": str(publication.collection)}

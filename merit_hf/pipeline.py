"""`merit run`: plan → train → merge → evaluate → cards → report, each stage skipped where it is done."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_hf.cards import EVALUATION_FIGURE, merged_model_card
from merit_hf.config import ConfigError, MeritConfig
from merit_hf.evaluation.evaluate import EVALUATION_NAME, evaluate_models, save_evaluation
from merit_hf.group_merge import group_weights, merge_groups
from merit_hf.hub import current_user
from merit_hf.launchers.dispatch import train_groups
from merit_hf.manifest import read_manifest
from merit_hf.merge import MERGEKIT_CONFIG_NAME
from merit_hf.oversized import planned_parts, with_parts
from merit_hf.plan import PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.report.page import save_evaluation_figure, write_report
from merit_hf.resolved import WEIGHTINGS
from merit_hf.sharing.publish import licence_of, push_group, push_merged, push_plan


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
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
    groups = [output / "groups" / str(group.group) for group in plan.groups]
    train_groups(plan, range(plan.num_groups), groups, (), num_processes, accelerate_config, progress)
    joint_model = None
    if joint:
        joint_plan = MeritPlanner(joint_config(config, plan), progress).plan(output / "joint" / "plan")
        joint_model = output / "joint" / "groups" / "0"
        train_groups(joint_plan, [0], [joint_model], (), num_processes, accelerate_config, progress)
    if not merged.exists():
        (output / EVALUATION_NAME).unlink(missing_ok=True)
        with progress.stage("Merging", unit="tensors") as stage:
            merge_groups(
                plan, groups, merged, engine=config.merge.engine, weights=_weights(config),
                out_dtype=config.merge.out_dtype, adapters=config.merge.adapters, svd_rank=config.merge.svd_rank,
                method=config.merge.method, parameters=config.merge.parameters,
                progress=stage.update,
            )  # fmt: skip
    models = {"base": plan.base_folder(), **({"joint": joint_model} if joint_model else {})}
    models |= {f"group-{number}": folder for number, folder in enumerate(groups)} | {"merged": merged}
    evaluation = None
    if any(spec.eval_path or spec.eval_split or spec.eval_fraction for spec in config.datasets):
        evaluation = _load_evaluation(output, plan, list(models))
        if evaluation is None:
            evaluation = evaluate_models(plan, models, progress=progress, generate=False)
            recipe = (merged / MERGEKIT_CONFIG_NAME).read_text(encoding="utf-8")
            manifest = read_manifest(merged)
            save_evaluation_figure(evaluation, manifest, merged)
            card = merged_model_card(plan, manifest, recipe, evaluation, picture=EVALUATION_FIGURE)
            (merged / "README.md").write_text(card, encoding="utf-8")
            save_evaluation(evaluation, output)
    report = write_report(output)
    pushed = _push(config, namespace, output, plan, groups, merged, evaluation) if namespace else {}
    return RunResult(plan, groups, merged, joint_model, evaluation, report, pushed)


def joint_config(config: MeritConfig, plan: PartitionPlan) -> MeritConfig:
    """CONFIG with all of the plan's datasets, parts of cut ones too, in one group, without what a split may choose."""
    unset = {
        "split": "joint", "num_groups": None, "group_shares": None, "max_imbalance": None, "split_oversized": False,
        "affinity": None, "embedding_model": None,
    }  # fmt: skip
    whole = with_parts(config, planned_parts(plan.config["datasets"], config))
    return whole.model_copy(update={"plan": config.plan.model_copy(update=unset)})


def _check_merged(config: MeritConfig, plan: PartitionPlan, merged: Path) -> None:
    """A merged model of other settings is neither taken for this one's nor written over."""
    manifest = read_manifest(merged)
    values = group_weights(plan, range(plan.num_groups), _weights(config))
    wanted = {
        "plan": plan.sha256,
        "merge.engine": config.merge.engine,
        "merge.out_dtype": config.merge.out_dtype,
        "merge.method": config.merge.method,
        "merge.parameters": config.merge.parameters,
        "merge.weights": [value / sum(values) for value in values],
        "merge.adapters": config.merge.adapters,
        "merge.svd_rank": config.merge.svd_rank,
    }
    found = {
        "plan": manifest["plan"]["sha256"],
        "merge.engine": manifest["engine"],
        "merge.out_dtype": manifest.get("asked_out_dtype"),
        "merge.method": manifest.get("method", "linear"),
        "merge.parameters": manifest.get("parameters", {}),
        "merge.weights": [group["weight"] for group in manifest["groups"]],
        "merge.adapters": manifest.get("adapters", "dense"),
        "merge.svd_rank": manifest.get("svd_rank"),
    }
    if None in found["merge.weights"]:  # of a method that takes none
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

"""Why is the merged model as it is: losses at many points between checkpoints, and what they say.

    diagnose(plan, ["runs/groups/0", "runs/groups/1"], "runs/diagnosis", merged="runs/merged")

Orchestration only: `probe` measures, `analysis` and `basin` compute, `verdict` judges.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_hf.align import align
from merit_hf.checkpoint import check_output_folder, read_model_config
from merit_hf.config import ConfigError
from merit_hf.diagnosis.analysis import analyse_losses, analyse_weights, rounded
from merit_hf.diagnosis.basin import Survey
from merit_hf.diagnosis.evidence import TOLERANCE, left_basin_on
from merit_hf.diagnosis.losses import Store
from merit_hf.diagnosis.probe import Probed, probe
from merit_hf.diagnosis.verdict import judge
from merit_hf.diagnosis.wording import diagnosis_readme
from merit_hf.manifest import read_manifest
from merit_hf.merge_weights import group_weights
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.verification.verify import verify_checkpoint

SCHEMA_VERSION = 1
DIAGNOSIS_NAME = "diagnosis.json"
MEASUREMENTS_NAME = "measurements"
RENAMED_NAME = "renamed.part"
NUM_BOOTSTRAP = 1000


def diagnose(
    plan: PartitionPlan,
    checkpoints: Sequence[str | Path] = (),
    output: str | Path = "diagnosis",
    *,
    merged: str | Path | None = None,
    joint: str | Path | None = None,
    num_samples: int = 64,
    epsilons: Sequence[float] = (0.25, 0.5, 1.0),
    path_points: int = 1,
    forward_only: bool = False,
    tokens_per_batch: int = 2048,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure whether the groups stayed in one basin; without checkpoints, whether the base is ready.

    Writes `output`/diagnosis.json (keys: docs/diagnose.md) and keeps every finished measurement in
    `output`/measurements, so that a call with the same inputs goes on where it stopped. Memory: the model in float32,
    its gradients unless `forward_only`, and a piece of one tensor from each checkpoint.

    Args:
        plan ([`PartitionPlan`]): names base and datasets; losses are SFT's, on its held-out rows.
        checkpoints (`Sequence`): folders of group checkpoints, in any order. One that does not verify is diagnosed
            too, and the verdict says so. A LoRA adapter stands for the whole model that it makes of the base,
            W + s·B·A, and everything is measured in the space of those weights.
        output (`str` or `Path`): folder for the result.
        merged (`str` or `Path`, *optional*): the merged model; the weights are then those of its merge, otherwise the
            plan's tokens.
        joint (`str` or `Path`, *optional*): a model of the same base trained on everything, to compare with.
        num_samples (`int`, *optional*, defaults to `64`): at most so many held-out rows a dataset, and training rows.
        epsilons (`Sequence[float]`, *optional*): steps of the second differences, as shares of d_k.
        path_points (`int`, *optional*, defaults to `1`): points inside every path, evenly spaced; an odd number, as
            the middle is one of them.
        forward_only (`bool`, *optional*): no gradients, hence no curvature of single layers.
        tokens_per_batch (`int`, *optional*, defaults to `2048`): padded tokens in a batch; does not change the losses.
        progress ([`Progress`], *optional*): where to show it.

    Returns:
        The content of diagnosis.json.

    Raises:
        ConfigError: `output` is a file; an even number of path points; a checkpoint of no group of the plan, one
            given twice, none of a merged group; no held-out rows.
        MeritError: checkpoints that do not fit the base, or values or losses that are not finite.
    """
    start = time.monotonic()
    check_output_folder(Path(output))
    if path_points < 1 or path_points % 2 == 0:
        raise ConfigError(f"path points {path_points}: expected an odd number, since a path's middle is measured.")
    if not epsilons or min(epsilons) <= 0:
        raise ConfigError(f"epsilons {', '.join(map(str, epsilons))}: expected positive numbers.")
    progress, store = progress or Progress(), Store(Path(output) / MEASUREMENTS_NAME)
    folders = _group_folders(plan, checkpoints)
    weights = _weights(plan, folders, merged)
    folders = {group: folders[group] for group in weights}
    others = {label: Path(folder) for label, folder in (("merged", merged), ("joint", joint)) if folder is not None}
    located = {"base": plan.base_folder(), **{f"group-{k}": folder for k, folder in folders.items()}, **others}
    aligned = align(located["base"], list(located.values())[1:])
    survey = Survey(
        weights,
        tuple(sorted(set(map(float, epsilons)))),
        tuple((i + 1) / (path_points + 1) for i in range(path_points)),
        merged=merged is not None,
    )
    sources = dict(zip(located, aligned, strict=True))
    scratch = Path(output) / RENAMED_NAME
    probed = probe(plan, sources, survey, store, num_samples, forward_only, tokens_per_batch, progress, scratch)
    content = _content(plan, probed, folders)
    content["settings"] |= {"num_samples": num_samples, "forward_only": forward_only}
    made = {} if merged is None else read_manifest(merged)
    content["settings"] |= {key: made.get(key) for key in ("adapters", "interpolate_to_init")}
    content["cost"] |= {"seconds": round(time.monotonic() - start, 1)}
    vocab_size = read_model_config(located["base"]).get("vocab_size")
    content["verdict"] = judge(content, plan.sft.get("learning_rate"), vocab_size, plan.trust)
    content = rounded(content)
    save_diagnosis(content, Path(output))
    return content


def save_diagnosis(content: Mapping[str, Any], folder: Path) -> Path:
    """Write README.md and diagnosis.json, each in one step; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("README.md", diagnosis_readme(content)), (DIAGNOSIS_NAME, numbers)):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)
    return folder / DIAGNOSIS_NAME


def _content(plan: PartitionPlan, probed: Probed, folders: Mapping[int, Path]) -> dict[str, Any]:
    """diagnosis.json without its verdict."""
    survey = probed.survey
    losses = analyse_losses(survey, probed.held_out, probed.training, probed.prompts, NUM_BOOTSTRAP)
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "groups" if survey.weights else "base",
        "plan_sha256": plan.sha256,
        "base": {key: plan.base[key] for key in ("repo_id", "revision", "weights_sha256", "chat_template_sha256")},
        "models": list(survey.models()),
        "settings": {
            "epsilons": survey.epsilons,
            "path_positions": survey.positions,
            "sigmas": survey.sigmas,
            "num_noises": survey.num_noises,
            "num_bootstrap": NUM_BOOTSTRAP,
            "confidence": 0.95,
            "tolerance": TOLERANCE,
        },
        "cost": probed.cost,
        "verdict": None,
        "overall": losses.overall,
        "datasets": losses.datasets,
        "skipped": probed.skipped,
    }
    if probed.weights is None:
        return content
    found = analyse_weights(survey, probed.weights)
    if losses.overall["gain"] is not None:
        losses.overall["gain"]["predicted_by_gradient"] = found["by_gradient"]
    content |= {key: found[key] for key in ("geometry", "layers", "tensors")}
    content["groups"] = [
        {
            "group": row["group"],
            "weight": survey.weights[row["group"]],
            "datasets": plan.group(row["group"]).datasets,
            "checks_failed": _failed_checks(plan, folders[row["group"]]),
            **place,
            **row,
            "left_basin_on": left_basin_on(content, row["group"]),
        }
        for row, place in zip(losses.groups, found["by_group"], strict=True)
    ]
    return content


def _group_folders(plan: PartitionPlan, checkpoints: Sequence[str | Path]) -> dict[int, Path]:
    folders: dict[int, Path] = {}
    for checkpoint in map(Path, checkpoints):
        number = read_manifest(checkpoint).get("group")
        if type(number) is not int or not 0 <= number < plan.num_groups:
            raise ConfigError(
                f"{checkpoint}: its merit.json names group {number}, and the plan has groups 0 to "
                f"{plan.num_groups - 1}. Give checkpoints of this plan's groups."
            )
        if number in folders:
            raise ConfigError(f"group {number} is given twice: {folders[number]} and {checkpoint}. Give one of them.")
        folders[number] = checkpoint
    return dict(sorted(folders.items()))


def _weights(plan: PartitionPlan, folders: Mapping[int, Path], merged: str | Path | None) -> dict[int, float]:
    """{group: w_k}: those of the merge, else the plan's tokens, over the groups that are given."""
    if merged is None:
        values = group_weights(plan, list(folders), "tokens")
        return {group: value / sum(values) for group, value in zip(folders, values, strict=True)}
    if not folders:
        raise ConfigError("a merged model without its groups: give the group checkpoints that it was merged from.")
    manifest = read_manifest(merged)
    if manifest.get("kind") != "merged":
        raise ConfigError(f"{merged}: its merit.json is of a {manifest.get('kind')}, expected a merged model.")
    weights = {int(row["group"]): float(row["weight"]) for row in manifest["groups"]}
    absent = sorted(weights.keys() - folders.keys())
    if absent:
        raise ConfigError(
            f"{merged}: was merged from group {absent[0]} too, and no checkpoint of it is given. Give all of "
            f"{', '.join(map(str, sorted(weights)))}."
        )
    return dict(sorted(weights.items()))


def _failed_checks(plan: PartitionPlan, folder: Path) -> list[str]:
    return [
        f"{check.name} is {check.found}, expected {check.expected}"
        for check in verify_checkpoint(plan, folder)
        if not check.ok
    ]

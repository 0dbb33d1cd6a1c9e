"""What lies in a run's folder: a plan, and what there is of groups, joint, merged model, evaluation, diagnosis."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merit_hf.config import ConfigError, MeritError
from merit_hf.manifest import MANIFEST_NAME, read_manifest
from merit_hf.plan import PLAN_NAME, PartitionPlan

# Where the commands leave their results, relative to the run's folder; the first that is there counts.
_EVALUATIONS = ("evaluation/evaluation.json", "evaluation.json")
_DIAGNOSES = ("diagnosis/diagnosis.json", "diagnosis.json")


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint that was trained under a plan.

    Attributes:
        manifest: its merit.json. log: (step, loss) of every logged step; empty where no trainer_state.json is left.
    """

    manifest: dict[str, Any]
    log: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RoundFolder:
    """A round of a run: its number, from 1, its plan, and {group: its checkpoint}."""

    number: int
    plan: PartitionPlan
    groups: dict[int, TrainedModel]


@dataclass(frozen=True)
class RunFolder:
    """A run as it lies on disk.

    Attributes:
        plan_name: the plan's folder, relative to the run's: `plan`, or `.` where the folder is a plan itself.
        groups: {group: its checkpoint}; of a run in rounds, the last one's. merged: merit.json of the merged model.
        rounds: those that are there; none of a run that merges once.
        evaluation, diagnosis: the JSON of `merit evaluate` and `merit diagnose`.
        notices: what lies there and is not shown, with the reason.
    """

    plan: PartitionPlan
    plan_name: str
    groups: dict[int, TrainedModel]
    joint: TrainedModel | None
    merged: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    diagnosis: dict[str, Any] | None
    notices: list[str]
    rounds: list[RoundFolder] = field(default_factory=list)


def read_run(folder: Path) -> RunFolder:
    """Read what is in `folder`: the output of `merit run`, a plan alone, or anything between.

    Raises:
        ConfigError: no plan in it. MeritError: a file is there but cannot be read.
    """
    places = [name for name in ("plan", ".") if (folder / name / PLAN_NAME).is_file()]
    if not places:
        raise ConfigError(
            f"{folder}: neither plan/{PLAN_NAME} nor {PLAN_NAME} is in it. Give the --output of `merit run`, a folder "
            "that holds a plan in plan/, or a plan."
        )
    plan = PartitionPlan.from_pretrained(folder / places[0])
    notices: list[str] = []
    rounds = _read_rounds(folder, notices)
    groups = rounds[-1].groups if rounds else _read_groups(folder, "groups", plan, notices)
    joint = _trained(folder / "joint" / "groups" / "0")
    if joint is not None and joint.manifest.get("base", {}).get("weights_sha256") != plan.base["weights_sha256"]:
        notices.append("joint was trained from another base: it is left out.")
        joint = None
    merged = read_manifest(folder / "merged") if (folder / "merged" / MANIFEST_NAME).is_file() else None
    # The rounds of a run have plans of their own, and name the one of all rows.
    named = [(merged or {}).get(key) or {} for key in ("plan", "round")]
    if merged is not None and plan.sha256 not in (named[0].get("sha256"), named[1].get("plan_sha256")):
        notices.append("merged was merged under another plan: it is left out.")
        merged = None
    return RunFolder(
        plan, places[0], groups, joint, merged,
        _of_this_plan(folder, _EVALUATIONS, plan, notices), _of_this_plan(folder, _DIAGNOSES, plan, notices), notices,
        rounds,
    )  # fmt: skip


def _read_rounds(folder: Path, notices: list[str]) -> list[RoundFolder]:
    found: list[RoundFolder] = []
    while (folder / "rounds" / str(len(found) + 1) / "plan" / PLAN_NAME).is_file():
        name = f"rounds/{len(found) + 1}"
        plan = PartitionPlan.from_pretrained(folder / name / "plan")
        found.append(RoundFolder(len(found) + 1, plan, _read_groups(folder, f"{name}/groups", plan, notices)))
    return found


def _read_groups(folder: Path, name: str, plan: PartitionPlan, notices: list[str]) -> dict[int, TrainedModel]:
    groups = {}
    for group in range(plan.num_groups):
        found = _trained(folder / name / str(group))
        if found is not None and _is_of(found.manifest, plan, group):
            groups[group] = found
        elif found is not None:
            notices.append(f"{name}/{group} was trained under another plan, or as another group: it is left out.")
    return groups


def _trained(folder: Path) -> TrainedModel | None:
    if not (folder / MANIFEST_NAME).is_file():
        return None
    state = folder / "trainer_state.json"
    history = _read_json(state).get("log_history", []) if state.is_file() else []
    try:
        log = [(float(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    except (KeyError, TypeError, ValueError) as error:
        raise MeritError(f"{state}: log_history is not a Trainer's ({type(error).__name__}: {error}).") from error
    return TrainedModel(read_manifest(folder), log)


def _is_of(manifest: dict[str, Any], plan: PartitionPlan, group: int) -> bool:
    """By the group's identity: a plan that was extended keeps those of its finished groups."""
    return manifest.get("group") == group and manifest.get("group_sha256") == plan.group(group).group_sha256


def _of_this_plan(
    folder: Path, names: tuple[str, ...], plan: PartitionPlan, notices: list[str]
) -> dict[str, Any] | None:
    shown, found = "", None
    for name in names:
        if (folder / name).is_file():
            content = _read_json(folder / name)
            if content.get("plan_sha256", plan.sha256) != plan.sha256:
                notices.append(f"{name} is of another plan: it is left out.")
            elif found is None:
                shown, found = name, content
            else:
                notices.append(f"{name} is left out: {shown} is shown.")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MeritError(f"{path}: not valid JSON ({error}). Delete it and run the command that wrote it.") from error
    if not isinstance(content, dict):
        raise MeritError(f"{path}: expected a JSON object, found {type(content).__name__}. Delete it.")
    return content

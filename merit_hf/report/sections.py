"""The facts of the report's sections on plan, training, merge and origin, from a run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from merit_hf.cards import how_split
from merit_hf.parents import merge_command
from merit_hf.plan import PartitionPlan
from merit_hf.report import charts
from merit_hf.report.blocks import Cell, Table, count, decimals, group_cell, listed, number, plural, text
from merit_hf.report.run_folder import RunFolder, TrainedModel
from merit_hf.report.words import cosine_sentence, is_noise, verdict_sentence
from merit_hf.tables import MAX_ALL_PAIRS, PlannedGroup
from merit_hf.text import hide_local_paths, public_text
from merit_hf.trust_words import trust_sentences

_MAX_PAIRS = 6


def plan_facts(plan: PartitionPlan) -> dict[str, Any]:
    """Groups, conflicts, axes and datasets of the plan, with the figures that show them."""
    groups = [dataset.group for dataset in plan.datasets]
    tokens = [dataset.num_input_tokens for dataset in plan.datasets]
    totals = [group.num_input_tokens for group in plan.groups]
    facts: dict[str, Any] = {
        "how": how_split(plan),
        "groups": _groups_table(plan),
        "datasets": _datasets_table(plan),
        "balance": max(totals) / (sum(totals) / len(totals)) - 1,
        "cut": sum(dataset.num_truncated for dataset in plan.datasets),
        "dropped": sum(dataset.num_dropped for dataset in plan.datasets),
        "charts": [charts.sizes_chart(plan.names, groups, tokens, totals)],
        "conflict": None,
    }
    if plan.is_measured and len(plan.datasets) > 1:
        coordinates = np.array([dataset.coordinates for dataset in plan.datasets])
        matrix = plan.conflict_matrix if len(plan.datasets) <= MAX_ALL_PAIRS else None
        if matrix is not None:
            # Of more datasets the page would have to carry T² numbers; figures/conflict.png shows their means.
            facts["charts"].append(charts.conflict_chart(matrix, plan.names, groups))
        facts["charts"] += [
            charts.axes_chart(coordinates, plan.names, groups, plan.explained, tokens),
        ]
        facts["conflict"] = {
            "cosines": cosine_sentence(plan).replace(" -", " −"),
            "verdict": verdict_sentence(plan),
            "noise": is_noise(plan),
            "trust": [line.replace(" -", " −") for line in trust_sentences(plan)],
            "whole": matrix is not None,
            "pairs": _pairs_table(plan),
            "axes": _axes_table(plan),
            "num_axes": coordinates.shape[1],
        }
    return facts


def training_facts(run: RunFolder) -> dict[str, Any]:
    """What every group took and counted, and the losses that were logged."""
    rows = []
    mismatched = []
    # Groups that came in as a merged model: nobody here has to train them.
    merged = set(((run.merged or {}).get("with_merged") or {}).get("groups", []))
    for label, planned, trained in _trainings(run):
        if trained is None:
            state = "in the merged model that came in" if planned.group in merged else "not trained yet"
            rows.append([label, Cell(state, tone="note"), count(planned.num_steps),
                         count(planned.train_input_tokens), *[text(None)] * 5])  # fmt: skip
            continue
        facts = trained.manifest
        complete, stopped = (facts["status"] == status for status in ("complete", "stopped"))
        # A training that was stopped says itself that it has not all of its tokens.
        same = stopped or facts["num_input_tokens"] == planned.train_input_tokens
        if not same or (facts["num_loss_tokens"] != planned.train_loss_tokens and not stopped):
            mismatched.append(label.text)
        rows.append(
            [
                label, Cell(str(facts["status"]), tone="" if complete else "note" if stopped else "bad"),
                count(facts["num_steps"]), count(planned.train_input_tokens),
                count(facts["num_input_tokens"], "good" if same else "bad"), count(facts["num_loss_tokens"]),
                _padding(facts), *_ends(trained),
            ]
        )  # fmt: skip
    if run.joint is not None:
        facts = run.joint.manifest
        rows.append([Cell("joint"), Cell(str(facts["status"])), count(facts["num_steps"]), text(None),
                     count(facts["num_input_tokens"]), count(facts["num_loss_tokens"]), _padding(facts),
                     *_ends(run.joint)])  # fmt: skip
    columns = [("group", "text"), ("status", "text"), ("steps", "number"), ("tokens planned", "number"),
               ("tokens counted", "number"), ("of these with loss", "number"), ("padding", "number"),
               ("first logged loss", "number"), ("last logged loss", "number")]  # fmt: skip
    logs = training_logs(run)
    return {
        "table": Table("training", "What every group was trained on", columns, rows),
        "held_out": _held_out_table(run),
        "mismatched": mismatched,
        "missing": []
        if run.rounds
        else [group.group for group in run.plan.groups if group.group not in run.groups and group.group not in merged],
        "thinned": any(len(log) > charts.MAX_POINTS for log in logs.values()),
        "charts": [charts.losses_chart(logs)] if logs else [],
    }


def _trainings(run: RunFolder) -> list[tuple[Cell, PlannedGroup, TrainedModel | None]]:
    """Every group of every round, as it is called, as it was planned, and as it was trained."""
    if not run.rounds:
        return [(group_cell(group.group), group, run.groups.get(group.group)) for group in run.plan.groups]
    return [
        (replace(group_cell(group.group), text=f"round {place.number}: {group.group}"), group,
         place.groups.get(group.group))
        for place in run.rounds
        for group in place.plan.groups
    ]  # fmt: skip


def _held_out_table(run: RunFolder) -> Table | None:
    """Held-out losses that were logged on the way; None where no group was evaluated while it trained."""
    rows = [
        [group_cell(group), Cell(str(entry["dataset"])), count(entry["first_step"]), number(entry["first"], 4),
         count(entry["last_step"]), number(entry["last"], 4)]
        for group, trained in sorted(run.groups.items())
        for entry in trained.manifest.get("held_out_loss", [])
    ]  # fmt: skip
    columns = [("group", "text"), ("dataset", "text"), ("first step", "number"), ("held-out loss", "number"),
               ("last step", "number"), ("held-out loss then", "number")]  # fmt: skip
    return Table("held_out_training", "Held-out loss while training", columns, rows) if rows else None


def training_logs(run: RunFolder) -> dict[str, list[tuple[float, float]]]:
    """{"group 0" …, "joint": (step, loss) of what was logged}."""
    places = [(f"round {place.number}, ", place.groups) for place in run.rounds] or [("", run.groups)]
    logs = {
        f"{where}group {number}": model.log
        for where, groups in places
        for number, model in sorted(groups.items())
        if model.log
    }
    return logs | ({"joint": run.joint.log} if run.joint is not None and run.joint.log else {})


def merge_facts(run: RunFolder) -> dict[str, Any] | None:
    """Weights and displacements of the merged model; None where there is none yet."""
    manifest = run.merged
    if manifest is None:
        return None
    stats = manifest["stats"]
    moved = stats["group_displacements"]
    alpha, place = manifest.get("interpolate_to_init", 1), manifest.get("round")
    weights = [entry["weight"] for entry in manifest["groups"]]
    rows = [
        [group_cell(entry["group"]), count(entry["num_input_tokens"]), number(entry["weight"], 4), number(distance, 3)]
        for entry, distance in zip(manifest["groups"], moved, strict=True)
    ]
    # Methods of mergekit other than the mean may take no weights.
    weighted = manifest.get("method", "linear") == "linear" and None not in weights
    columns = [("group", "text"), ("tokens trained", "number"), ("weight", "number"), ("distance from base", "number")]
    merged = {entry["group"] for entry in manifest["groups"]}
    return {
        "table": Table("weights", "What went into the merged model", columns, rows,
                       [Cell("merged"), count(sum(entry["num_input_tokens"] for entry in manifest["groups"])),
                        number(sum(weights) if weighted else None, 4), number(stats["displacement"], 3)]),
        "manifest": manifest,
        "stats": stats,
        "cast_share": stats["cast_loss"] / stats["displacement"] if stats["displacement"] else 0.0,
        "mean_distance": float(np.dot(weights, moved)) if weighted else float(np.mean(moved)),
        "method": manifest.get("method", "linear"),
        # What the mean moved, before it was drawn to the base.
        "agreement": step_agreement(weights, moved, stats["displacement"] / alpha) if weighted else None,
        "alpha": alpha,
        "origin": f"what round {place['number'] - 1} has merged" if place and place["number"] > 1 else "the base",
        "missing": [group.group for group in run.plan.groups if group.group not in merged],
    }  # fmt: skip


def step_agreement(weights: Sequence[float], distances: Sequence[float], merged: float) -> float | None:
    """The mean cosine between the groups' steps from the base, each pair weighted by its share of the merged step.

    From ‖Σ w_k s_k‖² = Σ w_k²‖s_k‖² + 2 Σ_{j<k} w_j w_k ‖s_j‖‖s_k‖ cos(s_j, s_k): lengths alone give it. None for
    one group, or steps of length 0.
    """
    parts = np.asarray(weights) * np.asarray(distances)
    pairs = float(parts.sum() ** 2 - (parts**2).sum())
    return None if pairs <= 0 else float(np.clip((merged**2 - (parts**2).sum()) / pairs, -1.0, 1.0))


def provenance_facts(run: RunFolder) -> dict[str, Any]:
    """Base, data, settings, versions and commands."""
    plan = run.plan
    rows = [
        [Cell(dataset.name), group_cell(dataset.group),
         text(f"{dataset.repo_id} {dataset.config or ''} {dataset.split or ''}".strip() if dataset.repo_id
              else "local"), text((dataset.revision or "")[:12]), text(dataset.fingerprint[:16])]
        for dataset in plan.datasets
    ]  # fmt: skip
    columns = [("dataset", "text"), ("group", "number"), ("from", "text"), ("revision", "text"),
               ("fingerprint", "text")]  # fmt: skip
    # One line a dataset: a mixture of hundreds stays readable.
    config = {key: value for key, value in plan.config.items() if key != "datasets"}
    return {
        "sources": Table("sources", "Where the datasets come from", columns, rows),
        "commands": _commands(run),
        "config": public_yaml(config),
        "sft": {name: value for name, value in sorted(plan.sft.items()) if value is not None},
        "versions": dict(sorted(plan.versions.items())),
        "cost": plan.cost,
    }


def public_yaml(content: Mapping[str, Any]) -> str:
    """YAML without local paths, the unset keys left out."""

    def pruned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: pruned(entry) for key, entry in value.items() if entry not in (None, {}, [])}
        return value

    return "\n".join(hide_local_paths(line) for line in yaml.safe_dump(pruned(content), sort_keys=False).splitlines())


def _groups_table(plan: PartitionPlan) -> Table:
    columns = [("group", "text"), ("datasets", "text"), ("examples", "number"), ("tokens in one pass", "number"),
               ("steps", "number"), ("tokens trained", "number"), ("weight", "number")]  # fmt: skip
    rows = [
        [group_cell(group.group), text(listed([public_text(name, 40) for name in group.datasets], 4)),
         count(group.num_examples), count(group.num_input_tokens), count(group.num_steps),
         count(group.train_input_tokens), number(group.weight, 4)]
        for group in plan.groups
    ]  # fmt: skip
    sums = [sum(getattr(group, name) for group in plan.groups)
            for name in ("num_examples", "num_input_tokens", "num_steps", "train_input_tokens", "weight")]  # fmt: skip
    last = [Cell("all"), text(plural(len(plan.datasets), "dataset")), *(count(value) for value in sums[:4]),
            number(sums[4], 4)]  # fmt: skip
    return Table("groups", "The groups", columns, rows, last)


def _datasets_table(plan: PartitionPlan) -> Table:
    measured = plan.is_measured
    axes = max((len(dataset.coordinates) for dataset in plan.datasets), default=0)
    columns = [("dataset", "text"), ("group", "number"), ("examples", "number"), ("tokens", "number"),
               ("with loss", "number"), ("cut", "number"), ("dropped", "number")]  # fmt: skip
    if measured:
        columns += [("base loss", "number"), ("gradient norm", "number")]
        columns += [(f"axis {axis + 1}", "number") for axis in range(axes)]
    rows = []
    for dataset in plan.datasets:
        cells = [Cell(dataset.name), group_cell(dataset.group), count(dataset.num_examples),
                 count(dataset.num_input_tokens), count(dataset.num_loss_tokens), count(dataset.num_truncated),
                 count(dataset.num_dropped)]  # fmt: skip
        if measured:
            cells += [number(dataset.base_loss), number(dataset.gradient_norm, 2)]
            cells += [number(value) for value in [*dataset.coordinates, *[None] * axes][:axes]]
        rows.append(cells)
    return Table("datasets", "The datasets", columns, rows)


def _pairs_table(plan: PartitionPlan) -> Table:
    pairs = plan.conflict_pairs()
    assert pairs is not None
    lowest, highest = pairs.most_extreme(_MAX_PAIRS)
    rows = []
    for first, second, cosine in dict.fromkeys([*lowest, *highest[::-1]]):
        a, b = plan.datasets[first], plan.datasets[second]
        together = "same group" if a.group == b.group else f"groups {a.group} and {b.group}"
        rows.append([Cell(a.name), Cell(b.name), number(cosine, 2), text(together)])
    columns = [("dataset", "text"), ("and", "text"), ("cosine", "number"), ("where they went", "text")]
    return Table("pairs", "The pairs that conflict most, and those that agree most", columns, rows)


def _axes_table(plan: PartitionPlan) -> Table:
    angles = plan.bounds.get("sin_angle") or []
    gaps = plan.bounds.get("eigengaps") or []
    names = [public_text(name, 40) for name in plan.names]
    rows = []
    for axis in range(max(len(dataset.coordinates) for dataset in plan.datasets)):
        values = np.array([dataset.coordinates[axis] for dataset in plan.datasets])
        order = np.argsort(values, kind="stable")
        rows.append(
            [
                Cell(f"axis {axis + 1}"),
                Cell(f"{plan.explained[axis]:.0%}" if axis < len(plan.explained) else "–", None),
                number(gaps[axis] if axis < len(gaps) else None, 2),
                number(angles[axis] if axis < len(angles) else None, 2),
                text(listed([names[i] for i in order[:3]])), text(listed([names[i] for i in order[::-1][:3]])),
            ]
        )  # fmt: skip
    columns = [("axis", "text"), ("share of the variance", "number"), ("eigengap", "number"),
               ("sin(angle) at most", "number"), ("lowest", "text"), ("highest", "text")]  # fmt: skip
    return Table("axes-table", "The axes of conflict", columns, rows)


def _padding(facts: Mapping[str, Any]) -> Cell:
    padding, tokens = facts.get("num_padding_tokens"), facts["num_input_tokens"]
    if padding is None or not padding + tokens:
        return text(None)
    return Cell(f"{padding / (padding + tokens):.0%}", padding / (padding + tokens))


def _ends(trained: TrainedModel) -> list[Cell]:
    if trained.log:
        return [number(trained.log[0][1]), number(trained.log[-1][1])]
    return [text(None), number(trained.manifest.get("final_loss"))]


def _commands(run: RunFolder) -> list[tuple[str, str]]:
    """(what it does, the call), to be run in the folder of the run."""
    plan, name = run.plan, run.plan_name
    groups = " ".join(f"groups/{group.group}" for group in plan.groups)
    shown = merge_command(plan, run.merged) if run.merged else f"merit merge PLAN {groups} --output merged"
    merge = shown.replace(f"merit merge {plan.repo_id or 'PLAN'} ", f"merit merge {name} ", 1)
    joint = " --joint joint/groups/0" if run.joint else ""
    models = f"{'joint=joint/groups/0 ' if run.joint else ''}{groups} merged"
    if run.rounds:
        last = f"rounds/{len(run.rounds)}"
        checked = " ".join(f"{last}/groups/{group.group}" for group in plan.groups)
        return [
            ("all rounds", f"merit run CONFIG.yaml{' --joint' if run.joint else ''} --output ."),
            ("checks of the last round", f"merit verify {last}/plan {checked}"),
            ("this page", "merit report ."),
        ]
    return [
        ("the plan", f"merit plan CONFIG.yaml --output {name}"),
        ("the groups", f"merit train {name} --group all --output groups"),
        ("checks", f"merit verify {name} {groups}"),
        ("the merged model", merge),
        ("held-out losses", f"merit evaluate {models} --plan {name} --output evaluation"),
        ("why it is as it is", f"merit diagnose {name} {groups} --merged merged{joint} --output diagnosis"),
        ("this page", "merit report ."),
    ]


def summed_tokens(plan: PartitionPlan) -> str:
    return f"{sum(group.num_input_tokens for group in plan.groups):,}"


def in_short(run: RunFolder, training: Mapping[str, Any], merge: Mapping[str, Any] | None) -> list[str]:
    """The first lines of the page: what was made, in sentences."""
    plan = run.plan
    lines = [
        f"{plural(len(plan.datasets), 'dataset')} ({summed_tokens(plan)} tokens a pass) were split into "
        f"{plural(plan.num_groups, 'group')}, {how_split(plan)}."
    ]
    if plan.is_measured and len(plan.datasets) > 1:
        lines.append(verdict_sentence(plan))
    done = sum(model.manifest["status"] == "complete" for model in run.groups.values())
    if run.groups:
        counted = (
            f"but the tokens counted in group {listed(training['mismatched'], 9)} are not those planned"
            if training["mismatched"]
            else "and every one counted exactly the tokens that were planned"
        )
        where = f"In the last of {plural(len(run.rounds), 'round')}, " if run.rounds else ""
        lines.append(f"{where}{done} of {plural(plan.num_groups, 'group')} are trained, {counted}.")
    if merge is not None:
        lines.append(
            f"The merged model lies {decimals(merge['stats']['displacement'], 2)} from {merge['origin']}; the groups "
            f"lie {decimals(merge['mean_distance'], 2)} away on average."
        )
    return lines

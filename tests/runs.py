"""Folders of runs of any size and state, with made-up numbers that agree: what `merit report` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merit_hf import tables
from merit_hf.conflict import conflict_matrix
from merit_hf.ledger import TokenLedger
from merit_hf.manifest import group_manifest, write_manifest
from merit_hf.partition import num_axes_for, principal_axes, split_by_conflict
from merit_hf.plan import PartitionPlan, PlannedDataset, PlannedGroup, group_identity

BASE = {
    "repo_id": "org/base", "revision": "b" * 40, "weights_sha256": "a" * 64, "chat_template_sha256": "d" * 64,
    "dtype": "bfloat16",
}  # fmt: skip
SFT = {"learning_rate": 1e-5, "max_steps": -1, "num_train_epochs": 1.0}


def make_plan(folder: Path, names: Sequence[str], num_groups: int = 2, seed: int = 0) -> PartitionPlan:
    """A plan on disk that loads, of random gradients around a few common directions."""
    rng = np.random.default_rng(seed)
    names = sorted(names)
    count = len(names)
    directions = rng.normal(size=(5, 16))
    matrix = conflict_matrix(directions[np.arange(count) % 5] + 0.8 * rng.normal(size=(count, 16)))
    tokens = rng.integers(500, 5000, size=count).tolist()
    members = split_by_conflict(matrix, tokens, num_groups)
    axes = num_axes_for(num_groups)
    coordinates, values = principal_axes(matrix, axes)
    datasets = [
        PlannedDataset(
            name=name, group=int(members[i]), tag=None, format="prompt-completion", fingerprint=f"{i:064x}",
            tokens_digest=f"{i:064x}", num_examples=10 + i % 7, num_input_tokens=tokens[i],
            num_loss_tokens=tokens[i] // 3, num_sampled=8, gradient_norm=1.0 + i % 3, base_loss=2.0 + 0.01 * i,
            coordinates=coordinates[i].tolist(), repo_id=f"org/data-{i}", revision="c" * 40, split="train",
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    groups = []
    for number in range(num_groups):
        mine = [dataset for dataset in datasets if dataset.group == number]
        taken = sum(dataset.num_input_tokens for dataset in mine)
        groups.append(
            PlannedGroup(
                group=number, datasets=[dataset.name for dataset in mine],
                num_examples=sum(dataset.num_examples for dataset in mine), num_input_tokens=taken,
                num_loss_tokens=sum(dataset.num_loss_tokens for dataset in mine), num_steps=5 + number,
                train_input_tokens=taken, train_loss_tokens=sum(dataset.num_loss_tokens for dataset in mine),
                weight=taken / sum(tokens), group_sha256=group_identity(BASE, mine, SFT),
            )
        )  # fmt: skip
    section = {"split": "merit", "num_groups": num_groups, "num_samples": 8, "sketch": "count_sketch",
               "sketch_dim": 64, "stride": 5, "reduction": "token_mean", "center": "column", "balance": "tokens",
               "axes": "global", "tokens_per_batch": 2048, "seed": 0}  # fmt: skip
    plan = PartitionPlan(
        config={"base": {"model_name_or_path": "org/base"}, "datasets": [{"name": name} for name in names],
                "plan": section, "sft": SFT, "merge": {"engine": "safetensors", "weights": "tokens"}},
        base=BASE, datasets=datasets, groups=groups, sft=SFT, conflict_matrix=matrix,
        explained=(values**2 / (values**2).sum()).tolist()[:axes],
        bounds={"operator_norm": 0.02, "eigengaps": [0.5] * axes, "sin_angle": [0.04] * axes,
                "structure_p_value": 0.005, "verdict": "structure"},
        cost={"gradient_seconds": 12.0, "tokens": 4000}, versions={"merit_hf": "0.1.0", "torch": "2.9.0"},
        skipped={"empty": "it has no rows"},
    )  # fmt: skip
    # As save_pretrained, without the time that its figures and its card take.
    (folder / "data").mkdir(parents=True)
    tables.write_datasets(folder, datasets)
    tables.write_groups(folder, groups)
    tables.write_conflict(folder, names, tables.conflict_pairs(matrix))
    plan.save_settings(folder)
    return PartitionPlan.from_pretrained(folder)


def train(plan: PartitionPlan, folder: Path, seed: int = 1) -> None:
    """groups/K: merit.json and trainer_state.json, no weights."""
    rng = np.random.default_rng(seed)
    for group in plan.groups:
        target = folder / "groups" / str(group.group)
        target.mkdir(parents=True)
        ledger = dict(zip(TokenLedger.FIELDS, (group.train_input_tokens, group.train_loss_tokens, 40), strict=True))
        write_manifest(target, group_manifest(plan, group.group, ledger, group.num_steps, plan.sft, "complete"))
        losses = (3.0 - 0.1 * np.arange(group.num_steps) + 0.05 * rng.normal(size=group.num_steps)).tolist()
        log = [{"step": step + 1, "loss": loss, "epoch": 0.1} for step, loss in enumerate(losses)]
        state = {
            "global_step": group.num_steps,
            "log_history": [*log, {"step": group.num_steps, "train_runtime": 1.0}],
        }
        (target / "trainer_state.json").write_text(json.dumps(state))


def merge(plan: PartitionPlan, folder: Path) -> None:
    """merged/merit.json."""
    (folder / "merged").mkdir(parents=True)
    weights = np.array([group.weight for group in plan.groups])
    moved = 1.0 + 0.25 * np.arange(plan.num_groups)
    stats = {
        "num_tensors": 2, "num_parameters": 9000, "group_displacements": moved.tolist(), "cast_loss": 0.01,
        # Steps at right angles.
        "displacement": float(np.sqrt(((weights * moved) ** 2).sum())),
    }  # fmt: skip
    manifest = {
        "schema_version": 1, "kind": "merged", "weights": "tokens", "out_dtype": "bfloat16", "engine": "safetensors",
        "plan": {"repo_id": None, "revision": None, "sha256": plan.sha256}, "base": BASE, "versions": {}, "files": {},
        "groups": [{"group": group.group, "weight": group.weight, "num_input_tokens": group.train_input_tokens}
                   for group in plan.groups],
        "stats": stats,
    }  # fmt: skip
    write_manifest(folder / "merged", manifest)


def evaluation(plan: PartitionPlan) -> dict[str, Any]:
    """Merged beats the base on all datasets but each third, by twice as much on the next."""
    models = ["base", "joint", *(f"group-{group.group}" for group in plan.groups), "merged"]
    rows = {}
    for number, dataset in enumerate(plan.datasets):
        loss = dict.fromkeys(models, 3.0) | {"joint": 2.0}
        loss["merged"] = 3.0 + (0.25, -0.5, -1.0)[number % 3]
        loss[f"group-{dataset.group}"] = 2.25
        rows[dataset.name] = {"group": dataset.group, "num_examples": 8, "num_loss_tokens": 90, "loss": loss}
    mean = {label: sum(row["loss"][label] for row in rows.values()) / len(rows) for label in models}
    return {
        "metric": "held-out SFT loss, nats a token", "plan_sha256": plan.sha256, "models": models, "datasets": rows,
        "mean": mean,
    }  # fmt: skip


def answers(content: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with answers, as `merit evaluate` gives it: scores, lengths, notes and a harness."""
    models = content["models"]
    for row in content["datasets"].values():
        row |= {
            "metric": "exact_match", "metric_from": "data", "num_answers": 8, "free_form": True,
            "reference_tokens": 40.0, "score": dict.fromkeys(models, 0.5),
            "length_ratio": dict.fromkeys(models, 1.0) | {"merged": 0.25},
        }  # fmt: skip
        change = row["loss"]["merged"] - 3.0
        row["differences"] = {"merged": {"base": {"loss": {"difference": change, "low": change - 0.3,
                                                           "high": change + 0.3}}}}  # fmt: skip
    first = next(iter(content["datasets"]))
    tasks = {"gsm8k": {"exact_match": {label: {"value": 0.125, "stderr": 0.01} for label in models}}}
    return content | {
        "schema_version": 1, "mean_score": dict.fromkeys(models, 0.5), "mean_length_ratio": dict.fromkeys(models, 1.0),
        "notes": [f"merged answers {first} with less than half of the reference's tokens."],
        "harness": {"name": "lm-evaluation-harness", "version": "0.4.9", "settings": {}, "tasks": tasks},
    }  # fmt: skip


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def diagnosis(plan: PartitionPlan) -> dict[str, Any]:
    """A diagnosis of kind `groups`: the last group left the basin on the first dataset."""
    last, first = plan.num_groups - 1, plan.datasets[0].name
    paths = [(f"group-{group.group}", "mean") for group in plan.groups]

    def entry(number: int) -> dict[str, Any]:
        measured = (-0.4, 0.2, 0.3)[min(number, 2)]
        return {
            "num_examples": 8, "num_loss_tokens": 90, "loss": {"base": 3.0, "mean": 2.5},
            "gain": {
                "measured": estimate(measured), "by_group": [], "predicted_by_gradient": 0.2,
                "ladder": [{"epsilon": epsilon, "predicted": estimate(0.2), "rho": estimate(measured / 0.2)}
                           for epsilon in (0.25, 0.5, 1.0)],
            },
            "barriers": [{"from": a, "to": b, "height": estimate(0.4 if number == 0 else -0.1), "position": 0.5,
                          "losses": [2.0, 2.1, 2.0]} for a, b in paths],
            "changes": {"mean-base": estimate(-0.5), "mean-line": estimate(0.02), "mean-joint": estimate(0.3),
                        "merged-mean": estimate(0.0)},
            "exclude": {},
            "perturbation": [{"sigma": sigma, "increase": estimate(10 * sigma)} for sigma in (0.01, 0.1)],
        }  # fmt: skip

    labels = [*(f"group-{group.group}" for group in plan.groups), "mean"]
    finding = {"code": "left_basin", "severity": "problem", "groups": [last], "datasets": [first],
               "text": f"Group {last} left the basin on {first}.", "remedy": "Lower its learning rate."}  # fmt: skip
    return {
        "schema_version": 1, "kind": "groups", "plan_sha256": plan.sha256, "models": ["base", *labels],
        "settings": {"num_samples": 64}, "cost": {},
        "verdict": {"status": "problem", "summary": f"Group {last} left the basin on 1 dataset.",
                    "remedy": f"Merge with --exclude {last}.", "findings": [finding]},
        "groups": [{"group": group.group, "weight": group.weight, "datasets": group.datasets, "checks_failed": [],
                    "displacement": 1.5, "distance_from_mean": 1.0, "variance_share": 0.5, "curvature_share": None,
                    "own": {"held_out": estimate(-0.4), "training": estimate(-0.6)}, "exclude": estimate(-0.2),
                    "left_basin_on": [first] if group.group == last else []} for group in plan.groups],
        "geometry": {"labels": labels, "norms": [1.0] * len(labels), "cosines": np.eye(len(labels)).tolist(),
                     "base_norm": 30.0, "merged_from_mean": 0.0, "line_position": 0.5},
        "overall": entry(1),
        "datasets": {dataset.name: {"group": dataset.group, **entry(i)} for i, dataset in enumerate(plan.datasets)},
        "layers": [{"layer": f"layers.{i}", "num_parameters": 100, "variance": 0.1, "variance_share": 0.5,
                    "curvature": None, "curvature_share": None} for i in range(2)],
        "tensors": [], "skipped": {"tiny": "it has no held-out rows"},
    }  # fmt: skip


def make_run(folder: Path, names: Sequence[str], num_groups: int = 2) -> PartitionPlan:
    """All that `merit run`, `merit evaluate` and `merit diagnose` leave, but the weights."""
    plan = make_plan(folder / "plan", names, num_groups)
    train(plan, folder)
    merge(plan, folder)
    (folder / "evaluation.json").write_text(json.dumps(answers(evaluation(plan))))
    (folder / "diagnosis").mkdir()
    (folder / "diagnosis" / "diagnosis.json").write_text(json.dumps(diagnosis(plan)))
    return plan

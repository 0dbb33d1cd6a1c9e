"""Which group a dataset joins, and what training each group will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from merit_hf import partition
from merit_hf.config import MeritError, PlanSection
from merit_hf.data import count_tokens
from merit_hf.identity import counts_steps, group_fields
from merit_hf.ledger import count_steps, replay
from merit_hf.mixture import PreparedDataset
from merit_hf.plan import PlannedDataset, PlannedGroup, group_identity
from merit_hf.sft import group_steps, identity_fields, training_rows

GRADIENT_SPLITS = ("merit", "kmeans")


def split_datasets(
    prepared: Sequence[PreparedDataset],
    tags: Mapping[str, str | None],
    matrix: np.ndarray | None,
    section: PlanSection,
    num_groups: int,
    coordinates: np.ndarray | None = None,
    points: np.ndarray | None = None,
) -> np.ndarray:
    """The group of every dataset by `plan.split`, int [T].

    Args:
        matrix: C or the affinity given in its place, for the splits that look at one; None for the others.
        coordinates: of C's principal axes, where they are known already.
        points: float [T, dim], embeddings of the texts; for `kmeans_text` alone.

    Raises:
        MeritError: k-means finds fewer distinct points than groups, or `plan.max_imbalance` cannot be kept.
    """
    sizes = [dataset_size(dataset, section.balance) for dataset in prepared]
    groups = _split(prepared, tags, matrix, section, num_groups, sizes, coordinates, points)
    if section.max_imbalance is None:
        return groups
    try:
        return partition.rebalance(groups, sizes, section.max_imbalance, section.group_shares, matrix)
    except OverflowError as error:
        load, group, heaviest = error.args
        raise MeritError(
            f"plan.max_imbalance={section.max_imbalance:g} cannot be kept: group {group} would still hold {load:.2f} "
            f"times its share, with `{prepared[heaviest].name}` as its largest dataset. Raise it, set "
            "plan.split_oversized=true, or make fewer groups."
        ) from error


def _split(
    prepared: Sequence[PreparedDataset],
    tags: Mapping[str, str | None],
    matrix: np.ndarray | None,
    section: PlanSection,
    num_groups: int,
    sizes: Sequence[int],
    coordinates: np.ndarray | None,
    points: np.ndarray | None,
) -> np.ndarray:
    seed = section.seed if section.split_seed is None else section.split_seed
    if section.split == "random":
        return partition.split_at_random(sizes, num_groups, seed, section.group_shares)
    if section.split == "by_tag":
        return partition.split_by_tag([tags[dataset.name] or "" for dataset in prepared])
    if section.split == "joint":
        return np.zeros(len(prepared), dtype=np.int64)
    if section.split in ("merit", "affinity"):
        assert matrix is not None
        return partition.split_by_conflict(
            matrix, sizes, num_groups, section.center, section.axes, section.group_shares, coordinates
        )
    if points is None:
        assert matrix is not None
        points = partition.gram_points(matrix, max(partition.GRAM_AXES, num_groups))
    try:
        return partition.split_by_kmeans(points, num_groups, seed)
    except ValueError as error:
        raise MeritError(f"plan.split={section.split}: {error}. Lower plan.num_groups.") from error


def dataset_size(dataset: PreparedDataset, balance: str) -> int:
    """What of a dataset is balanced: its tokens, its examples, or itself."""
    if balance == "datasets":
        return 1
    return dataset.counts.num_input_tokens if balance == "tokens" else dataset.counts.num_examples


def plan_groups(
    rows: Sequence[PlannedDataset],
    trains: dict[str, datasets.Dataset],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    base: dict[str, Any],
    peft: dict[str, Any],
    steps_of_all: Mapping[str, int],
) -> list[PlannedGroup]:
    """Counts, replayed training budget, weight and identity of every group.

    `sft.max_steps` is the budget of the whole mixture: groups share it by their input tokens. `steps_of_all`: what
    [`mixture_steps`] says of the mixture.
    """
    numbers = sorted({row.group for row in rows})
    members = {number: [row for row in rows if row.group == number] for number in numbers}
    tokens = {number: sum(row.num_input_tokens for row in members[number]) for number in numbers}
    budgets, identities = {}, {}
    steps = _shared_steps(args.max_steps, tokens)
    for number in numbers:
        with group_steps(args, steps[number]):
            merged = datasets.concatenate_datasets([trains[row.name] for row in members[number]])
            counts = count_tokens(training_rows(model, tokenizer, args, merged))
            budgets[number] = replay(counts.input_tokens, counts.loss_tokens, args)
            fields = group_fields({**identity_fields(args), **steps_of_all}, budgets[number].num_steps)
            identities[number] = group_identity(base, members[number], fields, peft)
    total = sum(budget.num_input_tokens for budget in budgets.values())
    return [
        PlannedGroup(
            group=number,
            datasets=[row.name for row in members[number]],
            num_examples=sum(row.num_examples for row in members[number]),
            num_input_tokens=tokens[number],
            num_loss_tokens=sum(row.num_loss_tokens for row in members[number]),
            num_steps=budgets[number].num_steps,
            train_input_tokens=budgets[number].num_input_tokens,
            train_loss_tokens=budgets[number].num_loss_tokens,
            weight=budgets[number].num_input_tokens / total,
            group_sha256=identities[number],
        )
        for number in numbers
    ]


def mixture_steps(
    trains: Mapping[str, datasets.Dataset], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> dict[str, int]:
    """{"mixture_steps": steps of training on everything at once}; empty where the schedule counts no steps."""
    if not counts_steps(identity_fields(args)):
        return {}
    if args.max_steps > 0:
        return {"mixture_steps": args.max_steps}
    rows = training_rows(model, tokenizer, args, datasets.concatenate_datasets(list(trains.values())))
    return {"mixture_steps": count_steps(len(rows), args)}


def _shared_steps(max_steps: int, tokens: Mapping[int, int]) -> dict[int, int]:
    """`max_steps` shared in proportion to tokens, by largest remainders, so that the shares sum to it.

    At least 1 each; not positive means no bound, for every group.
    """
    if max_steps <= 0:
        return dict.fromkeys(tokens, max_steps)
    exact = {number: max_steps * count / sum(tokens.values()) for number, count in tokens.items()}
    steps = {number: int(share) for number, share in exact.items()}
    by_remainder = sorted(exact, key=lambda number: (steps[number] - exact[number], number))
    for number in by_remainder[: max_steps - sum(steps.values())]:
        steps[number] += 1
    return {number: max(1, count) for number, count in steps.items()}

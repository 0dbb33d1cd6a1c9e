"""Which merge? Several weightings of the same groups side by side, and the greedy soup, which leaves groups out.

merge_sweep(plan, checkpoints, "runs/sweep", ["tokens", "uniform"])        # runs/sweep/tokens, runs/sweep/uniform
soup = greedy_soup(plan, checkpoints, "runs/merged")                       # adds a group only where the loss falls
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from merit_hf.checkpoint import atomic_folder, check_new_folder
from merit_hf.config import ConfigError
from merit_hf.evaluation.evaluate import evaluate_models
from merit_hf.group_merge import chosen_groups, merge_groups, verified_folders
from merit_hf.merge import MergeStats, merge_checkpoints
from merit_hf.merge_weights import group_weights
from merit_hf.plan import PartitionPlan
from merit_hf.progress import Progress
from merit_hf.resolved import WEIGHTINGS


@dataclass(frozen=True)
class SoupStep:
    """One decision of the greedy soup.

    Attributes:
        group: the group that was tried.
        groups: the mean that was evaluated: the soup so far and `group`.
        loss: its held-out loss, the unweighted mean over the datasets, in nats a token.
        kept: whether `group` stays in the soup.
    """

    group: int
    groups: list[int]
    loss: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """What [`greedy_soup`] made: the groups that are in it, every step, and the merge's statistics."""

    groups: list[int]
    steps: list[SoupStep]
    stats: MergeStats


def merge_sweep(
    plan: PartitionPlan, checkpoints: Sequence[str | Path], output: str | Path, weights: Sequence[str], **options: Any
) -> dict[str, MergeStats]:
    """A merge a weighting, each a whole model in a folder of `output` with the weighting's name.

    A single weighting is merged into `output` itself.

    Args:
        plan, checkpoints, options: as in [`merge_groups`].
        output (`str` or `Path`): new folder, complete once it is there.
        weights (`Sequence[str]`): `tokens`, `loss_tokens`, `uniform`, or files; a file's folder has its name less the
            suffix.

    Raises:
        ConfigError: two weightings would have the same folder, or one of them cannot be used.
    """
    if len(weights) == 1:
        return {weights[0]: merge_groups(plan, checkpoints, output, weights=weights[0], **options)}
    names = [text if text in WEIGHTINGS else Path(text).stem for text in weights]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--weights: two weightings are called `{name}`. Give each once, files by other names.")
    check_new_folder(Path(output))
    numbers = sorted(chosen_groups(plan, checkpoints, options.get("exclude", ()), options.get("allow_missing", False)))
    for text in weights:
        group_weights(plan, numbers, text)
    with atomic_folder(Path(output)) as part:
        return {
            name: merge_groups(plan, checkpoints, part / name, weights=text, **options)
            for name, text in zip(names, weights, strict=True)
        }


def greedy_soup(
    plan: PartitionPlan,
    checkpoints: Sequence[str | Path],
    output: str | Path,
    *,
    weights: str | Path = "tokens",
    exclude: Sequence[int] = (),
    allow_missing: bool = False,
    num_samples: int = 200,
    progress: Progress | None = None,
    **options: Any,
) -> Soup:
    """Merge the groups whose addition lowers the held-out loss (the greedy soup of Wortsman et al., 2022).

    The groups are evaluated by themselves and sorted by loss. The best one is the first soup; each next one is added,
    under `weights`, and stays only where the mean loss over all datasets falls. The rows that choose are no longer a
    fair judge of what was chosen: evaluate the model on others.

    Args:
        plan, checkpoints, output, weights, exclude, allow_missing, options: as in [`merge_groups`].
        num_samples (`int`, *optional*, defaults to `200`): held-out rows a dataset.
        progress ([`Progress`], *optional*): where to show the evaluations.

    Raises:
        ConfigError: no dataset has held-out rows, or as in [`merge_groups`].
    """
    check_new_folder(Path(output))
    sources = chosen_groups(plan, checkpoints, exclude, allow_missing)
    numbers = sorted(sources)
    group_weights(plan, numbers, weights)
    folders = dict(zip(numbers, verified_folders(plan, [sources[number] for number in numbers]), strict=True))
    progress = progress or Progress()
    alone = {f"group-{number}": folder for number, folder in sorted(folders.items())}
    losses = evaluate_models(plan, alone, num_samples, progress=progress, generate=False)["mean"]

    def loss_of(numbers: Sequence[int]) -> float:
        values = group_weights(plan, numbers, weights)
        scratch = Path(output).with_name(Path(output).name + ".soup.part")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            merge_checkpoints(plan.base_folder(), [folders[k] for k in numbers], values, scratch, **options)
            label = "groups " + " ".join(map(str, numbers))
            return float(
                evaluate_models(plan, {label: scratch}, num_samples, progress=progress, generate=False)["mean"][label]
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    steps = choose_greedily({number: losses[f"group-{number}"] for number in folders}, loss_of)
    groups = sorted(step.group for step in steps if step.kept)
    left_out = [number for number in range(plan.num_groups) if number not in groups]
    with progress.stage("Merging", unit="tensors") as stage:
        stats = merge_groups(
            plan, checkpoints, output, weights=weights, exclude=left_out, progress=stage.update,
            soup=[asdict(step) for step in steps], **options,
        )  # fmt: skip
    return Soup(groups, steps, stats)


def choose_greedily(losses: Mapping[int, float], loss_of: Callable[[Sequence[int]], float]) -> list[SoupStep]:
    """The greedy rule: groups from the lowest loss up, each kept only where `loss_of` the soup with it is lower.

    Args:
        losses (`Mapping[int, float]`): loss of every group by itself.
        loss_of (`Callable`): loss of the mean of some groups, in ascending order.
    """
    first, *others = sorted(losses, key=lambda number: (losses[number], number))
    soup, best = [first], losses[first]
    steps = [SoupStep(first, [first], best, True)]
    for number in others:
        candidate = sorted([*soup, number])
        loss = loss_of(candidate)
        kept = loss < best
        steps.append(SoupStep(number, candidate, loss, kept))
        if kept:
            soup, best = candidate, loss
    return steps


def soup_table(soup: Soup) -> Table:
    """Every step of a soup."""
    table = Table(title="Greedy soup: a group stays where the mean held-out loss falls")
    table.title_justify = "left"
    for column in ("tried", "mean of groups", "held-out loss", ""):
        table.add_column(column, no_wrap=True, justify="right" if column == "held-out loss" else "left")
    for step in soup.steps:
        groups = " ".join(map(str, step.groups))
        table.add_row(f"group {step.group}", groups, f"{step.loss:.4f}", Text("kept" if step.kept else "left out"))
    return table

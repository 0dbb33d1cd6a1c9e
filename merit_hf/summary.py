"""What the commands say at their end: the plan, the merge, the run, each on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from merit_hf.config import ConfigError
from merit_hf.evaluation.evaluate import EVALUATION_NAME, evaluation_table
from merit_hf.manifest import MANIFEST_NAME, read_manifest
from merit_hf.pipeline import RunResult
from merit_hf.plan import PartitionPlan
from merit_hf.report.words import cosine_sentence, verdict_sentence
from merit_hf.trust_words import trust_sentences

# Beyond this share of the distance from the base, the rounding of the output is worth a word.
MUCH_CAST_LOSS = 0.1
# Of a group with more datasets than a screen has room for.
_MAX_NAMES = 20


def plan_summary(plan: PartitionPlan) -> list[Any]:
    """Groups with their tokens, how far they can be trusted, and as the last sentence whether to follow the plan."""
    table = Table(
        title=f"Plan {plan.sha256[:12]}: {len(plan.datasets)} datasets, {plan.num_groups} groups", title_justify="left"
    )
    for column, justify in (
        ("group", "right"),
        ("datasets", "left"),
        ("examples", "right"),
        ("tokens", "right"),
        ("weight", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for group in plan.groups:
        more = len(group.datasets) - _MAX_NAMES
        names = Text(", ".join(group.datasets[:_MAX_NAMES]) + (f" and {more:,} more" if more > 0 else ""))
        table.add_row(
            str(group.group), names, f"{group.num_examples:,}", f"{group.train_input_tokens:,}", f"{group.weight:.3f}"
        )
    lines: list[Any] = [table]
    lines += [f"Left out: {name} ({reason})." for name, reason in sorted(plan.skipped.items())]
    truncated = sum(dataset.num_truncated for dataset in plan.datasets)
    dropped = sum(dataset.num_dropped for dataset in plan.datasets)
    if truncated or dropped:
        lines.append(f"{truncated} examples were cut to max_length, {dropped} dropped because no loss token was left.")
    if plan.is_measured and len(plan.datasets) > 1:
        lines.append(cosine_sentence(plan))
        lines += trust_sentences(plan)
        lines.append(verdict_sentence(plan))
    return lines


def merge_summary(stats: Mapping[str, Any]) -> str:
    """How far the merged model moved, what the final cast loses, and the cure where that is much.

    `stats`: as in the merged model's merit.json.
    """
    moved = ", ".join(f"{value:.3f}" for value in stats["group_displacements"])
    share = stats["cast_loss"] / stats["displacement"] if stats["displacement"] else 0.0
    text = (
        f"Merged {stats['num_tensors']} tensors ({stats['num_parameters']:,} parameters). Distance from the base "
        f"{stats['displacement']:.3f}, of the groups {moved}. The final cast changes it by {stats['cast_loss']:.4f} "
        f"({share:.1%})."
    )
    if stats.get("relative_error"):
        text += f" Cut to rank {stats['rank']}, it leaves out {stats['relative_error']:.2%} of the mean update."
    if share > MUCH_CAST_LOSS:
        text += (
            " That rounds away much of what was learnt: keep it with merge.out_dtype=float32 (--out-dtype float32)."
        )
    return text


def run_summary(result: RunResult, output: Path) -> list[Any]:
    """The evaluation table, where everything lies, and the next command."""
    lines: list[Any] = []
    if result.evaluation is not None:
        lines.append(evaluation_table(result.evaluation))
        lines.append(f"Evaluation: {output / EVALUATION_NAME}")
    lines.append(merge_summary(read_manifest(result.merged)["stats"]))
    last = output / "rounds" / str(len(result.rounds)) if result.rounds else output
    lines.append(f"Plan:       {output / 'plan'}")
    if result.rounds:
        lines.append(
            f"Rounds:     {output / 'rounds'}/1 … {len(result.rounds)}, each with its plan, groups and merged"
        )
    lines.append(f"Groups:     {last / 'groups'}/0 … {result.plan.num_groups - 1}")
    if result.joint is not None:
        lines.append(f"Joint:      {result.joint}")
    lines.append(f"Merged:     {result.merged}  (card: {result.merged / 'README.md'})")
    lines.append(f"Report:     {result.report}")
    lines += [f"Pushed:     {what} → {url}" for what, url in result.pushed.items()]
    names = " ".join(str(group) for group in result.groups)
    lines.append(f"Next: merit verify {last / 'plan'} {names}")
    return lines


def split_label(text: str) -> tuple[str | None, str]:
    """`LABEL=MODEL` → label and model; the label is None where there is none, or `text` as a whole is a folder."""
    label, equals, model = text.partition("=")
    return (label, model) if equals and not Path(text).is_dir() else (None, text)


def label_models(models: Sequence[tuple[str | None, str, Path]], plan: PartitionPlan) -> dict[str, Path]:
    """Column headings: the label that was given, what merit.json says the model is, or its name; numbered where they
    repeat.

    Args:
        models: (label or None, as it was named in the call, its folder).

    Raises:
        ConfigError: two models were given the same label, or one that of the base.
    """
    labels: dict[str, Path] = {}
    for given, text, folder in models:
        label = given or _own_label(text, folder, plan)
        if given is not None and (given in labels or given == "base" or not given):
            raise ConfigError(
                f"{given}={text}: {'`base` is the base of the plan' if given == 'base' else 'that label is taken'}. "
                "Give each model a label of its own, or none."
            )
        unique, number = label, 2
        while unique in labels or unique == "base":
            unique, number = f"{label}-{number}", number + 1
        labels[unique] = folder
    return labels


def _own_label(text: str, folder: Path, plan: PartitionPlan) -> str:
    if not (folder / MANIFEST_NAME).exists():
        return Path(text).name
    manifest = read_manifest(folder)
    if manifest["kind"] != "group":
        return "merged"
    trained_on = {entry["name"] for entry in manifest["datasets"]}
    # One group that holds everything, beside a plan of several: the joint baseline.
    return "joint" if plan.num_groups > 1 and trained_on == set(plan.names) else f"group-{manifest['group']}"

"""What RESULTS.md says in words: what held, what explains it, what limits it, what to do. By rule, from its tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from entries import ArmSummary, Contrast, shown
from experiment import BASE
from outcomes import match_displacement
from summaries import Summary

ENOUGH_STEPS = 300  # of a group
ENOUGH_TOKENS = 1_000_000  # of an arm


def held(summary: Summary) -> list[str]:
    """What the primary outcome says of each arm."""
    found = []
    for row in summary.arms:
        if row.name.removesuffix("·λ") in (BASE, *summary.experiment.outcome.lines) or not row.outcomes:
            continue
        for outcome in row.outcomes:
            where = f"the line to `{outcome.line}` at equal {outcome.match}"
            beyond = f" {_cells(outcome.clipped)} left out: no point of the line does as much." * bool(outcome.clipped)
            if outcome.estimate is None:
                found.append(f"`{row.name}`: nothing to hold against {where}.{beyond}")
                continue
            verdict = {1: "above", -1: "below", 0: "not told apart from"}[outcome.sure]
            found.append(
                f"`{row.name}` is {verdict} {where}: {shown(outcome.estimate)} nats, {outcome.won} datasets won, "
                f"{outcome.lost} lost.{beyond}{outcome.estimate.caution}"
            )
    return found


def failed_gates(summary: Summary) -> list[str]:
    return [gate.name for gate in summary.gates if not gate.passed]


def in_short(summary: Summary) -> str:
    """One line a mixture: its gates, and how the gates' split did against the lines and against random splits."""
    name, failed = summary.experiment.gates.merit, failed_gates(summary)
    gates = f"failed {', '.join(failed)}" if failed else "all gates passed"
    row = _main_row(summary)
    if row is None:
        return f"**{summary.title}** ({gates}): `{name}` was not run."
    told = [f"over `{o.line}` at equal {o.match} {shown(o.estimate)}" for o in row.outcomes]
    rival = _against_random(summary, name)
    if rival and rival.estimate:
        told.append(f"less that of `{rival.theirs}` {shown(rival.estimate)}")
    diverged = f", {row.failed} diverged" if row.failed else ""
    return f"**{summary.title}** ({gates}; {_cells(row.done)}{diverged}): excess of `{name}` {'; '.join(told)}."


def controls(summary: Summary) -> list[str]:
    """How much of what a split forgot less than joint training a shorter step forgets less as well."""
    base, found = summary.cells[BASE][None, None], []
    for row in _split_rows(summary):
        for line in summary.experiment.outcome.lines:
            forgot, losses = [], []
            for seeds, cell in summary.cells[row.name].items():
                curve = summary.curve(line, seeds)
                if curve is None:
                    continue
                match = match_displacement(curve, summary.mixture, cell.displacement)
                if match.clipped:
                    continue
                place, zero = np.array([match.position, 1.0]), base.loss(summary.held_out)
                point, end = curve.at(place, summary.held_out).mean(axis=1) - zero
                forgot.append((cell.loss(summary.held_out) - zero, end, point))
                losses.append((cell.loss(summary.mixture), float(curve.at(place, summary.mixture).mean(axis=1)[0])))
            if forgot:
                ours, end, point = np.mean(forgot, axis=0)
                loss = np.mean(losses, axis=0)
                found.append(
                    f"`{row.name}` forgot {ours:+.3f} nats where `{line}` forgot {end:+.3f}; the point of the line to "
                    f"it that moved as far forgot {point:+.3f}, at a mixture loss of {loss[1]:.3f} against "
                    f"{loss[0]:.3f}."
                    f"{_share(ours, end, point)}"
                )
    return found


def _share(ours: float, end: float, point: float) -> str:
    if not (ours < end and point < end):
        return ""
    return f" Of the {end - ours:.3f} nats it kept, the shorter step keeps {end - point:.3f} without any split."


def advice(summary: Summary) -> list[str]:
    """What follows for a user: from gates, from the lines, and from the random splits."""
    failed = failed_gates(summary)
    if failed:
        return [f"The mixture failed {', '.join(failed)}: what this run shows is no ground for a decision."]
    found = []
    for row in _split_rows(summary):
        below = [f"`{o.line}` at equal {o.match}" for o in row.outcomes if o.sure < 0]
        unsure = [f"`{o.line}` at equal {o.match}" for o in row.outcomes if not o.sure]
        if below:
            text = (
                f"`{row.name}` lay below the line to {', '.join(below)}: a shorter step towards joint training does "
                "better. Split where GPUs are scattered, not for the loss."
            )
        elif unsure:
            text = (
                f"`{row.name}` was not shown to beat the line to {', '.join(unsure)}. On this evidence split where "
                "GPUs are scattered, not for the loss."
            )
        else:
            text = f"`{row.name}` beat every line: on mixtures like this one splitting pays by itself."
        rival = _against_random(summary, row.name)
        if rival and rival.estimate:
            text += {
                1: f" It beat `{rival.theirs}`.", -1: f" `{rival.theirs}` did better.",
                0: f" It could not be told from `{rival.theirs}`: which groups one makes was not seen to matter.",
            }[rival.sure]  # fmt: skip
        found.append(text)
    return found


def limits(summary: Summary) -> list[str]:
    """What keeps these numbers from saying more."""
    found, merit = [], _main_row(summary)
    if merit is not None and merit.tokens is not None:
        tokens = merit.tokens["input"]
        steps = (merit.steps or 0) / summary.experiment.arm(merit.name).groups
        if tokens < ENOUGH_TOKENS or steps < ENOUGH_STEPS:
            found.append(
                f"{tokens:,.0f} tokens an arm and {steps:,.0f} steps a group; a firm word would need "
                f"{ENOUGH_TOKENS:,} and {ENOUGH_STEPS}."
            )
    diverged = [f"`{row.name}` {row.failed}" for row in summary.arms if row.failed]
    if diverged:
        found.append(f"Trainings that diverged are left out of every mean: {', '.join(diverged)}.")
    short = [f"`{r.name}` {r.done} of {r.wanted}" for r in summary.arms if r.done + r.failed < r.wanted]
    if short:
        found.append(f"Not all cells were run: {', '.join(short)}.")
    missing = _missing_controls(summary)
    if missing:
        found.append(f"Controls that were not run here: {', '.join(missing)}.")
    borrowed = [f"`{arm.name}` that of `{arm.tuned_as}`" for arm in summary.experiment.arms if arm.tuned_as]
    if borrowed:
        found.append(f"Learning rates that were not tuned but taken over: {', '.join(borrowed)}.")
    edges = [f"`{choice['arm']}`" for choice in summary.choices if choice["edge"]]
    if edges:
        found.append(f"The best learning rate of {', '.join(edges)} lies at an end of the grid.")
    samples = summary.experiment.evaluation.test_samples
    found.append(
        f"One base, one mixture, {len(summary.held_out)} tasks held out of it, {samples} test rows a dataset at most. "
        "Intervals take datasets as independent, though those of a family are alike, and the point of equal "
        "forgetting as known, though it is estimated."
    )
    return found


def _missing_controls(summary: Summary) -> list[str]:
    arms = [arm for arm in summary.experiment.arms if summary.cells.get(arm.name)]
    once = summary.experiment.sft.get("num_train_epochs", 1)
    there = {
        "joint training for twice the epochs": any(
            arm.kind == "joint" and arm.sft.get("num_train_epochs", 0) >= 2 * once for arm in arms
        ),
        "a soup of joint runs": any(arm.kind == "soup" for arm in arms),
        "a random split by example": any(arm.kind == "by_example" for arm in arms),
        "a random split by dataset": any(arm.split == "random" for arm in arms),
        "a k-means split": any(arm.split == "kmeans" for arm in arms),
    }
    return [name for name, known in there.items() if not known]


def for_users(found: Sequence[Summary]) -> str:
    """For one with many datasets and scattered GPUs: the gates' split in all mixtures whose gates passed."""
    sound = [(s, row) for s in found if not failed_gates(s) and (row := _main_row(s)) is not None]
    if not sound:
        return (
            "No mixture passed all of its gates, so nothing here says that a split lowers the loss, or that it does "
            "not. Read your own gates in `merit plan` and `merit diagnose`, and split where GPUs are scattered."
        )
    above = [s.title for s, row in sound if all(outcome.sure > 0 for outcome in row.outcomes)]
    below = [s.title for s, row in sound if any(outcome.sure < 0 for outcome in row.outcomes)]
    rivals = [(s.title, rival) for s, row in sound if (rival := _against_random(s, row.name)) and rival.estimate]
    better = [title for title, rival in rivals if rival.sure > 0]
    worse = [title for title, rival in rivals if rival.sure < 0]
    text = (
        f"Mixtures whose gates passed: {len(sound)}. The conflict-aware split lay above every line in "
        f"{_named(above)}, below one in {_named(below)}; against random splits it did better in {_named(better)} "
        f"and worse in {_named(worse)} of {len(rivals)}. "
    )
    if len(above) * 2 > len(sound):
        which = "by plan" if len(better) * 2 > len(rivals) else "at random or by plan"
        return text + f"Check that your gates pass, split {which}, and train the groups apart."
    return text + (
        "With scattered GPUs, train groups apart: no machine waits for another. With one cluster, train jointly, and "
        "take a shorter step (a larger batch, or a point on the line) first."
    )


def _named(titles: Sequence[str]) -> str:
    return f"{len(titles)} ({'; '.join(titles)})" if titles else "none"


def _cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"


def _main_row(summary: Summary) -> ArmSummary | None:
    return next((row for row in summary.arms if row.name == summary.experiment.gates.merit and row.outcomes), None)


def _against_random(summary: Summary, name: str) -> Contrast | None:
    """The first contrast with a random split: over the first line, at equal displacement."""
    return next((c for c in summary.contrasts if c.ours == name and _split_of(summary, c.theirs) == "random"), None)


def _split_rows(summary: Summary) -> list[ArmSummary]:
    return [row for row in summary.arms if _split_of(summary, row.name) == "merit" and row.outcomes]


def _split_of(summary: Summary, name: str) -> str | None:
    return next((arm.split for arm in summary.experiment.arms if arm.name == name), None)

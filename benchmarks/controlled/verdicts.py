"""What RESULTS.md says in words: what held, what explains it, what limits it, what to do. By rule, from its tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from entries import ArmSummary, shown
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
            verdict = {1: "above", -1: "below", 0: "not told apart from"}[outcome.estimate.sure]
            beyond = f" {outcome.clipped} cells lie beyond the line's end." if outcome.clipped else ""
            found.append(
                f"`{row.name}` is {verdict} the line to `{outcome.line}` at equal {outcome.match}: "
                f"{shown(outcome.estimate)} nats, {outcome.won} datasets won, {outcome.lost} lost.{beyond}"
                f"{outcome.estimate.caution}"
            )
    return found


def failed_gates(summary: Summary) -> list[str]:
    return [gate.name for gate in summary.gates if not gate.passed]


def in_short(summary: Summary) -> str:
    """One line a mixture: its gates, and how the gates' split did against the lines and against random splits."""
    name, failed = summary.experiment.gates.merit, failed_gates(summary)
    gates = f"failed {', '.join(failed)}" if failed else "all gates passed"
    row = next((row for row in summary.arms if row.name == name and row.outcomes), None)
    if row is None:
        return f"**{summary.title}** ({gates}): `{name}` was not run."
    told = [f"over `{o.line}` at equal {o.match} {shown(o.estimate)}" for o in row.outcomes]
    rivals = [c for c in summary.contrasts if c.ours == name and _split_of(summary, c.theirs) == "random"]
    if rivals and rivals[0].estimate:
        told.append(f"more than `{rivals[0].theirs}` by {shown(rivals[0].estimate)}")
    return f"**{summary.title}** ({gates}; {row.done} cells): excess of `{name}` {'; '.join(told)}."


def controls(summary: Summary) -> list[str]:
    """How much of what a split forgot less than joint training a shorter step forgets less as well."""
    base, found = summary.cells[BASE][None, None], []
    for row in _split_rows(summary):
        for line in summary.experiment.outcome.lines:
            ours, ends, points, losses = [], [], [], []
            for seeds, cell in summary.cells[row.name].items():
                curve = summary.curve(line, seeds)
                if curve is None:
                    continue
                place = np.array([match_displacement(curve, cell.displacement).position, 1.0])
                forgot = curve.at(place, summary.held_out).mean(axis=1) - base.loss(summary.held_out)
                points.append(float(forgot[0]))
                ends.append(float(forgot[1]))
                ours.append(cell.loss(summary.held_out) - base.loss(summary.held_out))
                losses.append((cell.loss(summary.mixture), float(curve.at(place, summary.mixture).mean(axis=1)[0])))
            if ours:
                mean = {"ours": np.mean(ours), "end": np.mean(ends), "point": np.mean(points)}
                loss = np.mean(losses, axis=0)
                found.append(
                    f"`{row.name}` forgot {mean['ours']:+.3f} nats where `{line}` forgot {mean['end']:+.3f}; the "
                    f"point of the line to it that moved as far forgot {mean['point']:+.3f}, at a mixture loss of "
                    f"{loss[1]:.3f} against {loss[0]:.3f}.{_share(mean['ours'], mean['end'], mean['point'])}"
                )
    return found


def _share(ours: float, end: float, point: float) -> str:
    if ours >= end:
        return ""
    return f" Of the {end - ours:.3f} nats it kept, the shorter step keeps {end - point:.3f} without any split."


def advice(summary: Summary) -> list[str]:
    """What follows for a user: from gates, from the lines, and from the random splits."""
    failed = failed_gates(summary)
    if failed:
        return [f"The mixture failed {', '.join(failed)}: what this run shows is no ground for a decision."]
    found = []
    for row in _split_rows(summary):
        if all(outcome.estimate.sure > 0 for outcome in row.outcomes):
            text = f"`{row.name}` beat every line: on mixtures like this one splitting pays by itself."
        else:
            text = (
                f"`{row.name}` did not beat every line: a shorter step towards joint training does as well. Split "
                "where GPUs are scattered, not for the loss."
            )
        rivals = [
            c for c in summary.contrasts
            if c.ours == row.name and _split_of(summary, c.theirs) == "random" and c.estimate
        ]  # fmt: skip
        if any(contrast.estimate and contrast.estimate.sure <= 0 for contrast in rivals):
            text += f" It did not surely beat `{rivals[0].theirs}`: which groups one makes was not seen to matter."
        found.append(text)
    return found


def limits(summary: Summary) -> list[str]:
    """What keeps these numbers from saying more."""
    rows = [row for row in summary.arms if row.tokens and row.name != BASE]
    merit = next((row for row in rows if row.name == summary.experiment.gates.merit), None)
    found = []
    if merit is not None and merit.tokens is not None:
        tokens, steps = merit.tokens["input"], merit.longest or 0
        few = [f"{tokens:,.0f} tokens an arm"] if tokens < ENOUGH_TOKENS else []
        few += [f"{steps:,.0f} steps of the longest group"] if steps < ENOUGH_STEPS else []
        if few:
            found.append(f"{' and '.join(few)}; {ENOUGH_TOKENS:,} and {ENOUGH_STEPS} are what a firm word would need.")
    short = [f"`{row.name}` {row.done} of {row.wanted}" for row in summary.arms if row.done < row.wanted]
    if short:
        found.append(f"Not all cells were run: {', '.join(short)}.")
    edges = [f"`{choice['arm']}`" for choice in summary.choices if choice["edge"]]
    if edges:
        found.append(f"The best learning rate of {', '.join(edges)} lies at an end of the grid.")
    samples = summary.experiment.evaluation.test_samples
    found.append(
        f"One base, one mixture, {len(summary.held_out)} tasks held out of it, {samples} test rows a dataset at most; "
        "what is new to this base need not be new to yours."
    )
    return found


def for_users(found: Sequence[Summary]) -> str:
    """For one with many datasets and scattered GPUs, from all mixtures whose gates passed."""
    sound = [summary for summary in found if not failed_gates(summary) and _split_rows(summary)]
    if not sound:
        return (
            "No mixture passed all of its gates, so nothing here says that a split lowers the loss, or that it does "
            "not. Read your own gates in `merit plan` and `merit diagnose`, and split where GPUs are scattered."
        )
    paid = [s.title for s in sound if any(all(o.estimate.sure > 0 for o in row.outcomes) for row in _split_rows(s))]
    chosen = [s.title for s in sound if any(c.estimate and c.estimate.sure > 0 and _split_of(s, c.theirs) == "random"
                                            for c in s.contrasts)]  # fmt: skip
    text = (
        f"Of {len(sound)} mixtures whose gates passed, a conflict-aware split lay above every line in {len(paid)}"
        f"{_named(paid)}, and surely above a random split by some measure in {len(chosen)}{_named(chosen)}. "
    )
    if len(paid) * 2 > len(sound):
        return text + "Plan, check that your gates pass, and train the groups apart."
    return text + (
        "With scattered GPUs, train groups apart: no machine waits for another, and the merged model stays nearer to "
        "the base. With one cluster, train jointly and take a shorter step (a larger batch, or a point on the "
        "line) first."
    )


def _named(titles: Sequence[str]) -> str:
    return f" ({'; '.join(titles)})" if titles else ""


def _split_rows(summary: Summary) -> list[ArmSummary]:
    return [row for row in summary.arms if _split_of(summary, row.name) == "merit" and row.outcomes]


def _split_of(summary: Summary, name: str) -> str | None:
    return next((arm.split for arm in summary.experiment.arms if arm.name == name), None)

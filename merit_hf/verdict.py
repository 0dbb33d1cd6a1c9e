"""The numbers of a diagnosis → what is wrong, in words, and what to do about it. Pure; reads diagnosis.json's keys.

A finding rests on an interval that clears `TOLERANCE`, and on more datasets than chance would give; the thresholds are
rules of thumb, and every number behind them is in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from merit_hf.basin import more_than_chance

TOLERANCE = 0.01  # nats: differences below it are none
PROMPT_EFFECT = 0.1  # nats: what the right prompt is worth to an answer that follows from it
RHO_RANGE = (0.8, 1.2)  # of a basin that is quadratic as far as the groups reach
NOT_THE_MEAN = 0.05  # of the mean's displacement
SHARP = 0.1  # of the base's loss, gained by noise of READY_SIGMA
READY_SIGMA = 0.05
UNTRAINED = 0.9  # of the loss of guessing every token alike

_ROUGHLY = "What is predicted of this merge holds only roughly: judge it by the measured losses."

PROBLEM, CAUTION, NOTE = "problem", "caution", "note"
_STATUS = {PROBLEM: 2, CAUTION: 1, NOTE: 0}


@dataclass(frozen=True)
class Finding:
    """One thing that was seen.

    Attributes:
        code: for programs. severity: `problem`, `caution` or `note`.
        text: what was seen, with its numbers. remedy: what to do; empty where nothing is to be done.
    """

    code: str
    severity: str
    text: str
    remedy: str = ""
    groups: list[int] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)


def judge(content: Mapping[str, Any], learning_rate: float | None, vocab_size: int | None = None) -> dict[str, Any]:
    """{"status", "summary", "remedy", "findings"} of a diagnosis without its verdict.

    Args:
        learning_rate: of the plan, for the remedy. vocab_size: of the base; tells an untrained one.
    """
    findings = _base_findings(content, vocab_size)
    if content["kind"] == "groups":
        findings = _group_findings(content, learning_rate) + _merge_findings(content, learning_rate) + findings
    findings.sort(key=lambda finding: -_STATUS[finding.severity])
    worst = findings[0].severity if findings else NOTE
    status = worst if worst != NOTE else "healthy"
    telling = [finding for finding in findings if finding.severity != NOTE]
    texts = [finding.text for finding in telling if finding.severity == worst] or [_all_is_well(content)]
    remedies = list(dict.fromkeys(finding.remedy for finding in telling if finding.remedy))
    return {
        "status": status,
        "summary": " ".join(texts),
        "remedy": " ".join(remedies) or _next_step(content),
        "findings": [asdict(finding) for finding in findings],
    }


def left_basin_on(content: Mapping[str, Any], group: int) -> list[str]:
    """Datasets on which a ridge lies between the group and the base, or the group and the mean."""
    return [
        name
        for name, entry in content["datasets"].items()
        if any(_above(b["height"]) for b in _own_paths(entry, group))
    ]


def _group_findings(content: Mapping[str, Any], learning_rate: float | None) -> list[Finding]:
    """What is wrong with single groups; groups with the same fault share a finding."""
    findings, faults = [], {row["group"]: _fault(content, row) for row in content["groups"]}
    for code in dict.fromkeys(filter(None, faults.values())):
        groups = [group for group, fault in faults.items() if fault == code]
        rows = [row for row in content["groups"] if row["group"] in groups]
        everywhere = len(groups) == len(content["groups"])
        text = " ".join(_FAULTS[code](content, row) for row in rows)
        if code in ("left_basin", "diverged", "overshot"):
            whose = "sft.learning_rate" if everywhere else f"the learning rate of {_groups(groups)}"
            now = f" ({learning_rate:g} now)" if learning_rate is not None else ""
            cure = f"Lower {whose}{now}, or train for fewer steps."
        elif code == "wrong_data":
            cure = f"Look at the rows of {_groups(groups)}: do training and held-out rows ask for the same answers?"
            cure += " If they do, train for fewer epochs."
        else:
            cure = f"Look at the rows of {_groups(groups)}: can their answers be told from their prompts?"
        cure += _exclusion_advice(rows, "exclude_for_others" if code == "noise" else "exclude", everywhere)
        findings.append(
            Finding(
                code,
                PROBLEM,
                text,
                cure,
                groups,
                _datasets_of(content, code, rows),
            )
        )
    for row in content["groups"]:
        if row["checks_failed"]:
            text = f"Group {row['group']} does not verify against the plan: {row['checks_failed'][0]}."
            cure = "Train it again from this plan."
            findings.append(Finding("not_verified", PROBLEM, text, cure, [row["group"]]))
        if not faults[row["group"]] and _below(row["exclude"]):
            text = f"The mean is better without group {row['group']} by {_nats(row['exclude'], -1)}."
            cure = f"Consider `merit merge --exclude {row['group']}`."
            findings.append(Finding("better_without", CAUTION, text, cure, [row["group"]]))
    return findings


def _fault(content: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    """The one word for a group: what it did on its own rows tells most, then what lies on the way to it."""
    held_out, training = row["own"]["held_out"], row["own"]["training"]
    if _above(training):
        return "diverged"
    if _left_basin(content, row["group"]):
        return "left_basin"
    if held_out is None:
        return None
    if _above(row["own"]["second_half"]) and _below(row["own"]["first_half"]):
        return "overshot"
    if _above(held_out):
        return "wrong_data"
    prompts = row["own"]["prompts"]
    if prompts is not None and prompts["low"] is not None and prompts["low"] <= 0 and prompts["high"] < PROMPT_EFFECT:
        return "noise"
    improved = held_out["value"] < -TOLERANCE and (held_out["high"] is None or held_out["high"] < 0)
    return None if improved else "learnt_nothing"


def _left_basin(content: Mapping[str, Any], group: int) -> bool:
    overall = any(_above(barrier["height"]) for barrier in _own_paths(content["overall"], group))
    return overall or more_than_chance(len(left_basin_on(content, group)), len(content["datasets"]))


def _own_paths(entry: Mapping[str, Any], group: int) -> list[Mapping[str, Any]]:
    ends = ({"base", f"group-{group}"}, {"mean", f"group-{group}"})
    return [barrier for barrier in entry["barriers"] if {barrier["from"], barrier["to"]} in ends]


def _say_left(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    on, group = left_basin_on(content, row["group"]), row["group"]
    highest = max(barrier["height"]["value"] for barrier in _own_paths(content["overall"], group))
    return (
        f"Group {group} left the basin on {len(on)} of {_count(content['datasets'], 'dataset')}: on the way to it the "
        f"loss rises over the straight line (mean over datasets {highest:+.3f} nats at the highest)."
    )


def _say_diverged(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    on = left_basin_on(content, row["group"])
    ridge = f", and it left the basin on {len(on)} of {_count(content['datasets'], 'dataset')}" if on else ""
    return (
        f"Group {row['group']} diverged: its loss on its own training rows is {_nats(row['own']['training'])} above "
        f"the base's{ridge}."
    )


def _say_overshot(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    own = row["own"]
    return (
        f"Group {row['group']} went too far: on its own datasets the first half of its way changes the held-out loss by "
        f"{_signed(own['first_half'])}, the second by {_signed(own['second_half'])}."
    )


def _say_wrong(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    training = row["own"]["training"]
    learnt = (
        f"while its training rows improved by {_nats(training, -1)}: it learnt something else than they ask for"
        if _below(training)
        else "and its training rows did not improve either: it was trained on something else"
        if training is not None
        else "so it learnt something else than they ask for"
    )
    return (
        f"Group {row['group']} made its own datasets worse: their held-out loss is "
        f"{_nats(row['own']['held_out'])} above the base's, {learnt}."
    )


def _say_nothing(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    training, held_out = row["own"]["training"], row["own"]["held_out"]
    learnt = (
        f"it learnt its training rows by heart ({_nats(training, -1)} better), nothing that holds on others"
        if _below(training)
        else "it learnt nothing"
    )
    return (
        f"Group {row['group']} is of no use to the merge: the held-out loss of its own datasets changed by "
        f"{_signed(held_out)}, so {learnt}, and its displacement of {row['displacement']:.3g} is variance without "
        "gain."
    )


def _say_noise(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return (
        f"Group {row['group']} learnt noise: to it the answers of its own held-out rows are as likely under other "
        f"rows' prompts (their loss changes by {_signed(row['own']['prompts'])}). It learnt how answers look (held-out loss "
        f"{_signed(row['own']['held_out'])} against the base), not what they say."
    )


_FAULTS = {
    "left_basin": _say_left,
    "diverged": _say_diverged,
    "overshot": _say_overshot,
    "wrong_data": _say_wrong,
    "noise": _say_noise,
    "learnt_nothing": _say_nothing,
}


def _merge_findings(content: Mapping[str, Any], learning_rate: float | None) -> list[Finding]:
    """What is to be said of the mean."""
    overall, findings = content["overall"], []
    gain = overall["gain"]
    if gain is not None:
        ridges = [
            b for b in overall["barriers"] if b["from"] != "mean" and b["from"] != "base" and _above(b["height"])
        ]
        if gain["measured"]["high"] is not None and gain["measured"]["high"] < -TOLERANCE:
            text = (
                f"Averaging did harm: the mean's loss is {_nats(gain['measured'], -1)} above the groups' own average."
            )
            findings.append(Finding("no_common_basin", PROBLEM, text, _lower(learning_rate)))
        elif ridges:
            worst = max(ridges, key=lambda barrier: barrier["height"]["value"])
            text = (
                f"A ridge of {_nats(worst['height'])} lies between {_spoken(worst['from'])} and "
                f"{_spoken(worst['to'])} (the highest of {len(ridges)})."
            )
            findings.append(Finding("barrier_between_groups", CAUTION, text, _lower(learning_rate)))
        findings += _rho_findings(gain)
    forgot = [name for name, entry in content["datasets"].items() if _above(entry["changes"]["mean-base"])]
    if forgot:
        chance = not more_than_chance(len(forgot), len(content["datasets"]))
        of = _count(content["datasets"], "dataset")
        text = f"The mean is worse than the base on {len(forgot)} of {of}: {_some(forgot)}."
        findings.append(Finding("worse_than_base", NOTE if chance else CAUTION, text, "", [], forgot))
    findings += _control_findings(content)
    return findings


def _rho_findings(gain: Mapping[str, Any]) -> list[Finding]:
    known = [(step["epsilon"], step["rho"]) for step in gain["ladder"] if step["rho"] is not None]
    if not known and not _above(gain["measured"]) and not _below(gain["measured"]):
        text = "Neither the measured nor the predicted gain can be told from 0: the groups hardly differ."
        return [Finding("no_gain", NOTE, text)]
    if len(known) < len(gain["ladder"]):
        missing = ", ".join(f"{step['epsilon']:g}" for step in gain["ladder"] if step["rho"] is None)
        text = (
            f"The loss does not surely bend upwards around the mean (the predicted gain cannot be told from 0, or is "
            f"negative, at ε = {missing}); the measured gain over the groups' own average is "
            f"{_signed(gain['measured'])}."
        )
        return [Finding("not_quadratic", CAUTION, text, _ROUGHLY)]
    shown = ", ".join(f"{rho['value']:.2f} at ε = {epsilon:g}" for epsilon, rho in known)
    low, high = RHO_RANGE
    outside = [rho for _, rho in known if not low <= rho["value"] <= high]
    clear = [rho for rho in outside if rho["low"] is None or rho["low"] > high or rho["high"] < low]
    if not outside:
        return [Finding("quadratic", NOTE, f"The basin is quadratic as far as the groups reach: ρ is {shown}.")]
    sure = "is not" if clear else "may not be"
    text = f"The basin {sure} quadratic as far as the groups reach: ρ is {shown}, and should be near 1."
    return [Finding("not_quadratic", CAUTION if clear else NOTE, text, _ROUGHLY if clear else "")]


def _control_findings(content: Mapping[str, Any]) -> list[Finding]:
    """The merged folder against the mean, and the mean against what moves as little as it does."""
    overall, geometry, findings = content["overall"], content["geometry"], []
    apart = geometry["merged_from_mean"]
    displacement = geometry["norms"][geometry["labels"].index("mean")]
    if apart is not None and apart > NOT_THE_MEAN * displacement:
        text = (
            f"The merged model is not the weighted mean of the groups: it lies {apart:.3g} from it, "
            f"{apart / displacement:.0%} of the mean's displacement (its loss − the mean's: "
            f"{_signed(overall['changes']['merged-mean'])})."
        )
        cure = "Rounding may do that (`merit merge --out-dtype float32`), or another method of merging."
        findings.append(Finding("not_the_mean", CAUTION, text, cure))
    line = overall["changes"].get("mean-line")
    if line is not None:
        what = f"a point on the line from the base to the joint model, as far from the base ({_signed(line)})"
        if _below(line):
            findings.append(Finding("better_than_line", NOTE, f"The mean beats {what}."))
        else:
            text = f"The mean does not beat {what}: what it gains over the base is not due to the split."
            if _above(line):
                text = f"The mean is worse than {what}: here the joint model, moved less, does better than the split."
            findings.append(Finding("line_as_good", NOTE, text))
    return findings


def _base_findings(content: Mapping[str, Any], vocab_size: int | None) -> list[Finding]:
    """Is the base ready: has it learnt something, and is the ground around it flat."""
    overall = content["overall"]
    loss = overall["loss"]["base"]
    severity = CAUTION if content["kind"] == "base" else NOTE
    if vocab_size and loss > UNTRAINED * math.log(vocab_size):
        text = (
            f"The base's loss is {loss:.2f} nats, and guessing among {vocab_size:,} tokens gives "
            f"{math.log(vocab_size):.2f}: it has learnt next to nothing, and groups that start there may not stay "
            "together."
        )
        return [
            Finding(
                "untrained_base", severity, text, "Warm it up on a sample of everything before it is planned with."
            )
        ]
    rises = {row["sigma"]: row["increase"] for row in overall["perturbation"]}
    if READY_SIGMA not in rises:
        return []
    rise = rises[READY_SIGMA]["value"]
    text = (
        f"Noise of {READY_SIGMA:.0%} of its weights changes the base's loss of {loss:.2f} by {rise:+.3f} nats "
        f"({rise / loss:+.0%})"
    )
    if rise > SHARP * loss:
        cure = "Groups may leave so narrow a basin: use a low learning rate, and diagnose again after it."
        return [Finding("sharp_base", severity, text + ": the ground around it is steep.", cure)]
    return [Finding("flat_base", NOTE, text + ": flat enough to merge around.")]


def _exclusion_advice(rows: Sequence[Mapping[str, Any]], key: str, everywhere: bool) -> str:
    """The other remedy, where it was measured to help."""
    if everywhere or rows[0][key] is None:
        return ""
    whose = "mean loss" if key == "exclude" else "mean loss on the other groups' datasets"
    helps = [row for row in rows if _below(row[key])]
    if not helps:
        return f" Leaving it out of the merge was measured, and does not surely lower the {whose}."
    options = " ".join(f"--exclude {row['group']}" for row in helps)
    gains = ", ".join(_signed(row[key]) for row in helps)
    alone = " (each alone)" if len(helps) > 1 else ""
    return f" Or merge with `{options}`: measured, the {whose} changes by {gains}{alone}."


def _datasets_of(content: Mapping[str, Any], code: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if code == "left_basin":
        return sorted({name for row in rows for name in left_basin_on(content, row["group"])})
    return [name for row in rows for name in row["datasets"]]


def _all_is_well(content: Mapping[str, Any]) -> str:
    if content["kind"] == "base":
        return "The base can be planned with."
    gain = content["overall"]["gain"]
    change = content["overall"]["changes"]["mean-base"]
    gained = f", and averaging gained {_nats(gain['measured'])} over the groups' own average" if gain else ""
    return f"The groups stayed in one basin. The mean's loss is {_signed(change)} against the base{gained}."


def _next_step(content: Mapping[str, Any]) -> str:
    return "Train the groups." if content["kind"] == "base" else "Nothing to mend."


def _lower(learning_rate: float | None) -> str:
    now = f" ({learning_rate:g} now)" if learning_rate is not None else ""
    return f"Lower sft.learning_rate{now}, or train for fewer steps."


def _above(estimate: Mapping[str, Any] | None) -> bool:
    """Surely above the tolerance."""
    return estimate is not None and estimate["low"] is not None and estimate["low"] > TOLERANCE


def _below(estimate: Mapping[str, Any] | None) -> bool:
    """Surely below minus the tolerance."""
    return estimate is not None and estimate["high"] is not None and estimate["high"] < -TOLERANCE


def _nats(estimate: Mapping[str, Any], sign: int = 1) -> str:
    return f"{sign * estimate['value']:.3f} nats"


def _signed(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:+.3f}"
    return f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def _groups(numbers: Sequence[int]) -> str:
    return f"group {numbers[0]}" if len(numbers) == 1 else "groups " + ", ".join(map(str, numbers))


def _spoken(label: str) -> str:
    return label.replace("-", " ")


def _count(things: Sequence[Any] | Mapping[str, Any], word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

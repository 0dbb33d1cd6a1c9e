"""The numbers of a diagnosis → what is wrong, in words, and what to do about it. Pure; reads diagnosis.json's keys.

A finding rests on an interval that clears `TOLERANCE`, and on more datasets than chance would give; the thresholds are
rules of thumb, and every number behind them is in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from merit_hf.diagnosis.basin import more_than_chance
from merit_hf.diagnosis.evidence import (
    SENTENCES,
    TOLERANCE,
    above,
    below,
    count,
    group_names,
    left_basin_on,
    nats,
    own_paths,
    signed,
    some,
    spoken,
)
from merit_hf.report import blocks
from merit_hf.trust_words import trust_verdict

PROMPT_EFFECT = 0.1  # nats: what the right prompt is worth to an answer that follows from it
RHO_RANGE = (0.8, 1.2)  # of a basin that is quadratic as far as the groups reach
NOT_THE_MEAN = 0.05  # of the mean's displacement
SHARP = 0.1  # of the base's loss, gained by noise of READY_SIGMA
READY_SIGMA = 0.05
LITTLE_LEARNT = 0.3  # nats, of joint training
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


def judge(
    content: Mapping[str, Any],
    learning_rate: float | None,
    vocab_size: int | None = None,
    trust: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{"status", "summary", "remedy", "findings"} of a diagnosis without its verdict.

    Args:
        learning_rate: of the plan, for the remedy. vocab_size: of the base; tells an untrained one.
        trust: of the plan: whether its groups are more than noise.
    """
    findings = _base_findings(content, vocab_size) + _plan_findings(content, trust or {})
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


def _group_findings(content: Mapping[str, Any], learning_rate: float | None) -> list[Finding]:
    """What is wrong with single groups; groups with the same fault share a finding."""
    findings, faults = [], {row["group"]: _fault(content, row) for row in content["groups"]}
    for code in dict.fromkeys(filter(None, faults.values())):
        rows = [row for row in content["groups"] if faults[row["group"]] == code]
        text = " ".join(SENTENCES[code](content, row) for row in rows)
        cure = _cure(code, rows, len(rows) == len(content["groups"]), learning_rate)
        groups = [row["group"] for row in rows]
        findings.append(Finding(code, PROBLEM, text, cure, groups, _datasets_of(content, code, rows)))
    for row in content["groups"]:
        if row["checks_failed"]:
            # A hash of several things tells least of what is wrong.
            first = min(row["checks_failed"], key=lambda check: check.startswith("group_sha256"))
            text = f"Group {row['group']} does not verify against the plan: {first}."
            cure = "Train it again from this plan."
            findings.append(Finding("not_verified", PROBLEM, text, cure, [row["group"]]))
        if not faults[row["group"]] and below(row["exclude"]):
            text = f"The mean is better without group {row['group']} by {nats(row['exclude'], -1)}."
            cure = f"Consider `merit merge --exclude {row['group']}`."
            findings.append(Finding("better_without", CAUTION, text, cure, [row["group"]]))
    return findings


def _cure(code: str, rows: Sequence[Mapping[str, Any]], everywhere: bool, learning_rate: float | None) -> str:
    groups = group_names([row["group"] for row in rows])
    if code in ("left_basin", "diverged", "overshot"):
        whose = "sft.learning_rate" if everywhere else f"the learning rate of {groups}"
        now = f" ({learning_rate:g} now)" if learning_rate is not None else ""
        cure = f"Lower {whose}{now}, or train for fewer steps."
    elif code == "wrong_data":
        cure = f"Look at the rows of {groups}: do training and held-out rows ask for the same answers? If they do, "
        cure += "train for fewer epochs."
    elif code == "noise" or all(below(row["own"]["training"]) for row in rows):
        cure = f"Look at the rows of {groups}: can their answers be told from their prompts?"
    else:
        cure = f"Train {groups} with another learning rate, and make sure that it was trained on these rows."
    key = "exclude_for_others" if code == "noise" else "exclude"
    # Where every group has the fault, leaving one out mends nothing.
    return cure if everywhere else cure + _exclusion_advice(rows, key)


def _fault(content: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    """The one word for a group: what it did on its own rows tells most, then what lies on the way to it."""
    held_out, training = row["own"]["held_out"], row["own"]["training"]
    if above(training):
        return "diverged"
    if _left_basin(content, row["group"]):
        return "left_basin"
    if held_out is None:
        return None
    prompts = row["own"]["prompts"]
    known = prompts is not None and prompts["low"] is not None
    # Whose answers still follow from their prompts has learnt the right thing, and too much of it.
    follows = known and prompts["low"] > PROMPT_EFFECT
    if above(row["own"]["second_half"]) and (below(row["own"]["first_half"]) or (above(held_out) and follows)):
        return "overshot"
    if above(held_out):
        return "wrong_data"
    if known and prompts["low"] <= 0 and prompts["high"] < PROMPT_EFFECT:
        return "noise"
    improved = held_out["value"] < -TOLERANCE and (held_out["high"] is None or held_out["high"] < 0)
    return None if improved else "learnt_nothing"


def _left_basin(content: Mapping[str, Any], group: int) -> bool:
    overall = any(above(barrier["height"]) for barrier in own_paths(content["overall"], group))
    return overall or more_than_chance(len(left_basin_on(content, group)), len(content["datasets"]))


def _merge_findings(content: Mapping[str, Any], learning_rate: float | None) -> list[Finding]:
    """What is to be said of the mean."""
    overall, findings = content["overall"], []
    gain = overall["gain"]
    if gain is not None:
        ridges = [b for b in overall["barriers"] if b["from"] != "mean" and b["from"] != "base" and above(b["height"])]
        if gain["measured"]["high"] is not None and gain["measured"]["high"] < -TOLERANCE:
            text = (
                f"Averaging did harm: the mean's loss is {nats(gain['measured'], -1)} above the groups' own average."
            )
            findings.append(Finding("no_common_basin", PROBLEM, text, _lower(learning_rate)))
        elif ridges:
            worst = max(ridges, key=lambda barrier: barrier["height"]["value"])
            text = (
                f"A ridge of {nats(worst['height'])} lies between {spoken(worst['from'])} and "
                f"{spoken(worst['to'])} (the highest of {len(ridges)})."
            )
            findings.append(Finding("barrier_between_groups", CAUTION, text, _lower(learning_rate)))
        findings += _rho_findings(gain)
    back = overall["changes"].get("mean-halfway")
    if above(back):
        text = (
            f"The mean went too far: the second half of its way from the base raises the loss by {nats(back)}, and "
            "more epochs would raise it further."
        )
        findings.append(Finding("mean_overshot", CAUTION, text, _lower(learning_rate)))
    forgot = [name for name, entry in content["datasets"].items() if above(entry["changes"]["mean-base"])]
    if forgot:
        chance = not more_than_chance(len(forgot), len(content["datasets"]))
        of = count(content["datasets"], "dataset")
        text = f"The mean is worse than the base on {len(forgot)} of {of}: {some(forgot)}."
        findings.append(Finding("worse_than_base", NOTE if chance else CAUTION, text, "", [], forgot))
    findings += _control_findings(content)
    return findings


def _rho_findings(gain: Mapping[str, Any]) -> list[Finding]:
    known = [(step["epsilon"], step["rho"]) for step in gain["ladder"] if step["rho"] is not None]
    if not known and not above(gain["measured"]) and not below(gain["measured"]):
        text = "Neither the measured nor the predicted gain can be told from 0: the groups hardly differ."
        return [Finding("no_gain", NOTE, text)]
    if len(known) < len(gain["ladder"]):
        missing = ", ".join(f"{step['epsilon']:g}" for step in gain["ladder"] if step["rho"] is None)
        text = (
            f"The loss does not surely bend upwards around the mean (the predicted gain cannot be told from 0, or is "
            f"negative, at ε = {missing}); the measured gain over the groups' own average is "
            f"{signed(gain['measured'])}."
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
    alpha = content["settings"].get("interpolate_to_init") or 1
    if alpha != 1 and apart is not None:
        text = (
            f"The merged model was put at {alpha:g} of the way from base to mean (interpolate_to_init); its loss − "
            f"the mean's: {signed(overall['changes']['merged-mean'])}. Gain and barriers here are the mean's."
        )
        findings.append(Finding("interpolated", NOTE, text))
    elif apart is not None and displacement > 0 and apart > NOT_THE_MEAN * displacement:
        text = (
            f"The merged model is not the weighted mean of the groups: it lies {apart:.3g} from it, "
            f"{apart / displacement:.0%} of the mean's displacement (its loss − the mean's: "
            f"{signed(overall['changes']['merged-mean'])})."
        )
        cure = "Rounding may do that (`merit merge --out-dtype float32`), or another method of merging."
        if content["settings"]["adapters"] == "svd":
            cure = "Its rank was cut: merge with a higher `--svd-rank`, or exactly with `--adapters concat`."
        findings.append(Finding("not_the_mean", CAUTION, text, cure))
    gained = overall["changes"].get("joint-base")
    if gained is not None and gained["low"] is not None and gained["low"] > -LITTLE_LEARNT:
        text = (
            f"Joint training changes the held-out loss by {signed(gained)}: less than {LITTLE_LEARNT} nats leave "
            "little that one split could do better than another."
        )
        findings.append(Finding("little_to_learn", NOTE, text))
    line = overall["changes"].get("mean-line")
    if line is not None:
        each = [entry["changes"]["mean-line"] for entry in content["datasets"].values()]
        # A mean over datasets may be one dataset's doing.
        what = (
            f"a point on the line from base to joint model, as far from the base ({signed(line)}; surely lower "
            f"on {sum(map(below, each))}, higher on {sum(map(above, each))} of {count(each, 'dataset')})"
        )
        if below(line):
            findings.append(Finding("better_than_line", NOTE, f"The mean beats {what}."))
        else:
            text = f"The mean does not beat {what}: nothing here shows that the split itself gained anything."
            if above(line):
                text = f"The mean is worse than {what}: here the joint model, moved less, does better than the split."
            findings.append(Finding("line_as_good", NOTE, text))
    return findings


def _plan_findings(content: Mapping[str, Any], trust: Mapping[str, Any]) -> list[Finding]:
    """Groups that are noise cannot show what splitting does, however well they merge."""
    if trust.get("verdict") not in ("weak", "random"):
        return []
    severity = CAUTION if content["kind"] == "base" else NOTE
    text = f"The plan is not one to draw conclusions from. {trust_verdict(dict(trust))}"
    return [Finding("plan_may_be_noise", severity, text)]


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
        f"Noise of {READY_SIGMA:.0%} of its weights changes the base's loss of {loss:.2f} by "
        f"{blocks.signed(rise)} nats ({blocks.signed(100 * rise / max(loss, 1e-9), 0)}%)"
    )
    if rise > SHARP * loss:
        cure = "Groups may leave so narrow a basin: use a low learning rate, and diagnose again after it."
        return [Finding("sharp_base", severity, text + ": the ground around it is steep.", cure)]
    return [Finding("flat_base", NOTE, text + ": flat enough to merge around.")]


def _exclusion_advice(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """The other remedy, where it was measured to help."""
    if any(row[key] is None for row in rows):
        return ""
    whose = "mean loss" if key == "exclude" else "mean loss on the other groups' datasets"
    helps = [row for row in rows if below(row[key])]
    if not helps:
        names = group_names([row["group"] for row in rows])
        return f" Merging without {names} was measured, and does not surely lower the {whose}."
    options = " ".join(f"--exclude {row['group']}" for row in helps)
    gains = ", ".join(signed(row[key]) for row in helps)
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
    gained = f", and averaging gained {nats(gain['measured'])} over the groups' own average" if gain else ""
    return f"The groups stayed in one basin. The mean's loss is {signed(change)} against the base{gained}."


def _next_step(content: Mapping[str, Any]) -> str:
    return "Train the groups." if content["kind"] == "base" else "Nothing to mend."


def _lower(learning_rate: float | None) -> str:
    now = f" ({learning_rate:g} now)" if learning_rate is not None else ""
    return f"Lower sft.learning_rate{now}, or train for fewer steps."

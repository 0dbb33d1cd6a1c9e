"""What a plan's trust facts say in sentences: on the command line, in the card and in the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from merit_hf.text import public_text
from merit_hf.trust import is_better

if TYPE_CHECKING:
    from merit_hf.plan import PartitionPlan

# A dataset that stays in its group less often than this is named, up to so many.
SURE = 0.8
MAX_UNSURE = 5
# Adjusted Rand index below which the groups of the two halves are told to disagree.
HALVES_AGREE = 0.5


def _shown(name: str) -> str:
    return public_text(name, 40)


def trust_sentences(plan: PartitionPlan, show: Callable[[str], str] = _shown) -> list[str]:
    """How reliable the gradients are, what re-drawn samples do to the groups, what random groups reach, the axes.

    Args:
        show: makes a dataset's name fit for where the sentences go.
    """
    trust = plan.trust
    if not trust.get("reliability"):
        return []
    lines = [_reliability(trust["reliability"], show)]
    stability, test, axes = trust["stability"], trust["random_test"], trust["axes"]
    if stability is not None:
        lines.append(
            f"Groups under re-drawn samples: adjusted Rand index {stability['adjusted_rand_index']:.2f} (1 the same, "
            f"0 chance; {stability['num_replicas']:d} replicas{_of(trust, plan)}){_halves(stability)}."
            + _unsure(plan, show)
        )
    if test is not None:
        gain = test["within"] - test["random"]
        doubt = (
            f" The read-out's error alone could make a difference of {test['readout_gain']:.3f}."
            if test["readout_gain"] is not None and gain <= test["readout_gain"]
            else ""
        )
        lines.append(
            f"Groups found on one half of the examples, judged on the other: mean cosine inside groups "
            f"{test['within']:.2f}, random groups of the same sizes {test['random']:.2f} (p = {test['p_value']:.3f})."
            + doubt
        )
    if axes["readout_sin_angle"] and axes["sampling_sin_angle"]:
        lines.append(
            f"Axis 1 is turned by at most sin(angle) = {axes['readout_sin_angle'][0]:.2f} by the read-out, "
            f"{axes['sampling_sin_angle'][0]:.2f} by sampling (1: not fixed)."
        )
    if trust.get("debias"):
        lines.append(_debias(trust["debias"], show))
    return lines


def _reliability(facts: dict[str, Any], show: Callable[[str], str]) -> str:
    return (
        f"Reliability of the gradients from {facts['num_samples']:d} examples (1: no noise): median "
        f"{facts['median']:.2f}, lowest {facts['lowest']:.2f} ({show(facts['lowest_dataset'])})."
    )


def _halves(stability: dict[str, Any]) -> str:
    """Plans of earlier versions do not hold it."""
    agreement = stability.get("half_agreement")
    return "" if agreement is None else f", of the two halves' own groups {agreement:.2f}"


def _of(trust: dict[str, Any], plan: PartitionPlan) -> str:
    count = trust["num_datasets"]
    return "" if count == len(plan.datasets) else f", {count:,} of the {len(plan.datasets):,} datasets"


def _unsure(plan: PartitionPlan, show: Callable[[str], str]) -> str:
    known = [(d.group_probability, d.name) for d in plan.datasets if d.group_probability is not None]
    unsure = sorted((share, name) for share, name in known if share < SURE)
    if not unsure:
        return f" Every dataset stays in its group in {SURE:.0%} of them or more." if known else ""
    told = ", ".join(f"{show(name)} {share:.0%}" for share, name in unsure[:MAX_UNSURE])
    more = f" and {len(unsure) - MAX_UNSURE} more" if len(unsure) > MAX_UNSURE else ""
    return f" In its own group in fewer than {SURE:.0%} of them: {told}{more}."


def _debias(facts: dict[str, Any], show: Callable[[str], str]) -> str:
    plain = [show(name) for name in facts["uncorrected"]]
    told = f"; not those of {', '.join(plain[:MAX_UNSURE])}" if plain else ""
    told += f" and {len(plain) - MAX_UNSURE} more" if len(plain) > MAX_UNSURE else ""
    told += ", whose reliability is below 0.1 or not known" if plain else ""
    clipped = f"; {facts['clipped_pairs']:d} pairs were cut to ±1" if facts["clipped_pairs"] else ""
    return f"The cosines are corrected for sampling noise{told}{clipped}."


def trust_verdict(trust: dict[str, Any]) -> str:
    """The last sentence of the plan's summary."""
    test, stability, advised = trust["random_test"], trust["stability"], trust["advised_num_samples"]
    samples, median = trust["reliability"]["num_samples"], trust["reliability"]["median"]
    if trust["verdict"] == "unknown":
        reason = "the datasets can be grouped in too few ways" if test is not None else "there is nothing to choose"
        return f"Worth following? Not known: {reason}, so no test can tell the groups from random ones."
    p_value, index = test["p_value"], stability["adjusted_rand_index"]
    numbers = f"p = {p_value:.3f}, adjusted Rand index {index:.2f}, reliability {median:.2f}"
    if trust["verdict"] == "follow":
        return f"Worth following: better than random groups, and stable ({numbers})."
    if trust["verdict"] == "random":
        return f"No better than random groups ({numbers}): train jointly, or split at random."
    better = is_better(p_value, test["within"] - test["random"], test["readout_gain"])
    what = "the groups are better than random ones but not stable" if better else "noise may hide the groups"
    halves = stability.get("half_agreement")
    if not better and halves is not None and halves < HALVES_AGREE:
        what = f"the halves of your samples disagree about the groups: this split is noise at n = {samples:d}"
        numbers += f", index between halves {halves:.2f}"
    if advised is None:
        return f"Weak: {what} ({numbers}), and all examples are used. Take fewer groups, or split at random."
    return f"Weak: {what} ({numbers}). Plan again with plan.num_samples={advised:d} (it had {samples:d})."

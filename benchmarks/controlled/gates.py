"""Is a mixture worth seeds? What it must show first, from rows of the record. Pure functions.

A null result says something only where there was something to find: groups that are real, a mixture that can be learnt
and is new to the base, groups that stay in one basin. Each gate is such a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiment import Gates
from tasks import TASKS

Row = Mapping[str, Any]
# Which facts each part of the measurement gives; later ones cost more.
BEFORE_TRAINING = ("split_half", "plan_agreement")
AFTER_TRAINING = ("joint_gain", "exact_match", "rho", "more_epochs")


@dataclass(frozen=True)
class Gate:
    """`value`: None where it could not be measured, which fails. `needed`: in words. `meaning`: of a failure."""

    name: str
    value: float | None
    needed: str
    passed: bool
    meaning: str

    @property
    def sentence(self) -> str:
        found = "could not be measured" if self.value is None else f"is {self.value:.3g}"
        return f"{self.name} {found}, needed {self.needed}: {self.meaning}"


def judge(gates: Gates, facts: Mapping[str, float | None], names: Sequence[str]) -> list[Gate]:
    """The gates `names` of BEFORE_TRAINING and AFTER_TRAINING.

    Args:
        facts: `split_half`, `plan_agreement`; `joint_gain` in nats, `exact_match`; `rho_low` and `rho_high` over ε;
            `more_epochs`, the merged mixture loss at more epochs less that at one.
    """
    found = {
        "split_half": _at_least(
            "split_half", facts, gates.split_half,
            "the halves of the samples disagree about the gradients. Raise plan.num_samples.",
        ),
        "plan_agreement": _at_least(
            "plan_agreement", facts, gates.plan_agreement,
            "other samples would give other groups, so that a plan is noise. Raise plan.num_samples, make fewer "
            "groups, or take datasets that differ more.",
        ),
        "joint_gain": _at_least(
            "joint_gain", facts, gates.joint_gain,
            "joint training learns next to nothing of the mixture. Train longer, or take tasks that are new to the "
            "base.",
        ),
        "exact_match": _at_least(
            "exact_match", facts, gates.exact_match,
            "joint training does not learn the tasks. Train longer, or take tasks that the base can learn.",
        ),
        "rho": _rho(gates, facts),
        "more_epochs": _more_epochs(facts),
    }  # fmt: skip
    return [found[name] for name in names]


def _at_least(name: str, facts: Mapping[str, float | None], needed: float, meaning: str) -> Gate:
    value = facts.get(name)
    return Gate(name, value, f"at least {needed:g}", value is not None and value >= needed, meaning)


def _rho(gates: Gates, facts: Mapping[str, float | None]) -> Gate:
    low, high = gates.rho
    values = [value for key in ("rho_low", "rho_high") if (value := facts.get(key)) is not None]
    worst = max(values, key=lambda value: abs(value - 1)) if values else None
    passed = bool(values) and all(low <= value <= high for value in values)
    meaning = (
        "the groups left the part of the basin that is quadratic, where averaging is understood. Lower the learning "
        "rate, or train for fewer steps."
    )
    return Gate("rho", worst, f"{low:g} to {high:g} at every ε", passed, meaning)


def _more_epochs(facts: Mapping[str, float | None]) -> Gate:
    value = facts.get("more_epochs")
    meaning = (
        "the merged model's loss on the mixture rises with more epochs, so the groups drift out of the common basin. "
        "Lower the learning rate."
    )
    return Gate("more_epochs", value, "0 or less", value is not None and value <= 0, meaning)


def gate_facts(rows: Sequence[Row], gates: Gates, mixture: Sequence[str]) -> dict[str, float | None]:
    """The facts that rows of phase `gate` hold; None where they are not there."""
    facts: dict[str, float | None] = {
        name: _of(rows, "plan", name) for name in ("split_half", "plan_agreement", "half_agreement", "eigengap")
    }
    short = [name for name in mixture if not TASKS[name].free_form]
    base, joint = _mean(rows, "base", "loss", mixture), _mean(rows, gates.joint, "loss", mixture)
    facts["joint_gain"] = None if base is None or joint is None else base - joint
    facts["exact_match"] = _mean(rows, gates.joint, "score", short)
    rho = [row["value"] for row in rows if row["metric"].startswith("rho@")]
    predicted = [row["value"] for row in rows if row["metric"].startswith("predicted_gain@")]
    # A missing ρ is a predicted gain that cannot be told from 0: not the quadratic basin that is asked for.
    whole = bool(rho) and len(rho) == len(predicted)
    facts["rho_low"], facts["rho_high"] = (min(rho), max(rho)) if whole else (None, None)
    once, longer = _mean(rows, gates.merit, "loss", mixture), _mean(rows, "longer", "loss", mixture)
    facts["more_epochs"] = None if once is None or longer is None else longer - once
    return facts


def _of(rows: Sequence[Row], part: str, metric: str) -> float | None:
    return next((row["value"] for row in rows if row["part"] == part and row["metric"] == metric), None)


def _mean(rows: Sequence[Row], part: str, metric: str, names: Sequence[str]) -> float | None:
    """Over the named datasets."""
    values = [
        row["value"] for row in rows if row["part"] == part and row["metric"] == metric and row["dataset"] in names
    ]
    return sum(values) / len(values) if values else None

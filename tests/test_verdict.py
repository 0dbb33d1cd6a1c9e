"""From numbers to words: which numbers make which finding, and the remedy that is told with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from merit_hf.diagnosis.verdict import judge

NAMES = [f"task-{i}" for i in range(12)]


def estimate(value: float, width: float = 0.005) -> dict[str, float | None]:
    return {"value": value, "low": value - width, "high": value + width}


def entry(num_groups: int = 3) -> dict[str, Any]:
    """Losses of a healthy merge."""
    labels = [f"group-{k}" for k in range(num_groups)]
    paths = [("base", label) for label in labels] + [("base", "mean")] + [("mean", label) for label in labels]
    paths += [(one, two) for i, one in enumerate(labels) for two in labels[i + 1 :]]
    ladder = [{"epsilon": step, "predicted": estimate(0.2), "rho": estimate(1.0, 0.05)} for step in (0.25, 0.5, 1.0)]
    return {
        "loss": {"base": 3.0, "mean": 2.0},
        "gain": {"measured": estimate(0.2), "ladder": ladder, "by_group": [1 / num_groups] * num_groups},
        "barriers": [{"from": a, "to": b, "height": estimate(-0.05), "position": 0.5} for a, b in paths],
        "changes": {"mean-base": estimate(-1.0)},
        "exclude": {},
        "perturbation": [{"sigma": 0.05, "increase": estimate(0.1)}],
    }


def content(num_groups: int = 3) -> dict[str, Any]:
    own = {
        "held_out": estimate(-0.5), "first_half": estimate(-0.3), "second_half": estimate(-0.2),
        "training": estimate(-0.6), "prompts": estimate(1.0),
    }  # fmt: skip
    groups = [
        {
            "group": k, "datasets": NAMES[4 * k : 4 * k + 4], "checks_failed": [], "displacement": 2.0,
            "own": copy.deepcopy(own), "exclude": estimate(0.1), "exclude_for_others": estimate(-0.05),
        }
        for k in range(num_groups)
    ]  # fmt: skip
    labels = ["group-0", "group-1", "group-2", "mean"]
    return {
        "kind": "groups",
        "settings": {"adapters": None},
        "groups": groups,
        "overall": entry(),
        "datasets": {name: entry() for name in NAMES},
        "geometry": {"labels": labels, "norms": [2, 2, 2, 1.2], "merged_from_mean": None},
    }


def codes(numbers: dict[str, Any]) -> dict[str, list[int]]:
    return {finding["code"]: finding["groups"] for finding in judge(numbers, 1e-4)["findings"]}


def test_all_is_well() -> None:
    found = judge(content(), 1e-4)
    assert found["status"] == "healthy"
    assert "stayed in one basin" in found["summary"]
    assert {finding["severity"] for finding in found["findings"]} == {"note"}


def raise_barrier(numbers: dict[str, Any], names: list[str], ends: tuple[str, str], height: float) -> None:
    for name in names:
        part = numbers["overall"] if name == "overall" else numbers["datasets"][name]
        (barrier,) = [b for b in part["barriers"] if (b["from"], b["to"]) == ends]
        barrier["height"] = estimate(height)


def test_a_group_that_left_the_basin_on_some_datasets_is_named_with_both_remedies() -> None:
    numbers = content()
    raise_barrier(numbers, NAMES[:2], ("mean", "group-2"), 0.3)
    raise_barrier(numbers, NAMES[1:4], ("base", "group-2"), 0.2)
    numbers["groups"][2]["exclude"] = estimate(-0.29)
    found = judge(numbers, 1e-4)
    (finding,) = [finding for finding in found["findings"] if finding["severity"] == "problem"]
    assert (finding["code"], finding["groups"], finding["datasets"]) == ("left_basin", [2], NAMES[:4])
    assert found["summary"].startswith("Group 2 left the basin on 4 of 12 datasets")
    assert found["remedy"].startswith("Lower the learning rate of group 2 (0.0001 now)")
    assert "merge with `--exclude 2`: measured, the mean loss changes by −0.290 [−0.295, −0.285]" in found["remedy"]


def test_a_ridge_on_one_dataset_of_many_may_be_chance_and_on_the_mean_it_is_none() -> None:
    numbers = content()
    raise_barrier(numbers, NAMES[:1], ("mean", "group-2"), 0.3)
    assert "left_basin" not in codes(numbers)
    raise_barrier(numbers, ["overall"], ("mean", "group-2"), 0.012)
    assert "left_basin" not in codes(numbers), "its interval does not clear the tolerance"
    raise_barrier(numbers, ["overall"], ("mean", "group-2"), 0.02)
    assert codes(numbers)["left_basin"] == [2]


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ({"training": estimate(0.4), "held_out": estimate(0.5)}, "diverged"),
        ({"held_out": estimate(0.5), "first_half": estimate(0.2), "prompts": estimate(0.0)}, "wrong_data"),
        ({"held_out": estimate(0.5), "second_half": estimate(0.3), "first_half": estimate(0.2)}, "overshot"),
        ({"held_out": estimate(-0.1), "second_half": estimate(0.2), "first_half": estimate(-0.3)}, "overshot"),
        ({"held_out": estimate(-2.0), "prompts": estimate(0.0, 0.02)}, "noise"),
        ({"held_out": estimate(0.0)}, "learnt_nothing"),
        ({"held_out": estimate(-0.3, 0.5)}, "learnt_nothing"),
        # Too few rows to say that the prompts tell nothing.
        ({"held_out": estimate(-2.0), "prompts": estimate(0.2, 0.3)}, None),
        ({"prompts": None, "training": None}, None),
        ({"prompts": {"value": 0.0, "low": None, "high": None}}, None),
    ],
)
def test_the_fault_of_a_group(own: dict[str, Any], code: str | None) -> None:
    numbers = content()
    numbers["groups"][1]["own"] |= own
    faults = {"diverged", "left_basin", "overshot", "wrong_data", "noise", "learnt_nothing"} & codes(numbers).keys()
    assert faults == ({code} if code else set())
    if code:
        assert codes(numbers)[code] == [1]
        assert judge(numbers, None)["status"] == "problem"


def test_exclusion_is_advised_only_where_it_was_measured_to_help() -> None:
    numbers = content()
    numbers["groups"][1]["own"]["held_out"] = estimate(0.0)
    assert "Merging without group 1 was measured, and does not surely lower" in judge(numbers, 1e-4)["remedy"]
    numbers["groups"][1]["exclude"] = estimate(-0.1)
    assert "--exclude 1" in judge(numbers, 1e-4)["remedy"]
    for row in numbers["groups"]:
        row["own"]["held_out"] = estimate(0.0)
    assert "xclu" not in judge(numbers, 1e-4)["remedy"], "all have the fault"


def test_a_group_without_fault_whose_absence_helps_is_a_caution() -> None:
    numbers = content()
    numbers["groups"][0]["exclude"] = estimate(-0.1)
    assert codes(numbers)["better_without"] == [0]
    assert judge(numbers, 1e-4)["status"] == "caution"


def test_rho() -> None:
    numbers = content()
    ladder = numbers["overall"]["gain"]["ladder"]
    assert "quadratic" in codes(numbers)
    ladder[2]["rho"] = estimate(1.3, 0.2)
    assert judge(numbers, 1e-4)["status"] == "healthy", "its interval reaches into the range"
    ladder[2]["rho"] = estimate(1.5, 0.2)
    assert judge(numbers, 1e-4)["status"] == "caution"
    assert "ρ is 1.00 at ε = 0.25, 1.00 at ε = 0.5, 1.50 at ε = 1" in judge(numbers, 1e-4)["summary"]
    ladder[0]["rho"] = None
    assert "does not surely bend upwards" in judge(numbers, 1e-4)["summary"]
    for step in ladder:
        step["rho"] = None
    numbers["overall"]["gain"]["measured"] = estimate(0.0)
    assert "no_gain" in codes(numbers)


def test_a_plan_that_may_be_noise_is_told_before_training_and_noted_after_it() -> None:
    trust = {
        "verdict": "random", "advised_num_samples": None, "reliability": {"num_samples": 200, "median": 0.9},
        "random_test": {"p_value": 0.4, "within": 0.1, "random": 0.1, "readout_gain": None},
        "stability": {"adjusted_rand_index": 0.1, "num_replicas": 200, "half_agreement": 0.0},
    }  # fmt: skip
    base = {"kind": "base", "overall": {"loss": {"base": 3.0}, "perturbation": []}, "datasets": {}}
    found = judge(base, 1e-4, trust=trust)
    assert found["status"] == "caution"
    assert "No better than random groups (p = 0.400" in found["summary"]
    after = judge(content(), 1e-4, trust=trust)
    assert after["status"] == "healthy", "the merge itself is well"
    assert "plan_may_be_noise" in {finding["code"] for finding in after["findings"]}
    for verdict in ("follow", "unknown"):
        assert judge(base, 1e-4, trust=trust | {"verdict": verdict})["findings"] == []


@pytest.mark.parametrize(("change", "told"), [(-0.1, True), (-0.4, False), (-0.301, False)])
def test_a_mixture_of_which_joint_training_learns_little_is_noted(change: float, told: bool) -> None:
    numbers = content()
    numbers["overall"]["changes"]["joint-base"] = estimate(change)
    found = judge(numbers, 1e-4)
    assert ("little_to_learn" in codes(numbers)) == told
    assert found["status"] == "healthy"


def test_a_mean_that_went_too_far_is_a_caution_with_a_lower_rate_as_its_remedy() -> None:
    numbers = content()
    numbers["overall"]["changes"]["mean-halfway"] = estimate(0.2)
    found = judge(numbers, 1e-4)
    assert found["status"] == "caution"
    assert "the second half of its way from the base raises the loss by 0.200 nats" in found["summary"]
    assert "Lower sft.learning_rate (0.0001 now)" in found["remedy"]
    numbers["overall"]["changes"]["mean-halfway"] = estimate(-0.2)
    assert "mean_overshot" not in codes(numbers)


def test_averaging_that_did_harm() -> None:
    numbers = content()
    numbers["overall"]["gain"]["measured"] = estimate(-0.3)
    found = judge(numbers, 1e-4)
    assert "Averaging did harm: the mean's loss is 0.300 nats above" in found["summary"]
    assert "Lower sft.learning_rate (0.0001 now)" in found["remedy"]


def test_the_controls() -> None:
    numbers = content()
    for value, code, said in (
        (-0.2, "better_than_line", "The mean beats"),
        (0.0, "line_as_good", "nothing here shows that the split itself gained"),
        (0.2, "line_as_good", "the joint model, moved less, does better"),
    ):
        numbers["overall"]["changes"]["mean-line"] = estimate(value)
        for number, name in enumerate(NAMES):
            numbers["datasets"][name]["changes"]["mean-line"] = estimate(-1.0 if number < 2 else 0.1 * (number < 5))
        texts = {finding["code"]: finding["text"] for finding in judge(numbers, 1e-4)["findings"]}
        assert said in texts[code]
        assert "surely lower on 2, higher on 3 of 12 datasets" in texts[code]
    numbers["overall"]["changes"]["merged-mean"] = estimate(0.1)
    numbers["geometry"]["merged_from_mean"] = 0.3
    assert judge(numbers, 1e-4)["status"] == "caution"
    assert "25% of the mean's displacement" in judge(numbers, 1e-4)["summary"]
    # What was asked for is no fault.
    numbers["settings"]["interpolate_to_init"] = 0.75
    found = judge(numbers, 1e-4)
    assert found["status"] == "healthy"
    texts = {finding["code"]: finding["text"] for finding in found["findings"]}
    assert "put at 0.75 of the way from base to mean" in texts["interpolated"]
    assert "not_the_mean" not in texts


def test_datasets_that_the_merge_made_worse_are_listed() -> None:
    numbers = content()
    for name in NAMES[:5]:
        numbers["datasets"][name]["changes"]["mean-base"] = estimate(0.1)
    found = judge(numbers, 1e-4)
    assert found["status"] == "caution"
    assert "worse than the base on 5 of 12 datasets: task-0, task-1, task-2, task-3 and 1 more" in found["summary"]


@pytest.mark.parametrize(
    ("loss", "rise", "code", "status"),
    [
        (3.0, 0.1, "flat_base", "healthy"),
        (3.0, 0.5, "sharp_base", "caution"),
        (9.9, 0.0, "untrained_base", "caution"),
    ],
)
def test_a_base_before_training(loss: float, rise: float, code: str, status: str) -> None:
    overall = {"loss": {"base": loss}, "perturbation": [{"sigma": 0.05, "increase": estimate(rise)}]}
    found = judge({"kind": "base", "overall": overall, "datasets": {}}, 1e-4, vocab_size=49152)
    assert [finding["code"] for finding in found["findings"]] == [code]
    assert found["status"] == status

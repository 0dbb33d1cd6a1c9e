"""Is the plan worth following? The verdicts and their words, and whole plans that say so of themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from synthetic import readouts, sample_halves, split_in_four, true_gradients
from test_cards import make_plan as card_plan
from tiny import as_chat, make_mixture, task_rows, write_jsonl

from merit_hf.cards import plan_dataset_card
from merit_hf.config import MeritConfig, PlanSection
from merit_hf.conflict import conflict_matrix
from merit_hf.plan import PLAN_NAME, PartitionPlan
from merit_hf.planner import MeritPlanner
from merit_hf.progress import Progress
from merit_hf.readouts import write_sketches
from merit_hf.reliability import debias_cosines
from merit_hf.report.words import is_noise, verdict_sentence
from merit_hf.stability import RandomTest
from merit_hf.summary import plan_summary
from merit_hf.trust import MAX_DATASETS, Assessment, assess, count_replicas, judge
from merit_hf.trust_words import trust_sentences, trust_verdict

QUIET = Progress(quiet=True)
SECTION = PlanSection(sketch="exact")
BETTER = RandomTest(p_value=0.001, within=0.6, random=0.2, smallest_p=0.001, readout_gain=0.01)
CHANCE = replace(BETTER, p_value=0.4, within=0.21)


def facts(median: float, samples: int = 200, needed: int | None = 100) -> dict[str, Any]:
    return {
        "median": median,
        "lowest": 0.1,
        "lowest_dataset": "x",
        "num_samples": samples,
        "num_samples_needed": needed,
    }


@pytest.mark.parametrize(
    ("median", "needed", "index", "test", "all_sampled", "verdict", "advised"),
    [
        (0.9, 89, 0.9, BETTER, False, "follow", None),
        (0.4, 1200, 0.6, BETTER, False, "follow", None),
        (0.4, 1200, 0.59, BETTER, False, "weak", 1200),
        (0.9, 89, 0.3, BETTER, False, "weak", 400),
        (0.9, 89, 0.3, BETTER, True, "weak", None),
        (0.4, 1200, 0.3, CHANCE, False, "weak", 1200),
        (0.9, 89, 0.9, CHANCE, False, "random", None),
        (0.4, 1200, 0.3, CHANCE, True, "random", None),
        (0.0, None, 0.1, CHANCE, False, "random", None),
        (0.01, 79_200, 0.1, CHANCE, False, "random", None),
        (0.9, 89, 0.9, replace(BETTER, within=0.205), False, "random", None),
        (0.9, 89, 0.9, replace(BETTER, within=0.205, readout_gain=None), False, "follow", None),
        (0.9, 89, 0.9, replace(CHANCE, smallest_p=0.1), False, "unknown", None),
        (0.9, 89, None, None, False, "unknown", None),
    ],
)
def test_verdicts(
    median: float, needed: int | None, index: float | None, test: RandomTest | None, all_sampled: bool, verdict: str,
    advised: int | None,
) -> None:  # fmt: skip
    found = judge(facts(median, needed=needed), index, test, all_sampled)
    assert found == {"verdict": verdict, "advised_num_samples": advised}


_STABLE = "adjusted Rand index 0.90, reliability 0.90"
_NOISY = "adjusted Rand index 0.30, reliability 0.40"
_UNKNOWN = "so no test can tell the groups from random ones."
GOLDEN = {
    "follow": f"Worth following: better than random groups, and stable (p = 0.001, {_STABLE}).",
    "weak": f"Weak: the groups are better than random ones but not stable (p = 0.001, {_NOISY}). Plan again with "
    "plan.num_samples=534 (it had 200).",
    "weak, noise": f"Weak: noise may hide the groups (p = 0.400, {_NOISY}). Plan again with plan.num_samples=534 (it "
    "had 200).",
    "weak, halves": "Weak: the halves of your samples disagree about the groups: this split is noise at n = 200 (p = "
    f"0.400, {_NOISY}, index between halves 0.10). Plan again with plan.num_samples=534 (it had 200).",
    "weak, no more": f"Weak: the groups are better than random ones but not stable (p = 0.001, {_NOISY}), and all "
    "examples are used. Take fewer groups, or split at random.",
    "random": "No better than random groups (p = 0.400, adjusted Rand index 0.30, reliability 0.90): train jointly, "
    "or split at random.",
    "few": f"Worth following? Not known: the datasets can be grouped in too few ways, {_UNKNOWN}",
    "nothing": f"Worth following? Not known: there is nothing to choose, {_UNKNOWN}",
}


def told(
    median: float, index: float | None, test: RandomTest | None, all_sampled: bool = False, halves: float | None = None
) -> dict[str, Any]:
    agreement = {} if halves is None else {"half_agreement": halves}
    reliability = facts(median, needed=534)
    return {
        "num_datasets": 4, "reliability": reliability, "random_test": None if test is None else vars(test),
        "stability": None if index is None else {"adjusted_rand_index": index, "num_replicas": 200, **agreement},
        "axes": {"eigengaps": [0.5], "readout_error": 0.02, "readout_sin_angle": [0.04], "sampling_error": 0.1,
                 "sampling_sin_angle": [0.2]},
        **judge(reliability, index, test, all_sampled),
    }  # fmt: skip


TOLD = {
    "follow": told(0.9, 0.9, BETTER),
    "weak": told(0.4, 0.3, BETTER),
    "weak, noise": told(0.4, 0.3, CHANCE),
    "weak, halves": told(0.4, 0.3, CHANCE, halves=0.1),
    "weak, no more": told(0.4, 0.3, BETTER, all_sampled=True),
    "random": told(0.9, 0.3, CHANCE),
    "few": told(0.9, 0.9, replace(BETTER, smallest_p=0.06)),
    "nothing": told(0.9, None, None),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_last_sentence_of_the_summary_says_it_in_words(case: str) -> None:
    assert trust_verdict(TOLD[case]) == GOLDEN[case]
    plan = card_plan(["alpha", "beta", "gamma", "delta"])
    plan.trust = TOLD[case]
    lines = plan_summary(plan)
    assert lines[-1] == verdict_sentence(plan) == GOLDEN[case]
    assert len(lines) <= 12
    assert is_noise(plan) == (case == "random")
    card = plan_dataset_card(plan)
    assert f"**{GOLDEN[case]}**" in card
    assert "shuffles" not in card


def test_one_example_a_dataset_says_nothing_of_noise() -> None:
    plan = card_plan(["alpha", "beta", "gamma", "delta"])
    plan.trust, cure = {}, "no halves to compare, so nothing is known of its noise: plan again with a larger"
    assert cure not in verdict_sentence(plan)
    plan.datasets = [replace(dataset, num_sampled=1) for dataset in plan.datasets]
    assert cure in verdict_sentence(plan)


def test_the_sentences_before_it() -> None:
    plan = card_plan(["alpha", "be|ta", "gamma", "delta"])
    plan.trust = TOLD["follow"] | {"debias": {"uncorrected": ["be|ta"], "clipped_pairs": 3}}
    plan.trust["reliability"] = {**plan.trust["reliability"], "lowest_dataset": "be|ta"}
    probabilities = [1.0, 0.55, 0.799, 0.8]
    plan.datasets = [
        replace(dataset, group_probability=share) for dataset, share in zip(plan.datasets, probabilities, strict=True)
    ]
    assert trust_sentences(plan) == [
        "Reliability of the gradients from 200 examples (1: no noise): median 0.90, lowest 0.10 (be|ta).",
        "Groups under re-drawn samples: adjusted Rand index 0.90 (1 the same, 0 chance; 200 replicas). In its own "
        "group in fewer than 80% of them: be|ta 55%, gamma 80%.",
        "Groups found on one half of the examples, judged on the other: mean cosine inside groups 0.60, random groups "
        "of the same sizes 0.20 (p = 0.001).",
        "Axis 1 is turned by at most sin(angle) = 0.04 by the read-out, 0.20 by sampling (1: not fixed).",
        "The cosines are corrected for sampling noise; not those of be|ta, whose reliability is below 0.1 or not "
        "known; 3 pairs were cut to ±1.",
    ]
    assert "be|ta" not in plan_dataset_card(plan), "a name is text in a card, never markup"
    plan.trust = {}
    assert trust_sentences(plan) == []


def test_the_section_of_the_card_is_the_golden_one() -> None:
    plan = card_plan(["alpha", "beta", "gamma", "delta"])
    plan.trust = TOLD["follow"] | {"debias": {"uncorrected": ["be|ta"], "clipped_pairs": 3}}
    card = plan_dataset_card(plan)
    section = card[card.index("## How far") : card.index("## How it was made")]
    expected = Path(__file__).parent / "golden" / "plan_card_trust.md"
    assert section == expected.read_text(encoding="utf-8")


def of(kind: str, count: int, noise: float, seed: int = 0, **section: Any) -> Assessment:
    rng = np.random.default_rng(seed)
    made = readouts(*sample_halves(true_gradients(kind, count, rng), noise, rng))
    groups = split_in_four(conflict_matrix([readout.sketch for readout in made]))
    plan = PlanSection(**{"sketch": "exact", **section})
    names = [f"set{number}" for number in range(count)]
    return assess(made, names, groups, lambda matrix, chosen: split_in_four(matrix), {"eigengaps": [1.0]}, plan)


@pytest.mark.parametrize("seed", range(3))
def test_the_three_verdicts_on_gradients_whose_truth_is_known(seed: int) -> None:
    follow = of("blocks", 24, 0.2, seed)
    assert follow.facts["verdict"] == "follow"
    assert np.mean([share for share in follow.probability if share is not None]) > 0.8
    weak = of("blocks", 24, 1.3, seed).facts
    assert weak["verdict"] == "weak"
    # Reliability 1/(1 + 1.3²) at 200 examples: 0.8 at 4 · 1.3² · 200.
    assert weak["advised_num_samples"] == pytest.approx(1352, rel=0.4)
    assert of("shared", 24, 0.2, seed).facts["verdict"] == "random"
    assert of("noise", 24, 1.0, seed).facts["verdict"] in ("random", "weak")
    assert of("noise", 24, 1.0, seed).facts["reliability"]["median"] < 0.1


def test_debiased_plans_are_bootstrapped_as_they_were_split() -> None:
    seen: list[np.ndarray] = []
    rng = np.random.default_rng(0)
    made = readouts(*sample_halves(true_gradients("blocks", 12, rng), 0.7, rng))
    matrix = conflict_matrix([readout.sketch for readout in made])
    corrected = debias_cosines(matrix, [readout.reliability for readout in made])[0]

    def split(values: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
        seen.append(values)
        return split_in_four(values)

    for section in (SECTION, PlanSection(sketch="exact", debias="split_half")):
        assess(made, [str(i) for i in range(12)], split_in_four(corrected), split, {}, section)
    plain, debiased = (np.abs(values[0, 1:]).mean() for values in (seen[0], seen[len(seen) // 2]))
    assert debiased > 1.2 * plain


def test_datasets_without_halves_are_left_out_and_too_few_say_nothing() -> None:
    rng = np.random.default_rng(0)
    made = readouts(*sample_halves(true_gradients("blocks", 13, rng), 0.2, rng))
    made[4] = replace(made[4], first_half=made[4].sketch, first_share=1.0, reliability=None, split_half_cosine=None)
    asked: list[list[int]] = []

    def split(matrix: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        asked.append(list(chosen))
        return split_in_four(matrix)

    groups = split_in_four(conflict_matrix([readout.sketch for readout in made]))
    found = assess(made, [str(i) for i in range(13)], groups, split, {}, SECTION)
    assert found.probability[4] is None
    assert all(share is not None for i, share in enumerate(found.probability) if i != 4)
    assert set(map(tuple, asked)) == {tuple(i for i in range(13) if i != 4)}
    assert found.facts["num_datasets"] == 12
    assert "12 of the 13 datasets" in " ".join(trust_sentences(_shown(found, 13)))
    assert assess([], ["a", "b"], np.zeros(2, dtype=int), split, {}, SECTION) == Assessment({}, [None, None])
    for count in (1, 2, 3):
        one = assess(made[:count], ["a", "b", "c"][:count], np.arange(count), split, {}, SECTION)
        assert one.facts["verdict"] == "unknown"
        assert one.facts["reliability"]["median"] > 0.9
        assert one.probability == [None] * count


def _shown(assessment: Assessment, count: int) -> PartitionPlan:
    plan = card_plan([str(i) for i in range(count)])
    plan.trust = assessment.facts
    return plan


def test_of_very_many_datasets_a_random_choice_is_assessed() -> None:
    rng = np.random.default_rng(0)
    count = MAX_DATASETS + 60
    directions = np.linalg.qr(rng.standard_normal((12, 4)))[0].T
    first, second = sample_halves(directions[np.arange(count) % 4], 0.2, rng)
    groups = np.arange(count) % 4

    def split(matrix: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        assert len(matrix) == len(chosen) == MAX_DATASETS
        return groups[chosen]

    found = assess(readouts(first, second), [str(i) for i in range(count)], groups, split, {}, SECTION)
    assert sum(share is not None for share in found.probability) == MAX_DATASETS
    assert found.facts["num_datasets"] == MAX_DATASETS
    assert found.facts["stability"] == {"adjusted_rand_index": 1.0, "num_replicas": 20, "half_agreement": 1.0}
    assert (count_replicas(12, "merit"), count_replicas(200, "merit"), count_replicas(12, "kmeans")) == (200, 200, 20)
    assert 20 <= count_replicas(500, "merit") < 50


# --- whole plans ---


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight datasets of two kinds: four ask for the words again, four for one of two numbers."""
    path = make_mixture(tmp_path_factory.mktemp("trust"), ("copy",), count=4)
    content = yaml.safe_load(path.read_text())
    content["datasets"] = []
    for number in range(8):
        rows = task_rows("copy", 60, seed=number)
        if number % 2:
            rows = [{**row, "completion": "one two three four five"} for row in rows]
        file = write_jsonl(path.parent / f"data/set{number}.jsonl", [as_chat(row) for row in rows])
        content["datasets"].append({"name": f"set{number}", "path": str(file), "eval_fraction": 0.0})
    content["plan"] = {"num_groups": 2, "num_samples": 40, "sketch_dim": 4096}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def plan(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PartitionPlan]:
    folder, made = tmp_path_factory.mktemp("plans"), {}

    def make(*overrides: str) -> PartitionPlan:
        if overrides not in made:
            config = MeritConfig.from_yaml(mixture, overrides)
            made[overrides] = MeritPlanner(config, QUIET).plan(folder / str(len(made)))
        return made[overrides]

    return make


def text(plan: PartitionPlan) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for line in plan_summary(plan):
        console.print(line)
    return console.export_text()


def test_a_plan_of_two_kinds_of_datasets_is_worth_following(plan: Callable[..., PartitionPlan]) -> None:
    made = plan()
    assert {tuple(group.datasets) for group in made.groups} == {
        tuple(f"set{i}" for i in range(0, 8, 2)), tuple(f"set{i}" for i in range(1, 8, 2))
    }  # fmt: skip
    assert made.trust["verdict"] == "follow"
    recorded = json.loads((made.folder / PLAN_NAME).read_text())
    assert recorded["trust"] == made.trust
    assert "structure_p_value" not in made.bounds
    assert all(d.group_probability > 0.9 and 0.3 < d.reliability <= 1 for d in made.datasets)
    shown = text(made)
    assert shown.rstrip().endswith(verdict_sentence(made))
    assert len(shown.splitlines()) < 24, "one screen"
    assert verdict_sentence(made) in (made.folder / "README.md").read_text()


def test_the_halves_are_kept_with_the_plan(plan: Callable[..., PartitionPlan]) -> None:
    made = plan()
    whole, first = made.load_sketches(), made.load_first_halves()
    for index, dataset in enumerate(made.datasets):
        share = dataset.first_half_share
        second = (whole[index] - share * first[index]) / (1 - share)
        cosine = first[index] @ second / np.linalg.norm(first[index]) / np.linalg.norm(second)
        assert cosine == pytest.approx(dataset.split_half_cosine, abs=1e-3)
        assert first[index] @ second / (whole[index] @ whole[index]) == pytest.approx(dataset.reliability, abs=1e-3)


def test_a_plan_of_before_halves_were_kept_still_loads(plan: Callable[..., PartitionPlan], tmp_path: Path) -> None:
    import shutil

    import pyarrow.parquet as pq

    old = tmp_path / "old"
    shutil.copytree(plan().folder, old)
    content = json.loads((old / PLAN_NAME).read_text())
    del content["trust"]
    content["bounds"] |= {"structure_p_value": 0.2, "verdict": "noise"}
    (old / PLAN_NAME).write_text(json.dumps(content))
    table = pq.read_table(old / "data/datasets.parquet")
    new = ["split_half_cosine", "reliability", "first_half_share", "group_probability"]
    pq.write_table(table.drop_columns(new), old / "data/datasets.parquet")
    write_sketches(old / "sketches.safetensors", list(plan().load_sketches()))
    loaded = PartitionPlan.from_pretrained(old)
    assert loaded.sha256 == plan().sha256
    assert loaded.load_first_halves() is None
    assert loaded.trust == {}
    assert verdict_sentence(loaded).startswith("The cosines show no more structure")
    assert is_noise(loaded)


def test_debias_is_part_of_the_plan(plan: Callable[..., PartitionPlan]) -> None:
    plain, made = plan(), plan("plan.debias=split_half")
    reliabilities = [dataset.reliability for dataset in plain.datasets]
    assert [dataset.reliability for dataset in made.datasets] == reliabilities
    expected, uncorrected, clipped = debias_cosines(plain.conflict_matrix, reliabilities)
    assert np.array_equal(made.conflict_matrix, expected)
    assert made.trust["debias"] == {"uncorrected": uncorrected, "clipped_pairs": clipped}
    assert "corrected for sampling noise" in text(made)


@pytest.mark.parametrize("split", ["random", "joint", "by_tag"])
def test_splits_without_gradients_claim_nothing(split: str, mixture: Path, tmp_path: Path) -> None:
    overrides = [f"plan.split={split}", "plan.num_groups=null", *(f"datasets.set{i}.tag=t{i % 2}" for i in range(8))]
    made = MeritPlanner(MeritConfig.from_yaml(mixture, overrides), QUIET).plan(tmp_path / "plan")
    assert made.trust == {}
    assert "following" not in text(made)
    assert "How far to trust" not in (made.folder / "README.md").read_text()


class Stopped(MeritPlanner):
    """Stops when all gradients are there and the plan is not."""

    def _measure(self, *args: Any) -> Any:
        super()._measure(*args)
        raise KeyboardInterrupt


def test_an_adaptive_plan_goes_on_where_it_was_stopped(
    plan: Callable[..., PartitionPlan], mixture: Path, tmp_path: Path
) -> None:
    auto = ("plan.num_samples=auto", "plan.min_reliability=0.9", "plan.max_num_samples=50")
    expected = plan(*auto)
    sizes = {dataset.num_sampled for dataset in expected.datasets}
    assert len(sizes) > 1
    assert sizes <= set(range(32, 51))
    config = MeritConfig.from_yaml(mixture, auto)
    with pytest.raises(KeyboardInterrupt):
        Stopped(config, QUIET).plan(tmp_path / "plan")
    done = sorted((tmp_path / "plan.part/gradients").glob("*.npy"))
    for file in done[:3]:
        file.unlink()
    found = MeritPlanner(config, QUIET).plan(tmp_path / "plan")
    assert found.datasets == expected.datasets
    assert found.trust == expected.trust
    name = "sketches.safetensors"
    assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes()


def test_read_outs_of_another_target_are_not_taken_over(
    plan: Callable[..., PartitionPlan], mixture: Path, tmp_path: Path
) -> None:
    auto = ("plan.num_samples=auto", "plan.min_reliability=0.9", "plan.max_num_samples=50")
    with pytest.raises(KeyboardInterrupt):
        Stopped(MeritConfig.from_yaml(mixture, (*auto[:2], "plan.max_num_samples=34")), QUIET).plan(tmp_path / "plan")
    found = MeritPlanner(MeritConfig.from_yaml(mixture, auto), QUIET).plan(tmp_path / "plan")
    assert found.datasets == plan(*auto).datasets

"""Scores of an answer against its reference, and paired differences of them."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit_hf.config import METRICS, ConfigError, MeritConfig
from merit_hf.evaluation.metrics import default_metric, exact_match, load_scorer, parse_metadata
from merit_hf.evaluation.paired import MIN_EXAMPLES, NUM_RESAMPLES, mean_difference, paired_difference

TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=40)


def score(name: str, answer: str, reference: str, prompt: str = "", metadata: dict | None = None) -> float:
    scorer = load_scorer(name, "datasets.x.metric")
    assert scorer is not None
    return scorer(answer, reference, prompt, metadata)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("54", "54", 1), (" 54\n", "54", 1), ("a  b\nc", "a b c", 1), ("", "", 1), ("54.", "54", 0), ("Yes", "yes", 0),
        ("The answer is 54", "54", 0), (unicodedata.normalize("NFD", "sábado"), "sábado", 1), ("sabado", "sábado", 0),
    ],
)  # fmt: skip
def test_exact_match(answer: str, reference: str, expected: float) -> None:
    assert exact_match(answer, reference) == expected
    assert exact_match(reference, answer) == expected


@settings(deadline=None)
@given(TEXT)
def test_every_metric_gives_a_reference_itself_all_points(text: str) -> None:
    words = "".join(c if c.isalnum() else " " for c in text) + " word"
    for name in ("exact_match", "chrf", "rouge1", "rougeL"):
        assert score(name, words, words) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(TEXT, TEXT)
def test_scores_lie_between_0_and_1(answer: str, reference: str) -> None:
    for name in METRICS:
        if name != "none":
            assert 0 <= score(name, answer, reference) <= 1


def test_chrf_and_rouge_are_their_libraries_own() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_chrf

    answer, reference = "the cat sat on a mat", "the cat lay on the mat"
    assert score("chrf", answer, reference) == pytest.approx(sentence_chrf(answer, [reference]).score / 100)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = RougeScorer([name]).score(reference, answer)[name].fmeasure
        assert 0 < expected < 1
        assert score(name, answer, reference) == expected
    # By hand: four of six words, in order.
    assert score("rougeL", answer, reference) == pytest.approx(4 / 6)
    # The metric for scripts that ROUGE's tokenizer drops.
    assert score("chrf", "東京", "東京都") > 0
    assert score("rougeL", "東京", "東京都") == 0


def test_reasoning_gym_scores_with_its_tasks_own_scorers() -> None:
    pytest.importorskip("reasoning_gym", exc_type=ImportError)
    assert score("reasoning_gym.spell_backward", "cba", "cba") == 1
    assert score("reasoning_gym.spell_backward", " CBA ", "cba") == 1
    assert 0 < score("reasoning_gym.spell_backward", "cbx", "cba") < 1
    metadata = {"task": "weekday_of_date"}
    assert score("reasoning_gym.calendar_arithmetic", "Monday", "Monday", metadata=metadata) == 1
    assert score("reasoning_gym.calendar_arithmetic", "Friday", "Monday", metadata=metadata) == 0.1
    with pytest.raises(ConfigError, match=r"`calendar_arithmetic` needs metadata .*'task'"):
        score("reasoning_gym.calendar_arithmetic", "Monday", "Monday")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exactmatch", "Did you mean `exact_match`"), ("ROUGE-L", "one of exact_match"), ("", "one of exact_match"),
        ("reasoning_gym.", "one of"), ("reasoning_gym.nothing", "no task `nothing`"),
    ],
)  # fmt: skip
def test_an_unknown_metric_is_refused(name: str, said: str) -> None:
    if name == "reasoning_gym.nothing":
        pytest.importorskip("reasoning_gym", exc_type=ImportError)
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")) as raised:
        load_scorer(name, "datasets.x.metric")
    assert "datasets.x.metric" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "library"),
    [("chrf", "sacrebleu"), ("rougeL", "rouge_score"), ("reasoning_gym.spell_backward", "reasoning_gym")],
)
def test_a_missing_library_is_told_in_one_line(name: str, library: str) -> None:
    script = (
        "import sys\n"
        "sys.modules[sys.argv[2]] = None\n"  # what Python itself takes as `cannot be imported`
        "from merit_hf.config import ConfigError\n"
        "from merit_hf.evaluation.metrics import load_scorer\n"
        "try:\n"
        "    load_scorer(sys.argv[1], 'datasets.x.metric')\n"
        "except ConfigError as error:\n"
        "    sys.stdout.write(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, name, library], capture_output=True, text=True, check=True)
    extra = "reasoning-gym" if library == "reasoning_gym" else "eval"
    assert f"pip install 'merit_hf[{extra}]'" in done.stdout
    assert "datasets.x.metric" in done.stdout
    assert "\n" not in done.stdout


def test_config_checks_the_name_of_a_metric() -> None:
    content = {"base": {"model_name_or_path": "b"}, "datasets": [{"name": "d", "path": "p", "metric": "chrff"}]}
    with pytest.raises(ConfigError, match=r"datasets\.d\.metric='chrff' .* Did you mean `chrf`"):
        MeritConfig.from_dict(content)
    for name in (*METRICS, "reasoning_gym.gcd"):
        content["datasets"][0]["metric"] = name  # type: ignore[index]
        assert MeritConfig.from_dict(content).datasets[0].metric == name


def test_the_default_goes_by_the_median_reference() -> None:
    assert default_metric(["yes", "no", "x" * 900]) == "exact_match"
    assert default_metric(["x" * 40]) == "exact_match"
    assert default_metric(["x" * 41]) == "chrf"


def test_metadata_is_json_or_a_struct() -> None:
    assert parse_metadata(None) is None
    assert parse_metadata(json.dumps({"a": [1]})) == {"a": [1]}
    # A table has every column in every row.
    assert parse_metadata({"a": 0, "b": None}) == {"a": 0}
    for wrong in ("[1]", "{", 3):
        with pytest.raises(ValueError, match=r"."):
            parse_metadata(wrong)


AMOUNTS = st.lists(st.tuples(*[st.floats(0, 100)] * 2, st.integers(1, 50)), min_size=1, max_size=30)


@settings(deadline=None)
@given(AMOUNTS, st.integers(0, 2**63))
def test_a_difference_is_one_of_ratios_of_sums(rows: list[tuple[float, float, int]], seed: int) -> None:
    ours, theirs, divisors = (list(column) for column in zip(*rows, strict=True))
    found = paired_difference(ours, theirs, divisors, seed)
    assert found.difference == pytest.approx(sum(ours) / sum(divisors) - sum(theirs) / sum(divisors), abs=1e-9)
    back = paired_difference(theirs, ours, divisors, seed)
    assert back.difference == pytest.approx(-found.difference)
    assert (found.low is None) == (len(rows) < MIN_EXAMPLES)
    if found.low is not None and found.high is not None:
        assert found.low <= found.high
        assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_the_interval_is_that_of_resampled_examples() -> None:
    rng = np.random.default_rng(0)
    ours, theirs, divisors = rng.gamma(2, size=60), rng.gamma(2, size=60), rng.integers(1, 9, size=60)
    found = paired_difference(ours, theirs, divisors, seed=3)
    draws = rng.integers(0, 60, size=(20_000, 60))
    ratios = (ours - theirs)[draws].sum(1) / divisors[draws].sum(1)
    spread = ratios.std()
    expected = np.quantile(ratios, [0.025, 0.975])
    # Two Monte-Carlo quantiles of 2,000 and 20,000 draws agree within a quarter of the spread.
    assert np.allclose([found.low, found.high], expected, atol=0.25 * spread)
    assert len(found.draws) == NUM_RESAMPLES


def test_pairing_takes_out_what_both_models_find_hard() -> None:
    rng = np.random.default_rng(0)
    hard = rng.gamma(1, 50, size=100)
    found = paired_difference(hard + 0.1, hard, np.ones(100), seed=0)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_mean_over_datasets_has_an_interval_where_all_have_one() -> None:
    rng = np.random.default_rng(1)
    large = [paired_difference(rng.random(40), rng.random(40), np.ones(40), seed) for seed in range(4)]
    small = paired_difference([1.0, 2.0], [0.0, 0.0], [1, 1], seed=0)
    mean = mean_difference(large)
    assert mean.difference == pytest.approx(np.mean([d.difference for d in large]))
    assert mean.low is not None
    assert mean.high is not None
    # Independent examples: the mean of four is known twice as well.
    widths = [d.high - d.low for d in large if d.high is not None and d.low is not None]
    assert mean.high - mean.low == pytest.approx(np.mean(widths) / 2, rel=0.2)
    assert mean_difference([*large, small]).low is None
    assert mean_difference([*large, small]).difference == pytest.approx((4 * mean.difference + 1.5) / 5)

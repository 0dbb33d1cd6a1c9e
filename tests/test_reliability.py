"""Reliability of a gradient from its halves: against truth that is known, and as the planner measures it."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from synthetic import sample_halves, true_gradients
from tiny import as_chat, task_rows, write_jsonl
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from merit_hf.config import DatasetSection, PlanSection
from merit_hf.conflict import conflict_matrix
from merit_hf.data import load_rows
from merit_hf.gradients import dataset_gradient, trained_parameters
from merit_hf.measure import FIRST_SAMPLES, measure_gradients
from merit_hf.mixture import PreparedDataset, prepare_dataset
from merit_hf.progress import Progress
from merit_hf.readouts import GradientReadout, open_sketches, write_sketches
from merit_hf.reliability import MIN_DEBIAS_RELIABILITY, debias_cosines, next_sample_size, samples_needed, split_half
from merit_hf.sft import build_args, load_model, load_tokenizer, open_loss
from merit_hf.sketch import make_sketch
from merit_hf.workers import Worker

VECTORS = arrays.arrays(np.float64, 6, elements=st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-3))


@given(VECTORS, VECTORS, st.floats(0.05, 0.95))
def test_the_reliability_is_the_products_share_of_the_whole(a: np.ndarray, b: np.ndarray, share: float) -> None:
    cosine, reliability = split_half(a, b, share)
    assert -1 <= cosine <= 1
    assert 0 <= reliability <= 1
    assert split_half(b, a, 1 - share) == pytest.approx((cosine, reliability))
    assert split_half(3 * a, 3 * b, share) == pytest.approx((cosine, reliability))
    whole = share * a + (1 - share) * b
    if np.any(a) and np.any(b) and whole @ whole > 1e-9:
        assert reliability == pytest.approx(np.clip(a @ b / (whole @ whole), 0, 1), abs=1e-6)


@given(st.floats(0, 1))
def test_halves_of_equal_length_give_spearman_brown(cosine: float) -> None:
    a, b = np.array([1.0, 0.0]), np.array([cosine, (1 - cosine**2) ** 0.5])
    assert split_half(a, b, 0.5) == pytest.approx((cosine, 2 * cosine / (1 + cosine)))


@pytest.mark.parametrize("noise", [0.3, 1.0, 2.0])
def test_it_estimates_the_cosine_of_two_samples_and_the_share_of_signal(noise: float) -> None:
    """r = 1/(1 + σ²) by construction; another sample's gradient has that cosine, the truth its root."""
    rng = np.random.default_rng(0)
    truth = true_gradients("shared", 300, rng)
    first, second = sample_halves(truth, noise, rng)
    again = sum(sample_halves(truth, noise, rng)) / 2
    whole = (first + second) / 2
    found = np.mean([split_half(a, b, 0.5)[1] for a, b in zip(first, second, strict=True)])
    expected = 1 / (1 + noise**2)
    assert found == pytest.approx(expected, abs=0.02)
    lengths = np.linalg.norm(whole, axis=1)
    assert np.mean((whole * again).sum(1) / lengths / np.linalg.norm(again, axis=1)) == pytest.approx(
        expected, abs=0.02
    )
    assert np.mean((whole * truth).sum(1) / lengths) == pytest.approx(expected**0.5, abs=0.02)


def test_a_half_without_a_direction_has_no_reliability() -> None:
    assert split_half(np.zeros(3), np.ones(3), 0.5) == (0.0, 0.0)
    assert split_half(np.ones(3), -np.ones(3), 0.5) == (-1.0, 0.0)


@given(st.integers(1, 1000), st.floats(0.01, 0.99), st.floats(0.05, 0.95))
def test_samples_needed_follow_the_law_of_1_over_n(num: int, reliability: float, target: float) -> None:
    needed = samples_needed(num, reliability, target)
    assert needed is not None
    noise = num * (1 - reliability) / reliability
    # The reliability at n is n/(n + noise).
    assert needed / (needed + noise) >= target - 1e-9
    assert needed == 1 or (needed - 1) / (needed - 1 + noise) <= target + 1e-9
    following = next_sample_size(num, reliability, target, 400)
    assert min(num, 400) <= following <= 400
    assert num >= 400 or following > num
    assert following <= max(2 * num, 0)


def test_no_number_of_samples_follows_from_halves_that_disagree() -> None:
    assert samples_needed(100, 0.0) is None
    assert samples_needed(100, None) is None
    assert next_sample_size(32, 0.0, 0.8, 400) == 64


def test_debiased_cosines_are_those_without_noise() -> None:
    """One dataset is four times as noisy: its cosines come out too small, and right after the correction."""
    rng = np.random.default_rng(1)
    truth = true_gradients("blocks", 8, rng, dim=40_000)
    first, second = sample_halves(truth, np.array([2.0, *[0.5] * 7]), rng)
    reliabilities = [split_half(a, b, 0.5)[1] for a, b in zip(first, second, strict=True)]
    measured = conflict_matrix((first + second) / 2)
    corrected, plain, clipped = debias_cosines(measured, reliabilities)
    expected = conflict_matrix(truth)
    assert np.abs(measured - expected)[0, 1:].max() > 0.2
    assert np.abs(corrected - expected).max() < 0.1
    assert (plain, clipped <= 10) == ([], True)
    assert np.array_equal(np.diagonal(corrected), np.ones(8))
    assert np.array_equal(corrected, corrected.T)
    assert np.abs(corrected).max() <= 1
    # The squared length that it divides by is unbiased.
    squares = [r * float(w @ w) for r, w in zip(reliabilities, (first + second) / 2, strict=True)]
    assert np.mean(squares) == pytest.approx(1, abs=0.1)


def test_what_cannot_be_corrected_keeps_its_plain_length_and_is_named() -> None:
    matrix = np.array([[1, 0.5, 0.9, 0.2], [0.5, 1, 0.1, 0.4], [0.9, 0.1, 1, 0.3], [0.2, 0.4, 0.3, 1]])
    before = matrix.copy()
    corrected, plain, clipped = debias_cosines(matrix, [0.25, None, 0.64, MIN_DEBIAS_RELIABILITY - 0.01])
    assert plain == [1, 3]
    assert clipped == 1
    assert np.array_equal(matrix, before)
    assert corrected[0, 2] == 1.0, "0.9 / (0.5 · 0.8)"
    assert corrected[0, 1] == pytest.approx(0.5 / 0.5)
    assert corrected[1, 2] == pytest.approx(0.1 / 0.8)
    assert corrected[1, 3] == 0.4
    assert debias_cosines(matrix, [None] * 4)[0].tolist() == matrix.tolist()


# --- as the planner measures them ---


@pytest.fixture(scope="module")
def model(base_dir: Path) -> PreTrainedModel:
    return load_model(base_dir)


@pytest.fixture(scope="module")
def tokenizer(base_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base_dir)


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[PreparedDataset]:
    """An easy dataset (one answer), a mixed one, a small one and one with a single example."""
    folder = tmp_path_factory.mktemp("rows")
    mixed = [row for task in ("repeat", "upper", "first", "count") for row in task_rows(task, 40)]
    rows = {"easy": [{**row, "completion": "cat"} for row in task_rows("copy", 150)], "mixed": mixed,
            "one": mixed[:1], "small": mixed[:5]}  # fmt: skip
    args = build_args({"max_length": 64}, folder / "trainer")
    made = []
    for name, examples in rows.items():
        path = write_jsonl(folder / f"{name}.jsonl", [as_chat(row) for row in examples])
        loaded = load_rows(DatasetSection(name=name, path=str(path), eval_fraction=0.0), folder)
        made.append(prepare_dataset(loaded, model, tokenizer, args))
    return made


def measure(
    prepared: list[PreparedDataset], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path,
    worker: Worker | None = None, **plan: object,
) -> dict[str, GradientReadout]:  # fmt: skip
    (folder / "work/gradients").mkdir(parents=True, exist_ok=True)
    section = PlanSection(**{"sketch": "exact", **plan})
    readouts, _ = measure_gradients(
        prepared, model, tokenizer, build_args({"max_length": 64}, folder / "trainer"), section, "0" * 64,
        folder / "work/gradients", worker or Worker(), Progress(quiet=True),
    )  # fmt: skip
    return {dataset.name: readout for dataset, readout in zip(prepared, readouts, strict=True)}


def in_one_pass(
    rows: datasets.Dataset, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, reduction: str
) -> GradientReadout:
    sketch = make_sketch("exact", [(n, p.numel()) for n, p in trained_parameters(model)], 0, 1, 0)
    with open_loss(model, tokenizer, build_args({}, folder / "trainer"), rows) as trainer:
        return dataset_gradient(trainer, rows, sketch, reduction)


@pytest.mark.parametrize("reduction", ["token_mean", "example_mean"])
def test_two_halves_make_the_gradient_of_one_pass(
    reduction: str, prepared: list[PreparedDataset], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = measure(prepared, model, tokenizer, tmp_path, num_samples=1000, reduction=reduction)
    for dataset in prepared:
        expected = in_one_pass(dataset.train, model, tokenizer, tmp_path, reduction)
        readout = found[dataset.name]
        assert np.linalg.norm(readout.sketch - expected.sketch) < 1e-5 * expected.norm
        assert readout.norm == pytest.approx(expected.norm, rel=1e-5)
        assert readout.loss == pytest.approx(expected.loss, rel=1e-5)
        for count in ("num_samples", "num_input_tokens", "num_loss_tokens"):
            assert getattr(readout, count) == getattr(expected, count)
        if dataset.name == "one":
            assert (readout.first_share, readout.reliability, readout.split_half_cosine) == (1.0, None, None)
            assert np.array_equal(readout.first_half, readout.sketch)
            continue
        # The second half follows from the whole and the first, and is as long as its share says.
        share = readout.first_share
        second = (readout.sketch - share * readout.first_half) / (1 - share)
        cosine, reliability = split_half(np.asarray(readout.first_half), second, share)
        assert (readout.split_half_cosine, readout.reliability) == pytest.approx((cosine, reliability), abs=1e-4)
        assert share == pytest.approx(0.5, abs=0.2)
        if reduction == "example_mean":
            assert share == -(-len(dataset.train) // 2) / len(dataset.train)


def test_auto_stops_when_the_halves_agree_or_at_the_cap_or_the_end(
    prepared: list[PreparedDataset], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plan = {"num_samples": "auto", "min_reliability": 0.9}
    found = measure(prepared, model, tokenizer, tmp_path / "a", max_num_samples=100, **plan)
    assert found["easy"].num_samples == FIRST_SAMPLES
    assert found["easy"].reliability >= 0.9
    assert FIRST_SAMPLES < found["mixed"].num_samples <= 100
    assert (found["small"].num_samples, found["one"].num_samples) == (5, 1)
    capped = measure(prepared, model, tokenizer, tmp_path / "b", max_num_samples=40, **plan)
    assert capped["mixed"].num_samples == 40
    assert capped["mixed"].reliability < 0.9
    # A sample is a prefix: what auto took is what the same fixed number takes.
    for name in ("easy", "mixed"):
        fixed = measure(prepared, model, tokenizer, tmp_path / name, num_samples=found[name].num_samples)[name]
        assert np.linalg.norm(fixed.sketch - found[name].sketch) < 1e-5 * fixed.norm
        assert np.linalg.norm(fixed.first_half - found[name].first_half) < 1e-5 * fixed.norm
        assert fixed.reliability == pytest.approx(found[name].reliability, abs=1e-4)


def test_halves_lie_beside_the_sketches_and_old_files_open(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole, first = rng.standard_normal((2, 3, 7)).astype(np.float32)
    write_sketches(tmp_path / "new", list(whole), list(first))
    assert np.array_equal(open_sketches(tmp_path / "new"), whole)
    assert np.array_equal(open_sketches(tmp_path / "new", "first_half"), first)
    from safetensors.numpy import load_file, save_file

    assert np.array_equal(load_file(tmp_path / "new")["first_half"], first)
    write_sketches(tmp_path / "old", list(whole))
    assert open_sketches(tmp_path / "old", "first_half") is None
    save_file({"sketches": whole, "first_half": first}, tmp_path / "theirs")
    assert np.array_equal(open_sketches(tmp_path / "theirs", "first_half"), first)
    assert np.array_equal(open_sketches(tmp_path / "theirs"), whole)

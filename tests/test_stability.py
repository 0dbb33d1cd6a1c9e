"""Bootstrap and the test against random groups: their algebra, and simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from synthetic import products, sample_halves, split_in_four, true_gradients

from merit_hf.conflict import conflict_matrix, structure_p_value
from merit_hf.stability import HalfProducts, bootstrap_groups, compare_with_random, match_groups


@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
@settings(max_examples=30)
def test_everything_follows_from_three_products(seed: int, share: float) -> None:
    """Replicas and halves in T × T are the cosines of the vectors themselves."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, 5, 30))
    whole, noise = share * first + (1 - share) * second, (share * (1 - share)) ** 0.5 * (first - second)
    made = products(first, second, share)
    e = rng.standard_normal(5)
    assert np.allclose(made.replica(e), conflict_matrix(whole + e[:, None] * noise), atol=1e-9)
    a, b, between = made.halves()
    assert np.allclose(a, conflict_matrix(first), atol=1e-9)
    assert np.allclose(b, conflict_matrix(second), atol=1e-9)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    assert np.allclose(between, (first * second).sum(1) / lengths, atol=1e-9)


def test_products_are_read_in_blocks() -> None:
    rng = np.random.default_rng(0)
    whole, first = rng.standard_normal((2, 3, 1_500_000)).astype(np.float32)
    made = HalfProducts.of(list(whole), list(first), [0.5, 0.5, 1.0])
    assert np.allclose(made.whole, whole.astype(np.float64) @ whole.T.astype(np.float64), rtol=1e-9)
    assert np.array_equal(made.noise[2], np.zeros(3)), "without a second half there is no noise to be seen"
    assert np.array_equal(made.cross[:, 2], np.zeros(3))


def test_the_noise_of_a_replica_is_that_of_the_gradient() -> None:
    """d has the covariance of g's own noise, halves of unequal weight included."""
    rng = np.random.default_rng(0)
    share, dim, noise = 0.3, 400, 0.5
    scale = noise / dim**0.5
    first = scale / share**0.5 * rng.standard_normal((200, dim))
    second = scale / (1 - share) ** 0.5 * rng.standard_normal((200, dim))
    made = products(first, second, share)
    assert np.diagonal(made.whole).mean() == pytest.approx(noise**2, rel=0.02)
    assert np.diagonal(made.noise).mean() == pytest.approx(noise**2, rel=0.02)
    assert abs(np.diagonal(made.cross).mean()) < 0.02 * noise**2


def test_groups_are_matched_by_overlap() -> None:
    groups = np.array([0, 0, 0, 1, 1, 2])
    assert match_groups(groups, np.array([2, 2, 2, 0, 0, 1])).tolist() == groups.tolist()
    assert match_groups(groups, np.array([1, 1, 0, 0, 0, 0])).tolist() == [0, 0, 1, 1, 1, 1]
    assert match_groups(groups, np.array([0, 1, 1, 2, 2, 3])).tolist() == [-1, 0, 0, 1, 1, 2]


def test_the_halves_own_groups_agree_where_there_are_blocks_and_not_where_there_is_noise() -> None:
    found = {}
    for kind, noise in (("blocks", 0.2), ("noise", 1.0)):
        indices = []
        for seed in range(12):
            rng = np.random.default_rng(seed)
            made = products(*sample_halves(true_gradients(kind, 20, rng), noise * np.ones(20), rng))
            groups = split_in_four(made.replica(np.zeros(20)))
            indices.append(bootstrap_groups(made, groups, split_in_four, 20, seed).half_agreement)
        found[kind] = float(np.mean(indices))
    assert found["blocks"] > 0.8
    assert abs(found["noise"]) < 0.15


def bootstrapped_and_fresh(kind: str, noise: float, spread: float, repeats: int = 12) -> tuple[float, float]:
    """Mean index by the bootstrap, and between plans of truly fresh samples of the same datasets."""
    bootstrapped, fresh = [], []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        truth = true_gradients(kind, 20, rng)
        lengths = noise * np.exp(spread * rng.standard_normal(20))
        made = products(*sample_halves(truth, lengths, rng))
        groups = split_in_four(made.replica(np.zeros(20)))
        bootstrapped.append(bootstrap_groups(made, groups, split_in_four, 20, seed).adjusted_rand_index)
        for _ in range(20):
            other = split_in_four(conflict_matrix(sum(sample_halves(truth, lengths, rng))))
            fresh.append(adjusted_rand_score(groups, other))
    return float(np.mean(bootstrapped)), float(np.mean(fresh))


@pytest.mark.parametrize(
    ("kind", "noise", "spread"),
    [("noise", 1.0, 0.0), ("shared", 0.7, 0.0), ("shared", 0.7, 0.7), ("blocks", 0.2, 0.0), ("blocks", 0.7, 0.0),
     ("blocks", 0.7, 0.7), ("blocks", 2.0, 0.0)],
)  # fmt: skip
def test_the_bootstrap_is_calibrated_against_fresh_samples(kind: str, noise: float, spread: float) -> None:
    bootstrapped, fresh = bootstrapped_and_fresh(kind, noise, spread)
    assert bootstrapped == pytest.approx(fresh, abs=0.15)


def test_a_dataset_between_two_groups_is_the_one_that_is_unsure() -> None:
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((400, 4)))[0].T
    truth = np.array([q[i // 3] for i in range(12)])
    truth[2] = (q[0] + q[1]) / 2**0.5
    made = products(*sample_halves(truth, 0.4, rng))
    groups = split_in_four(made.replica(np.zeros(12)))
    found = bootstrap_groups(made, groups, split_in_four, 100)
    assert found.probability[7:].min() > 0.9
    assert found.probability[2] < found.probability[7:].min()
    again = bootstrap_groups(made, groups, split_in_four, 100)
    assert np.array_equal(found.probability, again.probability)
    still = products(truth, truth)
    kept = bootstrap_groups(still, split_in_four(still.replica(np.zeros(12))), split_in_four, 10)
    assert (kept.adjusted_rand_index, kept.probability.tolist(), kept.matrix_error) == (1.0, [1.0] * 12, 0.0)


def p_values(kind: str, noise: float, spread: float, repeats: int = 80) -> np.ndarray:
    found = []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        lengths = noise * np.exp(spread * rng.standard_normal(20))
        made = products(*sample_halves(true_gradients(kind, 20, rng), lengths, rng))
        test = compare_with_random(made, split_in_four, num_permutations=199, seed=seed)
        assert test is not None
        found.append(test.p_value)
    return np.array(found)


@pytest.mark.parametrize(
    ("kind", "noise", "spread"), [("noise", 1.0, 0.0), ("noise", 1.0, 0.7), ("shared", 0.7, 0.0), ("shared", 0.7, 0.7)]
)
def test_p_is_uniform_where_no_split_is_better(kind: str, noise: float, spread: float) -> None:
    """Noise alone; one direction for all; that with datasets of very unequal noise, which must not pass for groups."""
    p = p_values(kind, noise, spread)
    # Binomial(80, 0.05): 4 expected, 11 or more in one of 400 cases; quartiles likewise.
    assert (p <= 0.05).sum() <= 10
    assert 26 <= (p <= 0.5).sum() <= 54
    assert p.max() > 0.8


def test_shuffled_cosines_would_call_one_shared_direction_structure() -> None:
    """Why the plan goes by the halves wherever there are any."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        halves = sample_halves(true_gradients("shared", 20, rng), 0.7, rng)
        found.append(structure_p_value(conflict_matrix(sum(halves)), seed, 99))
    assert np.mean(np.array(found) <= 0.05) > 0.5


def test_real_blocks_are_found_through_noise() -> None:
    assert (p_values("blocks", 0.7, 0.0, 20) <= 0.05).all()
    assert (p_values("blocks", 2.0, 0.0, 40) <= 0.05).mean() > 0.3


def test_the_mean_inside_groups_is_in_the_scale_of_noise_free_gradients() -> None:
    rng = np.random.default_rng(0)
    test = compare_with_random(products(*sample_halves(true_gradients("blocks", 40, rng), 0.7, rng)), split_in_four)
    assert test is not None
    assert test.within == pytest.approx(1.0, abs=0.1), "all of a block pull one way"
    assert test.random == pytest.approx(0.5 + 0.5 * 9 / 39, abs=0.07)
    assert test.p_value == test.smallest_p == 0.001


def test_with_few_datasets_p_cannot_be_small_and_says_so() -> None:
    rng = np.random.default_rng(0)
    four = products(*sample_halves(np.repeat(np.eye(2, 50), 2, axis=0), 0.01, rng))
    halved = np.array([0, 0, 1, 1])
    test = compare_with_random(four, lambda matrix: halved)
    assert test is not None
    assert test.p_value == test.smallest_p == pytest.approx(1 / 3, abs=0.05), "three ways to pair four datasets"
    assert compare_with_random(four, lambda matrix: np.arange(4)) is None
    assert compare_with_random(four, lambda matrix: np.zeros(4, dtype=int)) is None


def test_what_the_read_out_can_add_is_bounded() -> None:
    """Groups that fit the error of a read-out best gain no more than the bound."""
    rng = np.random.default_rng(0)
    error = rng.standard_normal((20, 20)) / 50
    error = (error + error.T) / 2
    np.fill_diagonal(error, 0)
    spectral = float(np.linalg.norm(error, 2))
    made = products(*(np.linalg.cholesky(np.eye(20) + error),) * 2)
    test = compare_with_random(made, split_in_four, spectral)
    assert test is not None
    assert test.readout_gain is not None
    assert test.p_value == 0.001, "the halves share the error, so that the test alone takes it for structure"
    assert 0 < test.within - test.random < test.readout_gain
    assert test.readout_gain == pytest.approx(spectral * 20 / (4 * 5 * 4), rel=1e-6)
    unknown = compare_with_random(made, split_in_four, None)
    assert unknown is not None
    assert unknown.readout_gain is None

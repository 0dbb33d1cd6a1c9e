"""The mathematics of a diagnosis: exact on quadratics, honest about noise, and what its verdict reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merit_hf.diagnosis import basin
from merit_hf.diagnosis.basin import Draws, Point, Survey, between

NUM_ROWS, DIM = 5, 6


class Quadratic:
    """Rows with a quadratic loss of their own each, over checkpoints that are points of R^6."""

    def __init__(self, seed: int, num_groups: int, spread: float = 1.0) -> None:
        self.rng = np.random.default_rng(seed)
        roots = self.rng.normal(size=(NUM_ROWS, DIM, DIM))
        self.hessians = roots @ roots.transpose(0, 2, 1)
        self.slopes = self.rng.normal(size=(NUM_ROWS, DIM))
        self.tokens = self.rng.integers(1, 9, NUM_ROWS)
        weights = self.rng.dirichlet(np.full(num_groups, 3.0))
        self.weights = {k: float(weight) for k, weight in enumerate(weights)}
        self.places = {label: self.rng.normal(size=DIM) for label in ("base", "joint", "merged")}
        self.places |= {f"group-{k}": self.rng.normal(size=DIM) * spread for k in range(num_groups)}

    def at(self, point: Point) -> np.ndarray:
        return sum(value * self.places[label] for label, value in point.coefficients)

    def nats(self, point: Point) -> np.ndarray:
        """[num_rows], summed over each row's tokens."""
        place = self.at(point)
        return self.tokens * (20 + self.slopes @ place + 0.5 * np.einsum("i,rij,j->r", place, self.hessians, place))

    def draws(self, survey: Survey, num_bootstrap: int = 200) -> Draws:
        points = [point for point in survey.points() if point.noise is None]
        return Draws(points, self.resample(points, num_bootstrap))

    def resample(self, points: list[Point], num_bootstrap: int) -> np.ndarray:
        return basin.resample(np.array([self.nats(point) for point in points]), self.tokens, num_bootstrap, 0)

    @property
    def hessian(self) -> np.ndarray:
        """Of the token-mean loss."""
        return np.einsum("r,rij->ij", self.tokens, self.hessians) / self.tokens.sum()


def survey_of(toy: Quadratic, **values: object) -> Survey:
    return Survey(toy.weights, sigmas=(), **values)  # type: ignore[arg-type]


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@settings(deadline=None, max_examples=50)
def test_rho_is_1_on_a_quadratic_and_the_prediction_is_its_curvature(seed: int, num_groups: int) -> None:
    toy = Quadratic(seed, num_groups)
    survey = survey_of(toy)
    found = basin.gain(survey, toy.draws(survey))
    mean = toy.at(survey.mean)
    exact = [
        0.5 * weight * (toy.places[f"group-{k}"] - mean) @ toy.hessian @ (toy.places[f"group-{k}"] - mean)
        for k, weight in toy.weights.items()
    ]
    assert found["measured"]["value"] == pytest.approx(sum(exact), rel=1e-9)
    for step in found["ladder"]:
        assert step["predicted"]["value"] == pytest.approx(sum(exact), rel=1e-6)
        for edge in ("value", "low", "high"):
            assert step["rho"][edge] == pytest.approx(1.0, abs=1e-6)
    assert found["by_group"] == pytest.approx(np.array(exact) / sum(exact), rel=1e-6)
    assert [step["epsilon"] for step in found["ladder"]] == [0.25, 0.5, 1.0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_a_convex_loss_has_no_barrier_on_any_path(seed: int, num_groups: int) -> None:
    toy = Quadratic(seed, num_groups)
    survey = survey_of(toy, positions=(0.25, 0.5, 0.75))
    found = basin.barriers(survey, toy.draws(survey))
    assert len(found) == 2 * num_groups + 1 + num_groups * (num_groups - 1) // 2
    assert all(barrier["height"]["value"] < 0 for barrier in found)


def test_a_ridge_is_measured_over_the_straight_line_and_at_its_place() -> None:
    survey = Survey({0: 0.5, 1: 0.5}, positions=(0.25, 0.5, 0.75), sigmas=())
    height = {0.0: 1.0, 0.25: 1.5, 0.5: 4.0, 0.75: 9.0, 1.0: 3.0}
    points = survey.points()
    losses = np.ones((3, len(points)))
    for t, loss in height.items():
        point = between(Point.of({"group-0": 1.0}), Point.of({"group-1": 1.0}), t)
        losses[:, points.index(point)] = loss
    (ridge,) = [
        b for b in basin.barriers(survey, Draws(points, losses)) if (b["from"], b["to"]) == ("group-0", "group-1")
    ]
    assert ridge["height"]["value"] == pytest.approx(9.0 - (0.25 * 1 + 0.75 * 3))
    assert ridge["position"] == 0.75
    assert ridge["losses"] == [1.0, 1.5, 4.0, 9.0, 3.0]


def test_a_place_that_is_reached_in_two_ways_is_measured_once() -> None:
    survey = Survey({0: 0.22, 1: 0.33, 2: 0.45}, positions=(0.5,), merged=True, line_position=0.5)
    points = survey.points()
    assert len(points) == len(set(points))
    assert survey.around(1, 1.0) == Point.of({"group-1": 1.0})
    assert survey.around(1, 0.0) == survey.mean
    assert survey.around(2, 0.5) == survey.on_path(("mean", "group-2"))[1]
    assert survey.without(1) == Point.of({"group-0": 22 / 67, "group-2": 45 / 67})
    # base, joint, line, merged, mean, 3 groups; 5 ladder points and 1 exclusion a group; 3 + 1 + 3 middles; 6 noises.
    # The middles of mean–group are on the ladder already.
    assert len(points) == 8 + 3 * 6 + 7 + 6
    assert all(sum(value for _, value in point.coefficients) == pytest.approx(1.0) for point in points)


def test_two_equal_groups_share_points() -> None:
    # With equal weights, θ̄ − d_0 is the other group, and so is the mean without the first.
    survey = Survey({0: 0.5, 1: 0.5})
    assert survey.around(0, -1.0) == Point.of({"group-1": 1.0}) == survey.without(0)


def test_without_checkpoints_only_the_base_and_its_noises_are_measured() -> None:
    survey = Survey({})
    assert list(survey.models()) == ["base"]
    assert len(survey.points()) == 1 + 3 * 2
    assert survey.paths() == []


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_variance_and_mean_follow_from_the_inner_products(seed: int, num_groups: int) -> None:
    rng = np.random.default_rng(seed)
    moved, weights = rng.normal(size=(num_groups + 1, 7)), rng.dirichlet(np.ones(num_groups))
    gram = moved @ moved.T
    mean = weights @ moved[:num_groups]
    expected = weights * ((moved[:num_groups] - mean) ** 2).sum(axis=1)
    np.testing.assert_allclose(basin.variance(gram[:num_groups, :num_groups], weights), expected, atol=1e-9)
    everything = np.vstack([moved, mean])
    np.testing.assert_allclose(basin.with_mean(gram, weights), everything @ everything.T, atol=1e-9)
    angles = basin.cosines(gram)
    assert angles[0, 1] == pytest.approx(moved[0] @ moved[1] / np.linalg.norm(moved[0]) / np.linalg.norm(moved[1]))
    np.testing.assert_allclose(np.diagonal(angles), 1.0)


def test_cosine_with_a_model_that_did_not_move_is_0() -> None:
    assert basin.cosines(np.array([[4.0, 0.0], [0.0, 0.0]])).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_bootstrap_is_paired_and_weighs_tokens() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, 40)
    # Rows differ widely, and one model is better by 0.1 nats a token on each of them.
    first = tokens * rng.uniform(1, 9, 40)
    losses = basin.resample(np.array([first, first - 0.1 * tokens]), tokens, 500, 0)
    assert losses.shape == (501, 2)
    assert losses[0, 0] == pytest.approx(first.sum() / tokens.sum())
    draws = Draws([Point.of({"a": 1.0}), Point.of({"b": 1.0})], losses)
    alone = draws.estimate(losses[:, 0])
    apart = draws.estimate(losses[:, 1] - losses[:, 0])
    assert alone["high"] - alone["low"] > 1.0
    assert apart["low"] == pytest.approx(-0.1)
    assert apart["high"] == pytest.approx(-0.1)


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    losses = basin.resample(values[None], np.ones(400), 4000, 0)
    found = Draws([Point.of({"a": 1.0})], losses).estimate(losses[:, 0])
    error = values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error + 0.02)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error + 0.02)


def test_one_row_has_no_interval() -> None:
    losses = basin.resample(np.array([[6.0]]), np.array([3]), 10, 0)
    assert Draws([Point.of({"a": 1.0})], losses, resampled=False).estimate(losses[:, 0]) == {
        "value": 2.0,
        "low": None,
        "high": None,
    }


def test_rho_is_not_given_where_the_prediction_is_rounding() -> None:
    survey = Survey({0: 0.5, 1: 0.5}, sigmas=())
    points = survey.points()
    losses = np.full((101, len(points)), 2.0)
    losses[:, points.index(survey.around(0, 0.25))] += 1e-8
    found = basin.gain(survey, Draws(points, losses))
    assert [step["rho"] for step in found["ladder"]] == [None, None, None]
    assert found["measured"]["value"] == 0.0


def test_rho_is_not_given_where_the_prediction_may_be_0() -> None:
    toy = Quadratic(0, 2)
    toy.hessians[0] *= -1.5
    toy.tokens[:] = 1
    survey = survey_of(toy)
    found = basin.gain(survey, toy.draws(survey))
    assert found["ladder"][0]["predicted"]["low"] < 0
    assert found["ladder"][0]["rho"] is None


def test_a_group_of_no_spread_has_no_shares() -> None:
    assert basin.shares(np.zeros(3)) == [None, None, None]
    assert basin.shares(np.array([1.0, 3.0])) == [0.25, 0.75]


@pytest.mark.parametrize(("hits", "trials", "more"), [(0, 12, False), (1, 12, False), (2, 12, False), (3, 12, True)])
def test_a_few_hits_among_many_datasets_may_be_chance(hits: int, trials: int, more: bool) -> None:
    assert basin.more_than_chance(hits, trials) is more


def test_the_binomial_tail_is_right() -> None:
    # P(X ≥ 2) of 4 at 0.025 is 0.0036; of 40 it is 0.2642.
    assert basin.more_than_chance(2, 4)
    assert not basin.more_than_chance(2, 40)
    assert basin.more_than_chance(2, 40, level=0.265)
    assert not basin.more_than_chance(2, 40, level=0.264)
    # Of 2000 at 0.025, 50 are expected, and 68 are the first with a tail below 0.01.
    assert [basin.more_than_chance(count, 2000) for count in (0, 50, 67, 68, 2000)] == [False] * 3 + [True] * 2

"""The controlled experiment's statistics, on values whose answers are known: lines, excess, intervals, ranks."""

from __future__ import annotations

import numpy as np
import outcomes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outcomes import Curve

small = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))


def quadratic_curve(mixture: tuple[float, float], held_out: tuple[float, float], length: float = 10.0) -> Curve:
    """Losses 5 + slope λ + bend λ², at λ = 0, 0.25 … 1.5."""
    lambdas = np.arange(7) / 4
    losses = {name: 5 + a * lambdas + b * lambdas**2 for name, (a, b) in (("m", mixture), ("h", held_out))}
    return Curve(lambdas, length, losses)


@given(slope=st.floats(-3, -0.1), bend=st.floats(0, 2), place=st.floats(0, 1.5), gift=small)
def test_the_excess_over_a_line_of_quadratic_losses_is_what_was_put_in(
    slope: float, bend: float, place: float, gift: float
) -> None:
    curve = quadratic_curve((slope, bend), (1.0, 0.5))
    # Beyond its lowest loss the line offers the point where that was.
    lowest = min(place, -slope / (2 * bend)) if bend else place
    on_line = 5 + slope * lowest + bend * lowest**2
    match = outcomes.match_displacement(curve, ["m"], place * 10.0)
    assert not match.clipped
    assert outcomes.excess(curve, match, {"m": on_line - gift}, ["m"])["m"] == pytest.approx(gift, abs=1e-5)


@given(place=st.floats(0.01, 1.0), gift=small)
def test_at_equal_forgetting_the_line_is_taken_where_it_forgot_as_much(place: float, gift: float) -> None:
    # Loss falls and forgetting rises all the way: the best point that forgot no more forgot as much.
    curve = quadratic_curve((-3.0, 0.5), (1.0, 0.5))
    match = outcomes.match_forgetting(curve, ["m"], ["h"], place + 0.5 * place**2)
    assert match.position == pytest.approx(place, abs=1e-3)
    found = outcomes.excess(curve, match, {"m": 5 - 3 * place + 0.5 * place**2 - gift}, ["m"])["m"]
    assert found == pytest.approx(gift, abs=5e-3)


def test_forgetting_that_is_not_monotone_and_lines_that_end_too_early() -> None:
    # F(λ) = −λ + λ²: below 0 until λ = 1, lowest at ½. Loss falls until λ = 1.5.
    curve = quadratic_curve((-3.0, 1.0), (-1.0, 1.0))
    assert outcomes.match_forgetting(curve, ["m"], ["h"], 0.0).position == pytest.approx(1.0, abs=1e-3)
    assert outcomes.match_forgetting(curve, ["m"], ["h"], 9.0).position == pytest.approx(1.5, abs=1e-3)
    least = outcomes.match_forgetting(curve, ["m"], ["h"], -9.0)
    assert (least.position, least.clipped) == (pytest.approx(0.5, abs=1e-3), True)
    far = outcomes.match_displacement(curve, ["m"], 99.0)
    assert (far.position, far.clipped) == (1.5, True)
    assert not outcomes.match_displacement(curve, ["m"], 15.0).clipped


def table(plans: int, orders: int, effect: float, seed: int = 0) -> dict[tuple[int | None, int], dict[str, float]]:
    """Values of eight datasets with large effects of order seed and dataset, and small ones of the plan seed."""
    rng = np.random.default_rng(seed)
    dataset, order, plan = 3 * np.arange(8), 5 * np.arange(orders), 0.01 * rng.normal(size=plans)
    return {
        (p, o): {f"d{i}": float(effect + dataset[i] + order[o] + plan[p]) for i in range(8)}
        for p in range(plans)
        for o in range(orders)
    }


def test_order_seeds_and_datasets_pair_two_arms_and_plan_seeds_do_not() -> None:
    found = outcomes.crossed_difference(table(4, 3, 0.5, seed=1), table(6, 3, 0.0, seed=2))
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=0.02)
    assert found.low is not None
    assert found.high is not None
    assert 0.45 < found.low < found.high < 0.55
    assert found.sure == 1
    # By itself an arm's mean carries the spread of datasets and orders.
    alone = outcomes.crossed_mean(table(4, 3, 0.5, seed=1))
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low > 5
    assert alone.drawn == ("order seeds", "datasets", "plan seeds")
    assert outcomes.crossed_difference(table(2, 2, 0), {(0, 7): {"d0": 1.0}}) is None


@pytest.mark.parametrize(
    ("pairs", "spread"),
    [
        ([(p, 0) for p in range(12)], (0.0, 0.0)),
        ([(p, p % 6) for p in range(12)], (0.5, 0.5)),
        ([(p, p % 3) for p in range(3)], (0.0, 1.0)),  # little but the orders, and three of them
        ([(p, o) for p in range(4) for o in range(3)], (0.3, 1.0)),
    ],
)
def test_an_interval_covers_what_it_draws_even_with_few_levels(
    pairs: list[tuple[int | None, int | None]], spread: tuple[float, float]
) -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 150
    for trial in range(trials):
        plan, order = (size * rng.normal(size=12) for size in spread)
        values = {(p, o): {f"d{i}": plan[p] + order[o] + 0.3 * rng.normal() for i in range(12)} for p, o in pairs}
        found = outcomes.crossed_mean(values, seed=trial)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert covered / trials >= 0.93


def test_an_interval_needs_something_to_draw_and_says_what_it_knows_nothing_of() -> None:
    single = outcomes.crossed_mean({(None, 0): {"d": 1.0}})
    assert (single.value, single.low, single.high, single.sure) == (1.0, None, None, 0)
    assert single.caution == " The interval knows nothing of other order seeds.", "a joint run has no plan"
    assert "plan seeds and order seeds" in outcomes.crossed_mean(table(1, 1, 0)).caution
    assert outcomes.crossed_mean(table(2, 1, 0)).caution == " The interval knows nothing of other order seeds."
    assert not outcomes.crossed_mean(table(2, 2, 0)).caution


def test_datasets_won_and_lost_rank_correlation_and_cosine_within_groups() -> None:
    ours = {(0, 0): {"a": 1.0, "b": -1.0, "c": 0.0}, (1, 0): {"a": 1.0, "b": -2.0, "c": 0.0}}
    assert outcomes.won_and_lost(ours) == (1, 1)
    assert outcomes.won_and_lost(ours, {(9, 0): {"a": 5.0, "b": -5.0, "c": 0.0}}) == (1, 1)
    rising = outcomes.rank_correlation(range(12), np.arange(12) ** 3)
    assert rising is not None
    assert (rising.value, rising.sure) == (pytest.approx(1.0), 1)
    assert outcomes.rank_correlation(range(4), range(4)) is None
    assert outcomes.rank_correlation([1] * 9, range(9)) is None
    matrix = np.array([[1, 0.5, -1], [0.5, 1, 0], [-1, 0, 1]])
    assert outcomes.within_group_cosine(matrix, [0, 0, 1]) == 0.5
    assert outcomes.within_group_cosine(matrix, [0, 0, 0]) == pytest.approx(-1 / 6)

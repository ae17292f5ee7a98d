"""Rewards of any size, on the grid: the mean stays, so the null holds; rounding to the nearest must fail the same test."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout.controller import reward
from service.rollout.evidence import count, log_e_promote, log_e_rollback
from service.rollout.grid import STEPS, on_grid, rounded
from service.settings import Metric

RATING = Metric(type="float", minimum=1.0, maximum=5.0)


def dithered(value):
    """Where a value in [0, 1] goes, and how often: the two outcomes of `rounded`, by enumeration."""
    scaled = value * STEPS
    share = scaled % 1
    return [(rounded(scaled, 0.0) / STEPS, share), (rounded(scaled, 1 - 1e-12) / STEPS, 1 - share)]


def nearest(value):
    """The wrong variant."""
    return [(round(value * STEPS) / STEPS, 1.0)]


def expectation(statistic, rule, pairs, candidate, control):
    """E[exp(statistic)] over all outcomes of pairs, exactly; arms are `(value, chance)` before rounding."""
    arm = lambda of: [(at, p * q) for value, p in of for at, q in rule(value) if p * q]  # noqa: E731
    one = [(c - b, p * q) for c, p in arm(candidate) for b, q in arm(control)]
    total = 0.0
    for outcome in product(one, repeat=pairs):
        total += np.prod([chance for _, chance in outcome]) * np.exp(statistic([d for d, _ in outcome]))
    return total


ALWAYS = [(0.5006, 1.0)]
AT_RANDOM = [(1.0, 0.5006), (0.0, 0.4994)]
"""Two arms of one mean, of which rounding lifts only one."""


@pytest.mark.parametrize("pairs", [1, 2, 4])
@pytest.mark.parametrize("statistic", [lambda d: log_e_promote(d, 0.0), log_e_rollback], ids=["better", "harm"])
@pytest.mark.parametrize("arms", [(ALWAYS, AT_RANDOM), (AT_RANDOM, ALWAYS)], ids=["steady", "wild"])
def test_equal_means_stay_equal(pairs, statistic, arms):
    assert expectation(statistic, dithered, pairs, *arms) <= 1 + 1e-12


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_rounding_to_the_nearest_makes_a_difference_of_none(pairs):
    assert expectation(lambda d: log_e_promote(d, 0.0), nearest, pairs, ALWAYS, AT_RANDOM) > 1 + 1e-6


def test_what_a_unit_s_hash_decides_has_the_right_mean():
    values = np.array([on_grid(0.1237, f"u{i}") for i in range(20_000)])
    assert set(values) == {0.123, 0.124}
    assert abs(values.mean() - 0.1237) < 4 * 0.0005 / np.sqrt(20_000)


@given(st.floats(0, 1), st.text(max_size=8))
def test_a_value_moves_by_less_than_a_step_and_the_same_each_time(value, unit):
    found = on_grid(value, unit)
    assert 0 <= found <= 1
    assert abs(found - value) < 1 / STEPS
    assert found == on_grid(value, unit) == on_grid(found, unit)


def test_thumbs_and_their_halves_stay_what_they_are():
    assert [on_grid(value, unit) for value in (0.0, 0.5, 1.0, 0.29, 0.57) for unit in "abc"] == [
        value for value in (0.0, 0.5, 1.0, 0.29, 0.57) for _ in "abc"
    ]


def rated(arm, values, start=0):
    scaled = reward(RATING)
    return [UnitOutcome(f"{arm}{start + i}", arm, start + i, scaled(v), True, 0, 1) for i, v in enumerate(values)]


def trial(candidate, control, pairs=4000, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda mean: np.clip(random.normal(mean, 0.8, pairs), 1, 5)  # noqa: E731
    return [*rated(Arm.CANDIDATE, draw(candidate)), *rated(Arm.CONTROL, draw(control))]


def test_ratings_are_counts_that_are_few_and_add_up():
    """However many units there are; the counts of two halves are those of the whole, in whatever order they are read."""
    units = trial(3.5, 3.5)
    whole = count(units, ()).differences
    assert len(whole) <= 2 * STEPS + 1
    assert all(d * STEPS == pytest.approx(round(d * STEPS), abs=1e-9) for d, _ in whole)
    assert count(units[::-1], ()).differences == whole
    early, late = ([u for u in units if (u.first_at < 2000) is is_early] for is_early in (True, False))
    merged = dict(whole)
    for half in (early, late):
        for d, n in count(half, ()).differences:
            merged[d] -= n
    assert not any(merged.values())


def test_ratings_decide_as_thumbs_do():
    """Better by .4 of a star is a tenth of the range: seen at once; and less is more where a metric is to fall."""
    d, n = zip(*count(trial(3.9, 3.5), ()).differences, strict=True)
    assert log_e_promote(d, 0.0, n) > np.log(1000)
    assert log_e_rollback(d, n) < 0
    falling = reward(RATING.model_copy(update={"optimize": "min"}))
    assert [falling(v) for v in (1.0, 3.0, 5.0)] == [1.0, 0.5, 0.0]


def test_equal_ratings_promote_and_roll_back_nobody_more_often_than_they_may():
    """A look after each pair: the paths of a hundred trials of ratings, through counts on the grid."""
    random, crossed = np.random.default_rng(1), 0
    for _ in range(100):
        skewed = np.clip(random.gamma(2.0, 1.0, (2, 1500)) + 1, 1, 5)
        values = np.array([[on_grid((v - 1) / 4, f"{a}{i}") for i, v in enumerate(row)] for a, row in enumerate(skewed)])
        differences = values[0] - values[1]
        wealth = np.logaddexp.reduce([np.cumsum(np.log1p(2.0**-k * differences)) for k in range(1, 7)]) - np.log(6)
        assert wealth[-1] == pytest.approx(log_e_promote(differences, 0.0), abs=1e-9)
        crossed += wealth.max() >= np.log(20)
    assert crossed <= 14  # P(Binomial(100, .05) > 14) < .001

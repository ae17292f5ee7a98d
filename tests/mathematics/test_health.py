"""The sequential test of the split against golden vectors, enumeration and simulation; a chi-square that peeks must fail the same check."""

from itertools import product
from math import log

import numpy as np
import pytest

from service.rollout.evidence import log_e
from service.rollout.health import CONCENTRATION, log_e_mismatch, log_e_response, log_e_split
from tests.mathematics.test_evidence import first_crossing

TENTH = (0.9, 0.1)
GOLDEN = {(4550, 450): 0.878620735661, (900, 100): -1.206604800214, (880, 120): 0.640383303485}
"""With forty digits."""


@pytest.mark.parametrize("counts", GOLDEN)
def test_golden_vectors(counts):
    assert log_e_mismatch(counts, TENTH) == pytest.approx(GOLDEN[counts], abs=1e-9)


def test_no_units_are_no_evidence_and_many_do_not_overflow():
    assert log_e_mismatch((0, 0), TENTH) == pytest.approx(0.0, abs=1e-9)
    assert np.isfinite(log_e_mismatch((10**8, 10**8), (0.5, 0.5)))


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_e_value_is_one_on_average_under_the_design(share):
    shares = (1 - share, share)
    total = 0.0
    for arms in product((0, 1), repeat=10):
        second = sum(arms)
        total += shares[0] ** (10 - second) * share**second * np.exp(log_e_mismatch((10 - second, second), shares))
    assert total == pytest.approx(1.0, abs=1e-12)


def paths(is_second, share):
    """ln e after each unit, for every row at once, by the odds of each next unit: not by the formula of the counts."""
    before = np.arange(is_second.shape[1])
    second = np.cumsum(is_second, axis=1) - is_second
    mine = np.where(is_second, second, before - second)
    design = np.where(is_second, share, 1 - share)
    return np.cumsum(np.log((CONCENTRATION * design + mine) / (CONCENTRATION + before) / design), axis=1)


def arrivals(seed, rows, units, share):
    return (np.random.default_rng(seed).random((rows, units)) < share).astype(np.int64)


def test_counts_say_the_same_as_a_stream():
    (row,) = arrivals(1, 1, 500, 0.3)
    assert paths(row[None], 0.5)[0, -1] == pytest.approx(log_e_mismatch((500 - row.sum(), row.sum()), (0.5, 0.5)), abs=1e-9)


RUNS, UNITS = 1000, 3000
MOST = {0.05: 72, 0.001: 6}
"""At most so many of 1000 are held by chance, with probability .999 (binomial)."""


@pytest.mark.parametrize("alpha", MOST)
def test_a_split_as_designed_is_seldom_held_though_looked_at_after_each_unit(alpha):
    held = (first_crossing(paths(arrivals(2, RUNS, UNITS, 0.5), 0.5), -log(alpha)) <= UNITS).sum()
    assert held <= MOST[alpha]
    assert alpha < 0.05 or held >= 1  # a dead test would be safe too


@pytest.mark.parametrize(("alpha", "chi_square"), [(0.05, 3.841), (0.001, 10.828)])
def test_a_chi_square_that_peeks_fails_the_same_check(alpha, chi_square):
    is_second = arrivals(2, RUNS, UNITS, 0.5)
    n = np.arange(1, UNITS + 1)
    statistic = (2 * np.cumsum(is_second, axis=1) - n) ** 2 / n
    assert (first_crossing(statistic[:, 20:], chi_square) <= UNITS - 20).sum() > MOST[alpha]


def test_two_points_of_ten_too_many_are_found_as_fast_as_published():
    found = first_crossing(paths(arrivals(3, 200, 9000, 0.12), 0.1), log(1000))
    assert np.median(found) == pytest.approx(3900, rel=0.15)
    assert np.quantile(found, 0.9) <= 7500


@pytest.mark.parametrize(("share", "most"), [(0.4, 800), (0.25, 150)])
def test_an_arm_that_loses_units_is_found(share, most):
    assert np.quantile(first_crossing(paths(arrivals(4, 200, 1000, share), 0.5), log(1000)), 0.9) <= most


def test_weight_steps_are_factors_of_their_own():
    assert log_e_split([(30, 20), (40, 60)]) == pytest.approx(log_e_split([(30, 20)]) + log_e_split([(40, 60)]))
    assert log_e_split([]) == 0.0
    leaning = [(130, 70), (70, 130)]  # wrong in both steps; pooled, nobody sees it
    assert log_e_split(leaning) > log(1000) > log_e_split([(200, 200)])


def expected(value, rate, pairs=6):
    """The mean of exp(`value`) over every outcome of so many pairs, in which each unit says something with chance `rate`."""
    chances = {-1.0: rate * (1 - rate), 0.0: rate**2 + (1 - rate) ** 2, 1.0: rate * (1 - rate)}
    return sum(np.prod([chances[d] for d in row]) * np.exp(value(row)) for row in product(chances, repeat=pairs))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 1.0])
def test_as_many_answers_in_both_arms_give_one_on_average(rate):
    assert expected(lambda row: log_e_response(row, [1] * len(row)), rate) == pytest.approx(1.0, abs=1e-12)


def test_the_better_of_the_two_sides_fails_the_same_check():
    def greater(row):
        return max(log_e(row, 0.0), log_e([-d for d in row], 0.0))

    assert expected(greater, 0.3) > 1.01


def test_both_directions_count_alike():
    assert log_e_response([1.0, 0.0], [40, 9]) == pytest.approx(log_e_response([-1.0, 0.0], [40, 9]), abs=1e-12)
    assert log_e_response([], []) == pytest.approx(0.0, abs=1e-12)


def test_answers_that_fall_from_a_tenth_to_seven_in_a_hundred_are_found_as_fast_as_published():
    """Reference: half of the runs within 1825 units of each arm."""
    random, found = np.random.default_rng(5), []
    for _ in range(60):
        gaps = (random.random(8000) < 0.07).astype(int) - (random.random(8000) < 0.1)
        looks = range(100, 8001, 100)
        values = ([(gaps[:n] == d).sum() for d in (-1, 0, 1)] for n in looks)
        logs = (log_e_response([-1.0, 0.0, 1.0], times) for times in values)
        found.append(next((n for n, log in zip(looks, logs, strict=True) if log >= np.log(100)), 8001))
    assert np.median(found) == pytest.approx(1825, rel=0.35)

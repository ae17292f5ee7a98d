"""The rollout's test plan in its reduced form: `learnd bench rollout --full` is the whole of it."""

import itertools
import math

import numpy as np
import pytest

from benchmarks import rollout
from benchmarks.rollout_plan import exact, mutants, single
from benchmarks.rollout_plan.paths import Check, Scale, bernoulli, first_crossing, log_paths, most_by_chance
from service.rollout.evidence import log_e_promote, log_e_rollback

SOME = Scale(is_full=False)


def test_the_bounds_are_those_of_the_plan():
    assert most_by_chance(2000, 0.05) == 131
    assert most_by_chance(400, 0.05) == 35


@pytest.mark.parametrize("part", ["T0", "T1", "T3", "T4", "T9", "T10", "T11", "T12"])
def test_each_part_is_within_its_thresholds(part):
    checks = list(rollout.PLAN[part](SOME))
    assert checks
    assert not [f"{check.what}: {check.found}, must be {check.limit}" for check in checks if not check.passed]


@pytest.mark.parametrize(
    "make", [mutants.naive_z, mutants.resubmitted, mutants.pooled_ramp, mutants.unmatured, mutants.thumbs_ratio]
)
def test_a_mutant_is_caught_and_ours_is_not(make):
    pair = make(SOME)
    assert pair.is_caught, pair


PROMOTION, ROLLBACK = exact.Bets(-0.05, 3.0), exact.Bets(0.0, 2.0, is_harm=True)
"""Low enough that ten pairs end some trials either way."""


def enumerated(candidate, champion, pairs, *, last_look_only=False):
    """Promoted, rolled back, neither: every sequence of outcomes, with the service's own e-values."""
    win, loss = candidate * (1 - champion), champion * (1 - candidate)
    chance_of = {1.0: win, 0.0: 1 - win - loss, -1.0: loss}
    found = [0.0, 0.0, 0.0]
    for outcomes in itertools.product(chance_of, repeat=pairs):
        end = 2
        for n in range(pairs if last_look_only else 1, pairs + 1):
            if log_e_rollback(outcomes[:n]) >= math.log(2.0):
                end = 1
            elif log_e_promote(outcomes[:n], 0.05) >= math.log(3.0):
                end = 0
            if end < 2:
                break
        found[end] += math.prod(chance_of[one] for one in outcomes)
    return found


@pytest.mark.parametrize(("candidate", "champion"), [(0.7, 0.7), (0.9, 0.2), (0.3, 0.8)])
def test_the_ends_of_a_trial_are_those_of_all_its_outcomes(candidate, champion):
    ends = exact.ends(candidate, champion, PROMOTION, ROLLBACK, cap=7)
    looked = enumerated(candidate, champion, 7)
    assert [ends.promoted, ends.rolled_back, ends.expired] == pytest.approx(looked, abs=1e-12)
    peeked_once = enumerated(candidate, champion, 7, last_look_only=True)
    assert peeked_once != pytest.approx(looked, abs=1e-3), "an end at any look is more than one at the last"


def test_the_three_ways_that_a_trial_ends_are_those_of_draws_and_of_the_reference():
    draws = SOME.random(5)
    codes = bernoulli(0.68, 0.7)(draws, 400, 2000)
    up = first_crossing(log_paths(codes, -0.05), math.log(20))
    down = first_crossing(log_paths((2 - codes).astype(np.int8), 0.0), math.log(20))
    ends = exact.ends(0.68, 0.7, exact.Bets(-0.05, 20), exact.Bets(0.0, 20, is_harm=True), cap=2000)
    assert ends.promoted == pytest.approx(((up < down) & (up <= 2000)).mean(), abs=0.08)  # three standard errors and a half
    assert ends.rolled_back == pytest.approx(((down <= up) & (down <= 2000)).mean(), abs=0.08)
    checks = list(single.t5(SOME))
    assert not [f"{check.what}: {check.found}, must be {check.limit}" for check in checks if not check.passed]


def test_the_last_line_has_its_fields_and_says_what_was_missed():
    checks = [
        Check("T2", "a: false promotions of 400", 20, most=35),
        Check("T4", "-0.20: median canary units to the rollback", 131, most=158),
        Check("T6", "50% worse: false discovery rate", 0.2, most=0.1),
        Check("T7", "z: ours wrong, of 400", 3, most=35),
        Check("T7", "z: mutant wrong", 30, least=36),
        Check("T14", "promotion: crash points", 9, least=2),
    ]
    said = rollout.figures(checks, SOME)
    assert said["false_promotion_rate"] == 0.05
    assert said["median_units_to_rollback"] == {"-0.20": 131}
    assert (said["fdr"], said["mutants_caught"], said["crash_points"], said["crash_mismatches"]) == (0.2, "0/1", 9, 0)
    assert said["missed"] == ["T6 50% worse: false discovery rate", "T7 z: mutant wrong"]


def test_the_curves_are_drawn(tmp_path):
    rollout.write(
        tmp_path, [Check("T0", "x", 1.0, most=2)], {"superiority": {0.05: [0.1] * 6}, "non-inferiority": {0.0: [0.2] * 6}}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checks.csv", "power.csv", "power.png"]

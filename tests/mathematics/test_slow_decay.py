"""The detector of slow decay against enumeration, its own definition and simulation; the usual wrong variants must fail the same tests."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout.anchor import blocks
from service.rollout.detector import START, log_cusum, mixed
from service.rollout.evidence import FRACTIONS

TERNARY = (-1.0, 0.0, 1.0)


def detector(differences):
    return mixed(log_cusum(differences))


def counted_twice(differences):
    """The wrong variant: each unit delivered a second time."""
    return mixed(log_cusum(np.repeat(differences, 2)))[1::2]


def process(differences):
    """An e-process in its place: never begun anew."""
    return np.logaddexp.reduce(np.cumsum(np.log1p(FRACTIONS[:, None] * np.asarray(differences)), axis=1)) - np.log(len(FRACTIONS))


def mean(statistic, steps, anchor, champion):
    """E[M at each step] over all outcomes of Bernoulli pairs, exactly."""
    up, down = anchor * (1 - champion), champion * (1 - anchor)
    chance = {1.0: up, -1.0: down, 0.0: 1 - up - down}
    total = np.zeros(steps)
    for outcome in product(TERNARY, repeat=steps):
        total += np.prod([chance[d] for d in outcome]) * np.exp(statistic(np.array(outcome)))
    return total


@pytest.mark.parametrize(("anchor", "champion"), [(0.5, 0.5), (0.7, 0.7), (0.95, 0.95), (0.6, 0.7)])
def test_its_mean_after_t_units_is_at_most_t_while_the_line_is_no_worse(anchor, champion):
    """What makes it an e-detector, so that the mean time to an alarm at A is at least A."""
    steps = np.arange(1, 7)
    assert (mean(detector, 6, anchor, champion) <= steps + 1e-12).all()


def test_units_that_count_twice_break_that():
    assert (mean(counted_twice, 6, 0.5, 0.5) > 1 + 1e-3)[0]


def test_it_is_no_e_process_and_is_not_to_be_read_as_one():
    assert mean(process, 6, 0.5, 0.5) == pytest.approx(np.ones(6), abs=1e-12)
    assert mean(detector, 6, 0.5, 0.5)[-1] > 1.05


def test_it_is_the_best_restart_at_each_fraction():
    random = np.random.default_rng(0)
    differences = random.choice(TERNARY, 200)
    gains = np.log1p(differences[:, None] * FRACTIONS)
    for place in (0, 1, 57, 199):
        best = max((tuple(gains[start : place + 1].sum(axis=0)) for start in range(place + 1)), key=lambda g: g[0])
        assert log_cusum(differences)[place, 0] == pytest.approx(best[0], abs=1e-9)


def test_it_goes_on_where_a_round_left_it():
    random = np.random.default_rng(1)
    differences = random.uniform(-1, 1, 300)
    first = log_cusum(differences[:120])
    assert log_cusum(differences[120:], tuple(first[-1])) == pytest.approx(log_cusum(differences)[120:], abs=1e-9)


def alarms(statistic, differences, threshold):
    """Units until the alarm, in each row; the number of units when there is none."""
    found = []
    for row in differences:
        has = statistic(row) >= np.log(threshold)
        found.append(int(has.argmax()) + 1 if has.any() else len(row))
    return np.array(found)


def test_false_alarms_are_as_rare_as_promised_and_not_when_units_count_twice():
    random = np.random.default_rng(2)
    equal = (random.random((60, 2000)) < 0.5).astype(float) - (random.random((60, 2000)) < 0.5)
    assert alarms(detector, equal, 30).mean() > 30 * 3
    lone = np.random.default_rng(3).choice([-1.0, 1.0], (400, 400))  # nothing is a draw: the bound is nearly reached
    assert alarms(detector, lone, 8).mean() >= 8
    assert alarms(counted_twice, lone, 8).mean() < 0.7 * alarms(detector, lone, 8).mean()


def test_after_a_long_calm_it_still_sees_a_decline_and_an_e_process_does_not():
    random = np.random.default_rng(4)
    chance = np.repeat([0.8, 0.45], [3000, 500])  # of the champion; the anchor's is .7: first the line gains, then it loses
    differences = (random.random((20, 3500)) < 0.7).astype(float) - (random.random((20, 3500)) < chance)
    found, late = alarms(detector, differences, 1000), alarms(process, differences, 1000)
    assert ((found > 3000) & (found < 3500)).all()
    assert (late == 3500).all()


units = st.lists(st.tuples(st.sampled_from([Arm.ANCHOR, Arm.CHAMPION]), st.floats(0, 100), st.floats(0, 1)), max_size=40)


def outcomes(drawn, matured_until=np.inf):
    return [
        UnitOutcome(f"u{i}", arm, at, reward if at <= matured_until else None, at <= matured_until, 0, 1)
        for i, (arm, at, reward) in enumerate(drawn)
    ]


@given(units, st.floats(0, 100), st.randoms())
def test_blocks_are_only_ever_added_and_never_chosen_by_what_was_said(drawn, early, random):
    whole = blocks(outcomes(drawn))
    before = blocks(outcomes(drawn, early))
    assert np.array_equal(whole[: len(before)], before)
    shuffled = outcomes(drawn)
    random.shuffle(shuffled)
    assert np.array_equal(blocks(shuffled), whole)
    assert len(blocks(outcomes([(arm, at, 0.3) for arm, at, _ in drawn]))) == len(whole)


def test_a_block_is_a_unit_of_the_anchor_less_the_mean_of_the_champion_s_before_it():
    said = [("c", 1.0), ("c", 0.0), ("a", 1.0), ("a", 0.0), ("c", 0.25), ("a", 1.0), ("c", 0.0)]
    arms = {"c": Arm.CHAMPION, "a": Arm.ANCHOR}
    assert blocks(outcomes([(arms[arm], float(i), reward) for i, (arm, reward) in enumerate(said)])).tolist() == [0.5, 0.75]


def test_nothing_seen_is_no_evidence():
    assert mixed(np.array(START)) == pytest.approx(0.0)
    assert log_cusum([]).shape == (0, len(FRACTIONS))

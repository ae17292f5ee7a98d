"""What holds of evidence whatever the data."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout.evidence import confidence_sequence, log_e, pair

differences = st.lists(st.floats(-1, 1), max_size=60)
nulls = st.floats(-0.9, 0.9)
units = st.lists(st.tuples(st.sampled_from([Arm.CANDIDATE, Arm.CONTROL]), st.floats(0, 100), st.floats(0, 1)), max_size=40)


@given(differences, nulls)
def test_evidence_is_finite_and_does_not_depend_on_order(values, null):
    found = log_e(values, null)
    assert np.isfinite(found)
    assert np.isclose(found, log_e(sorted(values), null), atol=1e-9)


@given(differences, nulls)
def test_one_more_win_never_weakens_and_one_more_loss_never_strengthens(values, null):
    assert log_e([*values, 1.0], null) >= log_e(values, null) - 1e-9
    assert log_e([*values, -1.0], null) <= log_e(values, null) + 1e-9


@given(differences, nulls, nulls)
def test_a_stricter_null_is_harder_to_reject(values, one, other):
    low, high = sorted((one, other))
    assert log_e(values, low) >= log_e(values, high) - 1e-9


@given(differences)
def test_intervals_only_shrink_and_hold_the_mean(values):
    interval = (-1.0, 1.0)
    for n in range(0, len(values) + 1, 7):
        narrower = confidence_sequence(values[:n], 0.05, interval)
        assert narrower[0] >= interval[0]
        assert narrower[1] <= interval[1]
        if n:
            alone = confidence_sequence(values[:n], 0.05)
            assert alone[0] - 1e-6 <= np.mean(values[:n]) <= alone[1] + 1e-6
        interval = narrower


def outcomes(drawn, matured_until=np.inf):
    return [
        UnitOutcome(f"u{i}", arm, at, reward if at <= matured_until else None, at <= matured_until, 0, 1)
        for i, (arm, at, reward) in enumerate(drawn)
    ]


@given(units, st.floats(0, 100), st.floats(0, 100))
def test_pairs_are_only_ever_added_as_units_mature(drawn, one, other):
    """For each step the earlier pairs are a prefix of the later ones, so no look can drop a pair for its outcome."""
    early, late = sorted((one, other))
    for step in ((), (50.0,)):
        before, after = pair(outcomes(drawn, early), step), pair(outcomes(drawn, late), step)
        assert len(before) <= len(after)
        remaining = list(after)
        for difference in before:
            remaining.remove(difference)


@given(units, st.randoms())
def test_the_order_in_which_units_are_read_does_not_matter(drawn, random):
    shuffled = outcomes(drawn)
    random.shuffle(shuffled)
    assert np.array_equal(pair(shuffled, (50.0,)), pair(outcomes(drawn), (50.0,)))

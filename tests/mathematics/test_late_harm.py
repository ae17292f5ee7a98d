"""Harm that begins in the middle of a bake: the detector beside the e-process, which must win back first what it lost."""

import numpy as np
import pytest

from service.rollout.detector import START, log_cusum, mixed, peak
from service.rollout.evidence import FRACTIONS, log_e_rollback

ALARM, ALPHA, PAIRS = 10_000, 0.005, 500
"""A bake's defaults: the metric has half of its level beside guardrails."""


def stepwise(differences, start=START):
    """The definition, pair by pair."""
    walk, found = np.array(start), []
    for difference in differences:
        walk = np.maximum(walk, 0.0) + np.log1p(difference * FRACTIONS)
        found.append(walk)
    return np.array(found)


def harmful(random, runs, calm, pairs, loss):
    """Champion before - champion, (runs, calm + pairs): both at .7, and after `calm` pairs the new one at .7 - `loss`."""
    chance = np.repeat([0.7, 0.7 - loss], [calm, pairs])
    return (random.random((runs, calm + pairs)) < 0.7).astype(float) - (random.random((runs, calm + pairs)) < chance)


def by_process(row):
    """Log of the e-process after each pair, from its definition over counts."""
    return np.array([log_e_rollback(-row[: n + 1]) for n in range(len(row))])


def found_after(logs, threshold, calm):
    """Pairs from the beginning of the harm to the alarm; infinite without one."""
    has = logs[calm:] >= threshold
    return has.argmax() + 1 if has.any() else np.inf


def medians(calm, loss):
    rows = harmful(np.random.default_rng(calm + int(100 * loss)), 40, calm, 700, loss)
    detector = np.median([found_after(mixed(log_cusum(row)), np.log(ALARM), calm) for row in rows])
    process = np.median([found_after(by_process(row), -np.log(ALPHA), calm) for row in rows])
    return detector, process


@pytest.mark.parametrize("start", [START, (3.0, -2.0, 0.5, 0.0, 7.0, -0.1)])
def test_it_is_what_its_definition_gives_pair_by_pair(start):
    differences = np.random.default_rng(0).uniform(-1, 1, 400)
    assert log_cusum(differences, start) == pytest.approx(stepwise(differences, start), abs=1e-9)
    assert peak(log_cusum(differences)) == pytest.approx(mixed(stepwise(differences)).max(), abs=1e-9)


def test_nothing_seen_is_no_alarm():
    assert peak(log_cusum([])) == 0.0
    assert peak(log_cusum([-1.0, -0.5])) == 0.0, "of a champion that only does better"


@pytest.mark.parametrize("loss", [0.2, 0.4])
def test_harm_that_begins_late_is_found_in_two_thirds_of_the_pairs_that_the_e_process_needs(loss):
    detector, process = medians(400, loss)
    assert detector < process * 2 / 3


def test_harm_from_the_beginning_is_the_e_process_s_to_find():
    """Why both are there."""
    detector, process = medians(0, 0.2)
    assert process < detector


def test_equal_champions_are_hardly_ever_taken_back_in_a_whole_bake():
    """At the e-process's own threshold, as if it kept a level, it would take back many times as many."""
    random = np.random.default_rng(7)
    peaks = np.array([peak(log_cusum(row)) for row in harmful(random, 1500, PAIRS, 0, 0.0)])
    assert (peaks >= np.log(ALARM)).mean() <= PAIRS / ALARM / 10
    assert (peaks >= -np.log(ALPHA)).mean() > ALPHA * 2

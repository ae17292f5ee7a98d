"""The betting e-process against golden vectors, exact enumeration and simulation; the usual wrong variants must fail the same tests."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout.evidence import FRACTIONS, confidence_sequence, log_e, log_e_harm, log_e_promote, log_e_rollback, pair

SHOWN = np.array([1, 2, 5, 10, 50, 100, 200])
GOLDEN = {
    0.0: [0.151916042026, 0.151916042026, 0.0813136610507, -0.0289008867578, 0.0305856193225, 0.221679529841, 0.663649941299],
    -0.05: [0.166642815893, 0.176637164437, 0.126821665678, 0.0413990619553, 0.326635171961, 0.828300466814, 2.03130197411],
}


def golden_differences():
    i = np.arange(1, 201)
    return ((3 * i) % 10 < 7).astype(float) - ((7 * i) % 10 < 6).astype(float)


def log_paths(differences, null):
    """ln e after each pair, for every row of `differences` at once; memory is rows by pairs."""
    surplus = (1 + differences) / (1 + null) - 1
    total = None
    for fraction in FRACTIONS:
        path = np.cumsum(np.log1p(fraction * surplus), axis=1)
        total = path if total is None else np.logaddexp(total, path)
    return total - np.log(len(FRACTIONS))


def bernoulli_pairs(seed, rows, pairs, candidate, champion):
    random = np.random.default_rng(seed)
    draw = lambda p: (random.random((rows, pairs)) < p).astype(float)  # noqa: E731
    return draw(candidate) - draw(champion)


def first_crossing(paths, threshold):
    """When each path first reaches the threshold; one more than its length when it never does."""
    has = paths >= threshold
    return np.where(has.any(axis=1), has.argmax(axis=1) + 1, paths.shape[1] + 1)


@pytest.mark.parametrize("null", GOLDEN)
def test_golden_vectors(null):
    differences = golden_differences()
    assert [log_e(differences[:n], null) for n in SHOWN] == pytest.approx(GOLDEN[null], abs=1e-9)
    assert log_paths(differences[None], null)[0, SHOWN - 1] == pytest.approx(GOLDEN[null], abs=1e-9)


def test_counts_say_the_same_as_a_stream_in_any_order():
    differences = golden_differences()
    assert [(differences == d).sum() for d in (1, 0, -1)] == [80, 60, 60]
    assert log_e([1, 0, -1], -0.05, [80, 60, 60]) == pytest.approx(log_e(differences, -0.05), abs=1e-9)
    assert log_e(differences[::-1], -0.05) == pytest.approx(log_e(differences, -0.05), abs=1e-9)


def test_no_data_is_no_evidence_and_ten_million_pairs_do_not_overflow():
    assert log_e([], 0.0) == 0.0
    assert np.isfinite(log_e([1.0, -1.0], 0.0, [9e6, 1e6]))


def expectation(statistic, pairs, candidate, champion):
    """E[exp(statistic)] over all outcomes of Bernoulli pairs, exactly."""
    chance = {
        1: candidate * (1 - champion),
        -1: champion * (1 - candidate),
        0: candidate * champion + (1 - candidate) * (1 - champion),
    }
    total = 0.0
    for outcome in product((-1, 0, 1), repeat=pairs):
        total += np.prod([chance[d] for d in outcome]) * np.exp(statistic(np.array(outcome, dtype=float)))
    return total


@pytest.mark.parametrize(
    ("candidate", "champion", "margin"), [(0.5, 0.5, 0.0), (0.65, 0.7, 0.05), (0.87, 0.9, 0.03), (0.6, 0.7, 0.05)]
)
def test_the_e_value_is_at_most_one_on_average_under_the_null(candidate, champion, margin):
    found = expectation(lambda d: log_e_promote(d, margin), 6, candidate, champion)
    assert found <= 1 + 1e-12
    if champion - candidate == pytest.approx(margin):
        assert found == pytest.approx(1.0, abs=1e-12)


def test_the_known_value_inside_the_null():
    assert expectation(lambda d: log_e_promote(d, 0.05), 6, 0.6, 0.7) == pytest.approx(0.9504, abs=5e-5)


@pytest.mark.parametrize("candidate", [0.5, 0.6, 0.9])
def test_the_rollback_e_value_is_at_most_one_when_there_is_no_harm(candidate):
    assert expectation(log_e_rollback, 6, candidate, 0.5) <= 1 + 1e-12


MUTANTS = {
    "margin with the wrong sign": lambda d: log_e(d, -0.10),
    "best bet instead of the mean of bets": lambda d: max(np.log1p(f * ((1 + d) / 0.95 - 1)).sum() for f in FRACTIONS),
    "pairs counted twice": lambda d: log_e(np.repeat(d, 2), -0.05),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_enumeration_finds_the_mutants(mutant):
    assert expectation(MUTANTS[mutant], 6, 0.65, 0.7) > 1 + 1e-3


def rarely_answered(statistic, pairs, rate, candidate, champion):
    """E[exp(statistic(differences, answered))] where only the share `rate` of either arm answers, a silent unit counting ½. Exact."""

    def units(content):
        return {(1.0, 1.0): rate * content, (0.0, 1.0): rate * (1 - content), (0.5, 0.0): 1 - rate}

    chance = Counter()
    for (mine, _), p in units(candidate).items():
        for (theirs, is_answered), q in units(champion).items():
            chance[mine - theirs, is_answered] += p * q
    total = 0.0
    for outcome in product(chance, repeat=pairs):
        differences, answered = np.array(outcome).T
        total += np.prod([chance[one] for one in outcome]) * np.exp(statistic(differences, answered))
    return total


@pytest.mark.parametrize(
    ("rate", "candidate", "champion", "margin"), [(0.1, 0.6, 0.7, 0.1), (0.3, 0.1, 0.5, 0.4), (1.0, 0.6, 0.7, 0.1)]
)
def test_the_margin_is_that_of_units_that_answer_however_few_they_are(rate, candidate, champion, margin):
    """At the null, worse by the margin where users answer, the mean of e is 1; with the margin on the mean it is more."""
    ours = rarely_answered(lambda d, a: log_e_promote(d, margin, answered=a), 4, rate, candidate, champion)
    assert ours == pytest.approx(1.0, abs=1e-12)
    harm = rarely_answered(lambda d, a: log_e_harm(d, margin, answered=a), 4, rate, candidate, champion)
    assert harm == pytest.approx(1.0, abs=1e-12)
    on_the_mean = rarely_answered(lambda d, _: log_e_promote(d, margin), 4, rate, candidate, champion)
    assert (on_the_mean > 1 + 1e-3) == (rate < 1), "the wrong variant, which is right where all answer"


def test_a_margin_where_all_answer_is_the_plain_one_and_no_wealth_is_negative():
    differences = golden_differences()
    assert log_e_promote(differences, 0.05, answered=np.ones(200)) == log_e_promote(differences, 0.05)
    assert np.isfinite(log_e_promote([-1.0, -0.5], 0.49, [1000, 1000], [0.0, 0.0]))
    assert np.isfinite(log_e_harm([1.0, 0.5], 0.49, [1000, 1000], [0.0, 0.0]))


def test_a_candidate_that_makes_rare_answers_bad_is_not_promoted():
    """One in twenty answers; nine in ten of them are content with the champion, half of them with the candidate."""
    random, promoted, wrongly = np.random.default_rng(4), 0, 0
    for _ in range(40):
        said = random.random((2, 4000)) < 0.05
        rewards = np.where(said, random.random((2, 4000)) < np.array([[0.5], [0.9]]), 0.5)
        (values, answered), times = np.unique([rewards[0] - rewards[1], said[1]], axis=1, return_counts=True)
        promoted += log_e_promote(values, 0.05, times, answered) >= np.log(20)
        wrongly += log_e_promote(values, 0.05, times) >= np.log(20)
    assert promoted == 0
    assert wrongly >= 36, "a margin on the mean promotes it"


REPEATS, PAIRS = 400, 4000
MOST = 35
"""At most so many of 400 cross by chance at alpha = .05, with probability .999."""


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.7, 0.95])
def test_equal_arms_looked_at_after_each_pair_seldom_seem_superior(rate):
    differences = bernoulli_pairs(1, REPEATS, PAIRS, rate, rate)
    false = (first_crossing(log_paths(differences, 0.0), np.log(20)) <= PAIRS).sum()
    assert 1 <= false <= MOST  # at least one: a dead test would be safe too


@pytest.mark.parametrize(("candidate", "champion", "margin"), [(0.65, 0.7, 0.05), (0.87, 0.9, 0.03)])
def test_a_candidate_at_the_margin_is_seldom_promoted(candidate, champion, margin):
    differences = bernoulli_pairs(2, REPEATS, PAIRS, candidate, champion)
    assert (first_crossing(log_paths(differences, -margin), np.log(20)) <= PAIRS).sum() <= MOST


def test_the_naive_z_test_fails_where_the_e_process_holds():
    differences = bernoulli_pairs(1, REPEATS, PAIRS, 0.7, 0.7)
    n = np.arange(1, PAIRS + 1)
    means = np.cumsum(differences, axis=1) / n
    spread = np.sqrt(np.maximum(np.cumsum(differences**2, axis=1) / n - means**2, 1e-12) / n)
    false = (first_crossing((means / spread)[:, 20:], 1.645) <= PAIRS - 20).sum()
    assert false > 5 * MOST


@pytest.mark.parametrize(("drop", "median", "q95"), [(0.2, 138, 315), (0.4, 44, 76)])
def test_harm_is_seen_as_fast_as_published(drop, median, q95):
    found = first_crossing(log_paths(-bernoulli_pairs(3, 800, 1000, 0.7 - drop, 0.7), 0.0), np.log(100))
    assert np.quantile(found, [0.5, 0.95]) == pytest.approx([median, q95], rel=0.15)


def test_equal_arms_are_seldom_rolled_back():
    found = first_crossing(log_paths(-bernoulli_pairs(4, REPEATS, PAIRS, 0.7, 0.7), 0.0), np.log(100))
    assert (found <= PAIRS).sum() <= 12  # .999 of 400 at alpha = .01


def test_an_equal_candidate_is_promoted_within_the_margin():
    found = first_crossing(log_paths(bernoulli_pairs(5, REPEATS, PAIRS, 0.7, 0.7), -0.05), np.log(20))
    assert (np.quantile(found, [0.5, 0.8]) <= [1350, 2350]).all()


@pytest.mark.parametrize(("candidate", "most"), [(0.8, 45), (0.6, 60)])
def test_a_far_better_candidate_needs_a_few_dozen_pairs(candidate, most):
    """The demo: the champion is never right, thumbs come on half of the replies, silence counts one half, margin .05."""
    random = np.random.default_rng(6)
    shape = (800, 200)

    def rewards(right):
        return np.where(random.random(shape) < 0.5, (random.random(shape) < right).astype(float), 0.5)

    found = first_crossing(log_paths(rewards(candidate) - rewards(0.0), -0.05), np.log(20))
    assert np.quantile(found, 0.95) <= most


def test_the_confidence_sequence_covers_at_every_look_and_a_fixed_sample_interval_does_not():
    truth, looks = 0.1, range(20, 1001, 40)
    differences = bernoulli_pairs(7, 120, 1000, 0.6, 0.5)
    missed = naive_missed = 0
    for row in differences:
        interval, has_naive_missed = (-1.0, 1.0), False
        for n in looks:
            interval = confidence_sequence(row[:n], 0.05, interval)
            half = 1.96 * row[:n].std() / np.sqrt(n)
            has_naive_missed |= abs(row[:n].mean() - truth) > half
        missed += not interval[0] <= truth <= interval[1]
        naive_missed += has_naive_missed
    most = 15  # .999 of 120 at alpha = .05
    assert missed <= most < naive_missed


def test_the_interval_is_where_the_tests_stop_rejecting():
    differences = golden_differences()
    low, high = confidence_sequence(differences, 0.05)
    assert low < 0.1 < high
    assert log_e(differences, low, None) == pytest.approx(np.log(40), abs=1e-3)
    assert log_e(-differences, -high, None) == pytest.approx(np.log(40), abs=1e-3)


def unit(arm, at, reward):
    return UnitOutcome(f"{arm}-{at}", arm, at, reward, is_matured=True, errors=0, requests=1)


def ramp(random):
    """A ramp from 1 % to 50 % while everybody grows happier: two equal arms of 0.1 and then 5 units a tick."""
    outcomes, steps = [], (0.0, 1000.0)
    for tick in range(1500):
        share, rate = (0.1, 0.3) if tick < 1000 else (5, 0.9)
        for arm in (Arm.CANDIDATE, Arm.CONTROL):
            count = random.poisson(share)
            outcomes += [unit(arm, tick + random.random(), float(random.random() < rate)) for _ in range(count)]
        outcomes += [unit(Arm.CHAMPION, tick + random.random(), float(random.random() < rate)) for _ in range(2)]
    return outcomes, steps


def test_pairs_within_a_step_are_not_fooled_by_a_ramp_under_drift_and_pooled_means_are():
    random = np.random.default_rng(8)
    for _ in range(3):
        outcomes, steps = ramp(random)
        differences = pair(outcomes, steps)
        assert abs(differences.mean()) < 0.05
        assert log_e_rollback(differences) < np.log(100)
        mean = {arm: np.mean([u.reward for u in outcomes if u.arm == arm]) for arm in Arm if any(u.arm == arm for u in outcomes)}
        assert mean[Arm.CANDIDATE] - mean[Arm.CHAMPION] > 0.2

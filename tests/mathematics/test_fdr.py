"""e-LOND against golden vectors and on simulated streams; levels whose index comes back must fail the same checks."""

import numpy as np
import pytest

from service.rollout import fdr
from tests.mathematics.test_evidence import bernoulli_pairs, log_paths

E_VALUES = [250, 40, 5, 500, 30, 60, 1e4]
THRESHOLDS = [22.857657, 34.645729, 44.188011, 70.017474, 75.045338, 100.464751, 128.566724]


def run(e_values, level=fdr.level, target=0.1, *, is_reused=False):
    """Thresholds and promotions of a stream, candidate by candidate; `is_reused`: one that fails gives its index back."""
    thresholds, promoted, index = [], [], 1
    for e_value in e_values:
        thresholds.append(1 / level(target, index, sum(promoted)))
        promoted.append(e_value >= thresholds[-1])
        index += not is_reused or promoted[-1]
    return thresholds, promoted


def test_golden_vectors():
    thresholds, promoted = run(E_VALUES)
    assert thresholds == pytest.approx(THRESHOLDS, abs=1e-6)
    assert promoted == [True, True, False, True, False, False, True]


@pytest.mark.parametrize(("index", "promotions", "about"), [(10, 3, 228), (50, 15, 747), (200, 60, 1800)])
def test_thresholds_as_published(index, promotions, about):
    assert 1 / fdr.level(0.1, index, promotions) == pytest.approx(about, rel=0.01)


def test_all_levels_without_a_promotion_spend_no_more_than_the_rate():
    last = 10**5
    spent = sum(fdr.level(0.1, index, 0) for index in range(1, last + 1))
    beyond = 0.1 * fdr.GAMMA * last ** (1 - fdr.EXPONENT) / (fdr.EXPONENT - 1)  # an integral over the rest, from above
    assert 0.0999 < spent < 0.1
    assert spent + beyond == pytest.approx(0.1, abs=1e-6)


STREAMS, CANDIDATES, PAIRS = 150, 30, 600
MOST = 27
"""At most so many of 150 streams go wrong by chance at .1, with probability .999 (binomial)."""


@pytest.fixture(scope="module")
def best():
    """The highest e-value that each candidate reaches while it is looked at after each pair: nulls, and good ones."""

    def highest(seed, candidate):
        paths = log_paths(bernoulli_pairs(seed, STREAMS * CANDIDATES, PAIRS, candidate, 0.7), -0.05)
        return np.exp(paths.max(axis=1)).reshape(STREAMS, CANDIDATES)

    return highest(11, 0.65), highest(12, 0.8)


def test_of_candidates_that_are_all_worse_seldom_is_any_promoted(best):
    """All null: the rate of false discoveries is the chance of one promotion in the whole stream."""
    nulls, _ = best
    assert sum(any(run(stream)[1]) for stream in nulls) <= MOST


WRONG = {
    "an index comes back after a failure": {"is_reused": True},
    "each candidate is tested as if alone": {"level": lambda *_: 0.05},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_wrong_variants_promote_one_in_most_streams(best, wrong):
    nulls, _ = best
    assert sum(any(run(stream, **WRONG[wrong])[1]) for stream in nulls) > MOST


@pytest.mark.parametrize("share_of_nulls", [0.5, 0.9])
def test_in_a_mixed_stream_false_promotions_are_few_and_good_candidates_pass(best, share_of_nulls):
    is_null = np.random.default_rng(13).random((STREAMS, CANDIDATES)) < share_of_nulls
    promoted = np.array([run(stream)[1] for stream in np.where(is_null, *best)])
    false = (promoted & is_null).sum(axis=1) / np.maximum(promoted.sum(axis=1), 1)
    assert false.mean() <= 0.1
    assert (promoted & ~is_null).sum() / (~is_null).sum() >= 0.85

"""The gate: gains on what is new, keeps what is old, and too little data never passes."""

import numpy as np
import pytest

from service.rollout.gates import bounds, judge, scores
from service.settings import Gate

GATE = Gate(score="exact_match", min_gain=0.1, max_loss=0.1, min_items=20)


def part(champion, candidate, *, is_new=True, items=50, base=0.0):
    """Exact-match scores with these shares of right answers."""

    def exact(share):
        right = [float(i < share * items) for i in range(items)]
        return {"exact": right, "loglik": [r - 1 for r in right]}

    ids = [f"e{i}" for i in range(items)]
    return {"is_new": is_new, "ids": ids, "base": exact(base), "champion": exact(champion), "candidate": exact(candidate)}


def verdict(gate=GATE, **slices):
    return judge({"slices": slices}, gate)


def test_a_gain_without_a_loss_passes():
    said = verdict(new=part(0.1, 0.8), old=part(0.8, 0.8, is_new=False))
    assert said.outcome == "pass"
    assert [(f.name, f.must) for f in said.findings] == [("new", "gain"), ("new", "not_lose"), ("old", "not_lose")]
    assert said.findings[0].low > 0.1


def test_no_gain_is_no_pass():
    assert verdict(new=part(0.5, 0.5)).outcome == "fail"
    assert verdict(new=part(0.5, 0.62)).outcome == "inconclusive"


def test_a_loss_on_an_old_slice_fails_whatever_the_gain():
    said = verdict(new=part(0.0, 1.0), old=part(0.9, 0.4, is_new=False))
    assert said.outcome == "fail"
    assert "old: fail" in said.reasons[-1]


def test_a_loss_that_the_pooled_mean_hides_is_found():
    slices = {"new": part(0.0, 0.5), "big": part(0.5, 0.8, is_new=False, items=200), "hidden": part(1.0, 0.3, is_new=False)}
    pooled = [c - p for s in slices.values() for c, p in zip(s["candidate"]["exact"], s["champion"]["exact"], strict=True)]
    assert np.mean(pooled) > 0.1
    assert verdict(**slices).outcome == "fail"


@pytest.mark.parametrize(
    "slices", [{}, {"new": part(0.0, 1.0, items=19)}, {"new": part(0.0, 1.0), "old": part(0.5, 0.5, is_new=False, items=5)}]
)
def test_too_little_data_is_inconclusive(slices):
    assert verdict(**slices).outcome == "inconclusive"


def test_small_slices_are_judged_together_so_that_none_blocks_for_ever():
    said = verdict(new=part(0.0, 1.0), tiny=part(0.5, 0.5, is_new=False, items=4), small=part(0.5, 0.5, is_new=False, items=18))
    assert said.outcome == "pass"
    assert said.findings[-1].name == "tiny+small"
    assert said.findings[-1].items == 22


def test_a_line_without_a_champion_is_compared_with_the_base():
    body = part(0.0, 0.8)
    del body["champion"]
    assert verdict(new=body).outcome == "pass"


def test_likelihood_is_scored_in_nats():
    said = verdict(Gate(score="likelihood", min_gain=0.1), new=part(0.0, 0.8))
    assert said.outcome == "pass"
    assert said.findings[0].champion == pytest.approx(-1.0)


def test_scores_that_do_not_pair_or_are_not_finite_are_refused():
    short, infinite = part(0.0, 1.0), part(0.0, 1.0)
    short["candidate"]["exact"].pop()
    infinite["candidate"]["exact"][0] = float("nan")
    for body in (short, infinite):
        with pytest.raises(ValueError, match="new"):
            verdict(new=body)


def test_a_verdict_is_the_same_each_time():
    slices = {"new": part(0.1, 0.7), "old": part(0.8, 0.75, is_new=False)}
    assert verdict(**slices).as_json() == verdict(**slices).as_json()


def test_bounds_hold_as_often_as_they_say():
    random = np.random.default_rng(0)
    samples = (random.random((400, 60)) < 0.6).astype(float) - (random.random((400, 60)) < 0.5)
    found = np.array([bounds(sample, 0.95, draws=400) for sample in samples])
    missed = (found[:, 0] > 0.1).mean(), (found[:, 1] < 0.1).mean()
    assert all(0.02 < share < 0.1 for share in missed)


def test_scores_are_means_by_slice():
    told = scores({"slices": {"new": part(0.1, 0.8), "none": part(0.0, 0.0, items=0)}})
    assert told == {"new": {"exact": pytest.approx(0.8), "loglik": pytest.approx(-0.2), "n": 50, "is_new": True}}

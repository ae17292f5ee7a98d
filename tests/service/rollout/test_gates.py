"""The gate: gains on what is new, keeps what is old, and too little data never passes."""

import json

import numpy as np
import pytest

from service.rollout.gates import bounds, judge, matrix, scores
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


def test_a_slice_that_is_large_enough_is_judged_by_itself_and_never_with_a_tiny_one():
    """Joined, the tiny one's loss would hide behind the large one's gain, or the large one's behind a larger's."""
    tiny, large, other = (part(0.9, c, is_new=False, items=n) for c, n in ((0.9, 4), (0.4, 30), (1.0, 200)))
    said = verdict(new=part(0.0, 1.0), tiny=tiny, large=large, other=other)
    outcomes = {found.name: found.outcome for found in said.findings if found.must == "not_lose"}
    assert outcomes["large"] == "fail"
    assert outcomes["other"] == "pass"
    assert said.worst.name == "large"
    assert said.as_json()["worst"] == "large"
    joined = np.concatenate([np.array(s["candidate"]["exact"]) - s["champion"]["exact"] for s in (large, other)])
    assert bounds(joined, 0.95)[0] > -0.1, "the control: together they would have passed"


def test_a_slice_too_small_to_pass_by_itself_may_fail_by_itself():
    lost = part(1.0, 0.0, is_new=False, items=6)
    said = verdict(new=part(0.0, 1.0), lost=lost, kept=part(0.5, 1.0, is_new=False, items=60))
    assert said.outcome == "fail"
    assert next(found for found in said.findings if found.name == "lost").outcome == "fail"
    assert said.findings[-1].outcome == "pass", "the control: with the larger one beside it, nothing would be seen"


def suite(candidate, *, must=(), champion=1.0, items=30):
    """A golden suite whose items `must` pass; the share `candidate` of its items is right, from the first on."""
    body = part(champion, candidate, items=items)
    return {**body, "must_pass": [i in must for i in range(items)]}


def golden(suites, gate=GATE, **more):
    return judge({"slices": {"new": part(0.0, 1.0)}, "suites": suites, **more}, gate)


def test_one_item_that_must_pass_and_does_not_fails_the_candidate():
    assert golden({"core": suite(1.0, must=(3, 29))}).outcome == "pass"
    said = golden({"core": suite(29 / 30, must=(3, 29))})
    assert said.outcome == "fail"
    assert "must pass: 1 of 2, not core/e29" in said.reasons
    assert golden({"core": suite(29 / 30, must=(3,))}).outcome != "fail", "the control: one scored item is within the margin"


def test_a_suite_is_a_protected_slice_of_its_own():
    said = golden({"core": suite(0.5)})
    assert said.outcome == "fail"
    assert said.worst.name == "suite:core"
    assert said.measured == ("suite:core",)


def test_a_suite_of_nothing_but_items_that_must_pass_has_no_score():
    said = golden({"core": suite(1.0, must=range(3), items=3)})
    assert said.outcome == "pass"
    assert [found.name for found in said.findings] == ["new", "new"]


@pytest.mark.parametrize(("kl", "limit", "outcome"), [(0.3, 0.5, "pass"), (0.6, 0.5, "fail"), (9.0, None, "pass")])
def test_the_divergence_from_the_champion_has_a_limit_when_one_is_set(kl, limit, outcome):
    said = golden({}, Gate(score="exact_match", min_gain=0.1, max_kl=limit), kl=kl)
    assert said.outcome == outcome
    assert said.as_json()["bounds"][0]["value"] == kl


def test_a_divergence_that_is_no_number_fails_without_a_limit_too():
    assert golden({}, kl=float("nan")).outcome == "fail"


@pytest.mark.parametrize(("lengths", "outcome"), [([10] * 8, "pass"), ([30] * 8, "fail"), ([2] * 8, "fail")])
def test_replies_may_be_neither_much_longer_nor_much_shorter(lengths, outcome):
    gate = Gate(score="exact_match", min_gain=0.1, max_length_ratio=2.0)
    assert golden({}, gate, lengths={"champion": [10] * 8, "candidate": lengths}).outcome == outcome


def test_each_finding_says_how_often_its_examples_were_looked_at():
    slices = {"new": part(0.0, 1.0), "a": part(0.5, 0.5, is_new=False), "b": part(0.5, 0.5, is_new=False)}
    said = judge({"slices": slices, "looks": {"new": 1, "a": 4, "b": 2}}, GATE)
    assert {found.name: found.looks for found in said.findings} == {"new": 1, "a": 4, "b": 2}
    assert "(look 4)" in " ".join(said.reasons)
    assert said.measured == ("a", "b")
    assert json.dumps(said.as_json())


def history(*evaluations):
    found = {}
    for number, slices in enumerate(evaluations, 1):
        found = matrix({"slices": slices}, found, f"desk@v{number}")
    return found


def test_a_re_base_must_keep_new_slices_and_old_and_need_not_gain():
    few = part(0.5, 0.5, items=6)
    slices = {"new": few, "old": part(0.8, 0.8, is_new=False)}
    assert judge({"slices": slices}, GATE).outcome == "inconclusive"
    assert judge({"slices": slices}, GATE, is_rebase=True).outcome == "pass"
    lost = {"new": part(0.9, 0.2), "old": part(0.8, 0.8, is_new=False)}
    assert judge({"slices": lost}, GATE, is_rebase=True).outcome == "fail"
    assert judge({"slices": {**slices, "old": part(0.8, 0.3, is_new=False)}}, GATE, is_rebase=True).outcome == "fail"
    assert judge({"slices": {"new": few}}, GATE, is_rebase=True).outcome == "inconclusive"
    assert judge({"slices": {}}, GATE, is_rebase=True).outcome == "inconclusive", "nothing measured is nothing kept"


def test_the_matrix_grows_with_each_version():
    first = {"planes": part(0.0, 0.8)}
    second = {"trains": part(0.1, 0.6), "planes": part(0.8, 0.7, is_new=False)}
    found = history(first, second)["exact"]
    assert found["versions"] == ("desk@v1", "desk@v2")
    assert found["slices"] == ("planes", "trains")
    assert [[pytest.approx(score) for score in row] for row in ((0.8, 0.1), (0.7, 0.6))] == [list(row) for row in found["scores"]]
    read = found["transfer"]
    assert read["average"] == pytest.approx(0.65)
    assert read["backward"] == pytest.approx(-0.1)
    assert read["forward"] == pytest.approx(0.1)
    assert read["forgetting"] == pytest.approx(0.1)
    stored = json.loads(json.dumps(history(first)))
    assert matrix({"slices": second}, stored, "desk@v2")["exact"] == found, "as it comes back from the database"


def test_new_and_older_examples_of_a_slice_are_one_column():
    found = history(
        {"a": part(0.0, 1.0, items=30)}, {"a": part(0.0, 1.0, items=30), "a (older)": part(1, 0.5, is_new=False, items=10)}
    )
    assert found["exact"]["slices"] == ("a",)
    assert found["exact"]["scores"][-1] == (pytest.approx(35 / 40),)


def test_a_slice_that_a_version_was_not_measured_on_is_left_out_of_what_is_read():
    first = {"a": part(0.0, 0.8), "b": part(0.0, 0.9)}
    found = history(first, {"c": part(0.0, 0.5), "a": part(0.8, 0.8, is_new=False)})["exact"]
    assert found["scores"][-1] == (pytest.approx(0.8), None, pytest.approx(0.5))
    assert found["transfer"]["backward"] == pytest.approx(0.0)
    assert found["transfer"]["average"] == pytest.approx(0.65)

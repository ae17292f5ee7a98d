"""What a shadow's counts say: harm and nothing else decides, and absence of evidence lets go on."""

import json

import numpy as np
import pytest

from service.rollout import shadow, verdicts
from service.rollout.controller import by_hand, judge
from service.rollout.evidence import log_e
from service.rollout.probe import ProbeResult
from service.rollout.shadow import ShadowTally
from service.rollout.stages import Stage, check
from service.settings import Shadow
from tests.service.rollout import test_controller as cases

POLICY = cases.POLICY.model_copy(update={"shadow": Shadow(share=0.2, min_pairs=10, max_seconds=50)})


LIMIT = shadow.harm_at(Shadow())


def trial(stage=Stage.SHADOW, **fields):
    return cases.trial(stage, policy=POLICY, steps=(), **{"since": 90.0, **fields})


def seen(tally, **fields):
    return cases.look(now=fields.pop("now", 100.0), shadow=tally, **fields)


def of(*nats, kind="accepted", **fields):
    return ShadowTally(len(nats), compared=((kind, shadow.differences((n - 3.0, -3.0) for n in nats)),), **fields)


def moved(tally, **fields):
    return judge(trial(), seen(tally, **fields)).move


def test_what_is_proven_goes_into_the_shadow_only_where_there_is_one():
    assert cases.moved(trial(Stage.VERIFYING), seen(None)).to is Stage.SHADOW
    assert cases.moved(cases.trial(Stage.VERIFYING), seen(None)).to is Stage.CANARY
    assert cases.moved(trial(Stage.VERIFYING, is_operator=True), seen(None)).to is Stage.PROMOTING


def test_differences_are_bounded_and_counted():
    assert shadow.differences([(-1.0, -3.0), (-9.0, -1.0), (-1.5, -1.25), (-1.5, -1.25)]) == ((-1.0, 1), (-0.25, 2), (1.0, 1))
    assert shadow.mean(((-1.0, 1), (-0.25, 2), (1.0, 1))) == pytest.approx(-0.125)


def test_no_harm_in_enough_comparisons_goes_on():
    assert moved(of(*[-0.05] * 9)) is None
    said = moved(of(*[-0.05] * 10))
    assert (said.to, said.reason) == (Stage.CANARY, "shadowed: no harm in 10 comparisons, 10 replies")


@pytest.mark.parametrize("kind", ["accepted", "corrected"])
def test_harm_rejects_it_before_it_answers_anybody(kind):
    said = moved(of(*[-0.9] * 20, kind=kind))
    assert said.to is Stage.REJECTED
    assert said.reason == f"shadow_harmed: {kind} replies are less likely, by nats a token of -0.900 on average"


def test_gains_on_corrections_do_not_pay_for_losses_on_what_was_good():
    both = ShadowTally(40, compared=(*of(*[-0.9] * 20).compared, *of(*[1.0] * 60, kind="corrected").compared))
    assert moved(both).reason.startswith("shadow_harmed: accepted")


def test_near_harm_no_number_of_comparisons_is_enough_but_time_is():
    few = of(*[-0.9] * 15, *[0.0] * 3)
    log, limit = shadow.harms(POLICY.shadow, few)["accepted"], shadow.harm_at(POLICY.shadow)
    assert limit - 1.5 < log < limit
    assert moved(few) is None
    assert moved(few, now=140.0).reason.startswith("shadowed_out_of_time")


def test_absence_of_evidence_goes_on_to_the_canary_but_not_to_a_promotion():
    assert moved(ShadowTally()) is None
    assert moved(None, now=139.9) is None
    said = moved(ShadowTally(), now=140.0)
    assert (said.to, said.reason) == (Stage.CANARY, "shadowed_out_of_time: no harm in 0 comparisons, 0 replies")


HARD = {
    "shadow_failures: 5 of its last 50 shadow replies failed": {"recent_failures": 5},
    "engine_crash: the engine died under 1 of its shadow replies": {"crashes": 1},
    "shadow_not_finite: 1 of its scores are no numbers": {"not_finite": 1},
}


@pytest.mark.parametrize("reason", HARD)
def test_what_needs_no_statistics(reason):
    said = moved(of(*[0.5] * 40, **HARD[reason]), now=140.0)
    assert (said.to, said.reason) == (Stage.REJECTED, reason)


def test_a_replica_that_lost_it_rejects_it_and_a_canary_waits_for_every_replica():
    bad = cases.replica(probe=ProbeResult(ok=False, reason="load_failed"))
    assert moved(of(*[0.5] * 40), replicas=(bad,)).to is Stage.REJECTED
    assert moved(of(*[0.5] * 40), replicas=(cases.replica(), cases.replica("new", probe=None))) is None


def test_the_switch_holds_it_back_and_rejects_all_the_same():
    assert moved(of(*[0.5] * 40), is_frozen=True) is None
    assert moved(of(*[-0.9] * 40), is_frozen=True).to is Stage.REJECTED
    assert cases.moved(trial(Stage.VERIFYING), seen(None, is_frozen=True)) is None


def test_a_new_champion_ends_it():
    assert moved(of(*[0.5] * 40), champion="desk@v9").to is Stage.ABORTED


def test_by_hand():
    assert by_hand(trial(), "abort").to is by_hand(trial(), "rollback").to is Stage.ABORTED
    check(Stage.SHADOW, by_hand(trial(), "promote").to)
    assert not Stage.SHADOW.has_traffic
    assert Stage.SHADOW.is_resident
    assert trial().weight == 0


@pytest.mark.parametrize("tally", [of(*[0.0] * 12), of(*[-0.9, -0.7] * 20), of(0.1, recent_failures=7, failed=9)])
def test_its_verdicts_are_decided_the_same_again(tally):
    one = trial()
    said = judge(one, seen(tally))
    body = json.loads(json.dumps(verdicts.record(one, said.move, said)))
    assert verdicts.replay(body).is_same
    body["facts"]["shadow"] = {**body["facts"]["shadow"], "compared": [], "recent_failures": 0}
    assert not verdicts.replay(body).is_same


def rejected(draw, log, level, runs=400, most=150):
    """Share of harmless candidates that are rejected when one looks after each comparison."""
    found = 0
    for seed in range(runs):
        nats = np.clip(draw(np.random.default_rng(seed), most), -1, 1)
        found += any(log(nats[:n]) >= level for n in range(5, most + 1, 5))
    return found / runs


def test_users_count_once_since_their_prompts_are_not_independent():
    """A candidate at the margin, twenty prompts of each user: all of them taken for comparisons would reject it often."""
    spec = Shadow(share=1)

    def log(nats):
        return shadow.log_harm(tuple((n, 1) for n in nats), spec.margin)

    def every_prompt(random, count):
        return np.repeat(random.normal(-0.1, 0.3, count), 20)[:count]

    assert rejected(lambda random, count: random.normal(-0.1, 0.3, count), log, LIMIT, runs=200) <= 0.05
    assert rejected(every_prompt, log, LIMIT, runs=200) > 0.15


def test_a_candidate_at_the_margin_is_rejected_seldom_and_without_the_margin_often():
    """An approved reply is the champion's own: another version finds it less likely by their divergence, and is no worse for it."""
    spec = Shadow(share=1, margin=0.1, alpha=0.05)

    def draw(random, count):
        return random.normal(-0.1, 0.3, count)

    limit = shadow.harm_at(spec)
    assert rejected(draw, lambda nats: shadow.log_harm(tuple((n, 1) for n in nats), spec.margin), limit) <= 0.05
    assert rejected(draw, lambda nats: log_e(-nats, 0.0), limit) > 0.5


@pytest.mark.parametrize(("nats", "comparisons"), [(-0.9, 22), (-0.6, 32)])
def test_gross_harm_is_found_before_the_shadow_is_over(nats, comparisons):
    """The figures in docs/operations.md; a standard deviation of 0.4 nats a token."""
    spec, times = Shadow(share=1), []
    for seed in range(100):
        drawn = np.random.default_rng(seed).normal(nats, 0.4, 200)
        found = (n for n in range(1, 201) if shadow.log_harm(shadow.differences((x, 0.0) for x in drawn[:n]), 0.1) >= LIMIT)
        times.append(next(found, 200))
    assert np.median(times) == pytest.approx(comparisons, abs=2)
    assert np.quantile(times, 0.9) < spec.min_pairs


def test_a_judge_has_no_margin_and_a_level_of_its_own():
    worse = ShadowTally(20, compared=(("judged", ((-1.0, 14), (0.0, 30), (1.0, 1))),))
    assert shadow.harms(POLICY.shadow, worse)["judged"] == pytest.approx(log_e([1.0] * 14 + [0.0] * 30 + [-1.0], 0.0))
    assert moved(ShadowTally(20, compared=(("judged", ((-1.0, 18),)),))).reason == (
        "shadow_harmed: judged replies are worse, by verdicts of -1.000 on average"
    )

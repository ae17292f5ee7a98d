"""Each rule of a trial, one look at a time."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout import verdicts
from service.rollout.controller import Look, judge, reward
from service.rollout.probe import ProbeResult
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport
from service.settings import Guardrail, Metric
from tests.service.rollout.policy import POLICY

GOOD = ProbeResult(ok=True)


def trial(stage=Stage.CANARY, **fields):
    plain = {"policy": POLICY, "opened_at": 0.0, "since": 0.0, "steps": () if stage is Stage.VERIFYING else (0.0,)}
    return Trial("desk-trial1", "desk", "desk@v2", "desk@v1", **{**plain, "stage": stage, **fields})


def replica(name="r1", number=5, probe=GOOD):
    return ReplicaReport(name, number, {"desk@v2": probe} if probe else {})


def look(**fields):
    plain = {"now": 100.0, "champion": "desk@v1", "replicas": (replica(),), "desired": 5, "serving_since": 0.0}
    return Look(**{**plain, **fields})


def units(candidate, control, start=0):
    """Matured units of both arms with these rewards, side by side in time."""
    made = []
    for arm, rewards in ((Arm.CANDIDATE, candidate), (Arm.CONTROL, control)):
        made += [UnitOutcome(f"{arm}{start + i}", arm, start + i, r, True, 0, 1) for i, r in enumerate(rewards)]
    return tuple(made)


BETTER = units([1.0] * 40, [0.0] * 40)
WORSE = units([0.0] * 40, [1.0] * 40)
SAME = units([0.5] * 40, [0.5] * 40)


def moved(trial, seen):
    return judge(trial, seen).move


class TestVerifying:
    def test_waits_until_every_replica_has_proven_it(self):
        assert moved(trial(Stage.VERIFYING), look(now=9.0, replicas=(replica(), replica("r2", probe=None)))) is None
        assert moved(trial(Stage.VERIFYING), look(now=9.0, replicas=(replica(), replica("r2")))).to is Stage.CANARY

    def test_no_replica_proves_nothing_and_condemns_nothing(self):
        assert moved(trial(Stage.VERIFYING), look(now=1e6, replicas=(), serving_since=None)) is None

    def test_a_refusal_rejects_with_its_reason(self):
        bad = ProbeResult(ok=False, reason="noop_adapter")
        said = moved(trial(Stage.VERIFYING), look(replicas=(replica(), replica("r2", probe=bad))))
        assert said.to is Stage.REJECTED
        assert said.reason == "noop_adapter: replica r2"

    def test_time_runs_out_but_not_while_nobody_served(self):
        absent = (replica(probe=None),)
        assert moved(trial(Stage.VERIFYING), look(now=61.0, replicas=absent)).reason.startswith("replica_timeout")
        assert moved(trial(Stage.VERIFYING), look(now=61.0, replicas=absent, serving_since=50.0)) is None

    def test_one_opened_by_a_person_skips_the_canary(self):
        assert moved(trial(Stage.VERIFYING, is_operator=True), look()).to is Stage.PROMOTING


class TestLevel:
    def test_a_candidate_alone_is_tested_at_its_own_alpha_when_told_so(self):
        alone = trial(policy=POLICY.model_copy(update={"multiplicity": "per_test"}), fdr_index=9)
        assert judge(alone, look()).evidence.promote_at == pytest.approx(math.log(20))

    def test_the_first_of_a_stream_needs_little_more_and_each_promotion_helps_the_next(self):
        asked = [judge(trial(fdr_index=t), look(promotions=r)).evidence.promote_at for t, r in ((1, 0), (2, 1), (2, 0))]
        assert np.exp(asked) == pytest.approx([22.857657, 34.645729, 69.291458])

    def test_never_more_than_alpha_promote(self):
        strict = POLICY.model_copy(update={"alpha_promote": 0.001})
        assert judge(trial(policy=strict, fdr_index=1), look()).evidence.promote_at == pytest.approx(math.log(1000))

    def test_what_suffices_alone_may_not_suffice_in_a_stream(self):
        enough = look(outcomes=units([1.0] * 30 + [0.0] * 6, [0.0] * 30 + [1.0] * 6), promotions=0)
        assert moved(trial(step=1, fdr_index=1), enough).to is Stage.PROMOTING
        assert moved(trial(step=1, fdr_index=200), enough) is None


class TestSuperiority:
    """Not worse is not enough where better is asked for."""

    SUPERIOR = POLICY.model_copy(update={"mode": "superiority"})
    ENOUGH = units([1.0, 0.0] * 200, [0.0, 1.0] * 200)

    def test_an_equal_candidate_passes_as_not_worse_and_not_as_better(self):
        wide = POLICY.model_copy(update={"margin": 0.3})
        seen = look(outcomes=self.ENOUGH)
        assert moved(trial(policy=wide, step=1), seen).reason.startswith("non_inferior")
        both = wide.model_copy(update={"mode": "superiority"})
        assert moved(trial(policy=both, step=1), seen) is None
        assert judge(trial(policy=both, step=1), seen).evidence.promote["quality"] <= 0

    def test_a_better_one_passes_as_better(self):
        said = moved(trial(policy=self.SUPERIOR), look(outcomes=BETTER))
        assert (said.to, said.reason.split(":")[0]) == (Stage.PROMOTING, "superior")

    def test_a_guardrail_keeps_its_margin(self):
        guarded = self.SUPERIOR.model_copy(update={"guardrails": {"error": Guardrail(kind="error", margin=0.3)}})
        fine = tuple(replace(unit, losses={"error": 0.0}) for unit in BETTER)
        evidence = judge(trial(policy=guarded), look(outcomes=fine)).evidence
        assert evidence.promote["error"] > 3  # equal to the control's, which is within its margin

    def test_worse_is_rolled_back_as_ever(self):
        assert moved(trial(policy=self.SUPERIOR), look(outcomes=WORSE)).to is Stage.ROLLING_BACK

    def test_its_verdict_is_decided_the_same_again(self):
        said = judge(trial(policy=self.SUPERIOR), look(outcomes=BETTER))
        assert verdicts.replay(json.loads(json.dumps(verdicts.record(trial(policy=self.SUPERIOR), said.move, said)))).is_same


class TestCanary:
    def test_a_better_candidate_is_promoted_with_its_evidence(self):
        said = judge(trial(), look(outcomes=BETTER))
        assert said.move.to is Stage.PROMOTING
        assert said.evidence.pairs == 40
        assert said.evidence.log_promote >= said.evidence.promote_at
        assert said.evidence.difference[0] > 0

    def test_not_before_enough_units_in_the_smaller_arm(self):
        said = moved(trial(step=1), look(outcomes=units([1.0] * 60, [0.0] * 29)))
        assert said is None

    def test_not_before_its_time(self):
        patient = trial(policy=POLICY.model_copy(update={"min_seconds": 200.0}), step=1)
        assert moved(patient, look(outcomes=BETTER)) is None
        assert moved(patient, look(outcomes=BETTER, now=201.0)).to is Stage.PROMOTING

    def test_one_that_must_wait_for_a_person_waits(self):
        manual = POLICY.model_copy(update={"is_automatic": False})
        assert moved(trial(policy=manual), look(outcomes=BETTER)).to is Stage.WAITING

    def test_a_worse_candidate_is_rolled_back(self):
        assert moved(trial(), look(outcomes=WORSE)).reason.startswith("harmed")

    def test_no_evidence_never_promotes_and_ends_as_expired(self):
        assert moved(trial(step=1), look()) is None
        assert moved(trial(step=1), look(now=1001.0)).to is Stage.EXPIRED
        undecided = units([1.0, 0.0] * 250, [0.55, 0.5] * 250)
        assert moved(trial(step=1), look(outcomes=undecided)).reason.startswith("max_units")

    def test_equal_arms_step_up_one_weight_at_a_time(self):
        said = moved(trial(), look(outcomes=SAME))
        assert (said.to, said.step) == (Stage.CANARY, 1)
        assert moved(trial(step=1), look(outcomes=SAME)) is None
        assert moved(trial(steps=(0.0, 35.0)), look(outcomes=SAME)) is None  # 5 units since the last step

    def test_a_step_lasts_as_long_as_it_must(self):
        slow = trial(policy=POLICY.model_copy(update={"step_min_seconds": 150.0}))
        assert moved(slow, look(outcomes=SAME)) is None
        assert moved(slow, look(outcomes=SAME, now=151.0)).step == 1

    def test_a_trial_does_not_expire_while_nobody_could_ask(self):
        assert moved(trial(step=1), look(now=5001.0)).to is Stage.EXPIRED
        assert moved(trial(step=1), look(now=5001.0, serving_since=5000.0)) is None

    def test_a_step_up_waits_while_harm_is_near(self):
        losing = units([0.0] * 13, [1.0] * 13)
        assert moved(trial(), look(outcomes=losing)) is None
        assert judge(trial(), look(outcomes=losing)).evidence.log_rollback > 3

    def test_a_burst_of_errors_rolls_back_at_once_whatever_the_thumbs_say(self):
        said = moved(trial(), look(outcomes=BETTER, failures=5))
        assert said.to is Stage.ROLLING_BACK
        assert said.reason.startswith("error_burst")

    @pytest.mark.parametrize("stage", [Stage.CANARY, Stage.HOLD, Stage.WAITING, Stage.PROMOTING])
    def test_one_death_of_the_engine_under_its_replies_rolls_back_at_once(self, stage):
        said = moved(trial(stage), look(outcomes=BETTER, crashes=2, failures=9))
        assert said.to is Stage.ROLLING_BACK
        assert said.reason == "engine_crash: the engine died under 2 of its replies"

    def test_a_replica_that_lost_it_rolls_back(self):
        bad = ProbeResult(ok=False, reason="load_failed")
        assert moved(trial(), look(outcomes=BETTER, replicas=(replica(probe=bad),))).to is Stage.ROLLING_BACK

    def test_rollback_wins_ties(self):
        """Both thresholds low enough to be crossed by the same data."""
        eager = POLICY.model_copy(update={"alpha_promote": 0.99, "alpha_rollback": 0.99, "margin": 0.9})
        said = judge(trial(policy=eager), look(outcomes=units([0.0] * 40, [0.3] * 40)))
        assert said.evidence.log_promote >= said.evidence.promote_at
        assert said.evidence.log_rollback >= said.evidence.rollback_at
        assert said.move.to is Stage.ROLLING_BACK

    def test_the_interval_never_widens(self):
        first = judge(trial(step=1), look(outcomes=SAME)).evidence
        narrow = replace(first, difference=(-0.01, 0.01))
        assert judge(trial(step=1), look(outcomes=SAME, last=narrow)).evidence.difference == (-0.01, 0.01)


def test_a_rollback_waits_for_those_who_have_the_candidate_not_for_one_that_another_line_keeps_behind():
    behind = replica("r2", number=-1, probe=None)
    assert moved(trial(Stage.ROLLING_BACK), look(replicas=(replica(), behind))).to is Stage.ROLLED_BACK
    assert moved(trial(Stage.ROLLING_BACK), look(replicas=(replica(), replica("r2", number=4)))) is None


LOPSIDED = units([1.0] * 120, [0.0] * 40)


class TestHold:
    def test_arms_of_unequal_size_hold_it_whatever_speaks_for_it(self):
        said = judge(trial(fdr_index=1), look(outcomes=LOPSIDED, now=120.0))
        assert said.evidence.log_promote >= said.evidence.promote_at
        assert said.evidence.log_mismatch >= said.evidence.mismatch_at
        assert (said.move.to, said.move.reason) == (Stage.HOLD, "sample_ratio_mismatch: 120 : 40 units in arms of equal size")

    def test_units_count_as_soon_as_they_were_assigned(self):
        waiting = tuple(replace(unit, is_matured=False, reward=None) for unit in LOPSIDED)
        assert moved(trial(), look(outcomes=waiting)).to is Stage.HOLD

    def test_an_arm_that_answers_slowly_is_waited_for(self):
        """All control units of the last seconds are in flight: dealt as designed, they only show later."""
        asked = [replace(unit, asked_at=unit.first_at, is_matured=False, reward=None) for unit in units([1.0] * 60, [0.0] * 60)]
        seen = tuple(replace(u, first_at=u.asked_at + 50) if u.arm is Arm.CONTROL else u for u in asked)
        early = tuple(u for u in seen if u.first_at <= 45)
        assert {u.arm for u in early} == {Arm.CANDIDATE}
        assert moved(trial(), look(outcomes=early, window_seconds=60, now=45.0)) is None
        assert moved(trial(), look(outcomes=seen, window_seconds=60, now=120.0)) is None
        assert moved(trial(), look(outcomes=early, window_seconds=60, now=120.0)).to is Stage.HOLD  # they never came

    def test_a_stricter_policy_needs_more(self):
        patient = POLICY.model_copy(update={"alpha_mismatch": 1e-12})
        assert moved(trial(policy=patient), look(outcomes=LOPSIDED)).to is Stage.PROMOTING

    def test_held_it_goes_nowhere_forward_however_good_it_is(self):
        assert moved(trial(Stage.HOLD), look(outcomes=BETTER)) is None
        assert moved(trial(Stage.HOLD), look(outcomes=SAME)) is None

    def test_held_it_is_still_rolled_back_and_still_expires(self):
        assert moved(trial(Stage.HOLD), look(outcomes=WORSE)).reason.startswith("harmed")
        assert moved(trial(Stage.HOLD), look(failures=5)).reason.startswith("error_burst")
        assert moved(trial(Stage.HOLD), look(outcomes=BETTER, now=1001.0)).to is Stage.EXPIRED

    def test_harm_wins_over_a_hold(self):
        assert moved(trial(), look(outcomes=units([0.0] * 120, [1.0] * 40))).to is Stage.ROLLING_BACK

    def test_what_a_person_has_answered_for_is_not_held_against_it_again(self):
        resumed = trial(steps=(0.0, 200.0), trusted_step=2, step=1)
        assert moved(resumed, look(outcomes=LOPSIDED, now=300.0)).to is Stage.PROMOTING
        again = LOPSIDED + units([1.0] * 120, [0.0] * 40, start=200)
        assert moved(resumed, look(outcomes=again, now=400.0)).reason.startswith("sample_ratio_mismatch: 120 : 40")


@pytest.mark.parametrize("stage", [Stage.VERIFYING, Stage.CANARY, Stage.HOLD, Stage.WAITING, Stage.PROMOTING])
def test_a_champion_that_changed_ends_the_comparison(stage):
    assert moved(trial(stage), look(champion="desk@v7", outcomes=BETTER)).to is Stage.ABORTED


def test_waiting_goes_on_until_a_person_or_harm_decides():
    assert moved(trial(Stage.WAITING), look(now=1e6, outcomes=BETTER)) is None
    assert moved(trial(Stage.WAITING), look(outcomes=WORSE)).to is Stage.ROLLING_BACK


def test_promoting_needs_every_live_replica():
    assert moved(trial(Stage.PROMOTING), look(now=9.0, replicas=(replica(), replica("new", probe=None)))) is None
    assert moved(trial(Stage.PROMOTING), look(now=9.0, replicas=())) is None
    assert moved(trial(Stage.PROMOTING), look()).to is Stage.LIVE


def test_promoting_does_not_wait_for_ever_for_a_replica_that_is_stuck():
    stuck, late = (replica(), replica("new", probe=None)), POLICY.verify_seconds + 100.5
    waiting = trial(Stage.PROMOTING, since=100.0, step=1)
    assert moved(waiting, look(replicas=stuck, now=late - 1)) is None
    said = moved(waiting, look(replicas=stuck, now=late))
    assert (said.to, said.step) == (Stage.HOLD, 1)
    assert said.reason.startswith("promote_failed: not held by every replica after")
    assert moved(trial(Stage.PROMOTING, since=100.0, is_operator=True), look(replicas=stuck, now=late)).to is Stage.ROLLING_BACK
    assert moved(waiting, look(replicas=(), now=late, serving_since=None)) is None  # no replica at all: nobody is stuck
    assert moved(waiting, look(replicas=stuck, now=late, serving_since=late - 9)) is None
    assert moved(waiting, look(now=1e6)).to is Stage.LIVE


def test_rolled_back_once_every_replica_routes_without_it():
    assert moved(trial(Stage.ROLLING_BACK), look(replicas=(replica(), replica("r2", number=4)))) is None
    assert moved(trial(Stage.ROLLING_BACK, reason="harmed"), look()).to is Stage.ROLLED_BACK


def test_rewards_are_scaled_and_turned_over():
    assert reward(Metric(type="boolean"))(True) == 1.0
    assert reward(Metric(type="boolean", optimize="min"))(True) == 0.0
    stars = reward(Metric(type="float", minimum=1, maximum=5))
    assert [stars(value) for value in (1, 3, 5, 9, "five")] == [0.0, 0.5, 1.0, 1.0, 0.5]

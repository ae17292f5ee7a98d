"""When the comparison itself is in doubt a trial is held, whatever it says; and silence promotes nobody."""

import json
from dataclasses import replace

import pytest

from replay import ledger
from replay.records import Arm
from service.rollout import verdicts
from service.rollout.controller import judge
from service.rollout.stages import Stage
from tests.service.rollout import test_controller as cases
from tests.service.rollout.test_controller import look, moved, trial
from tests.service.world import LINE, QUICK, World

STEP = {"steps": (0.0,), "step": 1}


def silenced(outcomes, arm, share):
    """Of an arm's units, this share says nothing."""
    seen, made = 0, []
    for unit in outcomes:
        if unit.arm is arm:
            seen += 1
            is_silent = int(seen * share) > int((seen - 1) * share)
            made.append(replace(unit, answered=float(not is_silent), reward=0.5 if is_silent else unit.reward))
        else:
            made.append(unit)
    return tuple(made)


BETTER = cases.units([1.0] * 200, [0.0] * 200)
EQUAL = cases.units([1.0] * 200, [1.0] * 200)


class TestResponses:
    def test_a_candidate_that_fewer_answer_is_held_before_it_is_promoted(self):
        said = judge(trial(**STEP), look(outcomes=silenced(BETTER, Arm.CANDIDATE, 0.4)))
        assert said.evidence.log_promote >= said.evidence.promote_at  # the mutant without this test would promote it
        assert said.evidence.log_response >= said.evidence.response_at
        assert said.move.to is Stage.HOLD
        assert said.move.reason.startswith("response_rate: -40%")

    def test_more_answers_are_no_better_sign(self):
        assert moved(trial(**STEP), look(outcomes=silenced(EQUAL, Arm.CONTROL, 0.4))).reason.startswith("response_rate: +67%")

    def test_a_difference_that_does_not_matter_is_let_through(self):
        tolerant = cases.POLICY.model_copy(update={"response_difference": 0.5})
        seen = look(outcomes=silenced(BETTER, Arm.CANDIDATE, 0.4))
        assert moved(trial(policy=tolerant, **STEP), seen).to is Stage.PROMOTING

    def test_who_resumes_answers_for_what_was_before(self):
        seen = look(outcomes=silenced(EQUAL, Arm.CANDIDATE, 0.4), now=500.0)
        resumed = trial(steps=(0.0, 300.0), step=1, trusted_step=2)
        assert judge(resumed, seen).evidence.log_response == pytest.approx(0.0, abs=1e-12)

    def test_harm_wins(self):
        worse = cases.units([0.0] * 200, [1.0] * 200)
        assert moved(trial(), look(outcomes=silenced(worse, Arm.CANDIDATE, 0.4))).to is Stage.ROLLING_BACK


class TestSilence:
    def test_nobody_says_anything_and_nobody_is_promoted(self):
        """Every silent unit is a half in both arms, which looks like two versions that are equal: it says nothing of either."""
        silent = tuple(replace(unit, answered=0.0, reward=0.5) for unit in cases.units([0.5] * 400, [0.5] * 400))
        said = judge(trial(**STEP), look(outcomes=silent))
        assert said.evidence.log_promote == 0.0
        assert said.move is None
        equal = judge(trial(**STEP), look(outcomes=cases.units([0.5] * 400, [0.5] * 400)))
        assert equal.evidence.log_promote >= equal.evidence.promote_at, "as many who say the same of both do"

    def test_ten_of_each_arm_must_have_said_something(self):
        def told(count):
            better = cases.units([1.0] * count + [0.5] * (400 - count), [0.0] * count + [0.5] * (400 - count))
            return tuple(replace(u, answered=float(int(u.unit.removeprefix(u.arm)) < count)) for u in better)

        lax = trial(policy=cases.POLICY.model_copy(update={"alpha_promote": 0.2}), **STEP)
        few = judge(lax, look(outcomes=told(9)))
        assert few.evidence.log_promote >= few.evidence.promote_at
        assert few.move is None
        assert moved(lax, look(outcomes=told(10))).to is Stage.PROMOTING

    def test_an_hour_of_requests_without_a_word_holds_it(self):
        late = (*cases.SAME, *cases.units([0.5], [0.5], start=5000))
        patient = cases.POLICY.model_copy(update={"max_seconds": 1e6})
        on = trial(policy=patient, **STEP)
        assert moved(on, look(outcomes=late, now=6000.0, heard_at=1000.0)).reason.startswith("stale_feedback: 4000 s")
        assert moved(on, look(outcomes=late, now=6000.0, heard_at=1500.0)) is None
        assert moved(on, look(outcomes=cases.SAME, now=9000.0, heard_at=39.0)) is None  # nobody asked: it is night
        off = trial(policy=patient.model_copy(update={"stale_seconds": 0}), **STEP)
        assert moved(off, look(outcomes=late, now=6000.0)) is None

    def test_it_goes_on_by_itself_when_feedback_is_heard_again_and_nothing_else_does(self):
        held = trial(Stage.HOLD, since=200.0, reason="stale_feedback: 4000 s", **STEP)
        assert moved(held, look(heard_at=199.0, now=300.0)) is None
        assert moved(held, look(heard_at=201.0, now=300.0)).to is Stage.CANARY
        other = trial(Stage.HOLD, since=200.0, reason="sample_ratio_mismatch: 9 : 1", **STEP)
        assert moved(other, look(heard_at=201.0, now=300.0)) is None


class TestExposedTwice:
    def test_more_than_one_in_a_hundred_holds_it_from_ten_on(self):
        many = cases.units([0.5] * 400, [0.5] * 400)
        assert moved(trial(**STEP), look(outcomes=many, exposed_twice=9)).to is not Stage.HOLD
        assert moved(trial(**STEP), look(outcomes=many, exposed_twice=10)).reason.startswith("exposed_twice: 10")
        more = cases.units([0.5] * 480, [0.5] * 480)
        assert moved(
            trial(policy=cases.POLICY.model_copy(update={"max_units": 999}), **STEP), look(outcomes=more, exposed_twice=9)
        )

    def test_the_ledger_counts_them_since_the_resumption(self, world):
        world.demonstrate(40)
        world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY)
        known = world.trial.id
        world.customers(40)
        asked = [one for one in (world._interaction() for _ in range(40)) if one.arm is not Arm.CHAMPION]
        other = {Arm.CANDIDATE: Arm.CONTROL, Arm.CONTROL: Arm.CANDIDATE}
        world._store([*asked, *(replace(one, id=f"{one.id}-again", arm=other[one.arm]) for one in asked)], [])
        assert world.read(lambda conn: ledger.exposed_twice(conn, known)) == len(asked) > 10
        assert world.read(lambda conn: ledger.exposed_twice(conn, known, world.now + 1)) == 0
        world.step()
        assert world.trial.stage is Stage.HOLD
        assert world.trial.reason.startswith("exposed_twice")


@pytest.fixture
def world(tmp_path):
    line = QUICK["lines"][LINE]
    world = World(tmp_path, {"lines": {LINE: {**line, "rollout": {**line["rollout"], "stale_seconds": 10}}}})
    world.quality = {"desk@v1": 0.8}
    yield world
    world.writer.close()


def test_a_silent_source_holds_and_its_return_resumes_with_the_split_still_tested(world):
    world.thumbs = 0.0
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.stage is Stage.HOLD, customers=4)
    assert world.trial.reason.startswith("stale_feedback")
    world.crash()
    world.thumbs = 0.5
    world.until(lambda w: w.trial.stage is Stage.CANARY, customers=4)
    assert world.trial.trusted_step == 0
    world.until(lambda w: w.champion == "desk@v1", customers=8)


@pytest.mark.parametrize("how", ["exposed_twice", "response", "stale"])
def test_what_held_it_is_recorded_and_decided_the_same_again(how):
    fields = {
        "exposed_twice": {"outcomes": cases.SAME, "exposed_twice": 20},
        "response": {"outcomes": silenced(BETTER, Arm.CANDIDATE, 0.4)},
        "stale": {"outcomes": cases.units([0.5] * 3, [0.5] * 3, start=5000), "heard_at": 1.0},
    }[how]
    said = judge(trial(), look(**fields))
    assert said.move.to is Stage.HOLD
    assert verdicts.replay(json.loads(json.dumps(verdicts.record(trial(), said.move, said)))).is_same

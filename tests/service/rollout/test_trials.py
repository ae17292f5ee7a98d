"""Trials in the database: one open for each line, moved by compare-and-set."""

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from service import conductor
from service.errors import Conflict, NotFound
from service.rollout import trials
from service.rollout.evidence import Evidence
from service.rollout.stages import Stage
from service.settings import Rollout

POLICY = Rollout(weights=(0.1, 0.5), margin=0.07)


@pytest.fixture
def conn():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        conductor.create(connection)
        yield connection
    engine.dispose()


@pytest.fixture
def trial(conn):
    return trials.begin(conn, line="desk", candidate="desk@v2", champion="desk@v1", policy=POLICY, now=1.0, job="desk-job2")


def seen(pairs=3, failed=0):
    return Evidence(2.0, pairs, pairs, pairs, pairs, 1.0, -1.0, 3.0, 4.6, (-0.1, 0.4), failed)


def test_it_reads_back_whole_with_its_frozen_policy(conn, trial):
    assert trials.get(conn, trial.id) == trial
    assert trial.policy == POLICY
    assert (trial.id, trial.stage, trial.since) == ("desk-trial1", Stage.VERIFYING, 1.0)


def test_a_line_has_one_open_trial(conn, trial):
    with pytest.raises(Conflict, match="desk-trial1"):
        trials.begin(conn, line="desk", candidate="desk@v3", champion="desk@v1", policy=POLICY, now=1.0)
    trials.move(conn, trial, Stage.REJECTED, 2.0, reason="no")
    assert trials.begin(conn, line="desk", candidate="desk@v3", champion=None, policy=POLICY, now=3.0).id == "desk-trial2"


def test_steps_are_remembered(conn, trial):
    canary = trials.move(conn, trial, Stage.CANARY, 2.0, reason="verified")
    second = trials.move(conn, canary, Stage.CANARY, 5.0, reason="step", step=1)
    assert (second.step, second.steps, second.weight) == (1, (2.0, 5.0), 0.5)
    promoting = trials.move(conn, second, Stage.PROMOTING, 6.0, reason="good")
    assert (promoting.step, promoting.weight) == (1, 0.5)


def test_a_hold_keeps_its_step_and_who_resumes_answers_for_what_was_before(conn, trial):
    second = trials.move(conn, through(conn, trial, Stage.CANARY), Stage.CANARY, 5.0, reason="step", step=1)
    held = trials.move(conn, second, Stage.HOLD, 6.0, reason="sample_ratio_mismatch")
    assert (held.step, held.steps, held.weight, held.trusted_step) == (1, (2.0, 5.0), 0.5, 0)
    resumed = trials.move(conn, held, Stage.CANARY, 9.0, reason="operator: resume", step=1)
    assert (resumed.step, resumed.steps, resumed.trusted_step, resumed.fdr_index) == (1, (2.0, 5.0, 9.0), 3, 1)


def test_what_a_person_opened_has_no_canary_to_hold(conn, trial):
    trials.move(conn, trial, Stage.REJECTED, 1.0, reason="no")
    who = {"line": "desk", "candidate": "desk@v3", "champion": None, "policy": trial.policy, "now": 2.0}
    by_hand = trials.move(conn, trials.begin(conn, **who, is_operator=True), Stage.PROMOTING, 3.0, reason="operator: promote")
    with pytest.raises(Conflict, match="no canary to hold"):
        trials.move(conn, by_hand, Stage.HOLD, 4.0, reason="operator: pause")
    assert trials.ends(conn, "desk", 9) == [(1.0, "rejected")]
    assert trials.ends(conn, "other", 9) == []


def test_of_two_that_move_it_one_is_told(conn, trial):
    canary = trials.move(conn, trial, Stage.CANARY, 2.0, reason="verified")
    with pytest.raises(Conflict, match="not verifying any more"):
        trials.move(conn, trial, Stage.REJECTED, 2.0, reason="late")
    trials.move(conn, canary, Stage.CANARY, 3.0, reason="step", step=1)
    with pytest.raises(Conflict):
        trials.move(conn, canary, Stage.CANARY, 3.0, reason="step", step=1)


def begun(conn, number):
    return trials.begin(conn, line="desk", candidate=f"desk@v{number}", champion="desk@v1", policy=POLICY, now=1.0)


def through(conn, trial, *stages, has_passed=False):
    for stage in stages:
        trial = trials.move(conn, trial, stage, 2.0, reason="so", has_passed=has_passed and stage is Stage.PROMOTING)
    return trial


def test_an_index_is_given_when_the_canary_begins_and_never_again(conn, trial):
    assert trial.fdr_index is None
    first = through(conn, trial, Stage.CANARY)
    stepped = trials.move(conn, first, Stage.CANARY, 3.0, reason="step", step=1)
    assert (first.fdr_index, stepped.fdr_index) == (1, 1)
    assert through(conn, stepped, Stage.EXPIRED).fdr_index == 1
    assert through(conn, begun(conn, 3), Stage.REJECTED).fdr_index is None  # it met nobody
    assert through(conn, begun(conn, 4), Stage.CANARY, Stage.ABORTED).fdr_index == 2
    assert through(conn, begun(conn, 5), Stage.CANARY, Stage.ROLLING_BACK, Stage.ROLLED_BACK).fdr_index == 3
    assert through(conn, begun(conn, 6), Stage.CANARY).fdr_index == 4


def test_promotions_by_evidence_are_counted_and_those_by_hand_are_not(conn, trial):
    through(conn, trial, Stage.CANARY, Stage.PROMOTING, Stage.LIVE, has_passed=True)
    assert trials.promotions(conn, "desk") == 1
    through(conn, begun(conn, 3), Stage.CANARY, Stage.PROMOTING, Stage.LIVE)
    through(conn, begun(conn, 4), Stage.CANARY, Stage.PROMOTING, Stage.ROLLING_BACK, Stage.ROLLED_BACK, has_passed=True)
    assert trials.promotions(conn, "desk") == 1
    assert trials.promotions(conn, "other") == 0


def test_the_database_refuses_an_index_twice(conn, trial):
    through(conn, trial, Stage.CANARY, Stage.EXPIRED)
    again = begun(conn, 3)
    with pytest.raises(IntegrityError):
        conn.execute(text("update trial set fdr_index = 1 where id = :id"), {"id": again.id})


def test_an_end_closes_it(conn, trial):
    assert trials.current(conn, "desk") == trial
    ended = trials.move(conn, trial, Stage.ABORTED, 9.0, reason="champion_changed")
    assert ended.ended_at == 9.0
    assert trials.current(conn, "desk") is None
    assert trials.counts(conn, "desk") == {"aborted": 1}


def test_looks_are_kept_and_shown(conn, trial):
    for pairs in (3, 4):
        trials.note(conn, trial.id, seen(pairs))
    assert trials.history(conn, trial.id) == [seen(3), seen(4)]
    shown = trials.as_json(trial, trials.last_look(conn, trial.id))
    assert shown["units"] == {"candidate": 4, "control": 4}
    assert shown["thresholds"] == {"promote": 3.0, "rollback": 4.6, "mismatch": 7.0, "response": 4.6}
    assert trials.as_json(trial, None)["log_evidence"] == {}


def test_a_look_that_says_nothing_new_need_not_be_kept():
    assert seen(1).adds_to(None)
    assert not seen(0).adds_to(None)
    assert not seen(201).adds_to(seen(200))
    assert seen(205).adds_to(seen(200))
    assert seen(200, failed=1).adds_to(seen(200))


def test_an_unknown_trial_is_not_found(conn):
    with pytest.raises(NotFound):
        trials.get(conn, "desk-trial9")

"""Trials in the database: one open for each line, moved by compare-and-set."""

import pytest
from sqlalchemy import create_engine

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


def test_of_two_that_move_it_one_is_told(conn, trial):
    canary = trials.move(conn, trial, Stage.CANARY, 2.0, reason="verified")
    with pytest.raises(Conflict, match="not verifying any more"):
        trials.move(conn, trial, Stage.REJECTED, 2.0, reason="late")
    trials.move(conn, canary, Stage.CANARY, 3.0, reason="step", step=1)
    with pytest.raises(Conflict):
        trials.move(conn, canary, Stage.CANARY, 3.0, reason="step", step=1)


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
    assert shown["thresholds"] == {"promote": 3.0, "rollback": 4.6}
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

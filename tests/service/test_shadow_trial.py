"""A trial that goes through the shadow, with a true conductor and ledger: what it lets pass, what it stops, what it leaves."""

import pytest
from sqlalchemy import func, select

from replay import ledger, shadows, tables
from replay.records import Feedback
from service import registry, screens, status
from service.rollout import trials
from service.rollout.stages import Stage
from tests.service.world import LINE, QUICK, World

SPEC = {"share": 1, "min_pairs": 20, "max_seconds": 60}
SETTINGS = {"lines": {LINE: {**QUICK["lines"][LINE], "rollout": {**QUICK["lines"][LINE]["rollout"], "shadow": SPEC}}}}


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path, SETTINGS)
    world.quality = {"desk@v1": 0.9}
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.stage is Stage.SHADOW)
    yield world
    world.writer.close()


def answered_by(world, version):
    asked = tables.interaction
    return world.read(lambda conn: conn.scalar(select(func.count()).select_from(asked).where(asked.c.version == version)))


def shown(world):
    return world.read(lambda conn: status.trials_of(conn, LINE))[0]


def words(world):
    return world.read(lambda conn: list(conn.scalars(select(shadows.shadow.c.reply))))


def test_in_the_shadow_the_candidate_is_held_and_answers_nobody(world):
    desired = world._desired()
    route = desired.routes[LINE]
    assert "desk@v1" in desired.resident_names
    assert (route.candidate, route.weight, route.shadow.version, route.shadow.trial) == (None, 0, "desk@v1", world.trial.id)
    world.step(customers=10)
    assert answered_by(world, "desk@v1") == 0
    assert world.trial.fdr_index is None


def test_a_harmless_one_goes_to_its_canary_with_what_was_compared_and_lives(world):
    world.step(customers=12)
    said = shown(world)
    assert (said["state"], said["weight"], said["units"]) == ("shadow", 0.0, {"candidate": 0, "control": 0, "shadow": 12})
    assert said["shadow"]["outcomes"] == {"ok": 12, "failed": 0}
    assert set(said["log_evidence"]) == set(said["thresholds"]) == {"shadow_accepted", "shadow_corrected", "shadow_judged"}
    assert screens.trial(said) == "shadow, 12 replies, 0 failed, 12 of 20 compared, harm 0.0 of 4.1"
    assert None not in words(world)
    world.step(customers=12)
    world.step()
    assert (world.trial.stage, world.trial.fdr_index) == (Stage.CANARY, 1)
    assert world.trial.reason == "shadowed: no harm in 24 comparisons, 24 replies"
    assert set(words(world)) == {None}
    world.until(lambda w: w.champion == "desk@v1", customers=20)
    assert shown(world)["shadow"]["pairs"] == 24


def test_a_harmful_one_is_rejected_before_it_answers_a_single_user(world):
    world.likes = {"desk@v1": -0.8}
    world.until(lambda w: not w.trial.stage.is_open, customers=6)
    assert world.trial.stage is Stage.REJECTED
    assert world.trial.reason.startswith("shadow_harmed: accepted")
    assert answered_by(world, "desk@v1") == 0
    assert world.examples == {"fresh": 40}
    assert world.read(lambda conn: registry.version(conn, "desk@v1")).state == "rejected"
    world.step()
    assert "desk@v1" not in world._desired().resident_names
    assert all(one["is_same"] for one in world.read(lambda conn: status.replay(conn, "desk-trial1")))


def test_one_that_fails_is_rejected_at_once(world):
    world.mute = {"desk@v1"}
    world.step(customers=6)
    world.step()
    assert world.trial.reason == "shadow_failures: 6 of its last 50 shadow replies failed"
    assert world.read(lambda conn: trials.current(conn, LINE)) is None


def test_without_a_word_of_feedback_time_lets_it_go_on(world):
    world.until(lambda w: w.trial.stage is Stage.CANARY, customers=0)
    assert world.trial.reason.startswith("shadowed_out_of_time: no harm in 0 comparisons")
    world.until(lambda w: not w.trial.stage.is_open, seconds=50)
    assert world.trial.stage is Stage.EXPIRED  # absence of evidence promotes nobody


def test_what_was_said_of_a_shadow_reply_teaches_nobody(world):
    """The ids are made known to an enemy, who corrects and thumbs them up while the trial goes on and after it."""
    world.step(customers=12)
    ids = world.read(lambda conn: list(conn.scalars(select(shadows.shadow.c.id))))
    said = [Feedback(f"e-{one}", one, "demonstration", "poison", world.now, world.now) for one in ids]
    said += [Feedback(f"u-{one}", one, "thumb", True, world.now, world.now) for one in ids]
    world.read(lambda conn: [ledger.give(conn, one) for one in said])
    world.until(lambda w: w.champion == "desk@v1", customers=20)
    world.demonstrate(40)
    world.until(lambda w: w.job.id == "desk-job2", customers=4)
    bodies = world.read(lambda conn: repr(conn.execute(select(tables.example)).all()))
    assert len(ids) == 12
    assert "poison" not in bodies
    assert world.read(ledger.counts) == {LINE: {"trained": 40, "reserved": 40}}


def test_reports_for_a_trial_that_has_left_the_shadow_are_dropped(world):
    world.step(customers=3)
    shadow = world._desired().routes[LINE].shadow
    world.conductor.steer(LINE, "abort")
    world._shadow([world.ask() for _ in range(5)], shadow)
    assert words(world) == [None] * 3
    assert world.trial.stage is Stage.ABORTED


def test_it_goes_on_after_a_death_where_it_stood(world):
    world.step(customers=12)
    before = shown(world)["shadow"]
    world.crash()
    assert shown(world)["shadow"] == before
    world.step(customers=12)
    world.step()
    assert world.trial.reason == "shadowed: no harm in 24 comparisons, 24 replies"


def test_a_person_may_promote_it_or_end_it(world):
    assert world.conductor.promote(LINE).stage is Stage.PROMOTING
    world.until(lambda w: w.champion == "desk@v1")
    assert set(words(world)) <= {None}

"""The wall clock jumps by an hour, as when somebody sets it: what a trial makes of that alone, with the rollout's own times."""

import pytest

from service.errors import Conflict
from service.rollout import trials
from service.rollout.stages import Stage
from tests.service.world import LINE, QUICK, World

HOUR = 3600.0
WINDOW = 1800.0
ROLLOUT = {"weights": [0.5], "guardrails": {"error": {"kind": "error", "margin": 0.5}}, "bake": {"holdback": 0.2}}
SETTINGS = {
    "feedback": {"metrics": {"thumb": {"type": "boolean", "window_seconds": WINDOW}}},
    "lines": {LINE: {**QUICK["lines"][LINE], "rollout": ROLLOUT}},
}


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path, SETTINGS)
    world.quality, world.thumbs = dict.fromkeys(("base", "desk@v1"), 0.5), 0.3
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None)
    yield world
    world.writer.close()


def asked(world, rounds=6):
    """Customers of both arms, all of whose windows are closed: too few for a verdict."""
    world.until(lambda w: w.trial.stage is not Stage.VERIFYING)
    for _ in range(rounds):
        world.step(customers=20)
    world.step(WINDOW + 1)
    world.step()


def at(world, stage):
    if stage is Stage.VERIFYING:
        return
    asked(world)
    if stage is Stage.HOLD:
        world.conductor.steer(LINE, "pause")
    if stage is Stage.BAKE:
        world.conductor.promote(LINE)
        world.step()
        asked(world)
    assert world.trial.stage is stage


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
@pytest.mark.parametrize("stage", [Stage.VERIFYING, Stage.CANARY, Stage.HOLD, Stage.BAKE])
def test_no_verdict_comes_of_a_jump(world, stage, jump):
    at(world, stage)
    champion = world.champion
    world.now += jump
    for _ in range(3):
        world.step()
    assert world.champion == champion
    assert world.trial.stage is (Stage.CANARY if stage is Stage.VERIFYING else stage), (
        world.trial.reason
    )  # replicas had proven it
    if stage is Stage.HOLD:
        assert world.conductor.steer(LINE, "resume").stage is Stage.CANARY


def test_after_a_jump_back_a_trial_goes_on_to_its_end(world):
    at(world, Stage.CANARY)
    world.now -= HOUR
    world.quality["desk@v1"], world.thumbs = 0.95, 0.9
    for _ in range(40):
        world.step(customers=30)
    world.step(2 * WINDOW)
    world.until(lambda w: w.champion == "desk@v1", steps=5)
    with pytest.raises(Conflict):
        world.conductor.steer(LINE, "pause")


def test_windows_that_a_jump_closes_early_prove_nothing_of_those_who_had_not_spoken(world):
    """What a jump does do, as `docs/operations.md` says: windows close with what was said by then, and silence is no evidence."""
    world.until(lambda w: w.trial.stage is Stage.CANARY)
    for _ in range(40):
        world.step(customers=50)
    world.now += HOUR
    world.step()
    identity = world.trial.id
    look = world.read(lambda conn: trials.last_look(conn, identity))
    assert look.pairs > 500
    assert world.trial.stage is Stage.CANARY, world.trial.reason


def test_one_that_replicas_still_load_is_rejected_by_a_jump_forward(tmp_path):
    world = World(tmp_path, SETTINGS)
    reports = world.reports
    world.reports = lambda: [type(one)(one.replica, one.number, {}) for one in reports()]  # still loading
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None)
    world.now += HOUR
    world.step()
    assert (world.trial.stage, world.trial.reason.split(":")[0]) == (Stage.REJECTED, "replica_timeout")
    world.writer.close()

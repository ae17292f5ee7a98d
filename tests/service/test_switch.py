"""The kill switch: what each mode holds back, what goes on, and that it outlives the daemon."""

import json

import pytest

from replay.records import Arm
from service import audit, registry, switch
from service.errors import Conflict, NotFound
from service.rollout import verdicts
from service.rollout.controller import Look, judge
from service.rollout.stages import Stage
from service.router import resolve
from tests.service.rollout import test_controller as cases
from tests.service.world import LINE, World


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.quality = {"desk@v1": 0.8, "desk@v2": 0.95}
    yield world
    world.writer.close()


def until(world, stage):
    world.until(lambda w: w.trial is not None and w.trial.stage is stage, customers=10)


FROZEN = [
    (Stage.VERIFYING, {}),
    (Stage.CANARY, {"outcomes": cases.BETTER}),
    (Stage.CANARY, {"outcomes": cases.SAME}),  # a step up
    (Stage.PROMOTING, {}),
]


@pytest.mark.parametrize(("stage", "fields"), FROZEN)
def test_nothing_goes_forward(stage, fields):
    seen = cases.look(**fields)
    assert judge(cases.trial(stage), seen).move is not None
    frozen = Look(**{**{name: getattr(seen, name) for name in Look.__slots__}, "is_frozen": True})
    assert judge(cases.trial(stage), frozen).move is None


WAYS_OUT = [
    (Stage.CANARY, {"outcomes": cases.WORSE}, Stage.ROLLING_BACK),
    (Stage.CANARY, {"failures": 5}, Stage.ROLLING_BACK),
    (Stage.CANARY, {"outcomes": cases.LOPSIDED}, Stage.HOLD),
    (Stage.HOLD, {"now": 1001.0}, Stage.EXPIRED),
    (Stage.ROLLING_BACK, {}, Stage.ROLLED_BACK),
    (Stage.CANARY, {"champion": "desk@v9"}, Stage.ABORTED),
]


@pytest.mark.parametrize(("stage", "fields", "to"), WAYS_OUT)
def test_every_way_out_stays_open(stage, fields, to):
    said = judge(cases.trial(stage), cases.look(is_frozen=True, **fields))
    assert said.move.to is to
    assert verdicts.replay(json.loads(json.dumps(verdicts.record(cases.trial(stage), said.move, said)))).is_same


def test_a_frozen_canary_goes_on_where_it_stood_when_it_is_off_again_even_over_a_crash(world):
    world.demonstrate(40)
    until(world, Stage.CANARY)
    world.conductor.throw("freeze_promotion", "odd replies")
    world.crash()
    for _ in range(20):
        world.step(customers=10)
    assert (world.trial.stage, world.champion) == (Stage.CANARY, None)
    with pytest.raises(Conflict, match="learnd switch off"):
        world.conductor.promote(LINE)
    world.conductor.throw("off", "")
    world.until(lambda w: w.champion == "desk@v1", customers=10)


@pytest.mark.parametrize("mode", ["freeze_promotion", "freeze_training", "base_only"])
def test_a_held_trial_is_not_resumed_before_it_is_off_again(world, mode):
    world.demonstrate(40)
    until(world, Stage.CANARY)
    world.conductor.steer(LINE, "pause")
    world.conductor.throw(mode, "")
    with pytest.raises(Conflict, match=f"the kill switch is on {mode}.*learnd switch off") as refused:
        world.conductor.steer(LINE, "resume")
    assert "\n" not in str(refused.value)
    assert world.trial.stage is Stage.HOLD
    world.conductor.throw("off", "")
    assert world.conductor.steer(LINE, "resume").stage is Stage.CANARY
    world.conductor.throw(mode, "")
    with pytest.raises(Conflict, match="not on hold"):  # what is wrong besides is said first: it would not go with the switch off
        world.conductor.steer(LINE, "resume")
    assert world.conductor.steer(LINE, "pause").stage is Stage.HOLD  # ways back stay open
    assert world.conductor.steer(LINE, "abort").stage is Stage.ROLLING_BACK


def test_a_promotion_that_was_under_way_waits_and_may_be_aborted(world):
    world.demonstrate(40)
    until(world, Stage.PROMOTING)
    world.conductor.throw("freeze_promotion", "")
    for _ in range(5):
        world.step()
    assert (world.trial.stage, world.champion) == (Stage.PROMOTING, None)
    assert world.conductor.steer(LINE, "abort").stage is Stage.ROLLING_BACK


def test_a_person_goes_back_whatever_it_holds_back(world):
    for version in ("desk@v1", "desk@v2"):
        world.demonstrate(40)
        world.until(lambda w, v=version: w.champion == v, customers=10)
    world.conductor.throw("freeze_training", "")
    assert world.conductor.roll_back(LINE)["to"] == "desk@v1"
    assert world.conductor.roll_back(LINE, "desk@v2")["candidate"] == "desk@v2"  # further: a trial by hand
    world.until(lambda w: w.champion == "desk@v2")


def test_nothing_is_learned_by_itself_nor_by_hand(world):
    world.conductor.throw("freeze_training", "")
    world.demonstrate(40)
    assert [world.step() for _ in range(3)] == [[]] * 3
    with pytest.raises(Conflict, match="freeze_training"):
        world.conductor.train(LINE)
    world.conductor.throw("freeze_promotion", "")
    world.step()
    assert world.job.id == "desk-job1"


def test_only_the_base_answers_and_the_champion_is_back_at_once(world):
    world.demonstrate(40)
    world.until(lambda w: w.champion == "desk@v1", customers=10)
    number = world.conductor.desired().number
    world.conductor.throw("base_only", "it says what it must not")
    held = world.conductor.desired()
    assert held.number > number  # replicas that wait are woken
    assert "desk@v1" in held.resident_names
    assert {(c.version, c.arm) for c in (resolve(held, "base", LINE, f"k{i}") for i in range(50))} == {("base", Arm.CHAMPION)}
    for name in ("desk@v1", "desk@champion"):
        with pytest.raises(NotFound, match="base_only"):
            resolve(held, "base", name, "k")
    assert resolve(held, "base", "desk@base", "k").version == "base"
    assert world.champion == "desk@v1"
    world.conductor.throw("off", "")
    assert resolve(world.conductor.desired(), "base", LINE, "k").version == "desk@v1"


def test_of_setting_and_hand_the_stricter_holds(world):
    read = lambda setting: world.read(lambda conn: switch.read(conn, setting)).mode  # noqa: E731
    assert (read("off"), read("freeze_training")) == ("off", "freeze_training")
    world.conductor.throw("freeze_promotion", "")
    assert (read("off"), read("base_only")) == ("freeze_promotion", "base_only")


def test_it_is_in_the_log_with_its_reason(world):
    world.conductor.throw("base_only", "a complaint")
    world.conductor.throw("off", "mended")
    told = world.read(lambda conn: audit.events(conn, switch.EVERYWHERE, "switch_thrown"))
    assert [event["body"] for event in told] == [
        {"mode": "base_only", "reason": "a complaint"},
        {"mode": "off", "reason": "mended"},
    ]
    assert world.read(audit.verify).broken is None
    assert world.read(registry.number) == 2

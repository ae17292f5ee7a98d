"""An older version answers a share for ever: who meets it, what it costs a trial, and what happens when the line has decayed."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from replay import memory
from replay.records import Arm
from service import audit, registry, status
from service.errors import Conflict, NotFound
from service.rollout import trials, watches
from service.rollout.anchor import Sight, Standing, Step, Watch, judge, sample
from service.rollout.detector import START
from service.rollout.stages import Stage
from service.router import Desired, Resident, Route, models, resolve
from service.settings import Anchor, Settings
from service.webhooks import notice_of
from tests.service.rollout.test_controller import units
from tests.service.world import LINE, QUICK, World

POLICY = Anchor(holdback=0.05, reverts=True)
HELD = {"champion": "desk@v3", "is_held": True, "is_refused": False}
OPEN = Watch(LINE, "desk@v1", round=4, opened_at=1.0, champion="desk@v3")


def said(anchor, champion):
    """Units of both, side by side in time: as a trial's, under the anchor's arms."""
    arms = {Arm.CANDIDATE: Arm.CHAMPION, Arm.CONTROL: Arm.ANCHOR}
    return tuple(replace(one, arm=arms[one.arm]) for one in units(champion, anchor))


SAME, WORSE = said([0.5] * 50, [0.5] * 50), said([1.0] * 50, [0.0] * 50)


def sight(outcomes=None, **fields):
    return Sight(**{**HELD, **fields}, sample=None if outcomes is None else sample(outcomes))


def step(watch=OPEN, policy=POLICY, **fields):
    return judge(watch, sight(**fields), policy)


class TestRules:
    def test_a_round_begins_when_replicas_hold_the_anchor_and_it_is_not_the_champion(self):
        closed = Watch(LINE, "desk@v1")
        assert step(closed).does == "open"
        assert step(closed, is_held=False) is None
        assert step(closed, champion="desk@v1") is None
        assert step(Watch(LINE, None), champion=None) is None  # the base against itself

    def test_it_ends_with_its_champion_its_units_or_a_replica_that_cannot_serve_the_anchor(self):
        assert step(champion="desk@v4", outcomes=SAME).reason == "the champion changed"
        assert step(is_refused=True).reason == "a replica cannot serve the anchor"
        assert step(policy=POLICY.model_copy(update={"round_units": 50}), outcomes=SAME).reason == "its units are dealt anew"
        assert step(outcomes=SAME).does == "note"

    def test_nothing_is_due_when_nothing_was_seen(self):
        assert step() is None
        assert step(outcomes=()) is None

    def test_what_is_worse_alarms_once_and_goes_back_where_that_is_set(self):
        assert step(outcomes=WORSE).does == "revert"
        by_hand = POLICY.model_copy(update={"reverts": False})
        first = step(policy=by_hand, outcomes=WORSE)
        assert first.does == "alarm"
        assert first.reason.startswith("worse_than_anchor: e = ")
        assert first.seen.difference[1] < 0
        alarmed = replace(OPEN, standing=Standing.ALARM)
        assert step(alarmed, policy=by_hand, outcomes=WORSE).does == "note"
        assert step(alarmed, outcomes=WORSE).does == "revert"

    def test_between_the_thresholds_it_only_warns(self):
        some = said([1.0] * 22, [0.0] * 22)
        assert step(outcomes=some).does == "alarm"
        assert step(outcomes=said([1.0] * 12, [0.0] * 12)).does == "note"

    def test_it_never_goes_back_onto_what_is_not_proven(self):
        assert step(outcomes=WORSE, is_held=False).does == "alarm"

    def test_what_a_champion_lost_is_carried_to_the_next_one(self):
        some = said([1.0] * 12, [0.0] * 12)
        gone = step(champion="desk@v4", outcomes=some)
        assert (gone.does, gone.seen.blocks) == ("close", 12)
        carried = {"round": 5, "opened_at": 2.0, "champion": "desk@v4", "walk": gone.seen.walk, "blocks": 12}
        assert step(Watch(LINE, "desk@v1", **carried), champion="desk@v4", outcomes=some).does == "alarm"
        anew = Watch(LINE, "desk@v1", **{**carried, "walk": START})
        assert step(anew, champion="desk@v4", outcomes=some).does == "note"

    def test_but_its_condemnation_is_not(self):
        assert step(champion="desk@v4", outcomes=WORSE).seen.walk == START
        alarmed = replace(OPEN, standing=Standing.ALARM)
        assert step(alarmed, champion="desk@v2", outcomes=said([1.0] * 12, [0.0] * 12)).seen.walk == START


def table(**route):
    whole = {"anchor": "desk@v1", "holdback": 0.05, "watch": "desk-anchor4", **route}
    held = tuple(Resident(f"desk@v{i}", f"/v{i}", i) for i in (1, 2, 3, 4))
    return Desired(1, held, {LINE: Route(LINE, "desk@v3", previous="desk@v2", **whole)})


def dealt(desired, keys=4000):
    return [resolve(desired, "base", LINE, f"k{i}") for i in range(keys)]


class TestWhoMeetsIt:
    def test_a_share_meets_the_anchor_nine_times_as_many_are_compared_with_it(self):
        found = Counter((c.arm, c.version, c.trial) for c in dealt(table()))
        assert found.keys() == {
            (Arm.ANCHOR, "desk@v1", "desk-anchor4"),
            (Arm.CHAMPION, "desk@v3", "desk-anchor4"),
            (Arm.CHAMPION, "desk@v3", None),
        }
        assert found[Arm.ANCHOR, "desk@v1", "desk-anchor4"] == pytest.approx(200, abs=50)
        assert found[Arm.CHAMPION, "desk@v3", "desk-anchor4"] == pytest.approx(1800, abs=120)

    def test_a_trial_deals_the_others_among_its_arms_by_a_salt_of_its_own(self):
        trial = table(candidate="desk@v4", weight=0.25, salt="t9", trial="t9")
        found = {c.unit: c for c in dealt(trial)}
        alone = {c.unit: c for c in dealt(table())}
        assert all((found[u].arm is Arm.ANCHOR) == (alone[u].arm is Arm.ANCHOR) for u in found)
        watched = Counter(c.arm for c in found.values() if c.trial == "desk-anchor4")
        assert watched.keys() == {Arm.ANCHOR, Arm.CHAMPION}  # what is the trial's is not counted here, nor the other way round
        assert watched[Arm.CHAMPION] == pytest.approx(900, abs=100)
        arms = Counter(c.arm for c in found.values() if c.trial == "t9")
        assert arms[Arm.CANDIDATE] == pytest.approx(950, abs=100)
        assert arms[Arm.CONTROL] == pytest.approx(950, abs=100)

    def test_another_round_deals_anew(self):
        first, second = ({c.unit for c in dealt(table(watch=w)) if c.arm is Arm.ANCHOR} for w in ("desk-anchor4", "desk-anchor5"))
        assert len(first & second) < 0.2 * len(first)

    def test_without_a_round_nobody_is_held_back(self):
        assert {(c.arm, c.trial) for c in dealt(table(watch=""), 500)} == {(Arm.CHAMPION, None)}
        assert {(c.arm, c.trial) for c in dealt(table(holdback=0.2), 500) if c.arm is Arm.CHAMPION} == {
            (Arm.CHAMPION, "desk-anchor4")
        }

    def test_it_has_a_name_that_clients_may_ask_for(self):
        assert resolve(table(), "base", "desk@anchor", "k").version == "desk@v1"
        assert resolve(table(anchor=None), "base", "desk@anchor", "k").version == "base"
        with pytest.raises(NotFound):
            resolve(Desired(1, (), {LINE: Route(LINE)}), "base", "desk@anchor", "k")
        assert "desk@anchor" in {model.id for model in models(table(), "base")}

    def test_a_line_needs_its_anchor_only_while_it_answers(self):
        assert "desk@v1" in table().routes[LINE].needed
        assert "desk@v1" not in table(watch="").routes[LINE].needed


ANCHORED = {**QUICK["lines"][LINE]["rollout"], "anchor": {"holdback": 0.2, "alarm": 100, "revert": 10_000, "round_units": 40}}


def opened(folder, **anchor):
    rollout = {**ANCHORED, "anchor": {**ANCHORED["anchor"], **anchor}}
    world = World(folder, {"lines": {LINE: {**QUICK["lines"][LINE], "rollout": rollout}}})
    world.quality, world.thumbs = {"base": 0.5, "desk@v1": 0.9, "desk@v2": 0.95}, 1.0
    return world


@pytest.fixture
def world(tmp_path):
    world = opened(tmp_path)
    yield world
    world.writer.close()


def candidate(world, version="desk@v1"):
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.candidate == version)
    return world


def live(world, version="desk@v1"):
    candidate(world, version).conductor.promote(LINE)
    world.until(lambda w: w.trial.stage is Stage.LIVE)
    return world


def watch(world):
    return world.read(lambda conn: watches.read(conn, LINE))


def decay(world, version):
    """The champion gets worse than its anchor, and nothing else happens."""
    world.quality[version] = 0.0
    world.until(lambda w: watch(w).standing is not Standing.OK, customers=20)


class TestOnTheWay:
    def test_off_it_leaves_no_trace(self, tmp_path):
        world = live(World(tmp_path))
        assert world.read(lambda conn: status.stored(conn, world.settings, world.now))["lines"][LINE]["anchor"] is None
        assert not [one for one in world.kinds() if one.startswith("anchor")]
        with pytest.raises(Conflict, match="holdback"):
            world.conductor.anchor(LINE, "champion")
        world.writer.close()

    def test_the_base_is_the_anchor_until_somebody_names_one(self, world):
        live(world)
        world.until(lambda w: watch(w).is_open)
        assert {one.version for one in (world.ask() for _ in range(200)) if one.arm is Arm.ANCHOR} == {"base"}
        assert world.conductor.anchor(LINE, "champion")["version"] == "desk@v1"
        world.step()
        assert not watch(world).is_open  # the champion against itself
        with pytest.raises(NotFound):
            world.conductor.anchor(LINE, "desk@v9")
        assert world.read(lambda conn: audit.events(conn, LINE, "anchored"))[-1]["body"] == {
            "anchor": "desk@v1",
            "by": "operator",
        }

    def test_a_trial_and_the_anchor_go_on_side_by_side_over_generations(self, world):
        live(world)
        world.conductor.anchor(LINE, "champion")
        candidate(world, "desk@v2")
        world.until(lambda w: w.champion == "desk@v2", customers=15)  # by evidence
        world.until(lambda w: watch(w).round >= 2 and watch(w).seen.blocks >= 45, customers=30)
        seen = watch(world)
        assert (seen.anchor, seen.champion, seen.standing) == ("desk@v1", "desk@v2", Standing.OK)
        assert "desk@v1" in world.conductor.desired().resident_names

    def test_decay_is_told_and_stops_promotions_until_somebody_looks(self, world):
        live(world)
        decay(world, "desk@v1")  # than the base
        assert world.champion == "desk@v1"
        told = world.read(lambda conn: audit.since(conn, 0, 10_000))
        alarms = [notice_of(one) for one in told if one["kind"] == "anchor_alarm"]
        assert [(one["type"], one["metadata"]["anchor"], one["metadata"]["champion"]) for one in alarms] == [
            ("event", None, "desk@v1")
        ]
        world.quality["desk@v2"] = 1.0
        candidate(world, "desk@v2")
        for _ in range(5):
            world.step(customers=5)
        assert world.trial.stage is Stage.VERIFYING
        with pytest.raises(Conflict, match="worse_than_anchor"):
            world.conductor.promote(LINE)
        world.conductor.anchor(LINE, "base")
        world.until(lambda w: w.champion == "desk@v2", customers=20)
        assert watch(world).standing is Standing.OK

    def test_a_held_trial_is_not_resumed_before_somebody_has_looked(self, world):
        candidate(world)
        world.until(lambda w: w.trial.stage is Stage.CANARY)
        world.conductor.steer(LINE, "pause")
        before = watch(world)
        alarmed = replace(before, standing=Standing.ALARM, reason="worse_than_anchor: by much")
        world.read(lambda conn: watches._store(conn, before, alarmed))
        with pytest.raises(Conflict, match=r"worse_than_anchor.*learnd rollout anchor"):
            world.conductor.steer(LINE, "resume")
        world.conductor.anchor(LINE, "base")
        assert world.conductor.steer(LINE, "resume").stage is Stage.CANARY

    def test_where_it_is_set_the_anchor_becomes_the_champion(self, tmp_path):
        world = live(opened(tmp_path, reverts=True, revert=1000))
        before = world.read(lambda conn: memory.remembered(conn, LINE, 100))
        live(world, "desk@v2")
        world.conductor.anchor(LINE, "desk@v1")
        decay(world, "desk@v2")
        world.until(lambda w: watch(w).standing is Standing.REVERTED, customers=20)
        (last, *_) = reversed(world.read(lambda conn: audit.events(conn, LINE, "anchor_verdict")))
        again = world.read(lambda conn: status.replay(conn, last["body"]["round"]))
        assert [(one["recorded"].split(":")[0], one["is_same"]) for one in again][-1] == ("revert", True)
        assert all(one["is_same"] for one in world.read(lambda conn: status.replay(conn, LINE)))
        assert world.read(lambda conn: registry.aliases(conn, LINE)) == {"champion": "desk@v1", "previous": None}
        states = {v.name: v.state for v in world.read(lambda conn: registry.versions(conn, LINE))}
        assert states == {"desk@v1": "live", "desk@v2": "rolled_back"}
        assert world.read(lambda conn: memory.remembered(conn, LINE, 100)) == before != []
        assert world.read(lambda conn: registry.last_crowning(conn, LINE)).reason.startswith("worse_than_anchor")
        assert {world.ask().version for _ in range(50)} == {"desk@v1"}
        for _ in range(3):
            world.step(customers=5)
        assert not watch(world).is_open  # until somebody names an anchor again
        assert world.read(audit.verify).broken is None
        world.writer.close()

    def test_a_trial_that_runs_then_ends_since_its_champion_is_gone(self, tmp_path):
        rollout = {
            **ANCHORED,
            "anchor": {**ANCHORED["anchor"], "reverts": True, "revert": 100},
            "weights": [0.05],
            "min_units": 9999,
        }
        world = World(tmp_path, {"lines": {LINE: {**QUICK["lines"][LINE], "rollout": {**rollout, "max_seconds": 9999}}}})
        world.thumbs, world.quality = 1.0, {"base": 0.5, "desk@v1": 0.9, "desk@v2": 0.5}
        candidate(live(world), "desk@v2")
        world.until(lambda w: w.trial.stage is Stage.CANARY)
        world.quality["desk@v1"] = 0.0
        world.until(lambda w: w.champion is None, customers=20)
        world.until(lambda w: w.trial.stage is Stage.ABORTED)
        assert world.examples == {"resting": 40, "fresh": 40}
        assert world.conductor.remembered(LINE) == {}
        world.writer.close()

    def test_an_anchor_that_replicas_cannot_hold_stops_nothing(self, world):
        live(live(world), "desk@v2")
        world.conductor.anchor(LINE, "desk@v1")
        world.until(lambda w: watch(w).is_open, customers=5)
        world.refused["desk@v1"] = "load_failed"
        world.step()
        assert not watch(world).is_open
        world.step()
        assert {world.ask().version for _ in range(100)} == {"desk@v2"}
        world.refused.clear()
        world.until(lambda w: watch(w).is_open)

    def test_what_is_stored_is_read_back(self, world):
        live(world)
        world.until(lambda w: watch(w).seen.blocks > 5, customers=20)
        before = watch(world)
        world.crash()
        assert watch(world) == before
        shown = world.read(lambda conn: status.stored(conn, world.settings, world.now))["lines"][LINE]["anchor"]
        assert json.loads(json.dumps(shown))["blocks"] == before.seen.blocks

    def test_a_step_on_what_has_moved_is_not_done(self, world):
        live(world)
        world.until(lambda w: watch(w).is_open)
        stale = watch(world)
        close, note = (Step(LINE, does, "", stale.seen) for does in ("close", "note"))
        world.read(lambda conn: watches.take(conn, stale, close, world.now))
        with pytest.raises(Conflict):  # it would open the round again
            world.read(lambda conn: watches.take(conn, stale, note, world.now))
        world.conductor.anchor(LINE, "base")
        due = judge(stale, Sight("desk@v1", True, True), Anchor(holdback=0.2))
        with pytest.raises(Conflict):
            world.read(lambda conn: watches.take(conn, stale, due, world.now))


def test_a_line_with_an_anchor_needs_one_place_more(tmp_path):
    settings = {"data_dir": tmp_path, "lines": {"a": {"rollout": {"anchor": {"holdback": 0.05}}}}}
    assert Settings(**settings, base={"max_resident": 4})
    with pytest.raises(ValueError, match="one more with an anchor"):
        Settings(**settings, base={"max_resident": 3})
    with pytest.raises(ValueError, match="nobody would be warned"):
        Anchor(alarm=100, revert=10)


def test_trials_are_named_apart_from_rounds(world):
    live(world)
    assert world.read(lambda conn: [t.id for t in trials.of(conn, LINE)]) == ["desk-trial1"]
    assert watch(world).name.startswith("desk-anchor")

"""After the promotion: a share stays on the champion before, and harm flips the alias back."""

import json
from dataclasses import replace

import pytest

from replay import ledger
from replay.records import Arm
from service import audit, registry, status
from service.errors import Conflict
from service.rollout import trials, verdicts
from service.rollout.controller import Look, Move, by_hand, judge
from service.rollout.evidence import Evidence
from service.rollout.probe import ProbeResult
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport, resolve
from service.settings import Bake, Rollout
from service.webhooks import notice_of
from tests.service.rollout.test_controller import units
from tests.service.world import LINE, QUICK, World

POLICY = Rollout(
    weights=(0.5,),
    min_units=30,
    max_seconds=1000,
    guardrails={},
    bake=Bake(holdback=0.2, min_units=40, min_seconds=60, max_seconds=600),
)
LONG = POLICY.model_copy(update={"bake": POLICY.bake.model_copy(update={"min_units": 500})})
GOOD, BAD = ProbeResult(ok=True), ProbeResult(ok=False, reason="load_failed")
BOTH = {"desk@v1": GOOD, "desk@v2": GOOD}
BETTER, WORSE = units([1.0] * 60, [0.5] * 60, start=200), units([0.0] * 60, [1.0] * 60, start=200)


def trial(stage=Stage.BAKE, **fields):
    plain = {"policy": POLICY, "opened_at": 0.0, "since": 150.0, "steps": (0.0,), "stage": stage}
    return Trial("t", "desk", "desk@v2", "desk@v1", **{**plain, **fields})


def look(outcomes=(), now=300.0, resident=BOTH, champion="desk@v2", **fields):
    return Look(now, champion, (ReplicaReport("r1", 5, dict(resident)),), 5, 0.0, tuple(outcomes), **fields)


def moved(seen, **fields):
    return judge(trial(**fields), seen).move


class TestRules:
    def test_a_promotion_leads_into_it_unless_it_is_off_or_a_person_chose_the_version(self):
        promoting = look(champion="desk@v1")
        assert moved(promoting, stage=Stage.PROMOTING).to is Stage.BAKE
        assert moved(promoting, stage=Stage.PROMOTING, is_operator=True).to is Stage.LIVE
        off = POLICY.model_copy(update={"bake": Bake(holdback=0)})
        assert moved(promoting, stage=Stage.PROMOTING, policy=off).to is Stage.LIVE

    def test_it_ends_with_enough_units_and_time_without_harm(self):
        assert moved(look(BETTER)).reason.startswith("baked: no harm")
        assert moved(look(BETTER, now=209.0)) is None  # too early
        assert moved(look(units([1.0] * 39, [0.5] * 60, start=200))) is None  # too few

    def test_out_of_time_it_ends_and_says_with_how_little(self):
        said = moved(look(units([0.5] * 5, [0.5] * 4, start=200), now=751.0))
        assert (said.to, said.reason) == (Stage.LIVE, "baked_out_of_time: no harm in 4 of 40 units of each arm")

    def test_a_standstill_is_no_time_in_which_it_could_have_done_harm(self):
        """The daemon was down for a day: nobody was there to be harmed."""
        at_noon = replace(look(now=90_000.0), serving_since=89_990.0)
        assert moved(at_noon) is None
        assert moved(replace(at_noon, serving_since=None)) is None
        assert moved(replace(at_noon, now=91_000.0)).reason.startswith("baked_out_of_time")

    def test_harm_goes_back_and_wins_over_the_end(self):
        assert moved(look(WORSE)).to is Stage.ROLLING_BACK
        assert moved(look(WORSE, now=1e6)).to is Stage.ROLLING_BACK
        assert moved(look(failures=5)).reason.startswith("error_burst")
        assert moved(look(crashes=1)).reason.startswith("engine_crash")
        assert moved(look(resident={**BOTH, "desk@v2": BAD})).to is Stage.ROLLING_BACK

    def test_it_never_goes_back_onto_what_is_not_proven_nor_ends_over_an_alarm(self):
        for resident in ({"desk@v2": GOOD}, {**BOTH, "desk@v1": BAD}):
            assert moved(look(WORSE, resident=resident)) is None
            assert moved(look(WORSE, resident=resident, now=1e6)) is None
        first = replace(trial(), champion=None)  # before it was the base, which every replica holds
        assert judge(first, look(WORSE, resident={"desk@v2": GOOD})).move.to is Stage.ROLLING_BACK

    def test_harm_that_begins_late_goes_back_however_well_it_did_before(self):
        """Forty units of each arm pay for what comes after them: the e-process of the whole is not half way yet."""
        well, ill = ([1.0] * 40, [0.5] * 40), ([0.0] * 28, [1.0] * 28)
        late, early = units(well[0] + ill[0], well[1] + ill[1], start=200), units(ill[0] + well[0], ill[1] + well[1], start=200)
        said = judge(trial(policy=LONG), look(late))
        assert said.evidence.log_rollback < said.evidence.rollback_at / 2
        assert said.evidence.log_late >= said.evidence.late_at
        assert (said.move.to, said.move.reason.split(":")[0]) == (Stage.ROLLING_BACK, "turned")
        recorded = json.loads(json.dumps(verdicts.record(trial(policy=LONG), said.move, said)))
        assert verdicts.replay(recorded).is_same
        path = recorded["facts"]["tally"]["path"]
        recorded["facts"]["tally"]["path"] = [*path[::2], *path[1::2]]
        assert not verdicts.replay(recorded).is_same, "their order decides"
        assert judge(trial(policy=LONG), look(early)).move.reason.startswith("turned"), "an alarm is not taken back"
        deaf = LONG.model_copy(update={"bake": LONG.bake.model_copy(update={"alarm": 1e9})})
        assert judge(trial(policy=deaf), look(late)).move is None

    def test_however_much_it_has_seen_it_can_be_told(self):
        """While the way back is blocked the evidence goes on growing, beyond what an exponential can hold."""
        long = LONG.model_copy(update={"bake": LONG.bake.model_copy(update={"alpha": 1e-300})})
        well, ill = ([1.0] * 4000, [0.0] * 4000), ([0.0] * 2500, [1.0] * 2500)
        seen = look(units(well[0] + ill[0], well[1] + ill[1], start=200), resident={"desk@v2": GOOD}, now=1e6)
        said = judge(trial(policy=long), seen)
        assert said.evidence.log_late > 710
        assert said.blocked.startswith("turned: harm that began late, log evidence ")

    def test_a_canary_has_no_such_detector(self):
        """A level is what it keeps, and mean times to an alarm add up over candidates."""
        before = trial(Stage.CANARY, policy=LONG, steps=(150.0,))
        said = judge(before, look(units([1.0] * 40 + [0.0] * 28, [0.5] * 40 + [1.0] * 28, start=200), champion="desk@v1"))
        assert (said.facts.tally.path, said.evidence.log_late) == ((), 0.0)
        assert said.move is None or said.move.to is not Stage.ROLLING_BACK

    def test_the_comparison_begins_anew(self):
        """Units and intervals of the canary have no part in it: a lead from there must not outweigh harm now."""
        before = Evidence(100.0, 99, 99, 99, 99, 9.0, -9.0, 3.0, 4.6, (0.3, 0.5))
        said = judge(trial(), look(WORSE, last=before)).evidence
        assert said.is_bake
        assert said.difference[0] < 0
        assert said.adds_to(before)
        assert trial().evidence_id != trial(Stage.CANARY).evidence_id

    def test_a_lopsided_bake_does_not_end_before_its_time(self):
        assert moved(look(units([0.5] * 200, [0.5] * 50, start=200), now=450.0)) is None

    def test_a_champion_that_changed_ends_it(self):
        assert moved(look(BETTER, champion="desk@v9")).to is Stage.ABORTED

    @pytest.mark.parametrize("outcomes", [BETTER, WORSE])
    def test_its_verdicts_are_decided_the_same_again(self, outcomes):
        said = judge(trial(), look(outcomes))
        assert verdicts.replay(json.loads(json.dumps(verdicts.record(trial(), said.move, said)))).is_same

    def test_by_hand(self):
        assert by_hand(trial(), "promote").to is Stage.LIVE
        assert by_hand(trial(), "abort").to is by_hand(trial(), "rollback").to is Stage.ROLLING_BACK


LINE_SETTINGS = QUICK["lines"][LINE]
BAKED = {"holdback": 0.3, "min_units": 40, "min_seconds": 0, "max_seconds": 100}


@pytest.fixture
def world(tmp_path):
    rollout = {**LINE_SETTINGS["rollout"], "bake": BAKED}
    world = World(tmp_path, {"lines": {LINE: {**LINE_SETTINGS, "rollout": rollout}}})
    world.quality = {"desk@v1": 0.8, "desk@v2": 0.95}
    yield world
    world.writer.close()


def baking(world, version="desk@v1"):
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.candidate == version and w.trial.stage is Stage.BAKE, customers=10)
    world.step()
    return world.trial


def last_look(world):
    name = world.trial.id
    return world.read(lambda conn: trials.last_look(conn, name))


class TestOnTheWay:
    def test_a_share_stays_on_the_champion_before_and_then_it_is_live(self, world):
        trial = baking(world)
        assert world.champion == "desk@v1"
        assert world.examples == {"reserved": 40}  # not consumed before the bake is over
        asked = [world.ask() for _ in range(200)]
        by_arm = {arm: {one.version for one in asked if one.arm is arm} for arm in Arm}
        assert by_arm[Arm.CANDIDATE] == by_arm[Arm.CHAMPION] == {"desk@v1"}
        assert by_arm[Arm.CONTROL] == {"base"}
        assert {one.trial for one in asked} == {None, trial.evidence_id}
        shown = world.read(lambda conn: status.trials_of(conn, LINE))[0]
        assert (shown["state"], shown["weight"]) == ("bake", 0.3)
        world.until(lambda w: w.trial.stage is Stage.LIVE, customers=10)
        assert world.examples == {"trained": 40}
        assert world.read(lambda conn: trials.promotions(conn, LINE)) == 1
        assert {world.ask().version for _ in range(50)} == {"desk@v1"}

    def test_no_job_begins_before_it_is_over(self, world):
        baking(world)
        world.demonstrate(40)
        world.step()
        assert world.job.id == "desk-job1"

    def test_harm_flips_the_alias_back_at_once_and_gives_the_examples_back(self, world):
        baking(world)
        world.until(lambda w: w.trial.stage is Stage.LIVE, customers=10)
        baking(world, "desk@v2")
        assert world.read(lambda conn: registry.aliases(conn, LINE)) == {"champion": "desk@v2", "previous": "desk@v1"}
        world.quality["desk@v2"], world.thumbs = 0.0, 1.0
        world.until(lambda w: w.trial.stage is Stage.ROLLING_BACK, customers=10)
        assert world.champion == "desk@v1"
        assert {world.ask().version for _ in range(50)} == {"desk@v1"}
        world.until(lambda w: w.trial.stage is Stage.ROLLED_BACK)
        assert world.trial.reason.startswith("harmed")
        assert world.examples == {"trained": 40, "fresh": 40}
        states = {v.name: v.state for v in world.read(lambda conn: registry.versions(conn, LINE))}
        assert states == {"desk@v1": "live", "desk@v2": "rolled_back"}
        assert world.read(lambda conn: trials.promotions(conn, LINE)) == 1
        assert world.read(lambda conn: registry.last_crowning(conn, LINE)).evidence["is_bake"]

    def test_harm_that_begins_late_flips_it_back_too(self, tmp_path):
        """It is better for some hundred units, and then others come: all that its lead is worth is not waited for."""
        rollout = {**LINE_SETTINGS["rollout"], "bake": {**BAKED, "min_units": 400, "max_seconds": 1000}}
        world = World(tmp_path, {"lines": {LINE: {**LINE_SETTINGS, "rollout": rollout}}})
        world.quality, world.thumbs = {"desk@v1": 0.8, "base": 0.5}, 1.0
        baking(world)
        world.until(lambda w: (look := last_look(w)) is not None and look.is_bake and look.pairs > 60, customers=20)
        world.quality["desk@v1"], world.quality["base"] = 0.0, 0.8
        world.until(lambda w: w.trial.stage is not Stage.BAKE, customers=10)
        assert (world.champion, world.trial.reason.split(":")[0]) == (None, "turned")
        seen = last_look(world)
        assert seen.log_late >= seen.late_at
        assert seen.log_rollback < seen.rollback_at
        (record,) = [one["body"] for one in world.read(lambda conn: audit.events(conn, LINE, "verdict"))][-1:]
        assert verdicts.replay(record).is_same
        world.writer.close()

    def test_a_rollback_that_cannot_be_is_told_once_and_done_when_it_can(self, world):
        baking(world)
        world.until(lambda w: w.trial.stage is Stage.LIVE, customers=10)
        baking(world, "desk@v2")
        world.quality["desk@v2"], world.thumbs, world.refused = 0.0, 1.0, {"desk@v1": "load_failed"}
        world.until(lambda w: w.trial.reason.startswith("rollback_blocked"), customers=10)
        assert world.trial.reason.startswith("rollback_blocked: desk@v1 is not held by every replica; harmed: difference in")
        world.crash()
        for _ in range(3):
            world.step(customers=3)
        assert (world.trial.stage, world.champion) == (Stage.BAKE, "desk@v2")
        (told,) = world.read(lambda conn: audit.events(conn, LINE, "rollback_blocked"))
        assert notice_of(told).items() >= {"type": "event", "kind": "rollback_blocked", "phase": "bake"}.items()
        assert told["body"]["reason"] in world.read(lambda conn: status.trials_of(conn, LINE))[0]["reason"]
        world.refused = {}
        world.until(lambda w: w.trial.stage is Stage.ROLLED_BACK, customers=3)
        assert (world.champion, world.trial.reason.split(":")[0]) == ("desk@v1", "harmed")

    def test_the_way_back_is_resident_while_it_bakes(self, world):
        baking(world)
        world.until(lambda w: w.trial.stage is Stage.LIVE, customers=10)
        baking(world, "desk@v2")
        assert {"desk@v1", "desk@v2"} <= world.conductor.desired().resident_names
        assert world.routes.routes[LINE].needed == {"desk@v1", "desk@v2"}

    @pytest.mark.parametrize("how", [None, "desk@v1", "abort"])
    def test_a_person_ends_it_either_way(self, world, how):
        baking(world)
        world.until(lambda w: w.trial.stage is Stage.LIVE, customers=10)
        baking(world, "desk@v2")
        if how == "abort":
            world.conductor.steer(LINE, "abort")
        else:
            world.conductor.roll_back(LINE, how)
        assert (world.champion, world.trial.stage) == ("desk@v1", Stage.ROLLING_BACK)
        with pytest.raises(Conflict):
            world.conductor.promote(LINE)

    def test_a_person_may_say_that_it_has_baked_enough(self, world):
        baking(world)
        assert world.conductor.promote(LINE).stage is Stage.LIVE
        assert world.examples == {"trained": 40}

    def test_who_would_end_it_late_is_told(self, world):
        trial = baking(world)
        world.conductor.steer(LINE, "abort")
        with pytest.raises(Conflict, match="not bake any more"):
            world.read(lambda conn: trials.move(conn, trial, Stage.LIVE, world.now, reason="what a tick had decided before"))

    def test_its_records_are_whole(self, world):
        baking(world)
        world.until(lambda w: w.trial.stage is Stage.LIVE, customers=10)
        assert world.read(audit.verify).broken is None
        known = world.trial.id
        told = world.read(lambda conn: status.replay(conn, known))
        assert [one["recorded"].split(":")[0] for one in told] == ["canary", "promoting", "bake", "live"]
        assert all(one["is_same"] for one in told)


def test_a_replica_without_the_way_back_answers_by_the_champion():
    route = replace(resolve_table().routes[LINE], champion="desk@v2")
    assert route.needed == {"desk@v1", "desk@v2"}


def resolve_table():
    from service.router import Desired, Route

    route = Route(LINE, "desk@v2", "desk@v2", "desk@v1", 0.5, salt="t", trial="t-bake", is_baking=True)
    return Desired(1, (), {LINE: route})


def test_both_halves_of_a_bake_are_recorded_under_its_own_name():
    found = {(c.arm, c.version, c.trial) for c in (resolve(resolve_table(), "base", LINE, f"k{i}") for i in range(200))}
    assert found == {(Arm.CANDIDATE, "desk@v2", "t-bake"), (Arm.CONTROL, "desk@v1", "t-bake")}


def test_units_of_the_canary_are_not_read_for_the_bake(world):
    trial = baking(world)
    seen = world.read(lambda conn: ledger.outcomes(conn, trial.evidence_id, "thumb", 5, world.now, reward=float))
    canary = world.read(lambda conn: ledger.outcomes(conn, trial.id, "thumb", 5, world.now, reward=float))
    assert len(canary) > 20 > len(seen)


def test_a_move_into_it_is_what_crowns(world):
    trial = baking(world)
    assert Move(Stage.BAKE, trial.reason).to is trial.stage
    assert world.read(lambda conn: registry.last_crowning(conn, LINE)).target == "desk@v1"

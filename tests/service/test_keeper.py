"""The keeper with everything behind it: what a replica, the API and an operator see of one turn of the loop."""

import asyncio

import pytest
from world import BASE, LINE, QUICK, validate

from replay.records import Arm, Feedback, Interaction
from replay.shadows import Score, Shadow
from service.comparing import ShadowReport
from service.errors import Conflict, NotFound
from service.keeper import Keeper
from service.rollout.probe import ProbeResult
from service.router import ReplicaReport
from service.settings import Settings


class Replica:
    """Does as desired, at once: holds what should be resident and serves the newest number."""

    def __init__(self, keeper, name="r0", refuses=()):
        self.keeper, self.name, self.refuses = keeper, name, refuses
        self.number, self.holds = -1, {}

    def report(self):
        return ReplicaReport(self.name, self.number, dict(self.holds), {"base": 2})

    async def turn(self, timeout_seconds=0.0):
        desired = await self.keeper.desired(self.number, self.report(), timeout_seconds)
        self.number = desired.number
        self.holds = {
            v.name: ProbeResult(v.name not in self.refuses, "load_failed" if v.name in self.refuses else None)
            for v in desired.resident
        }
        return desired


async def demonstrate(keeper, count, start=0):
    names = [f"i{n}" for n in range(start, start + count)]
    asked = [
        Interaction(name, LINE, "base", Arm.CHAMPION, name, "all", ({"role": "user", "content": name},), "Hm.", at=100.0)
        for name in names
    ]
    await keeper.record(asked)
    await keeper.feedback([Feedback(f"d-{name}", name, "demonstration", f"label of {name}", 100.0, 100.0) for name in names])


async def until(keeper, replicas, holds, turns=50):
    """Turn the world until the desk's part of the status satisfies `holds`."""
    for _ in range(turns):
        for replica in replicas:
            await replica.turn()
        await keeper.tick()
        line = (await keeper.status())["lines"][LINE]
        if holds(line):
            return line
    raise AssertionError(line)


async def test_a_fresh_keeper_is_not_ready_before_a_replica_serves(keeper):
    assert await keeper.readiness() == {"ready": False, "reasons": ["no engine replica serves yet"]}
    replica = Replica(keeper)
    await replica.turn()
    await replica.turn()
    assert await keeper.readiness() == {"ready": True, "reasons": []}


async def test_a_replica_that_falls_silent_is_gone(keeper, clock):
    replica = Replica(keeper)
    await replica.turn()
    await replica.turn()
    clock.now += 31
    assert (await keeper.status())["replicas"] == []
    assert not (await keeper.readiness())["ready"]


async def test_examples_become_a_version_that_an_operator_promotes(keeper, clock):
    replicas = [Replica(keeper, "r0"), Replica(keeper, "r1")]
    await demonstrate(keeper, 60)
    line = await until(keeper, replicas, lambda line: line["trial"] and line["trial"]["state"] == "canary")
    assert (line["champion"], line["candidate"], line["versions"]) == (None, "desk@v1", 1)
    assert line["last_verdict"]["outcome"] == "pass"
    await keeper.promote(LINE, None)
    line = await until(keeper, replicas, lambda line: line["champion"])
    assert (line["champion"], line["candidate"], line["job"], line["trial"]) == ("desk@v1", None, None, None)
    assert line["examples"]["trained"] == 60
    assert sum(line["buffer"].values()) > 0
    (version,) = await keeper.versions(LINE)
    assert version["aliases"] == ["champion"]
    assert version["slices"]["new"]["exact"] == pytest.approx(0.8)
    await until(keeper, replicas, lambda _: replicas[0].number == replicas[1].number)
    clock.now += 2
    await until(keeper, replicas, lambda line: True)
    (change,) = [one for one in await keeper.history(LINE) if one["alias"] == "champion"]
    assert (change["from"], change["to"]) == (None, "desk@v1")
    assert change["swap_seconds"] is not None
    (job,) = await keeper.jobs(LINE)
    assert (await keeper.job(job["id"]))["state"] == "succeeded"
    (trial,) = await keeper.trials(LINE)
    assert (await keeper.trial(trial["id"]))["state"] == "live"
    uses = [(await keeper.feedback_by_id(f"d-i{n}"))["used_in"] for n in range(60)]
    assert uses.count(["desk@v1"]) + uses.count([]) == 60
    assert 0 < uses.count([]) < 30  # held out: measured on, never learned from
    text = (await keeper.metrics(""))[0].decode()
    assert 'learnd_adapter_resident{replica="r1",version="desk@v1"} 1.0' in text
    assert 'learnd_conductor_events_total{kind="promoted",line="desk"} 1.0' in text
    assert 'learnd_swap_seconds_count{line="desk"} 1.0' in text


async def test_a_replica_tells_of_its_shadows_and_gets_what_to_score(tmp_path, launcher, clock):
    rollout = {**QUICK["lines"][LINE]["rollout"], "shadow": {"share": 1, "min_pairs": 2}}
    settings = Settings(data_dir=tmp_path, **{**QUICK, "lines": {LINE: {**QUICK["lines"][LINE], "rollout": rollout}}})
    keeper = Keeper(settings, BASE, launcher, clock, validate)
    await keeper.start()
    replica = Replica(keeper)
    await demonstrate(keeper, 40)
    await until(keeper, [replica], lambda line: line["trial"] and line["trial"]["state"] == "shadow")
    shadow = (await replica.turn()).routes[LINE].shadow
    await demonstrate(keeper, 1, start=90)
    done = Shadow("shadow-1", shadow.trial, "i90", "i90", "desk@v1", "r0", "so", 1, clock.now, 0.1)
    (gold,) = await keeper.shadow(ShadowReport("r0", (done,)))
    assert (gold.kind, gold.candidate, gold.interaction_id) == ("corrected", "desk@v1", "i90")
    scores = tuple(Score(gold.trial, gold.interaction_id, gold.kind, -1.0, -1.2) for _ in range(2))
    assert await keeper.shadow(ShadowReport("r0", (done,), scores)) == []
    (line,) = [line["trial"] for line in (await keeper.status())["lines"].values()]
    assert (line["state"], line["shadow"]["pairs"], line["shadow"]["outcomes"]) == ("shadow", 1, {"ok": 1, "failed": 0})
    assert b'learnd_trial_shadow_replies{line="desk",outcome="ok"} 1.0' in (await keeper.metrics(""))[0]
    assert b'learnd_trial_units{arm="shadow",line="desk"} 1.0' in (await keeper.metrics(""))[0]
    await keeper.close()


async def test_a_champion_that_no_replica_proves_makes_it_unready(keeper):
    replica = Replica(keeper)
    await demonstrate(keeper, 60)
    await until(keeper, [replica], lambda line: line["trial"] and line["trial"]["state"] == "canary")
    await keeper.promote(LINE, None)
    await until(keeper, [replica], lambda line: line["champion"])
    replica.holds = {}
    await keeper.desired(-1, replica.report(), 0)
    assert (await keeper.readiness())["reasons"] == ["no replica holds desk@v1, the champion of 'desk'"]


async def test_who_waits_is_woken_by_news_and_not_before(keeper):
    replica = Replica(keeper)
    await replica.turn()
    waiting = asyncio.create_task(replica.turn(timeout_seconds=15))
    await keeper.tick()
    assert not waiting.done()
    await demonstrate(keeper, 60)
    await until(keeper, [Replica(keeper, "other")], lambda line: line["trial"])
    assert (await waiting).resident_names == {"desk@v1"}


async def test_who_waits_is_let_go_when_the_keeper_closes(settings, launcher, clock):
    keeper = Keeper(settings, BASE, launcher, clock, validate)
    await keeper.start()
    waiting = asyncio.create_task(keeper.desired(99, Replica(keeper).report(), 15))
    await keeper.tick()
    await keeper.close()
    assert (await waiting).number == 0


async def test_training_by_hand_needs_something_to_learn_and_shows_its_progress(keeper, launcher):
    with pytest.raises(Conflict, match="nothing new to learn"):
        await keeper.train(LINE)
    await demonstrate(keeper, 20)
    job = await keeper.train(LINE)
    assert (job["trigger"], job["examples"]) == ("operator", 20)
    shown = await keeper.job(job["id"])
    assert {"phase", "step", "steps", "loss", "tokens_per_second", "eta_seconds"} <= shown.keys()
    with pytest.raises(Conflict):
        await keeper.train(LINE)


async def test_what_does_not_exist_is_named(keeper):
    for ask in (keeper.versions, keeper.history, keeper.jobs, keeper.trials, keeper.train):
        with pytest.raises(NotFound, match=r"no line 'desc'; .*desk"):
            await ask("desc")
    for ask in (keeper.job, keeper.trial):
        with pytest.raises(NotFound, match="'nope'"):
            await ask("nope")
    for act in (keeper.promote, keeper.rollback):
        with pytest.raises(NotFound, match="desk@v9"):
            await act(LINE, "desk@v9")


async def test_a_tick_that_fails_is_counted_and_the_loop_goes_on(keeper):
    """Closing the ledger under the keeper fails every tick: the loop says so and lives."""
    await keeper._storage.close()
    assert await keeper._safely("conductor", keeper.tick) is None
    assert keeper._metrics._serving.failures.labels("conductor")._value.get() >= 1
    assert not any(loop.done() for loop in keeper._loops[:2])  # the third has no webhook to tell of anything


async def test_a_keeper_goes_on_where_the_last_one_was_killed(settings, launcher, clock):
    first = Keeper(settings, BASE, launcher, clock, validate)
    await first.start()
    await demonstrate(first, 60)
    await until(first, [Replica(first)], lambda line: line["trial"])
    await first.close()
    again = Keeper(settings, BASE, launcher, clock, validate)
    await again.start()
    line = await until(again, [Replica(again)], lambda line: line["trial"]["state"] == "canary")
    assert line["candidate"] == "desk@v1"
    await again.close()

"""A replica's shadows: who is sampled, what makes way, what is told to the keeper, and that no user sees any of it."""

import asyncio
import itertools
import math

import pytest
from fakes import BASE, Client, FakeEngine, FakeKeeper, settle, state, write_version

from replay.records import Arm
from replay.shadows import Gold, Score
from service.errors import NotReady
from service.exchange import Clock
from service.gateway import Gateway
from service.load_notes import LoadNotes
from service.residency import Residency
from service.router import Shadowing
from service.settings import Settings, Shadow
from service.shadowing import MOST_KEPT, Shadower

CHAT = "/v1/chat/completions"
TRIAL = "support-trial1"


class Replica:
    def __init__(self, folder, **spec):
        versions = [write_version(folder, f"support@v{n}", n, shift=n / 10) for n in (1, 2)]
        shadow = Shadowing("support@v2", TRIAL, Shadow(**{"share": 1, **spec}))
        self.engine = FakeEngine()
        self.keeper = FakeKeeper(state(*versions, support={"champion": "support@v1", "shadow": shadow}, other={}))
        held = {"base_name": BASE, "validate": lambda folder: None, "notes": LoadNotes(folder / "loading")}
        self.residency = Residency(self.engine, self.keeper, "r1", **held)
        ticks = itertools.count(100)
        clock = Clock(lambda: 7.0, lambda: float(next(ticks)) / 100)
        settings = Settings(data_dir=folder, lines={"support": {}})
        self.shadower = Shadower(self.engine, self.residency, self.keeper, "r1", clock=clock)
        told = {"clock": clock, "shadower": self.shadower}
        self.gateway = Gateway(self.engine, self.residency, self.keeper, settings, **told)

    def client(self, text="my flight", path=CHAT, model="support", **extra):
        body = {"prompt": text} if path != CHAT else {"messages": [{"role": "user", "content": text}]}
        return Client(self.gateway, "POST", path, {"model": model, **body, **extra})

    async def ask(self, *args, **extra):
        return await self.client(*args, **extra).ask()

    async def done(self):
        """What the keeper is told once all that runs is over."""
        await settle(lambda: not self.shadower._running)
        await self.shadower.turn()
        return [one for report in self.keeper.reported for one in report.shadows]

    @property
    def asked(self):
        return [body["model"] for body in self.engine.bodies]


@pytest.fixture
async def replica(tmp_path):
    replica = Replica(tmp_path)
    await replica.residency.start()
    return replica


async def test_the_candidate_answers_the_same_when_the_user_has_the_whole_reply(replica):
    client = replica.client(temperature=0.5, seed=3, stream=True, n=2, user="u1")
    reply = await client.ask()
    assert reply.is_whole
    (done,) = await replica.done()
    first, second = replica.engine.bodies
    gone = {"stream", "stream_options", "n"}
    assert {**second, "model": ""} == {**{k: v for k, v in first.items() if k not in gone}, "model": ""}
    assert (done.trial, done.version, done.replica, done.reply) == (TRIAL, "support@v2", "r1", "support@v2 says 0.2")
    (served,) = replica.keeper.recorded
    assert (done.interaction_id, done.unit, done.error) == (served.id, served.unit, None)
    assert done.id.startswith("shadow-")
    assert done.latency_seconds > 0
    assert (served.version, served.arm, served.trial) == ("support@v1", Arm.CHAMPION, None)


async def test_it_begins_when_the_user_has_all_of_it(replica):
    client = replica.client("wait between", stream=True)
    asking = asyncio.create_task(client.ask())
    await client.until_chunks(1)
    for _ in range(50):
        await asyncio.sleep(0)
    assert replica.asked == ["support@v1"]
    assert not replica.shadower._running
    replica.engine.go.set()
    assert (await asking).is_whole
    assert len(await replica.done()) == 1


async def test_no_user_sees_it_and_no_interaction_is_recorded_of_it(replica):
    replies = [await replica.ask() for _ in range(5)]
    shadows = await replica.done()
    assert shadows
    assert all(reply.headers["x-model-version"] == "support@v1" and b"support@v2" not in reply.body for reply in replies)
    assert {said.version for said in replica.keeper.recorded} == {"support@v1"}
    assert not {one.id for one in shadows} & {said.id for said in replica.keeper.recorded}
    assert replica.residency.report().inflight == {}


@pytest.mark.parametrize(
    "extra",
    [{"store": False}, {"model": "support@v1"}, {"model": BASE}, {"model": "other"}, {"temperature": -1}, {"text": "explode"}],
)
async def test_what_is_not_asked_of_the_line_or_may_not_be_read_again_has_none(replica, extra):
    await replica.ask(**extra)
    assert await replica.done() == []


async def test_a_share_is_sampled_by_the_request(tmp_path):
    replica = Replica(tmp_path, share=0.3, max_running=1000)
    await replica.residency.start()
    for _ in range(300):
        await replica.ask()
    assert 60 <= len(await replica.done()) <= 120


async def test_only_so_many_at_a_time(tmp_path):
    replica = Replica(tmp_path, max_running=2)
    await replica.residency.start()
    replica.engine.slow = {"support@v2"}
    for _ in range(4):
        await replica.ask()
    assert len(replica.shadower._running) == 2
    replica.engine.go.set()
    assert len(await replica.done()) == 2


async def test_it_makes_way_for_users_and_none_begins_while_they_are_many(tmp_path):
    replica = Replica(tmp_path, max_busy=1)
    await replica.residency.start()
    replica.engine.slow = {"support@v2"}
    await replica.ask()
    await settle(lambda: "support@v2" in replica.asked)
    users = [asyncio.create_task(replica.ask("wait")) for _ in range(1)]
    await settle(lambda: replica.asked.count("support@v1") == 2)
    assert len(replica.shadower._running) == 1  # one user is no crowd
    users += [asyncio.create_task(replica.ask("wait")) for _ in range(2)]
    await settle(lambda: not replica.shadower._running)  # broken off
    await settle(lambda: replica.asked.count("support@v1") == 4)
    await replica.ask()
    assert not replica.shadower._running  # three users wait still
    replica.engine.go.set()
    await asyncio.gather(*users)
    replica.shadower.close()
    assert [one.error for one in await replica.done() if one.error] == []


async def test_one_that_takes_too_long_has_failed_but_not_where_the_champion_was_slow(tmp_path):
    replica = Replica(tmp_path, deadline_seconds=0.05)
    await replica.residency.start()
    replica.engine.slow = {"support@v2"}
    await replica.ask()
    (done,) = await replica.done()
    assert (done.error, done.reply) == ("timeout", "")
    strict = Replica(tmp_path / "strict", deadline_seconds=0.01)  # the clock's tick: the champion took all of it
    await strict.residency.start()
    await strict.ask()
    assert await strict.done() == []


async def test_a_failure_is_told_as_one(replica):
    replica.engine.failing = {"support@v2"}
    await replica.ask()
    (done,) = await replica.done()
    assert done.error == "engine_error"


async def test_none_without_the_candidate_in_memory(replica):
    await replica.keeper.set(resident=replica.keeper.now.resident[:1])
    await replica.residency._ask()
    await replica.residency._pursue()
    await replica.ask()
    assert replica.asked == ["support@v1"]
    assert await replica.done() == []


async def test_what_the_keeper_cannot_take_is_told_the_next_time(replica):
    await replica.ask()
    await settle(lambda: replica.shadower._shadows)
    replica.keeper.troubles = [NotReady("it starts again")]
    with pytest.raises(NotReady):
        await replica.shadower.turn()
    assert len(await replica.done()) == 1
    await replica.shadower.turn()
    assert len(replica.keeper.reported[-1].shadows) == 0


async def test_what_waits_for_the_keeper_is_bounded(replica):
    for _ in range(MOST_KEPT + 5):
        await replica.ask()
        await settle(lambda: not replica.shadower._running)
    assert len(await replica.done()) == MOST_KEPT


def gold(reply="yes", trial=TRIAL, candidate="support@v2"):
    return Gold(trial, f"i-{reply}", "accepted", candidate, ({"role": "user", "content": "?"},), reply)


async def scored(replica, *golds):
    replica.keeper.golds = list(golds)
    await replica.shadower.turn()
    await replica.shadower.turn()
    return [one for report in replica.keeper.reported for one in report.scores]


async def test_good_replies_are_scored_by_both_versions(replica):
    (found,) = await scored(replica, gold())
    by = {
        name: sum(values) / len(values)
        for name, values in [(n, await replica.engine.score(f"support@v{n}", (), "yes")) for n in (1, 2)]
    }
    assert found == Score(TRIAL, "i-yes", "accepted", by[2], by[1])
    assert found.candidate != found.champion


async def test_a_text_that_cannot_be_scored_is_settled_and_holds_up_nothing(replica):
    replica.engine.unscorable = {"odd"}
    found = await scored(replica, gold("odd"), gold("yes"))
    assert [one.error for one in found] == ["unscorable", None]


async def test_an_engine_that_dies_under_a_shadow_is_known_as_such(replica):
    replica.engine.slow = replica.engine.failing = {"support@v2"}
    await replica.ask()
    replica.engine.is_dead = True
    replica.engine.go.set()
    (done,) = await replica.done()
    assert done.error == "engine_dead"


@pytest.mark.parametrize(("version", "error"), [("support@v2", "not_finite"), ("support@v1", "unscorable")])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
async def test_no_number_speaks_against_the_candidate_alone(replica, version, error, value):
    replica.engine.broken = {version: value}
    (found,) = await scored(replica, gold())
    assert (found.error, found.candidate, found.champion) == (error, 0.0, 0.0)


async def test_a_dead_engine_says_nothing_of_the_text(replica):
    replica.engine.unscorable, replica.engine.is_dead = {"odd"}, True
    with pytest.raises(NotReady):
        await scored(replica, gold("odd"))
    assert replica.shadower._scores == []


async def test_nothing_is_scored_for_another_trial_or_while_users_are_many(replica):
    assert await scored(replica, gold(trial="support-trial0"), gold(candidate="support@v9")) == []
    with replica.shadower.traffic(), replica.shadower.traffic(), replica.shadower.traffic():
        assert await scored(replica, gold()) == []
    assert len(await scored(replica, gold())) == 1


async def test_the_loop_outlives_what_goes_wrong_in_it(replica):
    turns = []

    async def pause(_):
        turns.append(None)
        if len(turns) == 4:
            raise asyncio.CancelledError

    replica.shadower._pause = pause
    replica.keeper.troubles = [NotReady("no"), ValueError("what?")]
    with pytest.raises(asyncio.CancelledError):
        await replica.shadower.run()
    assert len(replica.keeper.reported) == 1

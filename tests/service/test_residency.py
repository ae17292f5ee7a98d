"""A replica's loop over a true small engine: what is held, proven, served and let go."""

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from fakes import BASE, PROBES, FakeEngine, FakeKeeper, write_version

from service.errors import ArtifactInvalid, NotFound, NotReady
from service.load_notes import LoadNotes
from service.residency import Residency
from service.rollout.controller import Look, judge
from service.rollout.stages import Stage, Trial
from service.router import Route, resolve
from service.settings import Rollout


class Replica:
    """A residency, its engine and its keeper; `run` is its loop."""

    def __init__(self, folder):
        self.folder = folder
        self.keeper = FakeKeeper()
        self.pauses = []
        self.begin()

    def begin(self):
        """A process of its own: the first, or the successor of one that died."""
        self.engine = FakeEngine()
        held = {"base_name": BASE, "validate": self._validate, "notes": LoadNotes(self.folder / "loading"), "pause": self._pause}
        self.residency = Residency(self.engine, self.keeper, "r1", **held)

    def _validate(self, folder):
        if (folder / "DAMAGED").exists():
            raise ArtifactInvalid(f"{folder} was changed")

    async def _pause(self, seconds):
        self.pauses.append(seconds)

    def version(self, n, **shifts):
        return write_version(self.folder, f"desk@v{n}", n, **shifts)

    def broken(self, n):
        """A version with a fingerprint, and weights that no engine can read."""
        version = self.version(n)
        (self.folder / version.name / "adapter.json").unlink()
        return version

    async def want(self, *versions, **route):
        """The next desired state: these versions and one route."""
        routes = {"desk": Route("desk", **route)}
        await self.keeper.set(resident=versions, routes=routes, versions=tuple(v.name for v in versions))

    def answers(self, model="desk"):
        return resolve(self.residency.desired, BASE, model, "k").version

    def verdicts(self):
        return {name: verdict.reason or "ok" for name, verdict in self.residency.report().resident.items()}

    @contextlib.asynccontextmanager
    async def run(self):
        await self.residency.start()
        loop = asyncio.create_task(self.residency.run())
        await self.keeper.until(lambda report: report.number == self.residency.desired.number)
        yield loop
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop


@pytest.fixture
def replica(tmp_path):
    return Replica(tmp_path)


async def test_a_damaged_version_never_reaches_the_engine(replica):
    one = replica.version(1)
    (replica.folder / one.name / "DAMAGED").touch()
    await replica.want(one, champion=one.name)
    await replica.residency.start()
    assert replica.verdicts() == {one.name: "artifact_invalid"}
    assert replica.answers() == BASE
    assert replica.engine.calls == []


async def test_it_starts_with_everything_held_and_proven(replica):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, two, champion=two.name, previous=one.name)
    assert replica.residency.report().number == -1
    await replica.residency.start()
    assert replica.residency.desired.routes == replica.keeper.now.routes
    assert replica.residency.report().number == 1
    assert replica.verdicts() == {one.name: "ok", two.name: "ok"}
    assert replica.engine.calls[0] == ("load", two.name)  # who answers comes first
    assert (replica.answers(), replica.answers("desk@previous")) == (two.name, one.name)


@pytest.mark.parametrize(
    ("shifts", "reason"),
    [
        ({"shift": 0.0, "told": 0.5}, "noop_adapter"),
        ({"shift": -0.5, "told": 0.5}, "fingerprint_mismatch"),
        ({"shift": 0.0}, "noop_adapter"),
    ],
)
async def test_what_is_not_what_was_trained_is_reported_and_not_held(replica, shifts, reason):
    one, two = replica.version(1), replica.version(2, **shifts)
    await replica.want(one, two, champion=one.name, candidate=two.name)
    await replica.residency.start()
    assert replica.verdicts() == {one.name: "ok", two.name: reason}
    assert set(replica.engine.shifts) == {one.name}
    assert replica.residency.report().number == 1  # its routes need no candidate without weight
    with pytest.raises(NotFound, match="not held"):
        replica.answers(two.name)


@pytest.mark.parametrize("written", ["{", "{}", '{"probes": [{"token_ids": [1]}]}', "[]"])
async def test_a_fingerprint_that_cannot_be_read_proves_nothing(replica, written):
    one = replica.version(1)
    (replica.folder / one.name / "fingerprint.json").write_text(written)
    await replica.want(one, champion=one.name)
    await replica.residency.start()
    assert replica.verdicts() == {one.name: "fingerprint_invalid"}
    assert replica.engine.calls == []


async def test_the_base_is_measured_once(replica):
    versions = [replica.version(n) for n in (1, 2, 3)]
    await replica.want(*versions, champion="desk@v1")
    await replica.residency.start()
    scored = Counter(name for name, _ in replica.engine.scored)
    assert scored == {name: len(PROBES) for name in (None, "desk@v1", "desk@v2", "desk@v3")}


async def test_a_champion_that_cannot_load_is_stood_in_for_by_the_previous(replica):
    one, two = replica.version(1), replica.broken(2)
    await replica.want(one, two, champion=two.name, previous=one.name)
    await replica.residency.start()
    assert replica.verdicts() == {one.name: "ok", two.name: "load_failed"}
    assert replica.residency.report().number == -1
    assert replica.answers() == one.name


async def test_then_by_the_base_and_it_is_tried_again_until_it_loads(replica):
    one = replica.broken(1)
    await replica.want(one, champion=one.name)
    async with replica.run():
        assert (replica.answers(), replica.verdicts()) == (BASE, {one.name: "load_failed"})
        (replica.folder / one.name / "adapter.json").write_text('{"shift": 0.5}')
        await replica.keeper.set()
        await replica.keeper.until(lambda report: report.number == 2)
        assert (replica.answers(), replica.verdicts()) == (one.name, {one.name: "ok"})


async def test_stand_ins_are_no_evidence(replica):
    one, two = replica.version(1), replica.broken(2)
    await replica.want(one, two, champion=one.name, candidate=two.name, weight=0.5, salt="t", trial="t")
    await replica.residency.start()
    choices = [resolve(replica.residency.desired, BASE, "desk", str(n)) for n in range(50)]
    assert {(choice.version, choice.trial) for choice in choices} == {(one.name, None)}
    assert replica.residency.report().number == -1


async def test_routes_change_only_after_the_proof(replica):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, champion=one.name)
    loading, go = asyncio.Event(), asyncio.Event()
    load = replica.engine.load

    async def slowly(name, path, int_id):
        loading.set()
        await go.wait()
        await load(name, path, int_id)

    async with replica.run():
        replica.engine.load = slowly
        await replica.want(one, two, champion=two.name, previous=one.name)
        await loading.wait()
        assert (replica.answers(), replica.residency.report().number) == (one.name, 1)
        go.set()
        await replica.keeper.until(lambda report: report.number == 2)
        assert replica.answers() == two.name
        assert replica.verdicts() == {one.name: "ok", two.name: "ok"}


async def test_a_way_back_waits_for_no_load(replica):
    one, two, three = (replica.version(n) for n in (1, 2, 3))
    await replica.want(one, two, champion=two.name, previous=one.name)
    loading = asyncio.Event()

    async def never(*_):
        loading.set()
        await asyncio.Event().wait()

    async with replica.run():
        replica.engine.load = never
        await replica.want(one, three, champion=one.name)
        await loading.wait()
        assert replica.answers() == one.name


async def test_what_is_in_use_is_unloaded_when_it_is_not(replica):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, two, champion=one.name)
    async with replica.run():
        with replica.residency.hold(one.name), replica.residency.hold(one.name):
            with replica.residency.hold(one.name):
                await replica.want(two, champion=two.name)
                await replica.keeper.until(lambda report: report.number == 2)
            assert replica.answers() == two.name
            with pytest.raises(NotFound):
                replica.answers(one.name)
            assert one.name in replica.engine.shifts
            assert replica.residency.report().inflight == {one.name: 2}
        await replica.keeper.until(lambda report: report.number == 2 and set(report.resident) == {two.name})
        assert replica.engine.calls[-1] == ("unload", one.name)
        assert replica.residency.report().inflight == {}


async def test_a_version_that_is_wanted_again_while_it_drains_stays(replica):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, two, champion=one.name)
    async with replica.run():
        with replica.residency.hold(one.name):
            await replica.want(two, champion=two.name)
            await replica.keeper.until(lambda report: report.number == 2)
            await replica.want(one, two, champion=one.name)
            await replica.keeper.until(lambda report: report.number == 3)
        assert replica.answers() == one.name
    assert [name for verb, name in replica.engine.calls if verb == "unload"] == []


async def test_a_keeper_that_is_down_is_asked_again_and_what_is_held_answers_on(replica):
    one = replica.version(1)
    await replica.want(one, champion=one.name)
    replica.keeper.troubles = [NotReady("starting")] * 2
    await replica.residency.start()
    assert replica.pauses == [0.2, 0.4]
    replica.keeper.troubles = [NotReady("down"), OSError("cut off"), *[NotReady("down")] * 6]
    loop = asyncio.create_task(replica.residency.run())
    await replica.keeper.until(lambda report: report.number == 1)
    assert replica.answers() == one.name
    assert replica.pauses[2:] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    await replica.keeper.set()
    await replica.keeper.until(lambda report: report.number == 2)
    loop.cancel()


async def test_a_failed_candidate_does_not_stop_the_next(replica):
    one, two, three = replica.version(1), replica.broken(2), replica.version(3)
    await replica.want(one, two, champion=one.name, candidate=two.name)
    async with replica.run():
        assert replica.verdicts()[two.name] == "load_failed"
        await replica.want(one, three, champion=one.name, candidate=three.name)
        await replica.keeper.until(lambda report: report.number == 2 and three.name in report.resident)
        assert replica.verdicts() == {one.name: "ok", three.name: "ok"}
        assert replica.answers("desk@candidate") == three.name


async def test_a_dead_engine_ends_the_loop(replica):
    await replica.want(replica.broken(1), champion="desk@v1")
    replica.engine.is_dead = True
    with pytest.raises(NotReady, match="dead"):
        await replica.residency.start()


async def die(replica, name, call="load", times=2):
    """The replica and its successors start on a version that the engine dies of, so many times."""
    for _ in range(times):
        replica.begin()
        replica.engine.deadly = {name: call}
        with pytest.raises(NotReady, match="dead"):
            await replica.residency.start()
    replica.begin()
    replica.engine.deadly = {name: call}


@pytest.mark.parametrize("call", ["load", "logprobs"])
@pytest.mark.parametrize(
    ("stage", "weight", "end"),
    [
        (Stage.VERIFYING, 0.0, Stage.REJECTED),
        (Stage.SHADOW, 0.0, Stage.REJECTED),
        (Stage.CANARY, 0.5, Stage.ROLLING_BACK),
        (Stage.HOLD, 0.5, Stage.ROLLING_BACK),
    ],
)
async def test_a_candidate_that_replicas_die_of_is_refused_by_the_next_and_taken_out(replica, call, stage, weight, end):
    one, two = replica.version(1), replica.version(2)
    trial = Trial("t", "desk", two.name, one.name, Rollout(), 0.0, stage, steps=(0.0,))
    await replica.want(one, two, champion=one.name, candidate=two.name, weight=weight, salt="t", trial="t")
    await die(replica, two.name, call)
    await replica.residency.start()
    assert not replica.engine.is_dead
    assert replica.verdicts() == {one.name: "ok", two.name: "engine_crash"}
    assert {replica.answers(), replica.answers("desk@champion")} == {one.name}
    move = judge(trial, Look(1.0, one.name, (replica.residency.report(),), replica.keeper.now.number, 0.0)).move
    assert (move.to, move.reason) == (end, "engine_crash: replica r1")


async def test_it_is_not_tried_again_by_anybody_until_a_person_says_so(replica):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, two, champion=one.name, candidate=two.name)
    await die(replica, two.name)
    for _ in range(3):
        replica.begin()
        await replica.residency.start()
        assert [name for verb, name in replica.engine.calls if verb == "load"] == [one.name]
    detail = replica.residency.report().resident[two.name].detail
    (replica.folder / "loading" / two.name).unlink()  # as the detail says
    assert detail.endswith(f"remove {replica.folder / 'loading' / two.name}")
    replica.begin()
    await replica.residency.start()
    assert replica.verdicts()[two.name] == "ok"


async def test_a_single_death_may_be_anybody_s(replica):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, two, champion=one.name, candidate=two.name)
    for _ in range(3):
        await die(replica, two.name, times=1)
        replica.engine.deadly = {}
        await replica.residency.start()
        assert replica.verdicts()[two.name] == "ok"  # and what went well begins the count anew
    assert [path.name for path in (replica.folder / "loading").iterdir()] == ["lock"]


@pytest.mark.parametrize("has_previous", [True, False])
async def test_a_champion_that_replicas_die_of_is_stood_in_for(replica, has_previous):
    one, two = replica.version(1), replica.version(2)
    await replica.want(one, two, champion=two.name, previous=one.name if has_previous else None)
    await die(replica, two.name)
    async with replica.run():
        assert replica.answers() == (one.name if has_previous else BASE)
        assert replica.verdicts()[two.name] == "engine_crash"
        (replica.folder / "loading" / two.name).unlink()
        replica.engine.deadly = {}
        await replica.keeper.set()
        await replica.keeper.until(lambda report: report.number == 2)
        assert replica.answers() == two.name


async def test_a_replica_that_is_stopped_while_it_loads_has_not_died_of_it(replica):
    one = replica.version(1)
    await replica.want(one, champion=one.name)
    loading = asyncio.Event()

    async def never(*_):
        loading.set()
        await asyncio.Event().wait()

    for _ in range(3):
        replica.begin()
        replica.engine.load = never
        starting = asyncio.create_task(replica.residency.start())
        await loading.wait()
        loading.clear()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    replica.begin()
    await replica.residency.start()
    assert replica.verdicts() == {one.name: "ok"}


class CachingEngine(FakeEngine):
    """An engine with a prefix cache, as vLLM's: what an adapter's id made of a prompt is not computed again; log-probs are."""

    def __init__(self):
        super().__init__()
        self.ids, self.prefixes = {}, {}

    async def load(self, name, path, int_id):
        await super().load(name, path, int_id)
        self.ids[name] = int_id

    def says(self, name, prompt="a prompt"):
        return self.prefixes.setdefault((self.ids[name], prompt), self.shifts[name])


async def test_the_prefix_cache_of_an_id_that_is_used_again_is_stale_and_no_probe_sees_it(replica):
    """What the rule of unique ids is for."""
    engine, one, two = CachingEngine(), replica.version(1, shift=0.5), replica.version(2, shift=-0.5)
    await engine.load(one.name, replica.folder / one.name, 1)
    assert engine.says(one.name) == 0.5
    await engine.unload(one.name)
    await engine.load(two.name, replica.folder / two.name, 1)
    replica.residency._engine = engine
    measured = await replica.residency._measure(
        two.name, json.loads((replica.folder / two.name / "fingerprint.json").read_text())
    )
    assert measured.ok
    assert engine.says(two.name) == 0.5  # the weights of the other


async def test_a_version_under_an_id_that_the_engine_has_had_for_another_is_refused(replica):
    engine = replica.residency._engine = CachingEngine()
    one, two, three = replica.version(1, shift=0.5), replica.version(2, shift=-0.5), replica.version(3, shift=-0.5)
    await replica.want(one, champion=one.name)
    async with replica.run():
        assert engine.says(one.name) == 0.5
        await replica.want(replace(two, int_id=1), champion=two.name, previous=one.name)
        await replica.keeper.until(lambda report: two.name in report.resident)
        assert replica.verdicts()[two.name] == "id_reused"
        assert ("load", two.name) not in engine.calls
        await replica.want(three, champion=three.name)
        await replica.keeper.until(lambda report: report.number == 3)
        assert (replica.answers(), engine.says(three.name)) == (three.name, -0.5)

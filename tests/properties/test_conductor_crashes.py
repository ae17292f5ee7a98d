"""Killed anywhere, a conductor that is opened anew on the same folder comes to the same end, and promotes once.

Every transaction that writes is a place to die, just before its commit and just after it, and so is each start of a job.
"""

import pytest
import structlog

from replay import quarantine
from replay.guard import Standing
from service import audit, bisecting, jobs, status
from service.rollout import trials, watches
from service.rollout.stages import Stage
from tests.service.rollout.test_bisection import ended, world_of
from tests.service.world import LINE, QUICK, World


class Crash(BaseException):
    """The process is gone: nothing in it may catch this."""


class Undone(Exception):
    """The process died before the commit."""


class Fate:
    """Counts the places to die, and says when it has come to the one that is meant."""

    def __init__(self, at):
        self.at = at
        self.passed = 0

    def strikes(self):
        self.passed += 1
        return self.passed == self.at


class MortalWriter:
    """The writer as seen by a conductor that may die around each write."""

    def __init__(self, writer, fate):
        self.writer = writer
        self.fate = fate

    def submit(self, work):
        wrote = []

        def watched(conn):
            changes = lambda: conn.connection.driver_connection.total_changes  # noqa: E731
            before, value = changes(), work(conn)
            if changes() != before:
                wrote.append(True)
                if self.fate.strikes():
                    raise Undone
            return value

        future = self.writer.submit(watched)
        if isinstance(future.exception(), Undone):
            raise Crash
        if wrote and self.fate.strikes():
            raise Crash
        return future


def mortal(world, at):
    """Let the world's conductor die at the `at`-th place: around a write or the start of a job."""
    fate = mortal_writer(world, at)
    start = world.launcher.start

    def mortal_start(job, folder):
        if fate.strikes():
            raise Crash
        start(job, folder)
        if fate.strikes():
            raise Crash

    world.launcher.start = mortal_start
    return fate


def mortal_writer(world, at):
    fate = Fate(at)
    world.wrap = lambda writer: MortalWriter(writer, fate)
    world.crash()
    return fate


def immortal(world):
    world.wrap = lambda writer: writer
    world.crash()


def promoted(world):
    return world.champion == "desk@v1" and world.trial.stage is Stage.LIVE


def rolled_back(world):
    return world.trial is not None and world.trial.stage is Stage.ROLLED_BACK


ROLLOUT = {
    "weights": [0.5],
    "min_units": 8,
    "guardrails": {"error": {"kind": "error", "margin": 0.5}},
    "bake": {"holdback": 0.5, "min_units": 24, "min_seconds": 0},
}


def undone(world):
    """It is worse than the base from its promotion on: rolled back out of the bake."""
    if world.trial is not None and world.trial.stage is Stage.BAKE:
        world.quality = {"base": 1.0}
    return rolled_back(world)


BRIEF = {
    "feedback": {"metrics": {"thumb": {"type": "boolean", "window_seconds": 1}}},
    "lines": {
        LINE: {
            **QUICK["lines"][LINE],
            "rollout": ROLLOUT,
            "learning": {"preferences": {"corrections": True, "min_items": 20}},
        }
    },
}
"""A trial of some ten pairs, after a job with opinions: what is tried here is dying, many times."""


def begin(folder, quality):
    world = World(folder, BRIEF, replicas=1)
    world.thumbs = 1.0
    world.quality = {"desk@v1": quality}
    world.failing = set() if quality else {"desk@v1"}
    world.demonstrate(40)
    return world


def check_records(world):
    """A trial has moved if and only if its verdict is recorded, and each record gives the same verdict again."""

    def work(conn):
        assert audit.verify(conn).broken is None
        for trial in trials.of(conn, LINE):
            told = [event["body"] for event in audit.events(conn, LINE, "verdict") if event["body"]["trial"]["id"] == trial.id]
            stages = [body["trial"]["stage"] for body in told] + [trial.stage]
            assert stages == [Stage.VERIFYING, *(body["move"]["to"] for body in told)]
            assert all(one["is_same"] for one in status.replay(conn, trial.id))

    world.read(work)


SCENARIOS = {"promotion": (1.0, promoted), "rollback": (0.0, rolled_back), "bake": (1.0, undone)}


@pytest.fixture(autouse=True)
def _quiet():
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_death_anywhere_changes_nothing(tmp_path, scenario):
    quality, is_over = SCENARIOS[scenario]
    whole = begin(tmp_path / "whole", quality)
    places = mortal(whole, at=0)
    whole.until(is_over, customers=12)
    expected = whole.summary()
    whole.writer.close()
    assert places.passed >= 12
    for at in range(1, places.passed + 1):
        world = begin(tmp_path / str(at), quality)
        mortal(world, at)
        try:
            world.until(is_over, customers=12)
        except Crash:
            immortal(world)
            check_records(world)
            world.until(is_over, customers=12)
        check_records(world)
        assert world.summary() == expected, f"after a death at place {at}"
        world.writer.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_daemon_that_dies_after_each_write_still_gets_there(tmp_path, scenario):
    quality, is_over = SCENARIOS[scenario]
    whole = begin(tmp_path / "whole", quality)
    whole.until(is_over, customers=12)
    world = begin(tmp_path / "dying", quality)
    deaths = 0
    while not is_over(world):
        mortal_writer(world, at=2)  # just after the first write's commit
        try:
            world.until(is_over, customers=12)
        except Crash:
            deaths += 1
    immortal(world)
    assert deaths > 5
    assert world.summary() == whole.summary()
    for one in (whole, world):
        one.writer.close()


SHADOWED = {**ROLLOUT, "shadow": {"share": 1, "min_pairs": 15, "max_seconds": 20}}


def in_the_shadow(folder, likes):
    world = World(folder, {**BRIEF, "lines": {LINE: {**QUICK["lines"][LINE], "rollout": SHADOWED}}}, replicas=1)
    world.likes = {"desk@v1": likes}
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.stage is Stage.SHADOW)
    return world


def shadowed(world):
    told = world.read(lambda conn: status.trials_of(conn, LINE))
    return world.summary(), told[0]["shadow"], told[0]["reason"]


@pytest.mark.parametrize(("likes", "end"), [(0.0, Stage.CANARY), (-0.9, Stage.REJECTED)])
def test_a_death_anywhere_in_the_shadow_changes_nothing(tmp_path, likes, end):
    def has_left(world):
        return world.trial.stage is not Stage.SHADOW

    whole = in_the_shadow(tmp_path / "whole", likes)
    places = mortal_writer(whole, at=0)
    whole.until(has_left, customers=4)
    expected = shadowed(whole)
    assert whole.trial.stage is end
    whole.writer.close()
    assert places.passed >= 2
    for at in range(1, places.passed + 1):
        world = in_the_shadow(tmp_path / str(at), likes)
        mortal_writer(world, at)
        with pytest.raises(Crash):
            world.until(has_left, customers=4)
        immortal(world)
        check_records(world)
        world.until(has_left, customers=0)  # whoever asked before the death asks no more: what was compared is on disk
        check_records(world)
        assert shadowed(world) == expected, f"after a death at place {at}"
        world.writer.close()


ANCHOR = {"holdback": 0.2, "alarm": 5, "revert": 10_000, "reverts": True, "round_units": 10}
DECAYS = {
    **BRIEF,
    "lines": {
        LINE: {
            **BRIEF["lines"][LINE],
            "rollout": {**ROLLOUT, "bake": {"holdback": 0}, "anchor": ANCHOR},
        }
    },
}


def decaying(folder):
    """A champion that is worse than the base, which is its anchor."""
    world = World(folder, DECAYS, replicas=1)
    world.thumbs, world.quality = 1.0, {"base": 1.0}
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None)
    world.conductor.promote(LINE)
    world.until(lambda w: w.champion == "desk@v1" and w.trial.stage is Stage.LIVE)
    return world


def fallen(world):
    """How it ended, whenever that was: the anchor is the champion, and each step of its watch is in the log once."""

    def work(conn):
        assert audit.verify(conn).broken is None
        watch, told = watches.read(conn, LINE), audit.events(conn, LINE)
        steps = [(one["body"]["does"], one["body"]["round"]) for one in told if "does" in one["body"]]
        assert len(set(steps)) == len(steps)
        assert [does for does, _ in steps].count("alarm") <= 1
        assert steps[-1] == ("revert", watch.name)
        return watch.standing, watch.anchor, watch.is_open, steps[0]

    return world.summary(), world.read(work)


def test_a_death_anywhere_changes_nothing_on_the_way_back_to_an_anchor(tmp_path):
    whole = decaying(tmp_path / "whole")
    places = mortal_writer(whole, at=0)
    whole.until(lambda w: w.champion is None, customers=5)
    expected = fallen(whole)
    whole.writer.close()
    assert places.passed >= 6
    for at in range(1, places.passed + 1):
        world = decaying(tmp_path / str(at))
        mortal_writer(world, at)
        try:
            world.until(lambda w: w.champion is None, customers=5)
        except Crash:
            immortal(world)
            world.until(lambda w: w.champion is None, customers=5)
        assert fallen(world) == expected, f"after a death at place {at}"
        world.writer.close()


def searched(world):
    """How a search ended: what was named and held, and what each of its jobs was given."""

    def work(conn):
        assert audit.verify(conn).broken is None
        found = bisecting.last(conn, LINE)
        held = [(case.feedback_id, case.reason) for case in quarantine.cases(conn, LINE, (Standing.HELD,), None, 10)]
        return found["outcome"], found["named"], held, [jobs.held(conn, job.id) for job in jobs.of(conn, LINE)]

    return world.summary()["examples"], world.read(work)


def test_a_death_after_each_write_changes_nothing_in_a_search_for_harmful_examples(tmp_path):
    whole = world_of(tmp_path / "whole", 16, bisect=True)
    whole.until(ended)
    world, deaths = world_of(tmp_path / "dying", 16, bisect=True), 0
    while not ended(world):
        mortal_writer(world, at=2 - deaths % 2)  # by turns just before a commit, in the middle of the work, and just after one
        try:
            world.until(ended)
        except Crash:
            deaths += 1
            if deaths % 2 == 0:
                immortal(world)
                world.step()
    immortal(world)
    assert deaths > 6
    assert searched(world) == searched(whole)
    assert searched(whole)[1][0] == "found"
    for one in (whole, world):
        one.writer.close()


def test_the_champion_is_crowned_once(tmp_path):
    """Dying right after the promotion's commit, again and again, crowns nobody a second time."""
    world = begin(tmp_path, 1.0)
    world.until(promoted, customers=12)
    before = world.summary()
    for _ in range(3):
        world.crash()
        world.step(customers=12)
    assert world.summary() == before
    assert before["trials"][0][3] is Stage.LIVE
    assert [target for alias, _, target in before["crowned"] if alias == "champion"] == ["desk@v1"]
    assert before["examples"] == {LINE: {"trained": 40}}
    world.writer.close()

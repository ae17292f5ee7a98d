"""Killed anywhere, a conductor that is opened anew on the same folder comes to the same end, and promotes once.

Every transaction that writes is a place to die, just before its commit and just after it, and so is each start of a job.
"""

import pytest
import structlog

from service.rollout.stages import Stage
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
    return world.champion == "desk@v1"


def rolled_back(world):
    return world.trial is not None and world.trial.stage is Stage.ROLLED_BACK


BRIEF = {
    "feedback": {"metrics": {"thumb": {"type": "boolean", "window_seconds": 1}}},
    "lines": {LINE: {**QUICK["lines"][LINE], "rollout": {"weights": [0.5], "min_units": 8}}},
}
"""A trial of some ten pairs: what is tried here is dying, many times."""


def begin(folder, quality):
    world = World(folder, BRIEF, replicas=1)
    world.thumbs = 1.0
    world.quality = {"desk@v1": quality}
    world.failing = set() if quality else {"desk@v1"}
    world.demonstrate(40)
    return world


SCENARIOS = {"promotion": (1.0, promoted), "rollback": (0.0, rolled_back)}


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
            world.until(is_over, customers=12)
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


def test_the_champion_is_crowned_once(tmp_path):
    """Dying right after the promotion's commit, again and again, crowns nobody a second time."""
    world = begin(tmp_path, 1.0)
    world.until(promoted, customers=12)
    before = world.summary()
    for _ in range(3):
        world.crash()
        world.step(customers=12)
    assert world.summary() == before
    assert [target for alias, _, target in before["crowned"] if alias == "champion"] == ["desk@v1"]
    assert before["examples"] == {LINE: {"trained": 40}}
    world.writer.close()

import asyncio

import pytest
from fakes import FakeKeeper, settle

from replay.records import Arm, Interaction
from service.errors import NotReady, StorageFailed
from service.recorder import LONGEST_PAUSE_SECONDS, Recorder
from service.settings import Recording


def said(n):
    return Interaction(
        id=f"i{n}", line="desk", version="desk@v1", arm=Arm.CHAMPION, unit="u", slice="default", messages=(), reply="", at=0.0
    )


class Pauses(list):
    """A pause that no time passes in."""

    async def __call__(self, seconds):
        self.append(seconds)
        await asyncio.sleep(0)


def recorder(keeper, *, patience_seconds=60.0, **settings):
    pauses = Pauses()
    return Recorder(keeper, Recording(**settings), patience_seconds=patience_seconds, pause=pauses), pauses


def ids(keeper):
    return [interaction.id for interaction in keeper.recorded]


async def test_sync_returns_when_it_is_stored():
    keeper = FakeKeeper()
    await recorder(keeper)[0].record(said(1))
    assert ids(keeper) == ["i1"]


async def test_a_keeper_that_cannot_write_is_asked_until_it_can_and_ever_less_often():
    keeper = FakeKeeper()
    keeper.troubles = [NotReady("starting"), *[StorageFailed("the disk is full")] * 9]
    patient, pauses = recorder(keeper)
    await patient.record(said(1))
    assert ids(keeper) == ["i1"]
    assert len(pauses) == 10
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


async def test_patience_ends_but_the_interaction_follows():
    keeper = FakeKeeper()
    keeper.can_write.clear()
    hasty, _ = recorder(keeper, patience_seconds=0)
    await hasty.record(said(1))
    assert ids(keeper) == []
    keeper.can_write.set()
    await hasty.close(60)
    assert ids(keeper) == ["i1"]


async def test_in_the_background_the_caller_waits_only_for_a_place():
    keeper = FakeKeeper()
    keeper.can_write.clear()
    quiet, _ = recorder(keeper, mode="background", queue_size=2)
    await quiet.record(said(1))
    await quiet.record(said(2))
    third = asyncio.create_task(quiet.record(said(3)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not third.done()
    keeper.can_write.set()
    await third
    await quiet.close(60)
    assert sorted(ids(keeper)) == ["i1", "i2", "i3"]


async def test_a_caller_that_is_cancelled_loses_nothing():
    keeper = FakeKeeper()
    keeper.can_write.clear()
    held, _ = recorder(keeper)
    caller = asyncio.create_task(held.record(said(1)))
    await settle(lambda: held._writing)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    keeper.can_write.set()
    await held.close(60)
    assert ids(keeper) == ["i1"]


async def test_an_error_that_no_time_mends_costs_that_interaction_only():
    keeper = FakeKeeper()
    keeper.troubles = [TypeError("a bug")]
    one, pauses = recorder(keeper)
    await one.record(said(1))
    await one.record(said(2))
    assert (ids(keeper), pauses) == (["i2"], [])


async def test_the_shutdown_has_a_deadline():
    keeper = FakeKeeper()
    keeper.can_write.clear()
    quiet, _ = recorder(keeper, mode="background")
    await quiet.record(said(1))
    await quiet.close(0)
    await settle(lambda: not quiet._writing)
    assert ids(keeper) == []

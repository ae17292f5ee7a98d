import asyncio
from dataclasses import replace

import pytest

from replay import ledger
from replay.records import Arm, Feedback, FeedbackStatus, Interaction
from service import conductor
from service.errors import Conflict, NotFound, StorageFailed
from service.metrics import Metrics
from service.storage import Storage

ASKED = Interaction("i1", "desk", "desk@v1", Arm.CHAMPION, "u", "all", ({"role": "user", "content": "Well?"},), "Fine.", at=100.0)
SAID = Feedback("f1", "i1", "thumb", True, 100.0, 100.0)


@pytest.fixture
async def storage(settings, clock):
    storage = Storage(settings, Metrics("1", "base"), clock)
    await storage.open()
    await storage.do(conductor.create)  # as the keeper does: drift reads jobs
    yield storage
    await storage.close()


async def test_one_contradiction_among_many_is_alone_refused(storage):
    await storage.record([ASKED])
    outcomes = await storage.feedback([SAID, replace(SAID, value=False), replace(SAID, id="f2"), SAID])
    assert isinstance(outcomes[1], Conflict)
    assert [getattr(o, "is_repeat", None) for o in outcomes] == [False, None, False, True]
    assert (await storage.feedback_by_id("f2"))["served_by"] == "desk@v1"


async def test_what_was_answered_is_there_after_another_start(storage, settings, clock):
    await storage.feedback([SAID])
    await storage.close()
    again = Storage(settings, Metrics("1", "base"), clock)
    await again.open()
    assert (await again.feedback_by_id("f1"))["status"] == "pending"
    await again.close()


async def test_feedback_that_waits_too_long_expires(storage, clock):
    await storage.feedback([SAID])
    clock.now += 86_401
    await storage.tidy()
    assert (await storage.feedback_by_id("f1"))["status"] == FeedbackStatus.EXPIRED


async def test_old_interactions_are_sealed_and_feedback_still_finds_them(storage, clock):
    await storage.record([ASKED])
    assert storage.bytes()["archive"] == 0
    clock.now += 3601
    await storage.tidy()
    assert storage.bytes()["archive"] > 0
    (receipt,) = await storage.feedback([SAID])
    assert receipt.status is FeedbackStatus.MATCHED


async def test_one_that_is_old_is_sealed_with_those_half_as_old(storage, clock):
    """Else a steady stream would leave a segment for each look at it."""
    began = clock.now
    await storage.record([replace(ASKED, id=f"i{n}", at=began + at) for n, at in enumerate((0, 1000, 1900))])
    clock.now = began + 3599
    await storage.tidy()
    assert (await storage.do(ledger.sizes)).open_interactions == 3
    clock.now = began + 3601
    await storage.tidy()
    assert (await storage.do(ledger.sizes)).open_interactions == 1


async def test_many_are_sealed_piece_by_piece_and_feedback_comes_in_between(storage, clock, monkeypatch):
    """The ledger's one writer is not held for longer than a piece takes."""
    monkeypatch.setattr("service.storage.SEGMENT", 2)
    await storage.record([replace(ASKED, id=f"i{n}", at=clock.now) for n in range(7)])
    _, between = await asyncio.gather(storage.seal_all(), storage.do(ledger.sizes))
    assert between.open_interactions == 5
    assert [path.name for path in sorted(storage.archive.glob("*.json"))] == [f"{n:08d}.json" for n in (1, 2, 3, 4)]


async def test_at_the_end_everything_is_sealed(storage):
    await storage.record([replace(ASKED, id=f"i{n}") for n in range(5)])
    await storage.seal_all()
    sizes = await storage.do(ledger.sizes)
    assert (sizes.interactions, sizes.open_interactions) == (5, 0)


async def test_unknown_feedback_is_not_found(storage):
    with pytest.raises(NotFound):
        await storage.feedback_by_id("nope")


@pytest.mark.usefixtures("storage")
async def test_a_ledger_that_is_in_use_is_refused(settings, clock):
    with pytest.raises(StorageFailed, match="is another daemon using it"):
        await Storage(settings, Metrics("1", "base"), clock).open()


async def test_closed_storage_says_so(storage):
    await storage.close()
    with pytest.raises(StorageFailed, match="not open"):
        await storage.record([ASKED])
    assert not await storage.does_write()


async def test_after_a_failure_it_writes_again_once_there_is_room(storage, settings):
    async def limit(pages):
        await asyncio.wrap_future(storage.writer.submit(lambda conn: conn.exec_driver_sql(f"PRAGMA max_page_count={pages}")))

    assert await storage.does_write()
    await limit(1)
    with pytest.raises(StorageFailed, match="full"):
        await storage.record([replace(ASKED, id=f"i{n}", reply="x" * 4000) for n in range(50)])
    probe = settings.data_dir / "room.probe"
    probe.mkdir()  # a write that fails, as on a full disk
    assert not await storage.does_write()
    probe.rmdir()
    assert await storage.does_write()
    await limit(2**30)
    await storage.record([ASKED])

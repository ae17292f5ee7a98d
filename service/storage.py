"""The ledger as the daemon uses it: asynchronous, measured, its failures told as ours. Owned by the keeper.

`do` is the one way to the database for everybody in the keeper's process; what it returns is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from replay import ledger, similarity, votes
from replay.guard import Guard
from replay.quarantine import Decision
from replay.records import Feedback, Interaction, Receipt
from replay.writer import Work, WriteFailed, Writer
from service import drift, quarantine
from service.door import Json
from service.errors import Conflict, LearndError, NotFound, StorageFailed
from service.judging import Judging
from service.metrics import Metrics
from service.settings import Settings
from service.webhooks import Webhooks

T = TypeVar("T")

SEGMENT = 1000
"""Interactions in a segment: they are sealed in some 50 ms, in which nothing else is written and no feedback acknowledged."""
PROBE_BYTES = 2**16
"""What must fit on the disk before the ledger counts as writing again after a failure."""


class Storage:
    """The ledger and its archive under the data directory."""

    def __init__(self, settings: Settings, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._folder = settings.data_dir
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._guards = {name: line.admission.guard() for name, line in settings.lines.items()}
        self._watch = drift.Watch(settings)
        self._has_failed = False
        self._writer: Writer | None = None

    @property
    def archive(self) -> Path:
        """Where sealed segments are."""
        return self._folder / "archive"

    @property
    def writer(self) -> Writer:
        """The writer, for those that wait for it in threads of their own; raises `StorageFailed` when closed."""
        if self._writer is None:
            raise StorageFailed("the ledger is not open: the daemon is starting or stopping")
        return self._writer

    async def open(self) -> None:
        """Open and lock the ledger, and make the tables that are missing; raises `StorageFailed`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        seconds = self._settings.ledger.group_commit_seconds
        try:
            self._writer = await asyncio.to_thread(Writer, self._folder / "ledger.db", seconds, self._metrics.saw_commit)
        except WriteFailed as error:
            raise StorageFailed(str(error)) from error
        await self.do(ledger.create)

    async def close(self) -> None:
        """Finish what was asked, then let go of the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await asyncio.to_thread(writer.close)

    async def do(self, work: Work[T]) -> T:
        """Do `work` on the connection; returns once it is on disk. Raises `StorageFailed`, or what the work raised."""
        began = time.perf_counter()
        try:
            value = await asyncio.wrap_future(self.writer.submit(work))
        except WriteFailed as error:
            self._has_failed = True
            self._metrics.saw_write_failure()
            raise StorageFailed(str(error)) from error
        self._metrics.saw_write(time.perf_counter() - began)
        return value

    async def feedback(self, items: Sequence[Feedback]) -> list[Receipt | LearndError]:
        """See `KeeperDoor.feedback`."""
        given = await self.do(lambda conn: ledger.give_all(conn, items, self.archive, self.guard))
        outcomes: list[Receipt | LearndError] = [
            one if isinstance(one, Receipt) else Conflict(str(one), param="id") for one in given
        ]
        self._metrics.saw_feedback(items, outcomes)
        return outcomes

    async def feedback_by_id(self, feedback_id: str) -> Json:
        """See `KeeperDoor.feedback_by_id`."""
        view = await self.do(lambda conn: ledger.feedback_view(conn, feedback_id))
        if view is None:
            raise NotFound(f"no feedback {feedback_id!r}", param="id")
        plain = {"object": "feedback", **asdict(view.feedback), "status": view.status.value}
        return {**plain, "refusal": view.refusal, "served_by": view.served_by, "used_in": view.used_in}

    async def record(self, interactions: Sequence[Interaction]) -> None:
        """See `KeeperDoor.record`."""
        joined = await self.do(lambda conn: ledger.record(conn, interactions, self.guard))
        self._metrics.saw_interactions(interactions)
        self._metrics.saw_joined(joined, self._clock())

    def guard(self, line: str) -> Guard | None:
        """What guards a line's examples."""
        return self._guards.get(line)

    async def quarantine(self, line: str, which: quarantine.Which, reason: str | None) -> list[Json]:
        """See `KeeperDoor.quarantine`."""
        return await self.do(lambda conn: quarantine.listed(conn, self._settings, line, which, reason))

    async def overrule(self, ids: Sequence[str], decision: Decision, by: str) -> list[Json]:
        """See `KeeperDoor.overrule`."""
        how = quarantine.Ruling(decision, by, self._clock())
        return await self.do(lambda conn: quarantine.overrule(conn, ids, how, self.guard, self.archive))

    async def review(self) -> None:
        """Judge the votes that came since, then look for drift."""
        for prepare in (similarity.prepare, drift.prepare):  # not in the writer's thread, where everybody waits for it
            await asyncio.to_thread(prepare)
        while await self.do(lambda conn: votes.review(conn, self.guard, self.archive)):
            pass
        now = self._clock()
        try:
            changes = await self.do(lambda conn: self._watch.look(conn, now))
        except BaseException:
            self._watch = drift.Watch(self._settings)  # it has seen what was not stored
            raise
        for change in changes:
            self._metrics.saw_event("drift", change.line)

    async def tell(self) -> None:
        """Tell the settings' webhooks of what is done, for ever."""
        await Webhooks(self._settings.webhooks, self.do, self._clock, self._metrics.saw_failure).run()

    async def judge(self) -> None:
        """Have shadow replies judged, for ever, where there is a judge."""
        await Judging(self._settings, self.do, self.archive, self._metrics.saw_failure).run()

    async def tidy(self) -> None:
        """Give up on feedback that waited too long, review what came, and seal what is old or too much."""
        now, spec = self._clock(), self._settings.ledger
        before = now - self._settings.feedback.pending_seconds
        self._metrics.saw_expired(await self.do(lambda conn: ledger.expire(conn, before)))
        sizes = await self.do(ledger.sizes)
        if sizes.interactions:
            await self.review()
        if sizes.open_interactions > spec.seal_rows:
            await self._seal(now)
        elif await self._seal_piece(now - spec.seal_age_seconds):  # and half as much again: not a segment for each tick
            await self._seal(now - spec.seal_age_seconds / 2)

    async def seal_all(self) -> None:
        """Seal every interaction that is still open: the last act of a daemon that stops in order."""
        await self._seal(self._clock() + 1)

    async def does_write(self) -> bool:
        """Whether a write would succeed now, as far as is known: after a failure, whether the disk has room again."""
        if self._writer is None or not self._writer.is_alive:
            return False
        if self._has_failed:
            self._has_failed = not await asyncio.to_thread(_has_room, self._folder / "room.probe")
        return not self._has_failed

    def bytes(self) -> dict[str, int]:
        """Bytes on disk: the ledger with its write-ahead log, and the archive."""
        ledger_files = self._folder.glob("ledger.db*")
        return {"ledger": _size(ledger_files), "archive": _size(self.archive.rglob("*"))}

    async def _seal(self, older_than: float) -> None:
        """Piece by piece: what others ask of the ledger comes in between."""
        while await self._seal_piece(older_than):
            pass

    async def _seal_piece(self, older_than: float) -> int:
        sealed = await self.do(lambda conn: ledger.seal(conn, self.archive, older_than, SEGMENT))
        self._metrics.saw_sealed(sealed)
        return sealed


def _has_room(probe: Path) -> bool:
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return True


def _size(files: Iterable[Path]) -> int:
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # sealed or checkpointed away meanwhile
            total += file.stat().st_size
    return total

"""The keeper: the one process that owns the ledger, the registry and the conductor. It is `KeeperDoor` itself.

It serves feedback and records through `Storage`, wakes replicas that wait for a newer desired state, and lets the
conductor move every line on, once a second and whenever something happened. It knows no Ray and no HTTP. Kill it at any
instant: what it has answered is on disk, and `start` goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TypeVar

import structlog

from learners.base import BaseModel
from replay.quarantine import Decision
from replay.records import Feedback, Interaction, Receipt
from replay.shadows import Gold
from service import comparing, jobs, lineage, status
from service import conductor as conducting
from service.artifacts import validator
from service.comparing import ShadowReport
from service.conductor import Conductor
from service.door import Json
from service.errors import LearndError, NotReady, StorageFailed
from service.jobs import Job
from service.journal import Event
from service.metrics import Metrics
from service.replicas import Replicas
from service.rollout import trials
from service.rollout.controller import Verb
from service.router import Desired, ReplicaReport
from service.settings import Settings, SwitchMode
from service.shown import Shown
from service.storage import Storage
from service.training import Launcher

T = TypeVar("T")

TICK_SECONDS, TIDY_SECONDS = 1.0, 30.0
HASTE_SECONDS = 0.05
"""Pause after a tick that did something: the next step is often due at once."""
FORGET_SECONDS = 30.0
"""A replica that has not reported for this long is gone."""
LONGEST_POLL_SECONDS = 15.0
"""A replica that waits for news is made to report again well before it would be forgotten."""
log = structlog.get_logger(__name__)


class Keeper(Shown):
    """Owner of all that is durable; `start` before use, `close` at the end."""

    def __init__(
        self,
        settings: Settings,
        base: BaseModel,
        launcher: Launcher,
        clock: Callable[[], float] = time.time,
        validate: Callable[[Path], str] | None = None,
    ) -> None:
        """`validate` gives an artifact's digest or raises `ArtifactInvalid`; None: as the learners check what they make."""
        self._settings, self._base, self._launcher, self._clock = settings, base, launcher, clock
        self._metrics = Metrics(installed_version("learnd"), settings.base.served_name)
        self._storage = Storage(settings, self._metrics, clock)
        self._replicas = Replicas(FORGET_SECONDS)
        self._validate = validate or validator(base, settings.base.max_rank)
        self._conductor: Conductor | None = None
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._ticking = asyncio.Lock()
        self._desired = Desired()
        self._loops: list[asyncio.Task[None]] = []
        self._is_closing = False

    async def start(self) -> None:
        """Open the ledger, read the desired state, begin to conduct. Raises `StorageFailed` when it cannot be opened."""
        await self._storage.open()
        await self._storage.do(conducting.create)
        await self._storage.do(lambda conn: lineage.follow_all(conn, self._settings.lines))
        owned = (self._settings, self._base, self._storage.writer, self._launcher)
        self._conductor = Conductor(*owned, validate=self._validate, clock=self._clock, listen=self._heard)
        await self._publish()
        loops = (self._conduct(), self._tidy(), self._storage.tell(), self._storage.judge())
        self._loops = [asyncio.create_task(loop) for loop in loops]
        log.info("keeper_started", data_dir=str(self._settings.data_dir), desired=self._desired.number)

    async def close(self) -> None:
        """Let replicas go, finish the tick that runs, seal what is open, let go of the ledger."""
        self._is_closing = True
        async with self._changed:
            self._changed.notify_all()
        async with self._ticking:  # a tick is in a thread of its own: cancelling would leave it without its ledger
            for loop in self._loops:
                loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        try:
            await self._storage.seal_all()
        except StorageFailed as error:  # it stays in the ledger, whole: only not sealed
            log.warning("sealing_failed", error=error.message)
        await self._storage.close()
        log.info("keeper_closed")

    async def tick(self) -> bool:
        """Let the conductor do what is due now and publish what came of it; says whether anything was done."""
        async with self._ticking:
            reports = [seen.report for seen in self._replicas.live(self._clock())]
            done = await asyncio.to_thread(self._conducting.tick, reports)
            await self._publish()
            return bool(done)

    # What comes in.

    async def feedback(self, items: Sequence[Feedback]) -> list[Receipt | LearndError]:
        """See `KeeperDoor.feedback`."""
        return await self._storage.feedback(items)

    async def feedback_by_id(self, feedback_id: str) -> Json:
        """See `KeeperDoor.feedback_by_id`."""
        return await self._storage.feedback_by_id(feedback_id)

    async def record(self, interactions: Sequence[Interaction]) -> None:
        """See `KeeperDoor.record`."""
        await self._storage.record(interactions)

    async def desired(self, after: int, report: ReplicaReport, timeout_seconds: float) -> Desired:
        """See `KeeperDoor.desired`."""
        if self._replicas.saw(report, self._clock()):
            self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_seconds, LONGEST_POLL_SECONDS)), self._changed:
                await self._changed.wait_for(lambda: self._desired.number > after or self._is_closing)
        return self._desired

    async def shadow(self, said: ShadowReport) -> list[Gold]:
        """See `KeeperDoor.shadow`."""
        live = {seen.report.replica for seen in self._replicas.live(self._clock())}
        return await self._storage.do(lambda conn: comparing.take(conn, self._settings, said, live))

    # What is shown.

    async def status(self) -> Json:
        """See `KeeperDoor.status`."""
        now, ready = self._clock(), await self.readiness()
        said = await self._storage.do(lambda conn: status.stored(conn, self._settings, now))
        said["ledger"]["bytes"] = await asyncio.to_thread(self._storage.bytes)
        await asyncio.to_thread(self._add_learning, said["lines"])
        base = {"name": self._settings.base.served_name, "path": str(self._base.path), **self._base.digests}
        replicas = [seen.as_json() for seen in self._replicas.live(now)]
        return {**ready, "base": base, **said, "replicas": replicas, "desired": self._desired.number}

    async def readiness(self) -> Json:
        """See `KeeperDoor.readiness`."""
        live, does_write = self._replicas.live(self._clock()), await self._storage.does_write()
        reasons = status.missing(self._desired, self._settings.lines, live, does_write=does_write)
        return {"ready": not reasons, "reasons": reasons}

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """See `KeeperDoor.metrics`."""
        return self._metrics.render(await self.status(), accept)

    async def job(self, job_id: str) -> Json:
        """See `KeeperDoor.job`."""
        job = await self._storage.do(lambda conn: jobs.get(conn, job_id))
        return await asyncio.to_thread(self._with_progress, job)

    # What is done by hand.

    async def train(self, line: str, strategy: str | None = None) -> Json:
        """See `KeeperDoor.train`."""
        return (await self._act(lambda: self._conducting.train(line, strategy))).as_json()

    async def bisect(self, job_id: str) -> Json:
        """See `KeeperDoor.bisect`."""
        return await self._act(lambda: self._conducting.bisect(job_id))

    async def promote(self, line: str, version: str | None) -> Json:
        """See `KeeperDoor.promote`."""
        return trials.as_json(await self._act(lambda: self._conducting.promote(line, version)), None)

    async def rollback(self, line: str, version: str | None) -> Json:
        """See `KeeperDoor.rollback`."""
        return await self._act(lambda: self._conducting.roll_back(line, version))

    async def overrule(self, ids: Sequence[str], decision: Decision, by: str) -> list[Json]:
        """See `KeeperDoor.overrule`."""
        return await self._storage.overrule(ids, decision, by)

    async def steer(self, line: str, verb: Verb) -> Json:
        """See `KeeperDoor.steer`."""
        return trials.as_json(await self._act(lambda: self._conducting.steer(line, verb)), None)

    async def anchor(self, line: str, version: str) -> Json:
        """See `KeeperDoor.anchor`."""
        return await self._act(lambda: self._conducting.anchor(line, version))

    async def throw(self, mode: SwitchMode, reason: str) -> Json:
        """See `KeeperDoor.throw`."""
        return (await self._act(lambda: self._conducting.throw(mode, reason))).as_json()

    # Inside.

    @property
    def _conducting(self) -> Conductor:
        if self._conductor is None:
            raise NotReady("the keeper is starting: repeat the request in a moment")
        return self._conductor

    async def _act(self, command: Callable[[], T]) -> T:
        done = await asyncio.to_thread(command)
        await self._publish()
        self._wake.set()
        return done

    async def _conduct(self) -> None:
        while not self._is_closing:
            has_done = await self._safely("conductor", self.tick)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HASTE_SECONDS if has_done else TICK_SECONDS):  # wait_for may swallow a cancellation
                    await self._wake.wait()
            self._wake.clear()

    async def _tidy(self) -> None:
        while not self._is_closing:
            await self._safely("tidy", self._storage.tidy)
            await asyncio.sleep(TIDY_SECONDS)

    async def _safely(self, name: str, work: Callable[[], Awaitable[T]]) -> T | None:
        """The edge of a background loop: what fails is logged, counted and tried again."""
        try:
            return await work()
        except Exception:
            log.exception("loop_failed", loop=name)
            self._metrics.saw_failure(name)
            return None

    async def _publish(self) -> None:
        desired = await asyncio.to_thread(self._conducting.desired)
        if desired.number > self._desired.number or not self._desired.routes:
            async with self._changed:
                self._desired = desired
                self._changed.notify_all()

    def _add_learning(self, lines: Mapping[str, Json]) -> None:
        """What lies in files: how far a running job is, and what each buffer holds."""
        for name, line in lines.items():
            line["buffer"] = self._conducting.remembered(name)
            line["job"] = self._with_progress(line["job"]) if line["job"] else None

    def _with_progress(self, job: Job) -> Json:
        return {**status.UNSAID, **self._conducting.progress(job), **job.as_json()}

    def _heard(self, event: Event) -> None:
        self._metrics.saw_event(event.kind, event.line)
        if event.kind == "swapped":
            self._metrics.saw_swap(event.line, event.body["swap_seconds"], event.body["feedback_to_live_seconds"])

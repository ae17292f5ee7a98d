"""The keeper: the one process that owns the ledger, the registry and the conductor. It is `KeeperDoor` itself.

It serves feedback and records through `Storage`, wakes replicas that wait for a newer desired state, and lets the
conductor move every line on, once a second and whenever something happened. It knows no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TypeVar

import structlog

from learners import artifact
from learners.adapter import Unservable
from learners.base import BaseModel
from replay.records import Feedback, Interaction, Receipt
from service import conductor as conducting
from service import jobs, registry, status
from service.conductor import Conductor
from service.door import Json, KeeperDoor
from service.errors import ArtifactInvalid, LearndError, NotFound
from service.journal import Event
from service.metrics import Metrics
from service.replicas import Replicas
from service.rollout import trials
from service.router import Desired, ReplicaReport
from service.settings import Settings
from service.storage import Storage
from service.training import Launcher

T = TypeVar("T")

TICK_SECONDS = 1.0
TIDY_SECONDS = 30.0
FORGET_SECONDS = 20.0
"""A replica that has not reported for this long is gone."""

log = structlog.get_logger(__name__)


class Keeper(KeeperDoor):
    """Owner of all that is durable; `start` before use, `close` at the end."""

    def __init__(self, settings: Settings, base: BaseModel, launcher: Launcher, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._base, self._launcher, self._clock = settings, base, launcher, clock
        self._metrics = Metrics(installed_version("learnd"), settings.base.served_name)
        self._storage = Storage(settings, self._metrics, clock)
        self._replicas = Replicas(FORGET_SECONDS)
        self._conductor: Conductor | None = None
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._desired = Desired()
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the ledger, read the desired state, begin to conduct."""
        await self._storage.open()
        await self._storage.do(conducting.create)
        self._conductor = Conductor(
            self._settings, self._base, self._storage.writer, self._launcher,
            validate=self._validate, clock=self._clock, listen=self._heard,
        )  # fmt: skip
        await self._publish()
        self._loops = [asyncio.create_task(self._conduct()), asyncio.create_task(self._tidy())]

    async def close(self) -> None:
        """Stop conducting, seal what is open, let go of the ledger."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self._storage.seal_all()
        await self._storage.close()

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
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(lambda: self._desired.number > after)
        return self._desired

    # What is shown.

    async def status(self) -> Json:
        """See `KeeperDoor.status`."""
        now, ready = self._clock(), await self.readiness()
        said = await self._storage.do(lambda conn: status.stored(conn, self._settings, now))
        said["ledger"]["bytes"] = self._storage.bytes()
        for name, line in said["lines"].items():
            await self._add_learning(name, line)
        return {
            **ready,
            "base": {"name": self._settings.base.served_name, "path": str(self._base.path), **self._base.digests},
            **said,
            "replicas": [seen.as_json() for seen in self._replicas.live(now)],
            "desired": self._desired.number,
        }

    async def readiness(self) -> Json:
        """See `KeeperDoor.readiness`."""
        live, does_write = self._replicas.live(self._clock()), await self._storage.does_write()
        reasons = status.missing(self._desired, self._settings.lines, live, does_write=does_write)
        return {"ready": not reasons, "reasons": reasons}

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """See `KeeperDoor.metrics`."""
        return self._metrics.render(await self.status(), accept)

    async def lines(self) -> list[Json]:
        """See `KeeperDoor.lines`."""
        return await self._storage.do(lambda conn: status.lines(conn, self._settings))

    async def versions(self, line: str) -> list[Json]:
        """See `KeeperDoor.versions`."""
        self._check(line)
        return await self._storage.do(lambda conn: status.versions(conn, line))

    async def history(self, line: str) -> list[Json]:
        """See `KeeperDoor.history`."""
        self._check(line)
        return await self._storage.do(lambda conn: [change.as_json() for change in registry.history(conn, line)])

    async def jobs(self, line: str | None) -> list[Json]:
        """See `KeeperDoor.jobs`."""
        self._check(line)
        return await self._storage.do(lambda conn: [job.as_json() for job in jobs.of(conn, line)])

    async def job(self, job_id: str) -> Json:
        """See `KeeperDoor.job`."""
        job = await self._storage.do(lambda conn: jobs.get(conn, job_id))
        return {**job.as_json(), **self._conducting.progress(job)}

    async def trials(self, line: str | None) -> list[Json]:
        """See `KeeperDoor.trials`."""
        self._check(line)
        return await self._storage.do(lambda conn: status.trials_of(conn, line))

    async def trial(self, trial_id: str) -> Json:
        """See `KeeperDoor.trial`."""
        return await self._storage.do(lambda conn: status.trial(conn, trial_id))

    # What is done by hand.

    async def train(self, line: str) -> Json:
        """See `KeeperDoor.train`."""
        return (await self._act(lambda: self._conducting.train(line))).as_json()

    async def promote(self, line: str, version: str | None) -> Json:
        """See `KeeperDoor.promote`."""
        return trials.as_json(await self._act(lambda: self._conducting.promote(line, version)), None)

    async def rollback(self, line: str, version: str | None) -> Json:
        """See `KeeperDoor.rollback`."""
        return await self._act(lambda: self._conducting.roll_back(line, version))

    # Inside.

    @property
    def _conducting(self) -> Conductor:
        if self._conductor is None:
            raise LearndError("the keeper has not started")
        return self._conductor

    async def _act(self, command: Callable[[], T]) -> T:
        done = await asyncio.to_thread(command)
        await self._publish()
        self._wake.set()
        return done

    async def _conduct(self) -> None:
        while True:
            reports = [seen.report for seen in self._replicas.live(self._clock())]
            if await asyncio.to_thread(self._conducting.tick, reports):
                await self._publish()
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_SECONDS)
            self._wake.clear()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            try:
                await self._storage.tidy()
            except Exception:  # the edge of a background loop: logged, counted, tried again
                log.exception("tidy_failed")
                self._metrics.saw_failure("tidy")

    async def _publish(self) -> None:
        desired = await asyncio.to_thread(self._conducting.desired)
        if desired.number > self._desired.number or not self._desired.routes:
            async with self._changed:
                self._desired = desired
                self._changed.notify_all()

    async def _add_learning(self, name: str, line: Json) -> None:
        """What lies in files: how far the running job is, and what the buffer holds."""
        line["buffer"] = await asyncio.to_thread(self._conducting.remembered, name)
        if line["job"]:
            job = await self._storage.do(lambda conn: jobs.get(conn, line["job"]["id"]))
            line["job"] |= self._conducting.progress(job)

    def _validate(self, folder: Path) -> str:
        try:
            return artifact.check(folder, self._base, self._settings.base.max_rank)
        except Unservable as error:
            raise ArtifactInvalid(str(error)) from None

    def _heard(self, event: Event) -> None:
        self._metrics.saw_event(event.kind, event.line)
        if event.kind == "swapped":
            self._metrics.saw_swap(event.line, event.body["swap_seconds"], event.body["feedback_to_live_seconds"])

    def _check(self, line: str | None) -> None:
        if line is not None and line not in self._settings.lines:
            raise NotFound(f"no line {line!r}; there is {', '.join(self._settings.lines)}", param="line")

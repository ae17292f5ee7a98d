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
from replay.records import Feedback, Interaction, Receipt
from service import conductor as conducting
from service import jobs, registry, status
from service.conductor import Conductor
from service.door import Json, KeeperDoor
from service.errors import ArtifactInvalid, LearndError, NotFound, NotReady, StorageFailed
from service.jobs import Job
from service.journal import Event
from service.metrics import Metrics
from service.replicas import Replicas
from service.rollout import trials
from service.router import Desired, ReplicaReport
from service.settings import Settings
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
UNSAID = dict.fromkeys(("phase", "step", "steps", "loss", "tokens_per_second", "eta_seconds"))
"""A job's progress before it has said anything."""

log = structlog.get_logger(__name__)


class Keeper(KeeperDoor):
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
        self._validate = validate
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
        self._conductor = Conductor(
            self._settings,
            self._base,
            self._storage.writer,
            self._launcher,
            validate=self._validate or self._check_artifact,
            clock=self._clock,
            listen=self._heard,
        )
        await self._publish()
        self._loops = [asyncio.create_task(self._conduct()), asyncio.create_task(self._tidy())]
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

    # What is shown.

    async def status(self) -> Json:
        """See `KeeperDoor.status`."""
        now, ready = self._clock(), await self.readiness()
        said = await self._storage.do(lambda conn: status.stored(conn, self._settings, now))
        said["ledger"]["bytes"] = await asyncio.to_thread(self._storage.bytes)
        await asyncio.to_thread(self._add_learning, said["lines"])
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
        return await asyncio.to_thread(self._with_progress, job)

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
        return {**UNSAID, **self._conducting.progress(job), **job.as_json()}

    def _check_artifact(self, folder: Path) -> str:
        from learners import artifact  # here, since it brings torch: the keeper is small and quick to start until it needs it
        from learners.adapter import Unservable

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

"""A replica's loop: what should be resident becomes resident here, proven before it is used, dropped when nothing uses it.

Wait for the keeper's desired state → load what is new → probe it → report → switch the routes whose versions are live →
drain what is no longer wanted → unload it. A line whose needed versions are not all live keeps the route it had, so one
bad adapter holds up its own line only. Nothing is ever unloaded under a live request, however long that takes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from service.door import KeeperDoor
from service.engines.base import Engine
from service.errors import ArtifactInvalid, NotReady
from service.rollout.probe import TOLERANCE, ProbeResult, judge
from service.router import Desired, ReplicaReport, Resident, Route
from service.traffic import Traffic

log = structlog.get_logger(__name__)

FINGERPRINT = "fingerprint.json"


class Residency:
    """What one replica holds. `start` once, then `run`; one event loop."""

    def __init__(
        self,
        engine: Engine,
        keeper: KeeperDoor,
        replica: str,
        *,
        base_name: str,
        poll_seconds: float = 10.0,
        tolerance: float = TOLERANCE,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.traffic = Traffic(base_name)
        self._engine, self._keeper, self._replica = engine, keeper, replica
        self._poll_seconds, self._tolerance, self._pause = poll_seconds, tolerance, pause
        self._desired = Desired(number=-1)
        self._verdicts: dict[str, ProbeResult] = {}
        """Of each version that is wanted or still held; the `ok` ones are in the engine."""
        self._retiring: dict[str, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether every line that should be served is, in full."""
        return self.traffic.table.number == self._desired.number >= 0

    def report(self) -> ReplicaReport:
        """What this replica holds and serves."""
        return ReplicaReport(self._replica, self.traffic.table.number, dict(self._verdicts), self.traffic.inflight)

    async def start(self) -> None:
        """Become what should be, before the first request. Raises `NotReady`, naming what could not be proven."""
        await self._turn(timeout_seconds=0)
        await self._turn(timeout_seconds=0)  # tells what was found; the answer may be newer by now
        if not self.is_ready:
            found = {name: f"{verdict.reason} {verdict.detail}" for name, verdict in self._verdicts.items() if not verdict.ok}
            raise NotReady(f"replica {self._replica} cannot hold what its lines need: {found}")

    async def run(self) -> None:
        """Follow the desired state until cancelled; a keeper that is away is asked again."""
        try:
            while True:
                try:
                    await self._turn(self._poll_seconds)
                except Exception:
                    log.exception("residency_turn_failed", replica=self._replica)
                    await self._pause(1)
        finally:
            for task in self._retiring.values():
                task.cancel()

    async def settle(self) -> None:
        """Return when all that is to be unloaded has been."""
        await asyncio.gather(*self._retiring.values())

    async def _turn(self, timeout_seconds: float) -> None:
        desired = await self._keeper.desired(self._desired.number, self.report(), timeout_seconds)
        async with self._changing:
            self._desired = desired
            for version in desired.resident:
                if version.name not in self._verdicts or self._verdicts[version.name].reason == "load_failed":
                    self._verdicts[version.name] = await self._take(version)
            self._switch(desired)
        self._retire()

    async def _take(self, version: Resident) -> ProbeResult:
        """Load a version and prove it; what is not proven does not stay."""
        try:
            await self._engine.load(version.name, Path(version.path), version.int_id)
            verdict = await self._probe(version)
        except ArtifactInvalid as error:
            verdict = ProbeResult(ok=False, reason="load_failed", detail=error.message)
        if not verdict.ok:
            await self._engine.unload(version.name)
        log.info("version_taken", version=version.name, ok=verdict.ok, reason=verdict.reason, detail=verdict.detail)
        return verdict

    async def _probe(self, version: Resident) -> ProbeResult:
        try:
            fingerprint = read_fingerprint(Path(version.path))
        except ArtifactInvalid as error:
            return ProbeResult(ok=False, reason="fingerprint_invalid", detail=error.message)
        texts = [probe["token_ids"] for probe in fingerprint["probes"]]
        adapter = [await self._engine.logprobs(version.name, ids) for ids in texts]
        base = [await self._engine.logprobs(None, ids) for ids in texts]
        return judge(fingerprint, adapter, base, self._tolerance)

    def _switch(self, desired: Desired) -> None:
        """Put the new table in force as far as its versions are live."""
        live = {name for name, verdict in self._verdicts.items() if verdict.ok}
        before = self.traffic.table
        fresh = {line: route for line, route in desired.routes.items() if route.needed <= live}
        kept = {line: before.routes[line] for line in desired.routes if line not in fresh and line in before.routes}
        known = {version.name: version for version in (*before.resident, *desired.resident)}
        wanted = desired.resident_names | {name for route in kept.values() for name in route.needed}
        self.traffic.table = replace(
            desired,
            number=desired.number if len(fresh) == len(desired.routes) else before.number,
            resident=tuple(known[name] for name in known if name in wanted & live),
            routes=_in_order(desired.routes, fresh | kept),
        )
        if before.number != self.traffic.table.number:
            log.info("routes_switched", number=self.traffic.table.number, replica=self._replica)

    def _retire(self) -> None:
        """Begin to drop what nothing names any more."""
        for name in self._unwanted() - set(self._retiring):
            task = asyncio.create_task(self._drop(name))
            self._retiring[name] = task
            task.add_done_callback(lambda done, name=name: self._retired(name, done))

    async def _drop(self, name: str) -> None:
        await self.traffic.drained(name)
        async with self._changing:  # it may have been wanted again while it drained
            if name in self._unwanted():
                await self._engine.unload(name)
                del self._verdicts[name]
                log.info("version_dropped", version=name, replica=self._replica)

    def _unwanted(self) -> set[str]:
        return set(self._verdicts) - self._desired.resident_names - self.traffic.table.resident_names

    def _retired(self, name: str, done: asyncio.Task[None]) -> None:
        del self._retiring[name]
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("unload_failed", version=name, exc_info=error)


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """The trainer's fingerprint of the version in `folder`. Raises `ArtifactInvalid` when there is no whole one."""
    try:
        fingerprint = json.loads((folder / FINGERPRINT).read_text())
        assert all(set(probe) >= {"token_ids", "adapter", "base"} for probe in fingerprint["probes"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ArtifactInvalid(f"{folder / FINGERPRINT} cannot be read: {error!r}") from error
    return fingerprint  # type: ignore[no-any-return] # JSON


def _in_order(order: Mapping[str, Route], routes: Mapping[str, Route]) -> dict[str, Route]:
    return {line: routes[line] for line in order if line in routes}

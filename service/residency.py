"""A replica's loop: load what is desired, prove it, report it, switch to it, drain what is not, unload it.

Each turn asks the keeper what should be, telling it what is. `desired` is what the gateway goes by: one assignment, made
only when everything that its routes name is resident and proven. A version that cannot be is reported, never served, and stops
nothing else: its line goes on as before or, in a replica that has just started, with the previous champion or the base. So
it is, too, with one that replicas have died of: `service/load_notes.py` remembers it for their successors.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from service.door import KeeperDoor
from service.engines.base import Engine
from service.errors import ArtifactInvalid, EngineCrash, LearndError
from service.load_notes import LoadNotes
from service.rollout.probe import ProbeResult, judge
from service.router import Desired, ReplicaReport, Resident, Route

POLL_SECONDS = 10.0
"""How long a question to the keeper may wait for news; also how often a champion that failed is tried again."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 10.0
"""Between two questions to a keeper that does not answer; each pause is twice the last."""

log = structlog.get_logger(__name__)


class Residency:
    """What one replica holds and serves; nobody else loads into or unloads from its engine."""

    def __init__(
        self,
        engine: Engine,
        keeper: KeeperDoor,
        replica: str,
        *,
        base_name: str,
        validate: Callable[[Path], object],
        notes: LoadNotes,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`validate` raises `ArtifactInvalid` for a version's folder that is damaged, foreign or made for another base."""
        self.desired = Desired(number=-1)
        """What the gateway goes by: its number is that of the last state whose routes are served in full."""
        self._engine = engine
        self._keeper = keeper
        self._replica = replica
        self._base = base_name
        self._validate = validate
        self._notes = notes
        self._pause = pause
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._target = Desired(number=-1)
        self._held: dict[str, Resident] = {}
        self._ids: dict[int, str] = {}
        """Whose each id was that the engine has ever seen."""
        self._verdicts: dict[str, ProbeResult] = {}
        self._inflight: Counter[str] = Counter()
        self._unanswerable: frozenset[str] = frozenset()
        self._is_idle = asyncio.Event()
        self._base_logprobs: dict[tuple[int, ...], list[float]] = {}

    async def start(self) -> None:
        """Hold and prove what is desired; returns when the replica may answer, with whatever of it could be had."""
        while not await self._ask():
            pass
        await self._pursue()

    async def run(self) -> None:
        """Follow the desired state for ever; raises only when the engine is dead."""
        while True:
            await self._ask()
            await self._pursue()

    @contextmanager
    def hold(self, version: str) -> Iterator[None]:
        """Keep `version` from being unloaded while a request uses it."""
        self._inflight[version] += 1
        try:
            yield
        finally:
            self._inflight[version] -= 1
            if not self._inflight[version]:
                del self._inflight[version]
                if version in self._held and version not in self._wanted():
                    self._is_idle.set()

    def report(self) -> ReplicaReport:
        """What this replica holds and serves now."""
        return ReplicaReport(self._replica, self.desired.number, dict(self._verdicts), dict(self._inflight))

    # One turn.

    async def _ask(self) -> bool:
        """Report, and wait for news: another target, or a version that may go now. Says whether the keeper answered."""
        question = self._keeper.desired(self._target.number, self.report(), POLL_SECONDS)
        answer = asyncio.ensure_future(question)
        idle = asyncio.create_task(self._is_idle.wait())
        try:
            await asyncio.wait({answer, idle}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                self._target = answer.result()
        except Exception as error:
            known = isinstance(error, LearndError)
            log.warning("keeper_unreachable", again_in_seconds=self._pause_seconds, exc_info=None if known else error)
            await self._pause(self._pause_seconds)
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
            return False
        finally:
            answer.cancel()
            idle.cancel()
        self._pause_seconds = FIRST_PAUSE_SECONDS
        return True

    async def _pursue(self) -> None:
        self._is_idle.clear()
        self._switch()  # a way back to what is held waits for no load
        missing = self._missing()
        for version in missing:
            self._verdicts[version.name] = await self._prove(version)
        self._switch()
        self._tell_unanswerable()
        await self._retire()

    def _missing(self) -> list[Resident]:
        """What is to be loaded, what answers first; of what has failed, only what should answer now is tried again."""
        needed = {name for route in self._target.routes.values() for name in route.needed}
        missing = [
            version
            for version in self._target.resident
            if version.name not in self._held and (version.name in needed or version.name not in self._verdicts)
        ]
        return sorted(missing, key=lambda version: version.name not in needed)

    # Load and prove.

    async def _prove(self, version: Resident) -> ProbeResult:
        """Load a version and measure it; it stays only if it is what the trainer made."""
        try:
            await asyncio.to_thread(self._validate, Path(version.path))
            fingerprint = await asyncio.to_thread(_read_fingerprint, version)
        except ArtifactInvalid as error:
            return self._told(version, ProbeResult(ok=False, reason="artifact_invalid", detail=error.message))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return self._told(version, ProbeResult(ok=False, reason="fingerprint_invalid", detail=str(error)))
        if (known := self._ids.setdefault(version.int_id, version.name)) != version.name:
            detail = f"id {version.int_id} was that of {known}: prefix caches would answer from its weights, which no probe sees"
            return self._told(version, ProbeResult(ok=False, reason="id_reused", detail=detail))
        try:
            with self._notes.noted(version.name, self._replica):
                verdict = await self._load(version, fingerprint)
        except EngineCrash as error:
            return self._told(version, ProbeResult(ok=False, reason="engine_crash", detail=error.message))
        if verdict.ok:
            self._held[version.name] = version
        else:
            await self._engine.unload(version.name)
        return self._told(version, verdict)

    async def _load(self, version: Resident, fingerprint: dict[str, Any]) -> ProbeResult:
        """The verdict on a version that is whole on disk; raises `NotReady` when the engine died of it."""
        try:
            await self._engine.load(version.name, Path(version.path), version.int_id)
            return await self._measure(version.name, fingerprint)
        except Exception as error:  # noqa: BLE001 - whatever a version's files do to the engine is the version's fault…
            await self._engine.check()  # …unless the engine is dead
            return ProbeResult(ok=False, reason="load_failed", detail=str(error))

    async def _measure(self, name: str, fingerprint: dict[str, Any]) -> ProbeResult:
        texts = [tuple(probe["token_ids"]) for probe in fingerprint["probes"]]
        for text in texts:
            if text not in self._base_logprobs:
                self._base_logprobs[text] = await self._engine.logprobs(None, text)
        seen = [await self._engine.logprobs(name, text) for text in texts]
        return judge(fingerprint, seen, [self._base_logprobs[text] for text in texts])

    def _told(self, version: Resident, verdict: ProbeResult) -> ProbeResult:
        tell = log.info if verdict.ok else log.error
        event = "version_proven" if verdict.ok else "version_refused"
        tell(event, version=version.name, reason=verdict.reason, agreement=verdict.agreement, detail=verdict.detail)
        return verdict

    # Switch.

    def _switch(self) -> None:
        """Serve as much of the target as is held, in one assignment."""
        target = self._target
        routes = {line: self._route(route) for line, route in target.routes.items()}
        kept = target.resident_names | {name for route in routes.values() for name in route.needed}
        resident = tuple(version for name, version in self._held.items() if name in kept)
        number = target.number if routes == dict(target.routes) else self.desired.number
        self.desired = Desired(number, resident, routes, target.versions, target.is_base_only)

    def _route(self, wanted: Route) -> Route:
        """The wanted route if all that it needs is held, else the best there is; stand-ins are no evidence in a trial."""
        if wanted.needed <= self._held.keys():
            return wanted
        before = self.desired.routes.get(wanted.line)
        choices = (wanted.champion, before.champion if before else None, wanted.previous)
        champion = next((name for name in choices if name in self._held), None)
        alone = replace(wanted, champion=champion, candidate=None, weight=0.0, trial=None, is_baking=False)
        return replace(alone, shadow=None, watch="")

    def _tell_unanswerable(self) -> None:
        """Log the lines that are answered by a stand-in, when that changes."""
        served = self.desired.routes
        lines = frozenset(line for line, wanted in self._target.routes.items() if served[line] != wanted)
        for line in lines - self._unanswerable:
            wanted, instead = self._target.routes[line], served[line].champion or self._base
            log.error("route_not_served", line=line, needed=sorted(wanted.needed), answered_by=instead)
        self._unanswerable = lines

    # Drain and unload.

    def _wanted(self) -> frozenset[str]:
        routed = {name for route in self.desired.routes.values() for name in route.needed}
        return self._target.resident_names | routed

    async def _retire(self) -> None:
        """Unload what is neither desired nor routed to nor in use; forget the verdicts on what nobody asks for any more."""
        wanted = self._wanted()
        for name in [name for name in self._held if name not in wanted and not self._inflight[name]]:
            del self._held[name]
            await self._engine.unload(name)
            log.info("version_unloaded", version=name)
        self._verdicts = {name: verdict for name, verdict in self._verdicts.items() if name in wanted or name in self._held}


def _read_fingerprint(version: Resident) -> dict[str, Any]:
    fingerprint: dict[str, Any] = json.loads((Path(version.path) / "fingerprint.json").read_text())
    if not all({"token_ids", "adapter", "base"} <= probe.keys() for probe in fingerprint["probes"]):
        raise ValueError("a probe lacks token_ids, adapter or base")
    return fingerprint

"""A replica's part in a shadow: a candidate answers a sample of what was answered, for nobody to read, and texts are scored.

Off the users' way: a shadow begins when its user has the whole reply, only so many run at a time, none while the replica is busy,
and those that run are broken off when it becomes so. What comes of them goes to the keeper (`service/comparing.py`), which hands
back the good replies that candidate and champion are to be compared by. What the keeper cannot take is kept for the next time.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import structlog
from starlette.types import Message, Scope

from replay.outcomes import ENGINE_DEAD, is_failure
from replay.records import Arm, Interaction
from replay.shadows import NOT_FINITE, PREFIX, UNSCORABLE, Gold, Score, ScoreError, Shadow
from service import asking
from service.comparing import ShadowReport
from service.door import KeeperDoor
from service.engines.base import Engine
from service.errors import LearndError
from service.exchange import TIMEOUT, Asked, Clock, passed_on
from service.rollout.assignment import place_of
from service.router import Desired, Shadowing
from service.tap import ENGINE_ERROR, Tap

POLL_SECONDS = 2.0
MOST_KEPT = 200
"""Shadows and scores that wait for the keeper; more are dropped, the oldest first: they are a sample anyway."""

log = structlog.get_logger(__name__)


class Holder(Protocol):
    """What is needed of a replica's residency."""

    @property
    def desired(self) -> Desired:
        """What this replica holds and how it routes, now."""
        ...

    def hold(self, version: str) -> AbstractContextManager[None]:
        """Keep a version from being unloaded while it answers."""
        ...


class Shadower:
    """All shadows of one replica; `run` is its loop."""

    def __init__(
        self,
        engine: Engine,
        residency: Holder,
        keeper: KeeperDoor,
        replica: str,
        *,
        clock: Clock | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engine = engine
        self._residency = residency
        self._keeper = keeper
        self._replica = replica
        self._clock = clock or Clock()
        self._pause = pause
        self._users = 0
        self._running: set[asyncio.Task[None]] = set()
        self._shadows: list[Shadow] = []
        self._scores: list[Score] = []

    @contextmanager
    def traffic(self) -> Iterator[None]:
        """While a user is being answered; shadows make way when it is one too many."""
        self._users += 1
        try:
            if self._running and self._is_busy():
                self.close()
            yield
        finally:
            self._users -= 1

    def offer(self, scope: Scope, asked: Asked, served: Interaction) -> None:
        """Have the candidate answer this request too, if it falls into the sample and there is room; returns at once."""
        shadowing = self._shadowing(asked.choice.line)
        if shadowing is None or not _is_comparable(scope, served) or self._is_busy():
            return
        spec, place = shadowing.spec, place_of(f"{shadowing.trial}-shadow", served.id)
        if place >= spec.share or len(self._running) >= spec.max_running or served.latency_seconds > spec.deadline_seconds / 2:
            return
        task = asyncio.create_task(self._shadow(shadowing, scope, asked, served))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def run(self) -> None:
        """Report and score for ever."""
        while True:
            await self._pause(POLL_SECONDS)
            try:
                await self.turn()
            except LearndError as error:
                log.warning("shadows_not_reported", reason=error.message)
            except Exception:  # the loop's outer edge: a guard that fails must not take the replica with it
                log.exception("shadows_failed")

    async def turn(self) -> None:
        """Tell the keeper what has been done, and score what it hands out, as long as there is room."""
        if not self._shadows and not self._scores and not any(map(self._shadowing, self._residency.desired.routes)):
            return
        shadows, scores = tuple(self._shadows), tuple(self._scores)
        golds = await self._keeper.shadow(ShadowReport(self._replica, shadows, scores))
        del self._shadows[: len(shadows)], self._scores[: len(scores)]
        for gold in golds:
            if self._is_busy():
                return
            if (score := await self._scored(gold)) is not None:
                self._scores.append(score)

    def close(self) -> None:
        """Break off what runs; nothing of it is kept."""
        for task in self._running:
            task.cancel()

    # Inside.

    def _shadowing(self, line: str) -> Shadowing | None:
        """The shadow of a line, if this replica holds its candidate."""
        route = self._residency.desired.routes.get(line)
        shadowing = route.shadow if route else None
        return shadowing if shadowing and shadowing.version in self._residency.desired.resident_names else None

    def _is_busy(self) -> bool:
        """Whether more users are being answered than the strictest shadow allows."""
        found = (self._shadowing(line) for line in self._residency.desired.routes)
        return self._users > min((one.spec.max_busy for one in found if one), default=0)

    async def _shadow(self, shadowing: Shadowing, scope: Scope, asked: Asked, served: Interaction) -> None:
        at, began, tap = self._clock.now(), self._clock.elapsed(), Tap()
        try:
            with self._residency.hold(shadowing.version):
                async with asyncio.timeout(shadowing.spec.deadline_seconds):
                    await _ask(self._engine, scope, _body(asked.body, shadowing.version), tap)
            error = tap.error
        except TimeoutError:
            error = TIMEOUT
        except Exception as raised:  # whatever the engine raises is the candidate's failure, counted and logged
            log.warning("shadow_failed", version=shadowing.version, exc_info=raised)
            error = ENGINE_ERROR
        self._shadows.append(
            Shadow(
                id=f"{PREFIX}{uuid.uuid4().hex}",
                trial=shadowing.trial,
                interaction_id=served.id,
                unit=served.unit,
                version=shadowing.version,
                replica=self._replica,
                reply=tap.text,
                reply_tokens=tap.reply_tokens,
                at=at,
                latency_seconds=self._clock.elapsed() - began,
                error=ENGINE_DEAD if is_failure(error) and self._engine.is_dead else error,
            )
        )
        del self._shadows[:-MOST_KEPT]

    async def _scored(self, gold: Gold) -> Score | None:
        """Both versions' nats a token for a good reply; None when this replica does not hold them any more."""
        line = gold.candidate.partition("@")[0]
        route, names = self._residency.desired.routes.get(line), self._residency.desired.resident_names
        champion = route.champion if route else None
        if route is None or route.shadow is None or route.shadow.trial != gold.trial or gold.candidate not in names:
            return None
        try:
            with self._residency.hold(gold.candidate):
                found = [_mean(await self._engine.score(name, gold.messages, gold.reply)) for name in (gold.candidate, champion)]
        except Exception as error:  # noqa: BLE001 - whatever a text does to the engine is the text's fault…
            await self._engine.check()  # …unless the engine is dead
            log.warning("not_scorable", interaction=gold.interaction_id, reason=str(error))
            return _score(gold, error=UNSCORABLE)
        if all(map(math.isfinite, found)):
            return _score(gold, found[0], found[1])
        return _score(gold, error=UNSCORABLE if math.isfinite(found[0]) else NOT_FINITE)


def _score(gold: Gold, candidate: float = 0.0, champion: float = 0.0, error: ScoreError | None = None) -> Score:
    return Score(gold.trial, gold.interaction_id, gold.kind, candidate, champion, error)


def _is_comparable(scope: Scope, served: Interaction) -> bool:
    """Whether a user was answered by the line's champion, in words that may be looked at again."""
    is_plain = scope["path"].rstrip("/") in asking.WITH_USAGE and bool(served.messages)
    return is_plain and served.arm is Arm.CHAMPION and served.is_trainable and served.error is None


def _body(passed: bytes, version: str) -> bytes:
    """The same request of the candidate: one reply, whole."""
    body = {name: value for name, value in json.loads(passed).items() if name not in {"stream", "stream_options", "n"}}
    return json.dumps({**body, "model": version}).encode()


async def _ask(engine: Engine, scope: Scope, body: bytes, tap: Tap) -> None:
    """Send a request through the engine's app, which nobody waits for, and read the reply."""
    rest, never = [body], asyncio.Event()

    async def receive() -> Message:
        if not rest:
            await never.wait()
        return {"type": "http.request", "body": rest.pop(), "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            tap.start(message["status"], headers.get(b"content-type", b"").decode())
        elif message["type"] == "http.response.body":
            tap.feed(message.get("body", b""), is_last=not message.get("more_body", False))

    await engine.app(passed_on(scope, body), receive, send)


def _mean(logprobs: list[float]) -> float:
    return sum(logprobs) / len(logprobs) if logprobs else math.nan

"""One request at the engine, and its reply on the way back: tapped, timed, and recorded once, however it ends.

Made by the gateway for each request that it has understood. `service/tap.py` reads the reply, `service/recorder.py` has the
interaction stored: before the client has the end of its reply, when recording is `sync`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replay.records import Interaction
from replay.records import Message as ChatMessage
from service.api.errors import respond
from service.recorder import Recorder
from service.router import Choice
from service.tap import ENGINE_ERROR, Tap

CLIENT_DISCONNECTED = "client_disconnected"
REPLACED_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"x-request-id"})
"""Not passed on: the body is another, and vLLM would make the reply's id, which must be unique, of the client's."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Clock:
    """How time is told: `now` in Unix seconds, `elapsed` for durations."""

    now: Callable[[], float] = time.time
    elapsed: Callable[[], float] = time.perf_counter


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is understood: who answers it, what is passed on, what will be recorded."""

    choice: Choice
    body: bytes
    hides_usage: bool
    messages: tuple[ChatMessage, ...]
    slice: str
    is_trainable: bool
    principal: str


def passed_on(scope: Scope, body: bytes) -> Scope:
    """The scope of a request as the engine gets it, with a body of our own."""
    headers = [(name, value) for name, value in scope["headers"] if name not in REPLACED_HEADERS]
    return {**scope, "headers": [*headers, (b"content-length", b"%d" % len(body))]}


class Said:
    """A request's body, said again from the start, and then whatever else the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self.has_left = False

    async def receive(self) -> Message:
        """As the engine's app calls it."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        return message


class Exchange:
    """One request at the engine and its reply, recorded once, however it ends."""

    def __init__(self, asked: Asked, recorder: Recorder, clock: Clock) -> None:
        self._asked = asked
        self._recorder = recorder
        self._clock = clock
        self._tap = Tap(hides_usage=asked.hides_usage)
        self.recorded: Interaction | None = None
        """What the recorder was given; None until then, and when the client or the engine broke it off."""
        self._at, self._began = clock.now(), clock.elapsed()
        self._ttft_seconds: float | None = None
        self._start: Message | None = None
        self._has_started = self._has_left = self._is_recorded = False

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the reply back."""
        said = Said(self._asked.body, receive)

        async def answer(message: Message) -> None:
            self._has_left = self._has_left or said.has_left
            await self._answer(message, send)

        try:
            await app(passed_on(scope, self._asked.body), said.receive, answer)
        except asyncio.CancelledError:  # how Serve says that the client has gone
            self._has_left = True
            raise
        except Exception as error:  # noqa: BLE001 - the outer edge of a request: told to the client, logged, recorded
            await self._fail(error, scope, receive, send)
        finally:
            self._has_left = self._has_left or said.has_left
            if not self._is_recorded:
                self._recorder.record_later(self._interaction(ENGINE_ERROR))

    async def _answer(self, message: Message, send: Send) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-model-version"] = self._asked.choice.version
            headers["x-rollout-arm"] = self._asked.choice.arm.value
            self._tap.start(message["status"], headers.get("content-type", ""))
            self._start = message  # goes with the first word: until one is out, another replica can still be asked
            return
        if message["type"] == "http.response.body":
            is_last = not message.get("more_body", False)
            body = self._tap.feed(message.get("body", b""), is_last=is_last)
            if self._ttft_seconds is None and self._tap.has_streamed_text:
                self._ttft_seconds = self._clock.elapsed() - self._began
            if self._tap.is_over:
                await self._record()
            if not body and not is_last:
                return
            message = {**message, "body": body}
            if self._start is not None:
                start, self._start, self._has_started = self._start, None, True
                await self._send(start, send)
        await self._send(message, send)

    async def _send(self, message: Message, send: Send) -> None:
        try:
            await send(message)
        except OSError:  # how newer ASGI servers say that the client has gone
            self._has_left = True
            raise

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        """The engine's app has raised: answer for it, if it has not answered and somebody still listens."""
        if self._has_left:
            return
        log.error("engine_failed", version=self._asked.choice.version, exc_info=error)
        if not self._has_started:
            await self._record(ENGINE_ERROR)
            await respond(error)(scope, receive, send)
        elif not self._tap.is_over:
            raise error  # half a reply is out: only a broken connection can say so now

    async def _record(self, error: str | None = None) -> None:
        if not self._is_recorded:
            self._is_recorded = True
            self.recorded = self._interaction(error)
            await self._recorder.record(self.recorded)

    def _interaction(self, error: str | None) -> Interaction:
        asked, tap = self._asked, self._tap
        return Interaction(
            id=tap.id or f"request-{uuid.uuid4().hex}",
            line=asked.choice.line,
            version=asked.choice.version,
            arm=asked.choice.arm,
            unit=asked.choice.unit,
            slice=asked.slice,
            messages=asked.messages,
            reply=tap.text,
            at=self._at,
            trial=asked.choice.trial,
            finish_reason=tap.finish_reason,
            error=CLIENT_DISCONNECTED if self._has_left else tap.error or error,
            prompt_tokens=tap.prompt_tokens,
            reply_tokens=tap.reply_tokens,
            latency_seconds=self._clock.elapsed() - self._began,
            ttft_seconds=self._ttft_seconds,
            principal=asked.principal,
            is_trainable=asked.is_trainable,
        )

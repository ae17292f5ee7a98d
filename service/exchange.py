"""One request at the engine, and its reply on the way back: tapped, timed, and recorded once, however it ends.

An engine that does not begin in time is told to stop, and the client that it is too late.

Made by the gateway for each request that it has understood. `service/tap.py` reads the reply, `service/recorder.py` has the
interaction stored: before the client has the end of its reply, when recording is `sync`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replay.outcomes import ENGINE_DEAD, is_failure
from replay.records import Interaction
from replay.records import Message as ChatMessage
from service import form
from service.api.errors import respond
from service.errors import ReplyTimeout
from service.form import Form
from service.recorder import Recorder
from service.refusals import Openings
from service.router import Choice
from service.settings_engine import Deadlines
from service.tap import ENGINE_ERROR, Tap

CLIENT_DISCONNECTED, TIMEOUT = "client_disconnected", "timeout"
REPLACED_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"x-request-id"})
"""Not passed on: the body is another, and vLLM would make the reply's id, which must be unique, of the client's."""

log = structlog.get_logger(__name__)


class Timer(Protocol):
    """What is to happen later, unless it is cancelled."""

    def cancel(self) -> None:
        """Let it not happen."""


def _later(seconds: float, deed: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, deed)


@dataclass(frozen=True, slots=True)
class Clock:
    """How time is told: `now` in Unix seconds, `elapsed` for durations, `later` for what is due in so many seconds."""

    now: Callable[[], float] = time.time
    elapsed: Callable[[], float] = time.perf_counter
    later: Callable[[float, Callable[[], None]], Timer] = _later


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
    is_streamed: bool
    openings: Openings
    """What a refusal opens with, on the line that is asked."""
    form: Form | None = None
    """What is asked of the reply's form."""


def passed_on(scope: Scope, body: bytes) -> Scope:
    """The scope of a request as the engine gets it, with a body of our own."""
    headers = [(name, value) for name, value in scope["headers"] if name not in REPLACED_HEADERS]
    asgi = {**scope["asgi"], "spec_version": "2.3"}  # from 2.4 on Starlette's streams do not listen for who has left
    return {**scope, "asgi": asgi, "headers": [*headers, (b"content-length", b"%d" % len(body))]}


class Late(TimeoutError):
    """The engine has not begun in time."""


class Said:
    """A request's body, said again from the start, and then whatever else the client does."""

    def __init__(self, body: bytes, receive: Receive, leave: Callable[[], None] = lambda: None) -> None:
        """`leave` is called when the client leaves."""
        self._body: bytes | None = body
        self._receive = receive
        self._leave = leave
        self._cut = asyncio.get_running_loop().create_future()

    @property
    def is_cut(self) -> bool:
        """Whether we have ended it."""
        return self._cut.done()

    def cut(self) -> None:
        """Let it look to the engine's app as if the client had left: then vLLM lets the request go; cancelled, it would not."""
        if not self._cut.done():
            self._cut.set_result(None)

    async def receive(self) -> Message:
        """As the engine's app calls it."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        told = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait({told, self._cut}, return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                return {"type": "http.disconnect"}
        finally:
            told.cancel()
        message = told.result()
        if message["type"] == "http.disconnect":
            self._leave()
        return message


class Exchange:
    """One request at the engine and its reply, recorded once, however it ends."""

    def __init__(self, asked: Asked, recorder: Recorder, deadlines: Deadlines, clock: Clock, is_dead: Callable[[], bool]) -> None:
        """`is_dead` tells of the engine whether it has died."""
        self._asked = asked
        self._recorder = recorder
        self._deadlines = deadlines
        self._clock = clock
        self._is_dead = is_dead
        self._tap = Tap(hides_usage=asked.hides_usage)
        self.recorded: Interaction | None = None
        """What the recorder was given; None until then, and when the client or the engine broke it off."""
        self._at, self._began = clock.now(), clock.elapsed()
        self._ttft_seconds: float | None = None
        self._start: Message | None = None
        self._has_started = self._is_recorded = False
        self._left: str | None = None
        """Why the client has left, once it has."""
        self._timer: Timer | None = None

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the reply back."""
        said, failure = Said(self._asked.body, receive, self._leave), None
        self._set_timer(said)

        async def answer(message: Message) -> None:
            if self._left is None and not said.is_cut:
                await self._answer(message, send)

        try:
            failure = await self._pass_on(app, scope, said, answer)
            if failure is not None:
                await self._fail(failure, scope, receive, send)
        except asyncio.CancelledError:  # how Serve says that the client has gone
            self._leave()
            raise
        finally:
            self._stop_timer()
            if not self._is_recorded:
                self._recorder.record_later(self._interaction(_code(failure)))

    async def _pass_on(self, app: ASGIApp, scope: Scope, said: Said, answer: Send) -> Exception | None:
        """Have the engine's app answer; gives what went wrong."""
        failure: Exception | None = None
        try:
            await app(passed_on(scope, self._asked.body), said.receive, answer)
        except Exception as error:  # noqa: BLE001 - the outer edge of a request: told to the client, logged, recorded
            failure = error
        return self._late() if said.is_cut else failure

    def _set_timer(self, said: Said) -> None:
        if self._limit > 0:
            self._timer = self._clock.later(self._limit, said.cut)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _limit(self) -> float:
        return self._deadlines.first_token_seconds if self._asked.is_streamed else self._deadlines.whole_reply_seconds

    def _late(self) -> Late:
        name = "first_token_seconds" if self._asked.is_streamed else "whole_reply_seconds"
        return Late(f"nothing came from the engine within engine.{name}, {self._limit:g} s: ask again later")

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
            if self._tap.has_token or self._tap.is_over:
                self._stop_timer()
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
            self._leave()
            raise

    def _leave(self) -> None:
        """The client has gone: for reasons of its own, or because nothing came."""
        waited, patience = self._clock.elapsed() - self._began, self._deadlines.patience_seconds
        is_failed = 0 < patience <= waited and not self._tap.has_token
        self._left = self._left or (TIMEOUT if is_failed else CLIENT_DISCONNECTED)

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        """The engine's app has raised: answer for it, if it has not answered and somebody still listens."""
        if self._left is not None:
            return
        log.error("engine_failed", version=self._asked.choice.version, exc_info=error)
        if not self._has_started:
            await self._record(_code(error))
            await respond(ReplyTimeout(str(error)) if isinstance(error, Late) else error)(scope, receive, send)
        elif not self._tap.is_over:
            raise error  # half a reply is out: only a broken connection can say so now

    async def _record(self, error: str | None = None) -> None:
        if not self._is_recorded:
            self._is_recorded = True
            self.recorded = self._interaction(error)
            await self._recorder.record(self.recorded)

    def _interaction(self, error: str | None) -> Interaction:
        asked, tap = self._asked, self._tap
        failure, words = self._left or tap.error or error, tap.words
        if is_failure(failure) and self._is_dead():
            failure = ENGINE_DEAD
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
            error=failure,
            prompt_tokens=tap.prompt_tokens,
            reply_tokens=tap.reply_tokens,
            latency_seconds=self._clock.elapsed() - self._began,
            ttft_seconds=self._ttft_seconds,
            principal=asked.principal,
            is_trainable=asked.is_trainable,
            is_refusal=tap.has_declined or (asked.openings.opens(words) if words else None),
            has_form=None if failure else form.has(asked.form, words, tap.calls, tap.finish_reason),
        )


def _code(failure: Exception | None) -> str:
    return TIMEOUT if isinstance(failure, Late) else ENGINE_ERROR

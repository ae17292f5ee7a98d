"""The way of a request through a replica: who asks ▸ which version ▸ rewrite `model` ▸ pass on ▸ tap the reply ▸ record.

Plain ASGI around the engine's own OpenAI app, for everything under `/v1`. It answers `/v1/models` itself, lets nobody load
adapters, and changes nothing else: what the engine says, refusals too, goes back as it is. `service/asking.py` reads requests,
`service/tap.py` replies; `service/recorder.py` has the interactions stored.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replay.records import Interaction
from service import asking
from service.api.auth import Keyring
from service.api.errors import respond
from service.door import KeeperDoor
from service.errors import LearndError, NotFound, TooLarge
from service.logs import RequestId
from service.recorder import Recorder
from service.router import Choice, Desired, Model, models, resolve
from service.settings import Settings
from service.tap import ENGINE_ERROR, Tap

MODELS = "/v1/models"
REFUSED = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What replicas hold is decided by the conductor alone."""

CLIENT_DISCONNECTED = "client_disconnected"
REPLACED_HEADERS = frozenset({b"content-length", b"transfer-encoding", b"x-request-id"})
"""Not passed on: the body is another, and vLLM would make the reply's id, which must be unique, of the client's."""

log = structlog.get_logger(__name__)


class Holder(Protocol):
    """What the gateway needs of a replica's residency."""

    @property
    def desired(self) -> Desired:
        """What this replica holds and how it routes, now."""
        ...

    def hold(self, version: str) -> AbstractContextManager[None]:
        """Keep a version from being unloaded while a request uses it."""
        ...


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
    messages: tuple[dict[str, Any], ...]
    slice: str
    is_trainable: bool
    principal: str


class Gateway:
    """The ASGI app of an engine replica."""

    def __init__(
        self, app: ASGIApp, residency: Holder, keeper: KeeperDoor, settings: Settings, *, clock: Clock | None = None
    ) -> None:
        self._app = app
        self._residency = residency
        self._base = settings.base.served_name
        self._keyring = Keyring(settings)
        self._recorder = Recorder(keeper, settings.recording)
        self._max_body_bytes = settings.http.max_body_bytes
        self._drain_seconds = settings.cluster.drain_seconds
        self._slices = {
            name: {title: re.compile(pattern) for title, pattern in line.slices.items()}
            for name, line in settings.lines.items()
        }
        self._clock = clock or Clock()
        self._started_at = int(self._clock.now())
        self._entrance = RequestId(self._enter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what is not HTTP is the engine's lifespan, or refused."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._entrance(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def close(self) -> None:
        """Have everything stored that is still on its way to the keeper."""
        await self._recorder.close(self._drain_seconds)

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "root_path": ""}  # Serve passes the whole path and a root path: the engine would strip it twice
        try:
            principal = self._keyring.check(Headers(scope=scope).get("authorization"), "infer")
            await self._dispatch(scope, receive, send, principal)
        except LearndError as error:
            await respond(error)(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send, principal: str) -> None:
        path, method = scope["path"].rstrip("/"), scope["method"]
        if path in REFUSED or not path.startswith("/v1/"):
            raise NotFound(f"there is no {method} {path} here: adapters come and go by `learnd promote` and `learnd rollback`")
        if method == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
            await self._models(path[len(MODELS) + 1 :])(scope, receive, send)
        elif method == "POST":
            await self._ask(scope, receive, send, principal)
        else:
            await self._app(scope, receive, send)

    def _models(self, wanted: str) -> JSONResponse:
        known = {model.id: self._describe(model) for model in models(self._residency.desired, self._base)}
        if not wanted:
            return JSONResponse({"object": "list", "data": list(known.values())})
        if wanted not in known:
            raise NotFound(f"no model {wanted!r}; these exist: {', '.join(known)}", param="model")
        return JSONResponse(known[wanted])

    def _describe(self, model: Model) -> dict[str, Any]:
        told = {"id": model.id, "object": "model", "created": self._started_at, "owned_by": "learnd"}
        return {**told, "root": model.root, "parent": model.parent}

    async def _ask(self, scope: Scope, receive: Receive, send: Send, principal: str) -> None:
        raw = await _read(scope, receive, self._max_body_bytes)
        if raw is None:  # the client left before it had asked
            return
        if not raw:
            await self._app(scope, _Said(raw, receive).receive, send)
            return
        asked = self._understand(scope, raw, principal)
        with self._residency.hold(asked.choice.version):  # nothing awaits between the choice and the hold
            await _Exchange(asked, self._recorder, self._clock).run(self._app, scope, receive, send)

    def _understand(self, scope: Scope, raw: bytes, principal: str) -> Asked:
        headers, body = Headers(scope=scope), asking.parse(raw)
        identity = structlog.contextvars.get_contextvars()["request_id"]
        key = asking.sticky_key(body, headers.get("x-session-id"), identity)
        choice = resolve(self._residency.desired, self._base, body["model"], key)
        passed, hides_usage = asking.rewritten(body, scope["path"], choice.version)
        return Asked(
            choice=choice,
            body=passed,
            hides_usage=hides_usage,
            messages=asking.messages_of(body),
            slice=asking.slice_of(body, headers.get("x-slice"), self._slices.get(choice.line, {})),
            is_trainable=body.get("store") is not False,
            principal=principal,
        )


class _Said:
    """A request's body, said again from the start, and then whatever else the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self.has_left = False

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        self.has_left = self.has_left or message["type"] == "http.disconnect"
        return message


class _Exchange:
    """One request at the engine and its reply, recorded once, however it ends."""

    def __init__(self, asked: Asked, recorder: Recorder, clock: Clock) -> None:
        self._asked = asked
        self._recorder = recorder
        self._clock = clock
        self._tap = Tap(hides_usage=asked.hides_usage)
        self._at, self._began = clock.now(), clock.elapsed()
        self._ttft_seconds: float | None = None
        self._has_started = self._has_left = self._is_recorded = False

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the reply back."""
        said = _Said(self._asked.body, receive)

        async def answer(message: Message) -> None:
            self._has_left = self._has_left or said.has_left
            await self._answer(message, send)

        try:
            await app(self._passed_on(scope), said.receive, answer)
        except asyncio.CancelledError:  # how Serve says that the client has gone
            self._has_left = True
            raise
        except Exception as error:
            await self._fail(error, scope, receive, send)
        finally:
            self._has_left = self._has_left or said.has_left
            if not self._is_recorded:
                self._recorder.record_later(self._interaction(ENGINE_ERROR))

    def _passed_on(self, scope: Scope) -> Scope:
        headers = [(name, value) for name, value in scope["headers"] if name not in REPLACED_HEADERS]
        return {**scope, "headers": [*headers, (b"content-length", b"%d" % len(self._asked.body))]}

    async def _answer(self, message: Message, send: Send) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-model-version"] = self._asked.choice.version
            headers["x-rollout-arm"] = self._asked.choice.arm.value
            self._tap.start(message["status"], headers.get("content-type", ""))
            self._has_started = True
        elif message["type"] == "http.response.body":
            is_last = not message.get("more_body", False)
            body = self._tap.feed(message.get("body", b""), is_last=is_last)
            if self._ttft_seconds is None and self._tap.has_streamed_text:
                self._ttft_seconds = self._clock.elapsed() - self._began
            if self._tap.is_over:
                await self._record()
            if not body and not is_last:
                return
            message = {**message, "body": body}
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
            await self._recorder.record(self._interaction(error))

    def _interaction(self, error: str | None) -> Interaction:
        asked, tap = self._asked, self._tap
        return Interaction(
            id=tap.id or f"unanswered-{uuid.uuid4().hex}",
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


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None when the client left; raises `TooLarge` as soon as it is."""
    size = Headers(scope=scope).get("content-length", "0")
    told = int(size) if size.isascii() and size.isdigit() else 0
    body = bytearray()
    while True:
        if max(told, len(body)) > limit:
            raise TooLarge(f"the body is over http.max_body_bytes, {limit} bytes")
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False) and len(body) <= limit:
            return bytes(body)

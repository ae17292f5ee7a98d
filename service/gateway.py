"""The way of a request through a replica: who asks ▸ which version ▸ rewrite `model` ▸ pass on ▸ tap the reply ▸ record.

Plain ASGI around the engine's own OpenAI app, for everything under `/v1`. It answers `/v1/models` itself, lets nobody load
adapters, and changes nothing else: what the engine says, refusals too, goes back as it is. `service/asking.py` reads the
request, `service/exchange.py` has it answered and recorded, `service/shadowing.py` may then let a candidate try it too.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service import asking, form
from service.api.auth import Keyring, authorization
from service.api.errors import respond
from service.door import KeeperDoor
from service.errors import LearndError, NotFound, NotReady, TooLarge
from service.exchange import Asked, Clock, Exchange, Said, passed_on
from service.logs import RequestId
from service.recorder import Recorder
from service.refusals import OPENINGS, Openings
from service.router import Desired, Model, models, resolve
from service.settings import Settings
from service.shadowing import Shadower

MODELS = "/v1/models"
REFUSED = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
"""What replicas hold is decided by the conductor alone."""
COUNTS = frozenset({"/v1/messages/count_tokens"})
"""Where nothing is generated, so nothing is recorded: it is no reply that a trial could count."""


class Holder(Protocol):
    """What the gateway needs of a replica's residency."""

    @property
    def desired(self) -> Desired:
        """What this replica holds and how it routes, now."""
        ...

    def hold(self, version: str) -> AbstractContextManager[None]:
        """Keep a version from being unloaded while a request uses it."""
        ...


class Answering(Protocol):
    """What the gateway needs of an engine."""

    @property
    def app(self) -> ASGIApp:
        """Its own OpenAI server."""
        ...

    @property
    def is_dead(self) -> bool:
        """Whether it can never answer again."""
        ...


class Gateway:
    """The ASGI app of an engine replica."""

    def __init__(
        self,
        engine: Answering,
        residency: Holder,
        keeper: KeeperDoor,
        settings: Settings,
        *,
        clock: Clock | None = None,
        shadower: Shadower | None = None,
    ) -> None:
        self._engine = engine
        self._app = engine.app
        self._shadower = shadower
        self._residency = residency
        self._base = settings.base.served_name
        self._keyring = Keyring(settings)
        self._deadlines = settings.engine
        self._recorder = Recorder(keeper, settings.recording)
        self._max_body_bytes = settings.http.max_body_bytes
        self._drain_seconds = settings.cluster.drain_seconds
        self._slices = {
            name: {title: re.compile(pattern) for title, pattern in line.slices.items()} for name, line in settings.lines.items()
        }
        self._openings = {name: Openings(line.rollout.phrases) for name, line in settings.lines.items() if line.rollout.phrases}
        self._usual_openings = Openings(OPENINGS)
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
            principal = self._keyring.check(authorization(Headers(scope=scope)), "infer")
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
            await self._app(scope, Said(raw, receive).receive, send)
            return
        if self._engine.is_dead:  # what is asked of it now is no version's failure
            raise NotReady("this replica's engine has died and is being replaced: repeat the request in a moment")
        asked = self._understand(scope, raw, principal)
        exchange = Exchange(asked, self._recorder, self._deadlines, self._clock, lambda: self._engine.is_dead)
        with self._residency.hold(asked.choice.version), self._traffic():  # nothing awaits between the choice and the hold
            if scope["path"].rstrip("/") in COUNTS:
                await self._app(passed_on(scope, asked.body), Said(asked.body, receive).receive, send)
                return
            await exchange.run(self._app, scope, receive, send)
        if self._shadower is not None and exchange.recorded is not None:
            self._shadower.offer(scope, asked, exchange.recorded)

    def _traffic(self) -> AbstractContextManager[None]:
        return self._shadower.traffic() if self._shadower is not None else nullcontext()

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
            is_streamed=body.get("stream") is True,
            principal=principal,
            openings=self._openings.get(choice.line, self._usual_openings),
            form=form.asked(body, scope["path"]),
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

"""`/feedback`: what people say of replies, taken one by one, by the hundred, or as a stream of lines.

Nothing is acknowledged before the keeper has it on disk. Whatever arrives while a call to the keeper is under way travels
in the next one, so the cost of crossing to the keeper is shared.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from replay.records import Feedback, FeedbackStatus, Receipt
from service.api.auth import Keyring
from service.api.bodies import FeedbackBody, FeedbackReader, read
from service.api.errors import describe
from service.door import Json, KeeperDoor
from service.errors import InvalidRequest, LearndError, TooLarge
from service.settings import Settings

BATCH_ITEMS = 1000
"""Items in one call to the keeper, of a stream up to twice as many, and in one `/feedback/batch`."""
AHEAD = 8
"""Parts of a stream's body that are read while others are stored."""

Outcome = Receipt | LearndError


class Intake:
    """Shares calls to the keeper among the requests that wait for one."""

    def __init__(self, keeper: KeeperDoor) -> None:
        self._keeper = keeper
        self._waiting: deque[tuple[Feedback, asyncio.Future[Receipt]]] = deque()
        self._pump: asyncio.Task[None] | None = None

    async def put(self, item: Feedback) -> Receipt:
        """Store one piece of feedback; returns once it is on disk, raises what the keeper says of it."""
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(BATCH_ITEMS, len(self._waiting)))]
            batch = [(item, future) for item, future in taken if not future.done()]
            outcomes: Sequence[Receipt | Exception]
            try:
                outcomes = await self._keeper.feedback([item for item, _ in batch])
            except Exception as error:  # noqa: BLE001 - handed to each request that waits
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                _settle(future, outcome)


class FeedbackApi:
    """The routes under `/feedback`."""

    def __init__(self, keeper: KeeperDoor, keyring: Keyring, settings: Settings, clock: Callable[[], float]) -> None:
        self._keeper = keeper
        self._keyring = keyring
        self._limit = settings.http.max_body_bytes
        self._reader = FeedbackReader(settings.feedback.metrics)
        self._intake = Intake(keeper)
        self._clock = clock

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(tags=["feedback"])
        add = router.add_api_route
        add("/feedback", self.give, methods=["POST"], status_code=201, openapi_extra=_takes("application/json"))
        add("/feedback/batch", self.give_batch, methods=["POST"], openapi_extra=_takes("application/json", many=True))
        add("/feedback/stream", self.give_stream, methods=["POST"], openapi_extra=_takes("application/x-ndjson"))
        add("/feedback/{feedback_id}", self.get, methods=["GET"])
        return router

    async def give(self, request: Request) -> Response:
        """One piece of feedback: 201 stored, 202 waiting for its interaction, 200 known already, 409 another body."""
        principal = self._principal(request)
        item = self._reader.one(await read(request, self._limit), principal, self._clock())
        status, body = answer(await self._intake.put(item))
        return JSONResponse(body, status)

    async def give_batch(self, request: Request) -> Response:
        """Up to 1000 in one array, each with its own answer; the status is theirs when they agree, else 207."""
        principal = self._principal(request)
        items = self._reader.many(await read(request, self._limit), principal, self._clock())
        if not 0 < len(items) <= BATCH_ITEMS:
            raise InvalidRequest(f"a batch has 1 to {BATCH_ITEMS} items, not {len(items)}: use /feedback/stream for more")
        answers = [answer(outcome) for outcome in await self._store(items)]
        data = [{"index": index, "status_code": status, **body} for index, (status, body) in enumerate(answers)]
        statuses = {status for status, _ in answers}
        return JSONResponse({"object": "list", "data": data}, statuses.pop() if len(statuses) == 1 else 207)

    async def give_stream(self, request: Request) -> Response:
        """Any number of lines of JSON; a line of JSON comes back for each, once it is on disk.

        A client that sends all before it reads should send some 10,000 lines at a time, or both sides' buffers fill up.
        """
        batches = _ahead(self._items(_lines(request, self._limit), self._principal(request)))
        first = await anext(batches, None)
        try:
            opening = await self._acknowledge(first) if first else b""
        except LearndError:  # the status says it
            await batches.aclose()
            raise
        return _Acknowledgements(opening, batches, self._acknowledge_or_say)

    async def get(self, feedback_id: str, request: Request) -> Json:
        """One piece of feedback: where it stands and which versions learned from it."""
        self._principal(request)
        return await self._keeper.feedback_by_id(feedback_id)

    def _principal(self, request: Request) -> str:
        return self._keyring.check(request.headers.get("authorization"), "feedback")

    async def _store(self, items: Sequence[Feedback | LearndError]) -> list[Outcome]:
        good = [item for item in items if isinstance(item, Feedback)]
        stored = iter(await self._keeper.feedback(good) if good else [])
        return [next(stored) if isinstance(item, Feedback) else item for item in items]

    async def _items(self, batches: AsyncIterator[Lines], principal: str) -> AsyncIterator[Items]:
        async for lines in batches:
            yield [(number, self._read(line, principal)) for number, line in lines]

    async def _acknowledge(self, items: Items) -> bytes:
        return _acknowledgements(items, await self._store([item for _, item in items]))

    async def _acknowledge_or_say(self, items: Items) -> bytes:
        try:
            return await self._acknowledge(items)
        except LearndError as error:
            return _acknowledgements(items, [error] * len(items))

    def _read(self, line: bytes | LearndError, principal: str) -> Feedback | LearndError:
        if isinstance(line, LearndError):
            return line
        try:
            return self._reader.one(line, principal, self._clock())
        except InvalidRequest as error:
            return error


def answer(outcome: Outcome) -> tuple[int, Json]:
    """Status and body for one piece of feedback."""
    if isinstance(outcome, LearndError):
        return describe(outcome)
    status = 200 if outcome.is_repeat else 202 if outcome.status is FeedbackStatus.PENDING else 201
    said = {"id": outcome.id, "object": "feedback", "status": str(outcome.status)}
    return status, {**said, "inference_id": outcome.inference_id, "served_by": outcome.served_by}


Lines = Sequence[tuple[int, bytes | LearndError]]
"""Lines with their numbers from 1; an error in place of one that is too long."""
Items = list[tuple[int, Feedback | LearndError]]
"""The same lines, read."""


class _Acknowledgements(Response):
    """Answers while it reads. Starlette's StreamingResponse would take the request's body to watch for a hang-up."""

    def __init__(self, opening: bytes, batches: AsyncGenerator[Items], acknowledge: Callable[[Items], Awaitable[bytes]]) -> None:
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._opening = opening
        self._batches = batches
        self._acknowledge = acknowledge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's form
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._opening, "more_body": True})
        with contextlib.suppress(ClientDisconnect):  # what it sent is stored; nobody is there to hear it
            async with contextlib.aclosing(self._batches) as batches:
                async for items in batches:
                    await send({"type": "http.response.body", "body": await self._acknowledge(items), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lines(request: Request, limit: int) -> AsyncIterator[Lines]:
    """The lines of a body as they come, in batches; ends after a line over `limit` bytes."""
    number, rest = 0, b""
    async for chunk in request.stream():
        *whole, rest = (rest + chunk).split(b"\n")
        for start in range(0, len(whole), BATCH_ITEMS):
            part = whole[start : start + BATCH_ITEMS]
            if lines := [(number + i, line) for i, line in enumerate(part, 1) if line.strip()]:
                yield lines
            number += len(part)
        if len(rest) > limit:
            yield [(number + 1, TooLarge(f"line {number + 1} is over http.max_body_bytes ({limit}): stopped reading"))]
            return
    if rest.strip():
        yield [(number + 1, rest)]


async def _ahead(batches: AsyncIterator[Items]) -> AsyncGenerator[Items]:
    """The same items, read on while those before are stored: what came meanwhile comes together, within bounds."""
    waiting: asyncio.Queue[Items | _End] = asyncio.Queue(AHEAD)

    async def read_on() -> None:
        error: Exception | None = None
        try:
            async for items in batches:
                await waiting.put(items)
        except Exception as what:  # noqa: BLE001 - raised again where the items are taken, after those before it
            error = what
        await waiting.put(_End(error))

    reading = asyncio.create_task(read_on())
    try:
        while not isinstance(taken := await waiting.get(), _End):
            items = [*taken]
            while len(items) < BATCH_ITEMS and not waiting.empty() and not isinstance(taken, _End):
                taken = waiting.get_nowait()
                items += [] if isinstance(taken, _End) else taken
            yield items
            if isinstance(taken, _End):
                break
        if taken.error is not None:
            raise taken.error
    finally:
        reading.cancel()


class _End(NamedTuple):
    """No more comes, and why, if it was an error."""

    error: Exception | None


def _acknowledgements(items: Items, outcomes: Sequence[Outcome]) -> bytes:
    said = []
    for (number, _), outcome in zip(items, outcomes, strict=True):
        status, body = answer(outcome)
        said.append(to_json({"line": number, "status_code": status, **body}, ensure_ascii=True))  # a line stays one to any reader
    return b"\n".join([*said, b""])


def _settle(future: asyncio.Future[Receipt], outcome: Receipt | Exception) -> None:
    if future.done():  # the client hung up
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _takes(media_type: str, *, many: bool = False) -> dict[str, Any]:
    """The body's schema for the API's description; the body itself is read by hand, for speed and for its limit."""
    schema: dict[str, Any] = FeedbackBody.model_json_schema()
    schema = {"type": "array", "items": schema, "maxItems": BATCH_ITEMS} if many else schema
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}

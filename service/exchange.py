"""One request whose reply is recorded: from the engine's first byte to the last one that leaves.

The gateway makes it; it stands between the engine's `send` and the client's. Headers are added, the reply is read as it
passes, and its end is held back until the interaction is recorded: a whole body all of it, a stream its last event. A
reply that could not be recorded is withheld: feedback on it could never be joined. A client that hangs up, an engine that
breaks off and a cancelled request are recorded too, by the caller, from `unfinished`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import Message as AsgiMessage
from starlette.types import Send

from replay.records import Interaction, Message
from service.api.errors import describe
from service.errors import StorageFailed
from service.recorder import Recorder
from service.router import Choice
from service.tap import Reply, Stream, read


@dataclass(frozen=True, slots=True)
class Asked:
    """What is known of a request once it is routed."""

    path: str
    choice: Choice
    messages: tuple[Message, ...]
    slice: str
    principal: str
    reply_id: str
    """The id that the engine will give the reply."""
    is_trainable: bool
    hides_usage: bool
    """The stream's usage was asked for by us, not by the client."""
    headers: Mapping[str, str]
    """What the reply's headers say beside the engine's own."""


class Exchange:
    """The reply to one request on its way to the client."""

    def __init__(
        self,
        asked: Asked,
        recorder: Recorder,
        send: Send,
        *,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._asked, self._recorder, self._send = asked, recorder, send
        self._at, self._timer, self._began = clock(), timer, timer()
        self._reply = Reply(asked.reply_id)
        self._stream: Stream | None = None
        self._start: AsgiMessage | None = None
        self._body = bytearray()
        self._ttft_seconds: float | None = None
        self._is_settled = False
        """The interaction is recorded, or could not be and the client was told."""

    async def send(self, message: AsgiMessage) -> None:
        """Take what the engine sends, pass on what the client is to get."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            chunk, is_last = message.get("body", b""), not message.get("more_body", False)
            await (self._pass if self._stream else self._gather)(chunk, is_last)

    def unfinished(self, error: str) -> Interaction | None:
        """The interaction that is still to be recorded after the engine has returned, broken off with `error`, if any."""
        if self._is_settled:
            return None
        if not self._reply.is_complete:
            self._reply.error = self._reply.error or error
        return self._interaction()

    async def _begin(self, message: AsgiMessage) -> None:
        headers = MutableHeaders(scope=message)
        headers.update(self._asked.headers)
        self._start = message
        if headers.get("content-type", "").startswith("text/event-stream"):
            self._stream = Stream(self._asked.path, self._reply, self._asked.hides_usage)
            await self._send(message)

    async def _gather(self, chunk: bytes, is_last: bool) -> None:
        self._body += chunk
        if not is_last:
            return
        assert self._start is not None, "ASGI: a response starts before its body"
        body = bytes(self._body)
        read(self._asked.path, self._start["status"], body, self._reply)
        refusal = await self._record() if self._reply.is_complete else None  # else the client has gone
        if refusal is not None:
            status, said = describe(refusal)
            body = json.dumps(said).encode()
            self._start["status"] = status
            MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _pass(self, chunk: bytes, is_last: bool) -> None:
        assert self._stream is not None
        out = b"".join(self._stream.feed(chunk)) + (self._stream.finish() if is_last else b"")
        if self._ttft_seconds is None and self._stream.has_begun:
            self._ttft_seconds = self._timer() - self._began
        if self._reply.is_complete and not self._is_settled:
            refusal = await self._record()
            if refusal is not None:  # in place of the last event, so no client takes the reply for a whole one
                out = b"data: " + json.dumps(describe(refusal)[1]).encode() + b"\n\n"
        if out or is_last:
            await self._send({"type": "http.response.body", "body": out, "more_body": not is_last})

    async def _record(self) -> StorageFailed | None:
        """Record the reply; returns why it could not be."""
        refusal = None
        try:
            await self._recorder.record(self._interaction())
        except StorageFailed as error:
            refusal = error
        self._is_settled = True  # not when cancelled: `unfinished` then records it again, which is idempotent
        return refusal

    def _interaction(self) -> Interaction:
        asked, reply = self._asked, self._reply
        return Interaction(
            id=reply.id,
            line=asked.choice.line,
            version=asked.choice.version,
            arm=asked.choice.arm,
            unit=asked.choice.unit,
            trial=asked.choice.trial,
            slice=asked.slice,
            messages=asked.messages,
            reply=reply.text,
            at=self._at,
            finish_reason=reply.finish_reason,
            error=reply.error,
            prompt_tokens=reply.prompt_tokens,
            reply_tokens=reply.reply_tokens,
            latency_seconds=self._timer() - self._began,
            ttft_seconds=self._ttft_seconds,
            principal=asked.principal,
            is_trainable=asked.is_trainable,
        )

"""What the gateway itself costs: processor time of each request and token, with an engine and a keeper that cost nothing.

In one process, without a network: an app that streams `REPLY_TOKENS` events as vLLM writes them, asked directly and through the
gateway. The least of many short runs, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import logging
import pstats
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from _load import LONG, REPLY_TOKENS
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replay.records import Interaction
from service.door import KeeperDoor
from service.gateway import Gateway
from service.router import Desired
from service.settings import Settings

ROUNDS, REQUESTS = 40, 50
BASE = Settings().base.served_name
BODY = json.dumps({"model": BASE, "messages": [{"role": "user", "content": LONG}], "temperature": 0, "stream": True}).encode()
SCOPE = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "root_path": "/v1",
    "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"",
    "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
}  # fmt: skip


def _event(**said: Any) -> bytes:
    whole = {"id": "chatcmpl-8a7b6c5d", "object": "chat.completion.chunk", "created": 1732490000, "model": BASE, **said}
    return b"data: " + json.dumps(whole, separators=(",", ":")).encode() + b"\n\n"


WORD = _event(choices=[{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None, "token_ids": None}])
USAGE = _event(choices=[], usage={"prompt_tokens": 110, "completion_tokens": REPLY_TOKENS, "total_tokens": 158})
CHUNKS = [*[WORD] * REPLY_TOKENS, USAGE, b"data: [DONE]\n\n"]


class Engine:
    """One that is always well."""

    is_dead = False

    @property
    def app(self) -> ASGIApp:
        return stream


async def stream(_: Scope, receive: Receive, send: Send) -> None:
    """A stream as vLLM writes it, at once."""
    await receive()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
    )
    for chunk in CHUNKS:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Holder:
    """A replica that holds nothing but its base."""

    desired = Desired(1)

    @contextmanager
    def hold(self, _: str) -> Iterator[None]:
        yield


class Keeper(KeeperDoor):
    """Takes interactions, and no time."""

    async def record(self, interactions: Sequence[Interaction]) -> None:
        assert all(said.reply_tokens == REPLY_TOKENS for said in interactions)


async def ask(app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
    """One request; what comes back is dropped."""

    async def receive() -> Message:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(_: Message) -> None:
        pass

    await app(dict(SCOPE), receive, send)


async def cost(app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> float:
    """Processor microseconds of a request."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(REQUESTS):
            await ask(app)
        best = min(best, (time.process_time() - began) / REQUESTS)
    return 1e6 * best


async def measure(is_profiled: bool) -> dict[str, float]:
    gateway = Gateway(Engine(), Holder(), Keeper(), Settings())
    through, direct = await cost(gateway), await cost(stream)
    if is_profiled:
        with cProfile.Profile() as profile:
            for _ in range(REQUESTS * 10):
                await ask(gateway)
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
    return {"request_us": round(through - direct), "token_us": round((through - direct) / REPLY_TOKENS, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    parser.add_argument("--profile", action="store_true", help="where it goes")
    said = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    told = asyncio.run(measure(said.profile))
    if not said.json:
        print(f"a request of {REPLY_TOKENS} tokens: {told['request_us']} µs, {told['token_us']} µs a token")
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

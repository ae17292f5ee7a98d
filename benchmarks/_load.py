"""A closed loop of clients over HTTP: each asks, reads the stream to its end, notes when each token came, and asks again.

Whole waves (a multiple of the clients) of replies of one length, so that a turn has no ragged ends. The client is a few lines
over asyncio's streams: it shares the cores with the server that it measures, where a full HTTP client would be felt.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

LONG = "Tell me about the history of computing and of the people who made it, one by one. " * 5
SHORT = "Name a city."
"""With SmolLM2's chat template about 110 and 25 tokens, the number in front included."""
REPLY_TOKENS = 48
PATIENCE_SECONDS = 120


@dataclass
class Reply:
    """One request: who was asked, when each piece of text came, what went wrong."""

    model: str
    began: float
    at: list[float] = field(default_factory=list)
    tokens: int = 0
    """As the server counts them; the pieces, where it does not."""
    text: str = ""
    named: str = ""
    """The version that the reply names."""
    header: str = ""
    """`x-model-version`, of learnd alone."""
    ended: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text."""
        return self.at[0] - self.began

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when it ended, seconds) of each pause between two pieces."""
        return [(after, after - before) for before, after in itertools.pairwise(self.at)]


@dataclass(frozen=True)
class Turn:
    """All replies of one turn, and how long it took."""

    replies: Sequence[Reply]
    seconds: float

    @property
    def good(self) -> list[Reply]:
        """Those without an error."""
        return [reply for reply in self.replies if not reply.error]

    @property
    def failed(self) -> int:
        """How many had one."""
        return len(self.replies) - len(self.good)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole turn."""
        return sum(reply.tokens for reply in self.good) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Over the whole turn."""
        return len(self.good) / self.seconds

    @property
    def ttfts(self) -> list[float]:
        """Of each reply that has a text, seconds."""
        return [reply.ttft for reply in self.good if reply.at]

    @property
    def pauses(self) -> list[float]:
        """All pauses between two pieces, seconds."""
        return [gap for reply in self.good for _, gap in reply.gaps]


def prompts(start: int) -> Iterator[str]:
    """Long and short in turn, each with a number in front: no two share a prefix that a cache could hold."""
    for number in itertools.count(start):
        yield f"{number * 7919 % 99991} {SHORT if number % 2 else LONG}"


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, by linear interpolation; nan of nothing."""
    if not values:
        return float("nan")
    ordered, place = sorted(values), q * (len(values) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def drive(
    port: int,
    models: Sequence[str],
    clients: int,
    waves: int,
    asked: Iterator[str],
    *,
    tokens: int = REPLY_TOKENS,
    within: float = math.inf,
) -> Turn:
    """One turn of `clients * waves` requests, the models in turn; returns when the last reply has ended.

    Raises `TimeoutError` when that takes longer than `within` seconds.
    """
    return asyncio.run(driven(port, models, clients, waves, asked, tokens=tokens, within=within))


async def driven(
    port: int,
    models: Sequence[str],
    clients: int,
    waves: int,
    asked: Iterator[str],
    *,
    tokens: int = REPLY_TOKENS,
    within: float = math.inf,
) -> Turn:
    """The same, where a loop runs already."""
    work = iter([(models[i % len(models)], next(asked)) for i in range(clients * waves)])
    replies: list[Reply] = []

    async def client() -> None:
        for model, prompt in work:
            replies.append(await ask(port, model, prompt, tokens))

    began = time.perf_counter()
    async with asyncio.timeout(within):
        await asyncio.gather(*(client() for _ in range(clients)))
    return Turn(replies, time.perf_counter() - began)


async def keep_asking(port: int, model: str, clients: int, texts: Sequence[str], done: asyncio.Event, tokens: int) -> list[Reply]:
    """Ask these texts in turn with so many clients until `done`; every request that was begun is read to its end."""
    replies, numbers = [], itertools.count()

    async def client() -> None:
        while not done.is_set():
            replies.append(await ask(port, model, texts[next(numbers) % len(texts)], tokens))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


async def ask(port: int, model: str, prompt: str, tokens: int = REPLY_TOKENS) -> Reply:
    """One streamed chat completion of exactly `tokens` tokens, greedy; an error is in the reply, never raised."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reply = Reply(model, time.perf_counter())
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await _exchange(port, json.dumps(body).encode(), reply)
        if not reply.error and not reply.at:
            reply.error = "no text"
    except (OSError, ValueError, LookupError, TimeoutError, asyncio.IncompleteReadError) as error:
        reply.error = repr(error)
    reply.ended = time.perf_counter()
    return reply


async def _exchange(port: int, body: bytes, reply: Reply) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        reply.header = headers.get("x-model-version", "")
        if status != 200:
            reply.error = f"http_{status}: {(await reader.read(500))!r}"
            return
        rest = b""
        async for piece in _pieces(reader, is_chunked=headers.get("transfer-encoding") == "chunked"):
            now = time.perf_counter()
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                _read(event, now, reply)
        if not reply.ended:
            reply.error = reply.error or "the stream broke off"
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, *, is_chunked: bool) -> AsyncIterator[bytes]:
    if not is_chunked:
        while piece := await reader.read(65536):
            yield piece
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _read(event: bytes, now: float, reply: Reply) -> None:
    data = event.removeprefix(b"data: ")
    if data == b"[DONE]":
        reply.ended = now
        return
    said = json.loads(data)
    reply.named = said.get("model") or reply.named
    if said.get("error"):
        reply.error = str(said["error"])
    for choice in said.get("choices") or ():
        if text := choice["delta"].get("content"):
            reply.text += text
            reply.at.append(now)
    reply.tokens = (said.get("usage") or {}).get("completion_tokens") or max(reply.tokens, len(reply.at))

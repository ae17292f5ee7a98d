"""Small true things to serve with: an engine whose adapters are numbers, a keeper in memory, a client that can hang up.

An adapter is one number, `shift`: the engine says it in each reply and moves its log-probs by it.
"""

import asyncio
import json
import time
import uuid
from dataclasses import dataclass, field, replace

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route as Path
from starlette.types import Message

from replay.records import Interaction
from replay.shadows import Gold
from service.comparing import ShadowReport
from service.door import KeeperDoor
from service.errors import ArtifactInvalid, InvalidRequest, NotReady
from service.router import Desired, ReplicaReport, Resident, Route

BASE = "smollm2-135m"
PROBES = ([5, 3, 8, 2], [7, 1, 4])


def measured(shift: float, token_ids) -> list[float]:
    """Log-probs of the tokens after the first, under an adapter that is `shift` (0: the base)."""
    return [-1 - token / 10 + shift * (-1) ** token for token in token_ids[1:]]


def write_version(folder, name: str, int_id: int, shift: float = 0.5, told: float | None = None) -> Resident:
    """A version on disk, with the fingerprint of `told` in place of its own if given."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "adapter.json").write_text(json.dumps({"shift": shift}))
    told = shift if told is None else told
    probes = [{"token_ids": ids, "adapter": measured(told, ids), "base": measured(0, ids)} for ids in PROBES]
    (path / "fingerprint.json").write_text(json.dumps({"probes": probes}))
    return Resident(name, str(path), int_id)


class FakeEngine:
    """An `Engine` whose app speaks as vLLM does, chat, completions and messages, whole and streamed.

    What the last message says decides: `explode` raises, `kill` ends the engine, `break` raises half-way in a stream, `wait` answers once `go` is set.
    """

    def __init__(self) -> None:
        self.shifts: dict[str, float] = {}
        self.calls: list[tuple[str, str]] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.go = asyncio.Event()
        self.is_dead = False
        self.scored: list[tuple[str | None, tuple[int, ...]]] = []
        self.broken: dict[str | None, float] = {}
        """What adapters say of every token, in place of a log-prob."""
        self.unscorable: set[str] = set()
        self.slow: set[str] = set()
        """Versions that answer once `go` is set."""
        self.failing: set[str] = set()
        self.deadly: dict[str, str] = {}
        """Versions that the engine dies of, and at which call: `load` or `logprobs`."""
        self.app = Starlette(
            routes=[
                Path("/v1/chat/completions", self._answer, methods=["POST"]),
                Path("/v1/completions", self._answer, methods=["POST"]),
                Path("/v1/messages", self._answer, methods=["POST"]),
                Path("/v1/messages/count_tokens", self._count, methods=["POST"]),
                Path("/v1/version", self._version),
                Path("/v1/load_lora_adapter", self._version, methods=["POST"]),
            ]
        )

    async def load(self, name, path, int_id) -> None:
        self.calls.append(("load", name))
        self._die_of(name, "load")
        try:
            self.shifts[name] = json.loads((path / "adapter.json").read_text())["shift"]
        except OSError as error:
            raise ArtifactInvalid(f"{path}: {error}") from error

    async def unload(self, name) -> None:
        if self.shifts.pop(name, None) is not None:
            self.calls.append(("unload", name))

    async def logprobs(self, name, token_ids) -> list[float]:
        self.scored.append((name, tuple(token_ids)))
        self._die_of(name, "logprobs")
        return measured(0 if name is None else self.shifts[name], token_ids)

    async def score(self, name, messages, reply) -> list[float]:
        """As by template: one token a letter, and the end."""
        if reply in self.unscorable:
            raise InvalidRequest("the template refuses it")
        said = await self.logprobs(name, [0, *(ord(letter) % 10 for letter in reply), 0])
        return [self.broken.get(name, value) for value in said]

    async def check(self) -> None:
        if self.is_dead:
            raise NotReady("dead")

    async def close(self) -> None:
        self.shifts.clear()

    def _die_of(self, name, call) -> None:
        if self.deadly.get(name) == call:
            self.is_dead = True
            raise RuntimeError("the engine's process has ended")

    async def _version(self, _: Request) -> JSONResponse:
        return JSONResponse({"version": "fake"})

    async def _count(self, request: Request) -> JSONResponse:
        self.bodies.append(body := await request.json())
        return JSONResponse({"input_tokens": len(body["messages"][-1]["content"])})

    async def _answer(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if body["model"] not in {*self.shifts, BASE}:
            return JSONResponse({"error": {"message": "no such model", "type": "NotFoundError", "param": None, "code": 404}}, 404)
        if body.get("temperature", 0) < 0:
            return JSONResponse({"error": {"message": "temperature", "type": "BadRequestError", "param": None, "code": 400}}, 400)
        is_chat = "messages" in body
        asked = body["messages"][-1]["content"] if is_chat else body["prompt"]
        if body["model"] in self.slow:
            await self.go.wait()
        if asked == "explode" or body["model"] in self.failing:
            raise RuntimeError("the engine has exploded")
        if asked == "kill":
            self.is_dead = True
            raise RuntimeError("the engine's process has ended")
        if asked == "wait":
            await _first(self.go.wait(), _gone(request))
        words = [f"{body['model']} ", "says ", str(self.shifts.get(body["model"], 0))]
        form = {"id": f"cmpl-{uuid.uuid4().hex}", "model": body["model"]}
        usage = {"prompt_tokens": len(str(asked)), "completion_tokens": len(words), "total_tokens": len(str(asked)) + len(words)}
        if request.url.path == "/v1/messages":
            return self._message(form, words, usage, asked, is_streamed=body.get("stream"))
        if body.get("stream"):
            options = body.get("stream_options") or {}
            usage = usage if options.get("include_usage") else None
            return StreamingResponse(self._stream(form, words, usage, is_chat, asked), media_type="text/event-stream")
        said = {"message": {"role": "assistant", "content": "".join(words)}} if is_chat else {"text": "".join(words)}
        return JSONResponse({**form, "choices": [{"index": 0, **said, "finish_reason": "stop"}], "usage": usage})

    def _message(self, form, words, usage, asked, *, is_streamed):
        usage = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        message = {**form, "type": "message", "role": "assistant", "content": [], "stop_reason": None, "usage": usage}
        if is_streamed:
            return StreamingResponse(self._events(message, words, usage, asked), media_type="text/event-stream")
        content = [{"type": "text", "text": "".join(words)}]
        return JSONResponse({**message, "content": content, "stop_reason": "end_turn"})

    async def _events(self, message, words, usage, asked):
        yield _named({"type": "message_start", "message": {**message, "usage": {**usage, "output_tokens": 0}}})
        yield _named({"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0})
        for word in words:
            yield _named({"type": "content_block_delta", "delta": {"type": "text_delta", "text": word}, "index": 0})
            if asked == "say error":
                yield _named({"type": "error", "error": {"type": "internal_error", "message": "out of memory"}})
                return
        yield _named({"type": "content_block_stop", "index": 0})
        yield _named({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage})
        yield _named({"type": "message_stop"})

    async def _stream(self, form, words, usage, is_chat, asked):
        for number, word in enumerate(words):
            said = {"delta": {"content": word}} if is_chat else {"text": word}
            finish = "stop" if number == len(words) - 1 else None
            yield _event({**form, "choices": [{"index": 0, **said, "finish_reason": finish}]})
            if asked == "break":
                raise RuntimeError("the engine has broken off")
            if asked == "say error":
                yield _event({"error": {"message": "out of memory", "code": 500}})
                break
            if asked == "kill between":
                self.is_dead = True
                raise RuntimeError("the engine's process has ended")
            if asked == "wait between":
                await self.go.wait()
        if usage:
            yield _event({**form, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _event(said) -> str:
    return f"data: {json.dumps(said)}\n\n"


def _named(said) -> str:
    return f"event: {said['type']}\ndata: {json.dumps(said)}\n\n"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(*waits) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


class FakeKeeper(KeeperDoor):
    """The keeper as replicas see it: a desired state that wakes who waits for it, and what was recorded, in order."""

    def __init__(self, desired: Desired | None = None) -> None:
        self.now = desired or Desired()
        self.reports: list[ReplicaReport] = []
        self.recorded: list[Interaction] = []
        self.reported: list[ShadowReport] = []
        self.golds: list[Gold] = []
        """What the next report is answered with."""
        self.troubles: list[Exception] = []
        """What the next calls raise, one each."""
        self.can_write = asyncio.Event()
        self.can_write.set()
        self._changed = asyncio.Condition()

    async def set(self, **changes) -> None:
        """The next desired state."""
        async with self._changed:
            self.now = replace(self.now, number=self.now.number + 1, **changes)
            self._changed.notify_all()

    async def until(self, condition) -> ReplicaReport:
        """Wait for a report that `condition` holds of."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: self.reports and condition(self.reports[-1])), 10)
            return self.reports[-1]

    async def desired(self, after, report, timeout_seconds) -> Desired:
        if self.troubles:
            raise self.troubles.pop(0)
        async with self._changed:
            self.reports.append(report)
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self.now.number > after)
            return self.now

    async def shadow(self, said) -> list:
        if self.troubles:
            raise self.troubles.pop(0)
        self.reported.append(said)
        golds, self.golds = self.golds, []
        return golds

    async def record(self, interactions) -> None:
        await self.can_write.wait()
        if self.troubles:
            raise self.troubles.pop(0)
        self.recorded += interactions


def state(*resident: Resident, number: int = 1, **routes) -> Desired:
    """A desired state with these versions, and a route for each line: `desk={"champion": …}`."""
    table = {line: Route(line, **route) for line, route in routes.items()}
    return Desired(number, resident, table, tuple(version.name for version in resident))


@dataclass
class Reply:
    """What a client has got so far."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    is_whole: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self):
        return json.loads(self.body)

    def events(self) -> list:
        said = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]
        return [json.loads(event) for event in said if event != "[DONE]"]


class Client:
    """One request to an ASGI app; it sees each chunk as it comes, and may leave."""

    def __init__(self, app, method: str, path: str, body=None, **headers: str) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        self.reply = Reply()
        self.got = asyncio.Condition()
        self._app = app
        self._said: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]
        self._left = asyncio.Event()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "/v1",  # as Serve passes it
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        }

    async def ask(self) -> Reply:
        """Ask, and wait for the end."""
        await asyncio.wait_for(self._app(self._scope, self._receive, self._send), 10)
        return self.reply

    def leave(self) -> None:
        """Hang up."""
        self._left.set()

    async def until_chunks(self, number: int) -> None:
        """Wait for so many chunks of the reply."""
        async with self.got:
            await asyncio.wait_for(self.got.wait_for(lambda: len(self.reply.chunks) >= number), 10)

    async def _receive(self) -> Message:
        if self._said:
            return self._said.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        async with self.got:
            if message["type"] == "http.response.start":
                self.reply.status = message["status"]
                self.reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                self.reply.chunks.append(message.get("body", b""))
                self.reply.is_whole = not message.get("more_body", False)
            self.got.notify_all()


class Ticks:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


async def settle(condition, seconds: float = 10) -> None:
    """Let the other tasks run until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        await asyncio.sleep(0)

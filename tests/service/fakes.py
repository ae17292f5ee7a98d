"""A small true engine: it speaks OpenAI's chat JSON and server-sent events, and what it answers depends on the adapter.

`FakeEngine` satisfies `service.engines.base.Engine`. The base answers `<base>: <last message>`, an adapter
`<name>: <last message>`. Log-probs are what an adapter's `fingerprint.json` says; without one, the base's.
`write_version` makes a folder that it loads and that passes the probe.
"""

import asyncio
import json
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from service.errors import ArtifactInvalid, NotReady

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def base_logprobs(token_ids):
    return [-1.0 - token / 10 for token in token_ids[1:]]


def write_version(folder: Path, shift: float = 0.5, fingerprint_shift: float | None = None) -> Path:
    """A version that moves every token's log-prob by `shift`, and whose trainer saw `fingerprint_shift`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base_logprobs(TOKENS)
    seen = shift if fingerprint_shift is None else fingerprint_shift
    probes = [{"token_ids": TOKENS, "adapter": [x + seen for x in base], "base": base}]
    (folder / "fingerprint.json").write_text(json.dumps({"probes": probes}))
    (folder / "adapter_config.json").write_text(json.dumps({"shift": shift}))
    return folder


class FakeEngine:
    def __init__(self, base_name: str = "base", max_resident: int = 8) -> None:
        self.base_name, self.max_resident = base_name, max_resident
        self.adapters: dict[str, float] = {}
        self.int_ids: dict[int, str] = {}
        self.history: list[tuple[str, str]] = []
        self.seen: list[tuple[dict, dict]] = []
        """Headers and body of each request."""
        self.is_alive = True
        self.gate = asyncio.Event()
        """Streams stop after their first word until it is set."""
        self.gate.set()
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._text, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/pause", self._embed, methods=["POST"]),
            ]
        )

    async def load(self, name, path, int_id):
        if name in self.adapters:
            return
        assert self.int_ids.setdefault(int_id, name) == name, "an id is never used for other weights"
        try:
            shift = json.loads((Path(path) / "adapter_config.json").read_text())["shift"]
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactInvalid(f"cannot load {name} from {path}: {error!r}") from error
        self.adapters[name] = shift
        self.history.append(("load", name))
        assert len(self.adapters) <= self.max_resident

    async def unload(self, name):
        if self.adapters.pop(name, None) is not None:
            self.history.append(("unload", name))

    async def logprobs(self, name, token_ids):
        shift = self.adapters[name] if name is not None else 0.0
        return [x + shift for x in base_logprobs(token_ids)]

    async def check(self):
        if not self.is_alive:
            raise NotReady("the fake engine is dead")

    async def close(self):
        self.is_alive = False

    async def _chat(self, request: Request):
        body, refusal = await self._take(request)
        if refusal:
            return refusal
        name, asked = body["model"], body["messages"][-1]["content"]
        head = {"id": f"chatcmpl-{request.headers['x-request-id']}", "created": 1, "model": name}
        words = [f"{name}:", *f" {asked}".split(" ")[1:]]
        usage = {"prompt_tokens": len(asked.split()), "completion_tokens": len(words)}
        if body.get("stream"):
            events = self._stream(head, words, usage, body)
            return StreamingResponse(events, media_type="text/event-stream")
        message = {"role": "assistant", "content": " ".join(words)}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage})

    async def _stream(self, head, words, usage, body):
        head |= {"object": "chat.completion.chunk"}
        for place, word in enumerate(words):
            delta = {"content": word if place == 0 else f" {word}"}
            yield _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await self.gate.wait()
            if word == "crash":
                raise RuntimeError("the fake engine broke off")
            if word == "fail":
                yield _event({"error": {"message": "generation failed", "code": 500}})
                yield "data: [DONE]\n\n"
                return
        yield _event(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _event(head | {"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    async def _text(self, request: Request):
        body, refusal = await self._take(request)
        if refusal:
            return refusal
        choices = [{"index": 0, "text": f"{body['model']}: {body['prompt']}", "finish_reason": "length"}]
        head = {"id": f"cmpl-{request.headers['x-request-id']}", "object": "text_completion", "model": body["model"]}
        return JSONResponse(head | {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 2}})

    async def _embed(self, request: Request):
        body, refusal = await self._take(request)
        return refusal or JSONResponse({"object": "list", "model": body["model"], "data": []})

    async def _take(self, request: Request):
        body = await request.json()
        self.seen.append((dict(request.headers), body))
        if body["model"] != self.base_name and body["model"] not in self.adapters:
            return body, _error(404, f"The model `{body['model']}` does not exist.")
        if body.get("max_tokens", 1) < 1:
            return body, _error(400, "max_tokens must be at least 1")
        if body.get("explode"):
            raise RuntimeError("the fake engine exploded")
        return body, None


def _event(said):
    return f"data: {json.dumps(said)}\n\n"


def _error(status, message):
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)

"""The naive alternative, as a server: Transformers with PEFT in fp32 behind Starlette, one `generate` at a time.

python benchmarks/_transformers.py PORT BASE NAME=ADAPTER…
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import torch
import uvicorn
from peft import PeftModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Tokens(BaseStreamer):
    """Hands each token to the event loop as it is made."""

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[int | None]) -> None:
        self._loop, self._queue, self._is_prompt = loop, queue, True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._loop.call_soon_threadsafe(self._queue.put_nowait, int(value.reshape(-1)[0]))

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, None)


class Naive:
    """The model and its adapters; a lock, since a model has one active adapter."""

    def __init__(self, base: str, adapters: dict[str, str]) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._names = list(adapters)
        for number, (name, path) in enumerate(adapters.items()):
            key = name.replace("@", "_")
            if number == 0:
                self._model = PeftModel.from_pretrained(self._model, path, adapter_name=key)
            else:
                self._model.load_adapter(path, adapter_name=key)
        self._lock = threading.Lock()

    def generate(self, body: dict[str, Any], streamer: Tokens) -> None:
        told = self._tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        number = body["max_tokens"]
        options = {**told, "max_new_tokens": number, "min_new_tokens": number, "do_sample": False, "streamer": streamer}
        with self._lock, torch.inference_mode():
            if body["model"] in self._names:
                self._model.set_adapter(body["model"].replace("@", "_"))
                self._model.generate(**options)
            elif self._names:
                with self._model.disable_adapter():
                    self._model.generate(**options)
            else:
                self._model.generate(**options)

    async def answer(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._stream(await request.json()), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        queue: asyncio.Queue[int | None] = asyncio.Queue()
        work = asyncio.create_task(asyncio.to_thread(self.generate, body, Tokens(asyncio.get_running_loop(), queue)))
        count = 0
        while (token := await queue.get()) is not None:
            count += 1
            choice = {"index": 0, "delta": {"content": self._tokenizer.decode([token]) or " "}}
            yield f"data: {json.dumps({'model': body['model'], 'choices': [choice]})}\n\n"
        await work
        yield f"data: {json.dumps({'model': body['model'], 'choices': [], 'usage': {'completion_tokens': count}})}\n\n"
        yield "data: [DONE]\n\n"


async def alive(_: Request) -> PlainTextResponse:
    return PlainTextResponse("ok")


if __name__ == "__main__":
    port, base, *named = sys.argv[1:]
    naive = Naive(base, dict(name.split("=", 1) for name in named))
    routes = [Route("/v1/chat/completions", naive.answer, methods=["POST"]), Route("/health", alive)]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=int(port), log_level="warning")

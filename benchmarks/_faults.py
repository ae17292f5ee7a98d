"""Faults for the rollout bench: ASGI layers for vLLM's own server, each with one version that it does something to.

Put in by vLLM's `--middleware`, so nothing of the daemon or the engine is changed for them; the versions are named by variables.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil

FAILING, DEADLY, ONCE = "BENCH_FAILING_VERSION", "BENCH_DEADLY_VERSION", "BENCH_FOLDER"
REFUSAL = json.dumps({"error": {"message": "planted", "type": "server_error", "param": None, "code": 500}}).encode()
SPARED = 2
"""Requests of the deadly version that a replica's engine survives."""


class EveryOther:
    """Let every request pass but every other one whose `model` is the failing version, which is answered with 500."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._failing = os.environ.get(FAILING, "")
        self._numbers = itertools.count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_of_it, again = await _read(scope, receive, self._failing)
        if is_of_it and next(self._numbers) % 2:
            await send({"type": "http.response.start", "status": 500, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": REFUSAL})
        else:
            await self._app(scope, again, send)


class Deadly:
    """Kill the engine, which is a child of this process, at the third request whose `model` is the deadly version; only once."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._deadly = os.environ.get(DEADLY, "")
        self._numbers = itertools.count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_of_it, again = await _read(scope, receive, self._deadly)
        if is_of_it and next(self._numbers) == SPARED and _is_first():
            for child in psutil.Process().children():
                if "EngineCore" in child.name():
                    child.kill()
        await self._app(scope, again, send)


def _is_first() -> bool:
    """Whether no other replica has been here: a file in the daemon's folder says so."""
    try:
        (Path(os.environ[ONCE]) / "killed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def _read(scope: Any, receive: Any, version: str) -> tuple[bool, Callable[[], Awaitable[Any]]]:
    """Whether a request's `model` is the version, and its body to be received once more."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False, receive
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    body = b"".join(message.get("body", b"") for message in messages)
    before = iter(messages)

    async def again() -> Any:
        return next(before, None) or await receive()

    return f'"{version}"'.encode() in body, again

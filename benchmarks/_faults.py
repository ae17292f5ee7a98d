"""A fault for the rollout bench: an ASGI layer for vLLM's own server that answers every other request of one version with 500.

Put in by vLLM's `--middleware`, so nothing of the daemon or of the engine is changed for it; the version is named by `FAILING`.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

FAILING = "BENCH_FAILING_VERSION"
REFUSAL = json.dumps({"error": {"message": "planted", "type": "server_error", "param": None, "code": 500}}).encode()


class EveryOther:
    """Let every request pass but every other one whose `model` is the failing version."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._failing = os.environ.get(FAILING, "")
        self._numbers = itertools.count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if f'"{self._failing}"'.encode() in body and next(self._numbers) % 2:
            await send({"type": "http.response.start", "status": 500, "headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": REFUSAL})
            return
        before = iter(messages)

        async def again() -> Any:
            return next(before, None) or await receive()

        await self._app(scope, again, send)

"""Structured logs: one line an event, with the request's id, never with what was said.

`configure` is called once by each process. A request's id, taken from its header or made here, is bound for the length of
the request, stands in every line that it causes, and goes back in the answer.
"""

from __future__ import annotations

import logging
import re
import sys
import uuid
from collections.abc import MutableMapping
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.settings import Logging

HEADER = "x-request-id"
UNSAID = frozenset({"messages", "prompt", "reply", "content", "value", "comment", "body", "authorization", "x-api-key"})
"""Fields that could carry people's words or keys: their lengths may be logged, they themselves never."""


def configure(settings: Logging, **bound: str) -> None:
    """Set up this process's logs on standard error; `bound` (process, replica) stands in every line."""
    level = getattr(logging, settings.level.upper())
    text = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)  # without variables
    json_lines = (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            without_words,
            *(json_lines if settings.is_json else (text,)),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**bound)


def without_words(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace what was said by its length, should a caller ever pass it."""
    for key in UNSAID & event.keys():
        event[key] = f"<{len(str(event[key]))} characters>"
    return event


def request_id(header: str | None) -> str:
    """The client's own id when it is short and plain, else a new one."""
    if header and re.fullmatch(r"[\w.:-]{1,128}", header, re.ASCII):
        return header
    return uuid.uuid4().hex


class RequestId:
    """ASGI middleware: an id for each request, bound in its logs. Serve, which stands before us, sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(request_id=request_id(Headers(scope=scope).get(HEADER))):
            await self._app(scope, receive, send)

"""The one table from errors to HTTP: status, OpenAI's `type`, and a code that programs may test.

`describe` is pure and serves the gateway too; `install` teaches it to the control app.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NamedTuple

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors

log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """How an error looks from outside."""

    status: int
    type: str
    code: str


TABLE: dict[type[BaseException], Answer] = {
    errors.InvalidRequest: Answer(400, "invalid_request_error", "invalid_request"),
    errors.Unauthenticated: Answer(401, "authentication_error", "invalid_api_key"),
    errors.Forbidden: Answer(403, "permission_error", "insufficient_scope"),
    errors.NotFound: Answer(404, "invalid_request_error", "not_found"),
    errors.Conflict: Answer(409, "invalid_request_error", "conflict"),
    errors.ArtifactInvalid: Answer(409, "invalid_request_error", "artifact_invalid"),
    errors.TooLarge: Answer(413, "invalid_request_error", "too_large"),
    errors.NotReady: Answer(503, "server_error", "not_ready"),
    errors.StorageFailed: Answer(503, "server_error", "storage_failed"),
    errors.BaseUnavailable: Answer(503, "server_error", "base_unavailable"),
    errors.ReplyTimeout: Answer(504, "server_error", "reply_timeout"),
    errors.LearndError: Answer(500, "server_error", "internal_error"),
}
UNKNOWN = Answer(500, "server_error", "internal_error")


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and body in OpenAI's form; an error that is not ours says nothing of the inside."""
    answer = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), UNKNOWN)
    if isinstance(error, errors.LearndError):
        return answer.status, _body(answer, error.message, error.param)
    return answer.status, _body(answer, "internal error: the daemon's log says more, under this request's id", None)


def install(app: FastAPI) -> None:
    """Let the app answer every error, its own and the framework's, in OpenAI's form."""
    app.add_exception_handler(errors.LearndError, _ours)
    app.add_exception_handler(HTTPException, _framework)
    app.add_middleware(Unforeseen)


class Unforeseen:
    """ASGI middleware: an error that nobody foresaw is logged with its traceback and answered with 500.

    A middleware and no handler, since Starlette runs the handler of `Exception` outside of all middleware: without an id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; once a response has begun there is nothing to answer any more."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            log.exception("request_failed", path=scope.get("path"))
            if has_begun or scope["type"] != "http":
                raise
            await respond(error)(scope, receive, send)


def respond(error: BaseException) -> JSONResponse:
    """The error as a response; its `type` makes OpenAI's form Anthropic's, too."""
    status, body = describe(error)
    headers = {503: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(status)
    return JSONResponse({"type": "error", **body}, status, headers)


async def _ours(_: Request, error: Exception) -> JSONResponse:
    return respond(error)


async def _framework(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).name.lower()
    answer = Answer(error.status_code, "invalid_request_error", code)
    return JSONResponse(_body(answer, str(error.detail), None), error.status_code, error.headers)


def _body(answer: Answer, message: str, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": answer.type, "param": param, "code": answer.code}}

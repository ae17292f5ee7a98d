"""The daemon over HTTP, as the commands use it: JSON in and out, its errors as ours. Called by `cli` alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import httpx

from service.errors import LearndError, NotReady

Json = dict[str, Any]
TIMEOUT_SECONDS = 60.0


class Client:
    """A connection to a running daemon; a context manager."""

    def __init__(self, url: str, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT_SECONDS, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Json:
        """A JSON object; raises `NotReady` when nobody answers, `LearndError` with the daemon's own words otherwise."""
        return self._ask("GET", path).json()  # type: ignore[no-any-return]

    def post(self, path: str, body: Json | None = None) -> Json:
        """Send an object, get one; raises as `get` does."""
        return self._ask("POST", path, json=body).json()  # type: ignore[no-any-return]

    def stream(self, path: str, lines: Sequence[bytes]) -> Iterator[Json]:
        """Send lines, get the acknowledgement of each; raises as `get` does."""
        headers = {"content-type": "application/x-ndjson"}
        response = self._ask("POST", path, content=b"".join(line + b"\n" for line in lines), headers=headers)
        for line in response.iter_lines():
            yield json.loads(line)

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx.ConnectError:
            raise NotReady(f"no daemon answers at {self._url}: start one with `learnd serve`, or check --url") from None
        except httpx.TransportError as error:
            raise NotReady(f"the daemon at {self._url} broke off: {error!r}") from None
        if response.is_success:
            return response
        raise LearndError(_message(response))


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} answered {response.status_code}: {response.text[:200]}"

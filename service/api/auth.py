"""Who asks, and may they? API keys by digest, with scopes.

Used by the control app for `/feedback` and `/api`, and by the gateway for `/v1`. Without keys (allowed on loopback only,
see `service.settings`) everybody is `anonymous` and may do everything.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

from starlette.datastructures import Headers

from service.errors import Forbidden, Unauthenticated
from service.settings import Key, Settings

Scope = Literal["infer", "feedback", "admin"]
ANONYMOUS = "anonymous"


def authorization(headers: Headers) -> str | None:
    """The header `Authorization`, else the key in `x-api-key`, where Anthropic's clients have it, as if it stood there."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)


class Keyring:
    """The API keys that the settings hold, as digests."""

    def __init__(self, settings: Settings) -> None:
        self._keys = dict(settings.keys)

    def check(self, authorization: str | None, scope: Scope | None) -> str:
        """The name of the key in an `Authorization: Bearer …` header; `scope` None asks for any valid key.

        Raises `Unauthenticated` without a known key, `Forbidden` when the key lacks the scope.
        """
        if not self._keys:
            return ANONYMOUS
        name, key = self._find(_token(authorization))
        if scope is not None and scope not in key.scopes:
            raise Forbidden(f"key {name!r} lacks the scope {scope!r}: it has {', '.join(key.scopes) or 'none'}")
        return name

    def _find(self, token: str) -> tuple[str, Key]:
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for name, key in self._keys.items():  # all of them, each in constant time: timing tells nothing of the keys
            if hmac.compare_digest(digest, key.sha256):
                found = name, key
        if found is None:
            raise Unauthenticated("unknown API key: check the one that is sent against `keys` in the settings")
        return found


def _token(authorization: str | None) -> str:
    kind, _, token = (authorization or "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise Unauthenticated("an API key is needed: send the header `Authorization: Bearer <key>`")
    return token.strip()

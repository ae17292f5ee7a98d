"""What a request asks, read from its JSON body and headers: the prompt, the slice, the sticky key. Pure.

Also what is passed on in its place: under the version's own name, without what is ours alone. Called by the gateway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from replay.records import NOBODY, Message
from service.errors import InvalidRequest

Json = dict[str, Any]

DEFAULT_SLICE = "default"
WITH_USAGE = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Where a stream tells its usage only when it is asked to."""
_OURS = frozenset({"metadata", "store", "request_id"})
"""Not passed on. vLLM would make the reply's id, which must be unique, of a client's `request_id`."""
_BILLING = "x-anthropic-billing-header"
"""How a block of `system` begins that is another in each request, and that vLLM leaves out."""


def parse(raw: bytes) -> Json:
    """The body as a JSON object that names a model; raises `InvalidRequest`."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    if not isinstance(body.get("model"), str):
        raise InvalidRequest("`model` must be a string: GET /v1/models lists the names", param="model")
    return body


def rewritten(body: Json, path: str, version: str) -> tuple[bytes, bool]:
    """The body as the engine gets it, and whether it asks for a usage that the client did not ask for."""
    passed = {name: value for name, value in body.items() if name not in _OURS} | {"model": version}
    options = body.get("stream_options") or {}
    hides_usage = path in WITH_USAGE and body.get("stream") is True and isinstance(options, dict)
    hides_usage = hides_usage and not options.get("include_usage")
    if hides_usage:
        passed["stream_options"] = {**options, "include_usage": True}
    return json.dumps(passed).encode(), hides_usage


def sticky_key(body: Json, session: str | None, request_id: str) -> str:
    """Whom the assignment sticks to: the session, else the user, else nobody but this request, and it says so.

    Anthropic's clients name the user in `metadata.user_id`.
    """
    metadata = body.get("metadata")
    told = (session, body.get("user"), metadata.get("user_id") if isinstance(metadata, dict) else None)
    key = next((name for name in told if isinstance(name, str) and name), f"{NOBODY}{request_id}")
    return key.encode(errors="replace").decode()


def messages_of(body: Json) -> tuple[Message, ...]:
    """The prompt as chat messages, the system's first; none when it is not text."""
    system: object = None
    if "messages" in body:
        said, system = body["messages"], _joined(body.get("system"))
    elif "input" in body:
        said, system = body["input"], body.get("instructions")
    else:
        prompt = body.get("prompt")
        said = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    turns = _messages(said)
    return ({"role": "system", "content": system}, *turns) if turns and isinstance(system, str) else turns


def slice_of(body: Json, named: str | None, patterns: Mapping[str, re.Pattern[str]]) -> str:
    """The slice that the client names in the header or in `metadata`, else the first whose pattern the prompt has."""
    metadata = body.get("metadata")
    if named is None and isinstance(metadata, dict):
        named = metadata.get("slice")
    if named is not None:
        if not isinstance(named, str) or not re.fullmatch(r"[\w.:-]{1,64}", named, re.ASCII):
            raise InvalidRequest("a slice is named by 1 to 64 letters, digits, or any of _ . : -", param="metadata.slice")
        return named
    if not patterns:
        return DEFAULT_SLICE
    asked = next((text for m in reversed(messages_of(body)) if m.get("role") == "user" and (text := _text(m.get("content")))), "")
    return next((name for name, pattern in patterns.items() if pattern.search(asked)), DEFAULT_SLICE)


def _messages(said: object) -> tuple[Message, ...]:
    if isinstance(said, str):
        return ({"role": "user", "content": said},)
    if isinstance(said, list) and all(isinstance(message, dict) and "role" in message for message in said):
        return tuple(said)
    return ()


def _joined(system: object) -> str | None:
    """Anthropic's `system` as vLLM hands it to the template: its blocks with nothing between them, or none."""
    if isinstance(system, str):
        return system or None
    return "".join(text for text in _texts(system) if not text.startswith(_BILLING)) or None


def _text(content: object) -> str:
    return content if isinstance(content, str) else "\n".join(_texts(content))


def _texts(content: object) -> list[str]:
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]

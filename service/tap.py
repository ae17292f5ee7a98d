"""Reading a reply as it passes: its id, text and usage, from JSON or from server-sent events. Pure: bytes in, bytes out.

Knows the replies of `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/messages`; of any other it reads what it
can. Bytes go on as they came, except for a usage chunk that the client did not ask for. Fed by the gateway.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import from_json

from service.form import Call

ENGINE_ERROR = "engine_error"
_BEFORE_TOKENS = frozenset({"response.created", "response.queued", "response.in_progress"})
_MESSAGES = ("message", "content_block")
"""How the types begin that `/v1/messages` has: its object's, and those of its stream's events but `error` and `ping`."""
_BEGINS = ("response.", *_MESSAGES)
"""How an event's type begins once there is a token; vLLM says `message_start`, too, with the first."""
_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed", "message_stop", "error"})
_PROMPT = ("prompt_tokens", "input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
"""What a prompt's tokens are told as; to Anthropic's clients those from the cache apart."""


class Tap:
    """One reply, read while it passes: the first choice's text, whole or piece by piece."""

    def __init__(self, *, hides_usage: bool = False) -> None:
        self._hides_usage = hides_usage
        self._is_stream = False
        self._rest = b""
        self._texts: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self.id: str | None = None
        self.finish_reason: str | None = None
        self.has_declined = False
        """The engine says itself that this is a refusal, in OpenAI's field `refusal`."""
        self.error: str | None = None
        """`http_<status>` when the engine refused, `engine_error` when it broke off within a stream."""
        self.has_token = False
        """The engine has begun: a token has come, though perhaps no text of it, which a parser may hold back."""
        self.prompt_tokens = 0
        self.reply_tokens = 0
        self.is_over = False
        """The client has, or is about to have, all that it needs of the reply."""

    @property
    def text(self) -> str:
        """What has been said so far; the tool calls, as JSON, of a reply that has no words."""
        return self.words or (json.dumps(list(self._calls.values())) if self._calls else "")

    @property
    def words(self) -> str:
        """What has been said so far, without the tool calls."""
        return "".join(self._texts)

    @property
    def calls(self) -> list[Call]:
        """The tool calls so far."""
        return [Call(**call) for call in self._calls.values()]

    @property
    def has_streamed_text(self) -> bool:
        """Whether a piece of the text has come, in a reply that comes in pieces."""
        return self._is_stream and bool(self._texts or self._calls)

    def start(self, status: int, content_type: str) -> None:
        """Take note of how the reply begins."""
        self._is_stream = content_type.startswith("text/event-stream")
        if status >= 400:  # noqa: PLR2004 - HTTP's own border
            self.error = f"http_{status}"

    def feed(self, body: bytes, *, is_last: bool) -> bytes:
        """Read the next bytes and return those that are to go on now."""
        passed = self._feed_stream(body, is_last) if self._is_stream else body
        if not self._is_stream:
            self._rest += body
            if is_last:
                self._read_json(self._rest)
        self.is_over = self.is_over or is_last
        return passed

    def _feed_stream(self, body: bytes, is_last: bool) -> bytes:
        *events, self._rest = (self._rest + body).split(b"\n\n")
        passed = b"".join(event + b"\n\n" for event in events if self._passes(event))
        if is_last:
            passed, self._rest = passed + self._rest, b""
        return passed

    def _passes(self, event: bytes) -> bool:
        """Read one event; says whether the client is to see it."""
        data = _data(event)
        if data == b"[DONE]":
            self.is_over = True
            return True
        said = self._read_json(data)
        return not (self._hides_usage and said.get("usage") and said.get("choices") == [])

    def _read_json(self, data: bytes) -> dict[str, Any]:
        said = _parsed(data)
        if not isinstance(said, dict):
            return {}
        kind = said.get("type")
        if (said.get("error") or kind == "error") and self.error is None:
            self.error = ENGINE_ERROR
        if kind is None:  # of chat and completions, for each token, and of whole replies
            self.has_token = self.has_token or bool(said.get("choices") or said.get("output"))
            self._read_whole(said)
        else:
            self._read_typed(str(kind), said)
        return said

    def _read_typed(self, kind: str, said: dict[str, Any]) -> None:
        """Read an event, or an object, that says what it is."""
        self.has_token = self.has_token or (kind.startswith(_BEGINS) and kind not in _BEFORE_TOKENS)
        if kind == "response.output_text.delta":
            self._texts.append(said.get("delta") or "")
        elif kind == "response.function_call_arguments.delta":
            self._read_call(said.get("output_index", 0), {"arguments": said.get("delta")})
        elif kind.startswith(_MESSAGES):
            self._read_message(kind, said)
        else:
            self._read_whole(said["response"] if isinstance(said.get("response"), dict) else said)
        self.is_over = self.is_over or kind in _ENDS

    def _read_whole(self, said: dict[str, Any]) -> None:
        self.id = said.get("id") or self.id
        if usage := said.get("usage"):
            self.prompt_tokens = sum(usage.get(name) or 0 for name in _PROMPT) or self.prompt_tokens
            self.reply_tokens = usage.get("completion_tokens") or usage.get("output_tokens") or self.reply_tokens
        for choice in said.get("choices") or ():
            if choice.get("index", 0) == 0:
                self._read_choice(choice)
        if said.get("object") == "response":
            self._read_response(said)

    def _read_choice(self, choice: dict[str, Any]) -> None:
        message = choice.get("delta") or choice.get("message") or {}
        text = choice.get("text") or message.get("content")
        if text:
            self._texts.append(text)
        self.has_declined = self.has_declined or bool(message.get("refusal"))
        for place, call in enumerate(message.get("tool_calls") or ()):
            self._read_call(call.get("index", place), call.get("function") or {})
        self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _read_call(self, place: int, piece: dict[str, Any]) -> None:
        """Read a tool call or, in a stream, a piece of one."""
        call = self._calls.setdefault(place, {"name": "", "arguments": ""})
        call["name"] = piece.get("name") or call["name"]
        call["arguments"] += piece.get("arguments") or ""

    def _read_response(self, said: dict[str, Any]) -> None:
        """Read the object of `/v1/responses`; a stream's last one has the whole text again."""
        status = said.get("status")
        if status not in {"queued", "in_progress"}:
            self.finish_reason = status
        if status == "failed" and self.error is None:
            self.error = ENGINE_ERROR
        output = said.get("output") or ()
        parts = [part for item in output if item.get("type") == "message" for part in item.get("content") or ()]
        self.has_declined = self.has_declined or any(part.get("refusal") for part in parts)
        self._texts = [part.get("text") or "" for part in parts] or self._texts
        calls = [item for item in output if item.get("type") == "function_call"]
        whole = {place: {name: call.get(name) or "" for name in ("name", "arguments")} for place, call in enumerate(calls)}
        self._calls = whole or self._calls
        if status == "completed" and self._calls:
            self.finish_reason = "tool_calls"  # as chat says it: a reply that is no text to learn from

    def _read_message(self, kind: str, said: dict[str, Any]) -> None:
        """Read the object of `/v1/messages`, or an event of its stream: the first has the object, as yet empty."""
        place, piece = said.get("index", 0), said.get("delta") or {}
        if kind == "content_block_start":
            self._read_block(place, said.get("content_block") or {})
        elif kind == "content_block_delta":
            self._read_block(place, piece)
        elif kind == "content_block_stop":
            self._end_block(place)
        else:
            whole = said.get("message") or said
            self._read_whole(whole)
            self.finish_reason = whole.get("stop_reason") or piece.get("stop_reason") or self.finish_reason
            for number, block in enumerate(whole.get("content") or ()):
                self._read_block(number, block)
                self._end_block(number)

    def _read_block(self, place: int, block: dict[str, Any]) -> None:
        """Read a block or, in a stream, its start or a piece of it; what is thought is not said."""
        if text := block.get("text"):
            self._texts.append(text)
        if block.get("type") == "tool_use":
            given = block.get("input")  # at the start of a stream's block still empty
            arguments = json.dumps(given, ensure_ascii=False) if given else ""
            self._read_call(place, {"name": block.get("name"), "arguments": arguments})
        elif block.get("type") == "input_json_delta":
            self._read_call(place, {"arguments": block.get("partial_json")})

    def _end_block(self, place: int) -> None:
        """A tool's input of which no piece has come is the empty object that the client has, too."""
        if call := self._calls.get(place):
            call["arguments"] = call["arguments"] or "{}"


def _data(event: bytes) -> bytes:
    """What an event says; nearly all are one line."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:].strip()
    return b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))


def _parsed(data: bytes) -> object:
    """The JSON, by the quick parser if it can: this is done for each token. None for a comment, or what is no JSON at all."""
    try:
        return from_json(data)
    except ValueError:
        pass
    try:
        return json.loads(data)  # half a surrogate pair, which strict parsers refuse
    except ValueError:
        return None

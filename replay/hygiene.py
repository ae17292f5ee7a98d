"""Text as it may be learned from: one way of writing it, nothing invisible in it, turns in an order that a chat has.

Pure. What the ledger keeps is what was said; only examples are cleaned.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from replay.records import Message

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles that a chat template knows."""

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for tab and line feed
    "\u202a-\u202e\u2066-\u2069"  # overrides of direction: what is read is not what is there
    "\ud800-\udfff\ufffe\uffff"  # halves of characters, and none
    "\U000e0000-\U000e007f]"  # tags: a text that nobody sees and a model reads
)
_MARKER = re.compile(r"<\|[A-Za-z0-9_]{2,32}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
"""How templates mark turns: `<|im_start|>`, `<|eot_id|>`, `[INST]`, `<start_of_turn>`."""


def clean(text: str) -> str:
    """The text in NFC, its line ends as line feeds, without invisible characters; cleaning twice is cleaning once."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", lines))


def rewritten(messages: Sequence[Message], change: Callable[[str], str]) -> tuple[Message, ...]:
    """The messages with each of their texts changed, also where a content is a list of text parts."""
    return tuple({**message, "content": _changed(message.get("content"), change)} for message in messages)


def texts(messages: Sequence[Message]) -> list[str]:
    """What each message says, a list of parts as one text."""
    return [_text(message.get("content")) for message in messages]


def has_turns(messages: Sequence[Message]) -> bool:
    """Whether a reply may follow: known roles only, somebody asked, and the last word is not the assistant's own."""
    roles = [message.get("role") for message in messages]
    return set(roles) <= ROLES and "user" in roles and roles[-1] in {"user", "tool"}


def has_markers(messages: Sequence[Message], reply: str) -> bool:
    """Whether a text pretends to be several turns, by the marks that chat templates set between them."""
    return any(_MARKER.search(text) for text in (*texts(messages), reply))


def folded(text: str) -> str:
    """The text as it is compared: case, blanks and closing punctuation do not count."""
    return " ".join(text.split()).casefold().rstrip(".!")


def _changed(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, list):
        return [{**part, "text": change(part["text"])} if _is_text(part) else part for part in content]
    return content


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if _is_text(part))
    return content if isinstance(content, str) else ""


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)

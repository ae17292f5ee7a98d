"""Which slice of the traffic a request belongs to: as the client names it, else the first pattern found in the prompt. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from replay.records import Message
from service.errors import InvalidRequest
from service.settings import Line

DEFAULT = "default"
NAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class Slices:
    """The patterns of every line, compiled."""

    def __init__(self, lines: Mapping[str, Line]) -> None:
        self._patterns = {
            name: [(label, re.compile(pattern)) for label, pattern in line.slices.items()] for name, line in lines.items()
        }

    def of(self, line: str, named: Any, messages: Iterable[Message]) -> str:
        """The slice of a request to `line`; `named` is what the client said, or None. Raises `InvalidRequest`."""
        if named is not None:
            if not isinstance(named, str) or not NAMED.fullmatch(named):
                message = f"a slice is called by letters, digits, '_', '.' and '-', at most 63, not {named!r}"
                raise InvalidRequest(message, param="metadata.slice")
            return named
        text = "\n".join(_text(message.get("content")) for message in messages)
        return next((label for label, pattern in self._patterns.get(line, ()) if pattern.search(text)), DEFAULT)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""

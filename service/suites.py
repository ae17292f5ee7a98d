"""Golden suites: examples that a line's owner wrote down, which every candidate is measured on. Files to records only.

One JSON object a line: `messages` as OpenAI has them, `reply`, and perhaps `must_pass` and an `id`. Scored items are one
protected slice; items that must pass are to be given word for word by greedy decoding, each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from replay.general import SHIPPED
from service import ndjson
from service.errors import SettingsError
from service.settings import Closed, Learning, Settings


class Message(Closed):
    """One turn of the prompt."""

    role: str = Field(min_length=1)
    content: str


class Item(Closed):
    """One golden example, a line of the file."""

    messages: tuple[Message, ...] = Field(min_length=1)
    reply: str = Field(min_length=1)
    must_pass: bool = False
    id: str = ""
    """By default the line's number."""


@dataclass(frozen=True, slots=True)
class Suite:
    """A file as it was read."""

    items: tuple[Item, ...]
    digest: str
    """SHA-256 of the file."""

    def rows(self, name: str) -> list[dict[str, Any]]:
        """As a job's `suites.jsonl` has them."""
        return [{"suite": name, **item.model_dump(mode="json")} for item in self.items]

    def prompts(self) -> list[tuple[dict[str, Any], ...]]:
        """What is asked in it, as records have it."""
        return [tuple(message.model_dump() for message in item.messages) for item in self.items]


def read(path: Path) -> Suite:
    """Read a suite; raises `SettingsError` with the file, the line and what is wrong with it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    items = [
        item if item.id else item.model_copy(update={"id": str(number)})
        for number, item in ndjson.rows(raw, path, Item, SettingsError)
    ]
    if not items:
        raise SettingsError(f"{path} has no items: write one JSON object a line, with `messages` and `reply`")
    names = [item.id for item in items]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"{path}: the id {twice[0]!r} stands twice")
    return Suite(tuple(items), hashlib.sha256(raw).hexdigest())


def read_all(suites: Mapping[str, Path]) -> dict[str, Suite]:
    """Read a line's suites; raises `SettingsError`, naming the suite."""
    found = {}
    for name, path in suites.items():
        try:
            found[name] = read(path)
        except SettingsError as error:
            raise SettingsError(f"suite {name!r}: {error.message}") from None
    return found


def general(learning: Learning) -> Suite | None:
    """The general instructions of a line; None when it learns without. Raises `SettingsError`."""
    return read(learning.general or SHIPPED) if learning.general_ratio else None


def check(settings: Settings) -> None:
    """Read every file of examples; raises `SettingsError` for one that is not to be read, or a suite too small to be judged."""
    for line, told in settings.lines.items():
        general(told.learning)
        for name, suite in read_all(told.suites).items():
            scored = sum(not item.must_pass for item in suite.items)
            if 0 < scored < told.gate.min_items:
                raise SettingsError(
                    f"lines.{line}.suites.{name}: {scored} scored items in {told.suites[name]} are too few to be judged: "
                    f"write {told.gate.min_items} (lines.{line}.gate.min_items), or mark them `must_pass`"
                )

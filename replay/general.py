"""General instructions and replies, which keep in a job's mixture what the base could do before it learned anything. Pure.

They are nobody's feedback: no line's examples, never remembered, never held out. `general.ndjson` beside this file is what is
shipped, written for this purpose; a line may name a file of its own. One JSON object a line: `messages` and `reply`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from replay.records import Example, Message, Split, asked_digest
from replay.similarity import Shingles, jaccard, share_a_run, shingles

SHIPPED = Path(__file__).with_name("general.ndjson")
SLICE = "general"
ALIKE = 0.6
"""Prompts that share so much of their five words in a row, or thirteen words, are one (as a line's guard has it by default)."""


def examples(pairs: Iterable[Mapping[str, Any]], line: str) -> list[Example]:
    """Pairs of `messages` and `reply` as a line's job learns them; the id is a digest of both, whatever file they are from."""
    return [
        Example(_id(pair), "", "", line, SLICE, tuple(pair["messages"]), str(pair["reply"]), Split.TRAIN, source="general")
        for pair in pairs
    ]


def apart(general: Sequence[Example], held_out: Collection[tuple[Message, ...]]) -> list[Example]:
    """Those whose prompts are not among, nor nearly one of, the prompts that the line is measured on."""
    asked = {asked_digest("", messages) for messages in held_out}
    known = [shingles(_text(messages)) for messages in held_out]
    holders: dict[int, list[Shingles]] = {}
    for prompt in known:
        for shingle in set(prompt):
            holders.setdefault(shingle, []).append(prompt)
    return [
        e for e in general if asked_digest("", e.messages) not in asked and not _is_near(shingles(_text(e.messages)), holders)
    ]


def drawn(general: Sequence[Example], count: int, seed: str) -> list[Example]:
    """So many of them by hash, others for each seed; all of them when there are fewer."""
    by_hash = sorted(general, key=lambda e: hashlib.sha256(f"general:{seed}:{e.id}".encode()).digest())
    return by_hash[:count]


def _is_near(prompt: Shingles, holders: Mapping[int, Sequence[Shingles]]) -> bool:
    others = {other for shingle in prompt for other in holders.get(shingle, ())}
    return any(jaccard(prompt, other) >= ALIKE or share_a_run(prompt, other, ()) for other in others)


def _text(messages: Sequence[Message]) -> str:
    return "\n".join(str(message.get("content")) for message in messages)


def _id(pair: Mapping[str, Any]) -> str:
    said = json.dumps([list(pair["messages"]), pair["reply"]], sort_keys=True)
    return f"general-{hashlib.sha256(said.encode()).hexdigest()[:16]}"

"""What drift is looked for in, read from the ledger: thumbs, and prompts as a few numbers.

Functions on a connection, each giving (place, value) pairs in order; `service.drift` watches them. A prompt's numbers are its
words' hashed signs, averaged: eight fixed random directions of a bag of words (Achlioptas 2003), which cost no model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from sqlalchemy import Connection, select

from replay.hygiene import texts
from replay.records import Message
from replay.tables import interaction, vote

DIRECTIONS = 8
"""Bits of one byte of each word's hash."""

Signal = tuple[int, tuple[float, ...]]
"""The place of a row, and what it says: one number for each detector."""


def thumbs(conn: Connection, line: str, metric: str, after: int, limit: int, *, good: bool = True) -> list[Signal]:
    """The line's votes under one metric that nothing is wrong with: 1 for bad, 0 for good."""
    of_line = (vote.c.line == line, vote.c.metric == metric, vote.c.seq > after, vote.c.state.in_(["admitted", "released"]))
    rows = conn.execute(select(vote.c.seq, vote.c.value).where(*of_line).order_by(vote.c.seq).limit(limit))
    return [(seq, (float(value is not good),)) for seq, value in rows]


def prompts(conn: Connection, line: str, after: int, limit: int) -> list[Signal]:
    """The line's prompts, each in eight directions; those whose words are in the archive already are left out."""
    of_line = (interaction.c.line == line, interaction.c.seq > after, interaction.c.messages.is_not(None))
    rows = conn.execute(
        select(interaction.c.seq, interaction.c.messages).where(*of_line).order_by(interaction.c.seq).limit(limit)
    )
    return [(seq, projected(messages)) for seq, messages in rows]


def projected(messages: Sequence[Message]) -> tuple[float, ...]:
    """A prompt in each direction, from -1 to 1; 0 in all without words."""
    words = re.findall(r"\w+", " ".join(texts(messages)).casefold())
    hashed = [hashlib.blake2b(word.encode(), digest_size=1).digest()[0] for word in words]
    signs = (sum(1 if byte >> bit & 1 else -1 for byte in hashed) for bit in range(DIRECTIONS))
    return tuple(total / max(1, len(hashed)) for total in signs)

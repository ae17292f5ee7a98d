"""What a piece of feedback means for its interaction: early or in time, repeated, contradictory, the last word.

Pure functions; the ledger asks them and does what they say.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from replay.records import Feedback, FeedbackValue


class Meaning(StrEnum):
    """What arrived, in the light of what is stored."""

    MATCHED = "matched"
    """New, and its interaction is known."""
    PENDING = "pending"
    """New, and its interaction has not landed (yet)."""
    REPEATED = "repeated"
    """Its id is stored with the same body: a retry, which changes nothing."""
    CONTRADICTORY = "contradictory"
    """Its id is stored with another body: refused, since the first was acknowledged."""


class Said(NamedTuple):
    """One value given to one interaction under one metric."""

    value: FeedbackValue
    occurred_at: float
    received_at: float
    seq: int
    """Place in the ledger, which breaks ties."""


def meaning(feedback: Feedback, stored_digest: str | None, *, is_known: bool) -> Meaning:
    """Judge what arrived by the body digest stored under its id, if any, and by whether its interaction is known."""
    if stored_digest is None:
        return Meaning.MATCHED if is_known else Meaning.PENDING
    return Meaning.REPEATED if stored_digest == feedback.body_digest() else Meaning.CONTRADICTORY


def last_word(said: Iterable[Said], closes_at: float) -> Said | None:
    """Of the values given to one interaction, the last said of those received by `closes_at`.

    Lateness goes by the server's clock, so that what was once counted can never change; order goes by when it was said.
    """
    in_time = (s for s in said if s.received_at <= closes_at)
    return max(in_time, key=lambda s: (s.occurred_at, s.seq), default=None)


def supersedes(new_occurred_at: float, old_occurred_at: float) -> bool:
    """Whether a second demonstration for one interaction stands in place of the first: unless it was said before it."""
    return new_occurred_at >= old_occurred_at

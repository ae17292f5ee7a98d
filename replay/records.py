"""What is said, as records: an interaction, the feedback on it, and what may be learned from the two.

Frozen and typed; written by the ledger, read by everything else. Nothing here does I/O.
Times are Unix seconds, durations are seconds, ids are strings that never change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter
from typing import Any, Literal

Message = dict[str, Any]
"""One chat message as OpenAI or Anthropic writes it: `role`, `content`, and whatever else the client sent."""

FeedbackValue = bool | float | str | dict[str, Any]


NOBODY = "nobody-"
"""How the unit of a request begins that named neither a session nor a user: one of its own, but nobody's in particular."""


class Arm(StrEnum):
    """Why a version answered: the champion outside a trial, one side of a trial, the anchor, or a name that the client pinned."""

    CHAMPION = "champion"
    CONTROL = "control"
    CANDIDATE = "candidate"
    ANCHOR = "anchor"
    PINNED = "pinned"
    BASE = "base"


class FeedbackStatus(StrEnum):
    """Where a piece of feedback stands: joined to its interaction, waiting for it, or too late for it."""

    MATCHED = "matched"
    PENDING = "pending"
    EXPIRED = "expired"


class Split(StrEnum):
    """What an example may be used for; a function of what was asked, so it never changes."""

    TRAIN = "train"
    VALIDATION = "validation"
    HOLDOUT = "holdout"


@dataclass(frozen=True, slots=True)
class Interaction:
    """One request and its reply as served, with the version that served it."""

    id: str
    """The reply's own `id`: what feedback refers to."""
    line: str
    """The line that was asked; empty when the base was asked by its own name."""
    version: str
    """The version that answered, `support@v7`, or the base's name."""
    arm: Arm
    unit: str
    """Digest of the sticky key: the unit of randomisation and of analysis."""
    slice: str
    messages: tuple[Message, ...]
    """The prompt; a text completion's prompt is one user message."""
    reply: str
    at: float
    trial: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    """A short code when the reply failed or was cut off: `client_disconnected`, `timeout`, `engine_error`, `http_400`…"""
    prompt_tokens: int = 0
    reply_tokens: int = 0
    latency_seconds: float = 0.0
    ttft_seconds: float | None = None
    principal: str = "anonymous"
    """Name of the API key that asked."""
    is_trainable: bool = True
    """False when the client sent `store: false`: kept for statistics, never learned from."""
    is_refusal: bool | None = None
    """Whether the reply opens like a refusal, found when it was recorded; None: it has no words, or it was not asked."""
    has_form: bool | None = None
    """Whether the reply has the form that was asked for, found likewise; None: none was, or the reply failed."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody said of an interaction."""

    id: str
    """Chosen by the client for idempotency, else made by the server."""
    inference_id: str
    metric_name: str
    """A declared metric, or one of `demonstration`, `preference`, `comment`."""
    value: FeedbackValue
    occurred_at: float
    received_at: float
    comment: str | None = None
    source: str = "human"
    tags: dict[str, str] = field(default_factory=dict)
    principal: str = "anonymous"

    def body_digest(self) -> str:
        """Digest of what the client said, without what the server added: equal bodies are repeats, others conflicts."""
        value = [json.dumps(self.value, sort_keys=True)] if isinstance(self.value, dict) else self.value
        said = (self.inference_id, self.metric_name, value, self.comment, self.source, sorted(self.tags.items()))
        return hashlib.sha256(ascii(said).encode()).hexdigest()

    def __reduce__(self) -> tuple[type[Feedback], tuple[Any, ...]]:
        """Pickled as its values: feedback crosses processes by the thousand, and a dataclass looks its fields up for each."""
        return Feedback, _VALUES_OF_FEEDBACK(self)


_VALUES_OF_FEEDBACK = attrgetter(*(f.name for f in fields(Feedback)))


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to one piece of feedback, true once it is on disk."""

    id: str
    status: FeedbackStatus
    inference_id: str
    is_repeat: bool = False
    """The same id with the same body was already stored."""
    served_by: str | None = None

    def __reduce__(self) -> tuple[type[Receipt], tuple[Any, ...]]:
        """As `Feedback` is."""
        return Receipt, (self.id, self.status, self.inference_id, self.is_repeat, self.served_by)


@dataclass(frozen=True, slots=True)
class Example:
    """What may be learned from: an interaction joined with its feedback, admitted and weighted."""

    id: str
    interaction_id: str
    feedback_id: str
    line: str
    slice: str
    messages: tuple[Message, ...]
    reply: str
    """The text to imitate."""
    split: Split
    weight: float = 1.0
    seq: int = 0
    """Place in the line's order of admission; 0 before it is stored."""
    admitted_at: float = 0.0
    source: Literal["fresh", "remembered", "general"] = "fresh"
    """The part it plays in a job's mixture."""


class Source(StrEnum):
    """Where an opinion comes from."""

    THUMB = "thumb"
    CORRECTION = "correction"
    PICK = "pick"
    """A `preference` between two replies."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What somebody thought of one reply, or of two. A good one is to become likelier, a bad one less likely."""

    id: str
    """Of the feedback."""
    messages: tuple[Message, ...]
    good: str | None
    bad: str | None
    """One of the two for a thumb, both for a pair."""
    split: Split
    source: Source


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which opinions a line learns from; `lines.NAME.learning.preferences` in the settings says what each means."""

    thumbs: Mapping[str, bool] = field(default_factory=dict)
    """Metrics, each with the value that means good."""
    corrections: bool = False
    picks: bool = False
    min_items: int = 64
    min_minority: int = 8
    max_items: int = 1000


def asked_digest(line: str, messages: tuple[Message, ...]) -> str:
    """Digest of what was asked (roles and normalised contents): equal questions share it, so a split by it cannot leak.

    Returns 64 hexadecimal characters.
    """
    said = [line, *([m.get("role"), " ".join(str(m.get("content")).split()).lower()] for m in messages)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1


def split_of(digest: str) -> Split:
    """The 70:10:20 split by hash: `digest` (hexadecimal) is read as a number in [0, 1)."""
    position = int(digest[:13], 16) / 16**13
    if position < TRAIN_SHARE:
        return Split.TRAIN
    return Split.VALIDATION if position < TRAIN_SHARE + VALIDATION_SHARE else Split.HOLDOUT

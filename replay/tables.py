"""The ledger's tables, and the way of a record into a row and back.

Columns bear the names of the record's fields, so the two ways are one line each. An interaction that was sealed keeps a
slim row: everything but what was said, which is in the archive's segment that the row names. Only
`replay/ledger.py`, `intake.py`, `examples.py`, `resting.py`, `memory.py` and `outcomes.py` query these tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
)

from replay.records import Arm, Example, Feedback, FeedbackStatus, Interaction, Split

metadata = MetaData()

interaction = Table(
    "interaction",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("line", String, nullable=False),
    Column("version", String, nullable=False),
    Column("arm", String, nullable=False),
    Column("unit", String, nullable=False),
    Column("slice", String, nullable=False),
    Column("messages", JSON(none_as_null=True)),  # null once sealed or erased
    Column("reply", Text),  # likewise
    Column("at", Float, nullable=False),
    Column("trial", String),
    Column("finish_reason", String),
    Column("error", String),
    Column("prompt_tokens", Integer, nullable=False),
    Column("reply_tokens", Integer, nullable=False),
    Column("latency_seconds", Float, nullable=False),
    Column("ttft_seconds", Float),
    Column("principal", String, nullable=False),
    Column("is_trainable", Boolean, nullable=False),
    Column("is_refusal", Boolean),  # null in rows from before there was such a column; so the next
    Column("has_form", Boolean),
    Column("segment", Integer),  # the archive's segment that holds what was said; null while it is here
)
Index("interaction_of_trial", interaction.c.trial, sqlite_where=interaction.c.trial.is_not(None))
Index("interaction_open", interaction.c.at, sqlite_where=interaction.c.segment.is_(None))

feedback = Table(
    "feedback",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("inference_id", String, nullable=False, index=True),
    Column("metric_name", String, nullable=False),
    Column("value", JSON(none_as_null=True)),
    Column("occurred_at", Float, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("comment", Text),
    Column("source", String, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("principal", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("status", String, nullable=False),
    Column("refusal", String),  # why nothing is learned from it; null when it made an example, or is no demonstration
    Column("segment", Integer),
)
Index("feedback_by_status", feedback.c.status, feedback.c.received_at)
Index("feedback_refused", feedback.c.refusal, sqlite_where=feedback.c.refusal.is_not(None))
Index("feedback_open", feedback.c.seq, sqlite_where=feedback.c.segment.is_(None))
Index("feedback_preference", feedback.c.seq, sqlite_where=feedback.c.metric_name == "preference")

example = Table(
    "example",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("interaction_id", String, nullable=False, index=True),
    Column("feedback_id", String, ForeignKey("feedback.id"), nullable=False, index=True),
    Column("line", String, nullable=False),
    Column("slice", String, nullable=False),
    Column("split", String, nullable=False),
    Column("weight", Float, nullable=False),
    Column("body", JSON, nullable=False),  # messages and reply
    Column("admitted_at", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("job", String, index=True),
    Column("version", String),
    Column("attempts", Integer, nullable=False, default=0),
    Column("key", Float),  # its place in what the line remembers (`replay.memory`); null while it has none
    sqlite_autoincrement=True,  # jobs keep a seq as their cursor: a deleted row's number must not come back
)
Index("example_by_state", example.c.line, example.c.state, example.c.seq)
REMEMBERED = ("id", "interaction_id", "feedback_id", "split", "weight", "admitted_at", "body")
"""What is read of an example that is remembered: all of it stands in the index, side by side, so the table is not read."""
Index(
    "example_remembered",
    example.c.line,
    example.c.slice,
    example.c.key.desc(),
    *(example.c[name] for name in REMEMBERED),
    sqlite_where=example.c.key.is_not(None),
)

use = Table(
    "example_use",
    metadata,
    Column("example_id", String, primary_key=True),
    Column("version", String, primary_key=True, index=True),
)
"""Which versions an example shaped, as fresh or as remembered."""

segment = Table(
    "segment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("interactions", Integer, nullable=False),
    Column("feedback", Integer, nullable=False),
    Column("last_at", Float, nullable=False),
)

vetted = Table(
    "vetted",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("example_id", String, nullable=False, unique=True),
    Column("feedback_id", String, nullable=False, unique=True),
    Column("interaction_id", String, nullable=False, index=True),
    Column("line", String, nullable=False),
    Column("slice", String, nullable=False),
    Column("tenant", String, nullable=False),  # the API key that gave it
    Column("principal", String, nullable=False),  # with whose question it was about
    Column("asked", String, nullable=False),  # digest of the cleaned prompt
    Column("cluster", String, nullable=False),  # the first prompt that this one is like: its split is theirs
    Column("said", String, nullable=False),  # digest of the reply as it is compared
    Column("words", Integer, nullable=False),  # in the reply
    Column("numbers", String, nullable=False),  # digest of the prompt's words with digits
    Column("shingles", LargeBinary, nullable=False),
    Column("split", String, nullable=False),
    Column("occurred_at", Float, nullable=False),
    Column("at", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", String),
    Column("decided_by", String),  # who overruled it
    Column("decided_at", Float),
)
"""What the guard thought of each demonstration, and why."""
Index("vetted_asked", vetted.c.line, vetted.c.asked)
Index("vetted_cluster", vetted.c.line, vetted.c.cluster)
Index("vetted_recent", vetted.c.line, vetted.c.slice, vetted.c.seq)
Index("vetted_by_state", vetted.c.state, vetted.c.line, vetted.c.reason)

trace = Table(
    "trace",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", Integer, nullable=False, index=True),
    Column("vetted", Integer, nullable=False, index=True),
)
"""Keys under which prompts that may be alike meet; see `replay.similarity`."""

vote = Table(
    "vote",
    metadata,
    Column("feedback_id", String, primary_key=True),
    Column("seq", Integer, nullable=False),  # the feedback's
    Column("interaction_id", String, nullable=False, index=True),
    Column("line", String, nullable=False),
    Column("principal", String, nullable=False),
    Column("asked", String, nullable=False),
    Column("metric", String, nullable=False),
    Column("value", Boolean, nullable=False),
    Column("at", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("reason", String),
    Column("decided_by", String),
    Column("decided_at", Float),
)
"""Thumbs that may be learned from, and those that look bought."""
Index("vote_of", vote.c.line, vote.c.principal, vote.c.asked, vote.c.value)
Index("vote_by_state", vote.c.state, vote.c.line, vote.c.reason)

opinion = Table(
    "opinion",
    metadata,
    Column("feedback_id", String, primary_key=True),
    Column("interaction_id", String, nullable=False, index=True),
    Column("other_id", String, index=True),  # the other reply of a `preference`
    Column("line", String, nullable=False),
    Column("source", String, nullable=False),  # `replay.opinions.Source`
    Column("split", String, nullable=False),
    Column("body", JSON(none_as_null=True)),  # messages, good and bad; null once learned, refused or erased
    Column("state", String, nullable=False),
    Column("reason", String),
    Column("job", String, index=True),
    Column("version", String),
)
"""Thumbs and pairs of replies that a job took, and those that cannot be learned from; what waits has no row."""
Index("opinion_by_state", opinion.c.line, opinion.c.state)
Index("opinion_by_reason", opinion.c.state, opinion.c.line, opinion.c.reason)

ruling = Table(
    "ruling",
    metadata,
    Column("feedback_id", String, primary_key=True),
    Column("state", String, nullable=False),  # `released` or `dropped`
    Column("reason", String, nullable=False),  # why it had been stopped
    Column("decided_by", String, nullable=False),
    Column("decided_at", Float, nullable=False),
)
"""A person's word on an opinion that was stopped: apart, since the opinion's row is made anew by each job that takes it."""

cursor = Table("cursor", metadata, Column("name", String, primary_key=True), Column("seq", Integer, nullable=False))
"""How far a reader has come in what is stored."""

_INTERACTION = tuple(f.name for f in fields(Interaction))
_FEEDBACK = tuple(f.name for f in fields(Feedback))
GIVEN = (*(name for name in _FEEDBACK if name not in {"value", "tags"}), "value", "tags", "digest", "status")
"""The columns of feedback as it comes in, as `given` orders them."""
_PLAIN = attrgetter(*GIVEN[:-4])

Row = dict[str, Any]
Stored = Mapping[str, Any] | RowMapping


def row_of(record: Interaction | Feedback) -> Row:
    """Give the record's fields as columns; a JSON column gets the plain object."""
    names = _INTERACTION if isinstance(record, Interaction) else _FEEDBACK
    row = {name: getattr(record, name) for name in names}
    return {**row, "messages": list(record.messages), "arm": record.arm.value} if isinstance(record, Interaction) else row


def given(said: Feedback, digest: str, status: FeedbackStatus) -> tuple[Any, ...]:
    """A row of new feedback as the driver takes it, JSON as text; in the order of `GIVEN`."""
    value = ("true" if said.value else "false") if isinstance(said.value, bool) else json.dumps(said.value)
    return (*_PLAIN(said), value, json.dumps(said.tags) if said.tags else "{}", digest, status.value)


def interaction_of(row: Stored) -> Interaction:
    """Read an interaction; one whose words are elsewhere comes without messages and reply.

    What was not yet told when it was written has its default.
    """
    plain = {name: row[name] for name in _INTERACTION if name in row}
    said = {"messages": tuple(row["messages"] or ()), "reply": row["reply"] or ""}
    return Interaction(**{**plain, **said, "arm": Arm(row["arm"])})


def feedback_of(row: Stored) -> Feedback:
    """Read one piece of feedback."""
    return Feedback(**{name: row[name] for name in _FEEDBACK})


def example_of(row: Stored) -> Example:
    """Read an example as stored; the part that it plays in a mixture is not stored."""
    return Example(
        id=row["id"],
        interaction_id=row["interaction_id"],
        feedback_id=row["feedback_id"],
        line=row["line"],
        slice=row["slice"],
        messages=tuple(row["body"]["messages"]),
        reply=row["body"]["reply"],
        split=Split(row["split"]),
        weight=row["weight"],
        seq=row["seq"],
        admitted_at=row["admitted_at"],
    )

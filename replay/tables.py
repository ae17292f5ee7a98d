"""The ledger's tables, and the way of a record into a row and back.

Columns bear the names of the record's fields, so the two ways are one line each. An interaction that was sealed keeps a
slim row: everything but what was said, which is in the archive's segment that the row names. Only
`replay/ledger.py`, `intake.py`, `examples.py` and `outcomes.py` query these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, RowMapping, String, Table, Text

from replay.records import Arm, Example, Feedback, Interaction, Split

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
Index("feedback_open", feedback.c.seq, sqlite_where=feedback.c.segment.is_(None))

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
    sqlite_autoincrement=True,  # jobs keep a seq as their cursor: a deleted row's number must not come back
)
Index("example_by_state", example.c.line, example.c.state, example.c.seq)

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

_INTERACTION = tuple(f.name for f in fields(Interaction))
_FEEDBACK = tuple(f.name for f in fields(Feedback))

Row = dict[str, Any]
Stored = Mapping[str, Any] | RowMapping


def row_of(record: Interaction | Feedback) -> Row:
    """Give the record's fields as columns; a JSON column gets the plain object."""
    names = _INTERACTION if isinstance(record, Interaction) else _FEEDBACK
    row = {name: getattr(record, name) for name in names}
    return {**row, "messages": list(record.messages), "arm": record.arm.value} if isinstance(record, Interaction) else row


def interaction_of(row: Stored) -> Interaction:
    """Read an interaction; one whose words are elsewhere comes without messages and reply."""
    plain = {name: row[name] for name in _INTERACTION}
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

"""The durable log of what was asked, answered and said: the one door to its tables.

Functions on a connection: no threads, no clock, no commit (`replay/writer.py` does that). Each is idempotent by the
ids of what it is given, so whoever was not answered says it again. Feedback is joined to its interaction whichever
comes first, and what may be learned from it is admitted in the same transaction. What comes in,
examples and trials' outcomes have a page of their own (`intake.py`, `examples.py`, `outcomes.py`) and are to be had from
here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, insert, inspect, select, text, update

from replay import archive, examples, opinions, resting, shadows, tables, vetting, votes
from replay.examples import (
    State,
    Waiting,
    counts,
    fresh,
    holdouts,
    reserve,
    reserved,
    rotated,
    trained,
    unlearned,
    used_in,
    validations,
    waiting,
)
from replay.intake import FeedbackConflict, chunks, give, give_all, interaction, record
from replay.outcomes import UnitOutcome, crashes, exposed_twice, feedback_of, last_heard, outcomes, recent_failures
from replay.records import Feedback, FeedbackStatus
from replay.tables import metadata

__all__ = [
    "AnotherSchema",
    "FeedbackConflict",
    "FeedbackView",
    "Sizes",
    "State",
    "UnitOutcome",
    "Waiting",
    "consume",
    "counts",
    "crashes",
    "create",
    "expire",
    "exposed_twice",
    "feedback_of",
    "feedback_view",
    "forget",
    "fresh",
    "give",
    "give_all",
    "holdouts",
    "interaction",
    "last_heard",
    "metadata",
    "outcomes",
    "recent_failures",
    "reclaim",
    "record",
    "refuse_another_schema",
    "release",
    "reserve",
    "reserved",
    "rotated",
    "seal",
    "sizes",
    "trained",
    "unlearned",
    "used_in",
    "validations",
    "waiting",
]

SCHEMA = 6
"""Of all tables in the ledger's file, the conductor's too; to be raised whenever one changes."""
_RAISED = frozenset({5})
"""Earlier versions that `create` raises to this one, since only columns came that may be null."""
_NEW_COLUMNS = (tables.interaction.c.is_refusal, tables.interaction.c.has_form)

_IN_WORDS = ("demonstration", "comment")
"""Metrics whose value is text."""


@dataclass(frozen=True, slots=True)
class FeedbackView:
    """A piece of feedback, where it stands, and what came of it."""

    feedback: Feedback
    status: FeedbackStatus
    refusal: str | None
    """Why nothing is learned from it, as `replay.admission.Reason`; None for an example, and while it is pending. Of a
    correction that is an example: why it makes no pair with what was served."""
    used_in: list[str]
    """The versions that learned from it."""
    served_by: str | None
    """The version whose reply it is about."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much the ledger holds and how old the oldest of it is, for metrics."""

    interactions: int
    open_interactions: int
    """Not yet sealed."""
    oldest_open_at: float | None
    feedback: dict[str, int]
    """By status."""
    oldest_pending_at: float | None
    refusals: dict[str, int]
    """Feedback that nothing is learned from, by reason."""
    examples: dict[str, dict[str, int]]
    """By line, then by state."""
    segments: int


class AnotherSchema(Exception):
    """The ledger's tables are those of another version of learnd; the message says what to do."""


def refuse_another_schema(file: Path) -> None:
    """Raise `AnotherSchema` when the ledger in `file` says that its tables are of another version.

    Its header is read, SQLite is not asked: a second connection would touch the log that the writer alone may recover.
    """
    header = _head(file)
    found = int.from_bytes(header[60:64], "big") if header.startswith(b"SQLite format 3\0") else 0
    if found not in {0, SCHEMA, *_RAISED}:  # 0: not yet written there
        raise AnotherSchema(
            f"{file} has tables of version {found}, this learnd's are of version {SCHEMA}: "
            "go on with the learnd that wrote it, or begin with another data_dir"
        )


def _head(file: Path) -> bytes:
    if not file.exists():
        return b""
    with file.open("rb") as opened:
        return opened.read(64)


def create(conn: Connection) -> None:
    """Make the tables and columns that are missing, and note their version."""
    metadata.create_all(conn)
    for column in _NEW_COLUMNS:
        if column.name not in {found["name"] for found in inspect(conn).get_columns(column.table.name)}:
            kind = column.type.compile(conn.dialect)
            conn.execute(text(f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}"))
    conn.execute(text(f"PRAGMA user_version = {SCHEMA}"))


def release(conn: Connection, job: str) -> int:
    """Take back what a job holds: its examples, which are counted, and its opinions."""
    opinions.release(conn, job)
    return examples.release(conn, job)


def reclaim(conn: Connection, job: str, ids: Sequence[str]) -> int:
    """Give an ended job what it held, as far as nobody else took it. Returns how many examples."""
    opinions.reclaim(conn, job)
    return examples.reclaim(conn, job, ids)


def consume(conn: Connection, job: str, version: str, remembered: Iterable[str] = ()) -> int:
    """Mark what a job holds as learned by `version`, with the examples that it rehearsed. Returns how many were new examples."""
    opinions.consume(conn, job, version)
    return examples.consume(conn, job, version, remembered)


def expire(conn: Connection, before: float) -> int:
    """Give up on feedback that was received before then and still waits for its interaction. Returns how many."""
    table = tables.feedback
    is_over = (table.c.status == FeedbackStatus.PENDING, table.c.received_at < before)
    return conn.execute(update(table).where(*is_over).values(status=FeedbackStatus.EXPIRED)).rowcount


def feedback_view(conn: Connection, feedback_id: str) -> FeedbackView | None:
    """Read one piece of feedback and what came of it."""
    row = conn.execute(select(tables.feedback).where(tables.feedback.c.id == feedback_id)).mappings().one_or_none()
    if row is None:
        return None
    said = tables.feedback_of(row)
    asked = interaction(conn, said.inference_id)
    return FeedbackView(
        feedback=said,
        status=FeedbackStatus(row["status"]),
        refusal=row["refusal"] or opinions.stopped(conn, feedback_id) or resting.refusal(conn, feedback_id),
        used_in=sorted({*used_in(conn, feedback_id), *opinions.used_in(conn, feedback_id)}),
        served_by=asked.version if asked else None,
    )


def sizes(conn: Connection) -> Sizes:
    """Measure the ledger, without reading all of it: it is asked at each scrape, while everybody waits.

    No interaction and no feedback is ever deleted, so the last one's place is their number.
    """
    asked, said = tables.interaction, tables.feedback
    is_open = asked.c.segment.is_(None)
    oldest = select(func.count(), func.min(said.c.received_at))
    pending, oldest_at = conn.execute(oldest.where(said.c.status == FeedbackStatus.PENDING)).one()
    expired = conn.execute(oldest.where(said.c.status == FeedbackStatus.EXPIRED)).one()[0]
    matched = (conn.scalar(select(func.max(said.c.seq))) or 0) - pending - expired
    by_status = {FeedbackStatus.MATCHED: matched, FeedbackStatus.PENDING: pending, FeedbackStatus.EXPIRED: expired}
    by_reason = select(said.c.refusal, func.count()).where(said.c.refusal.is_not(None)).group_by(said.c.refusal)
    opened = conn.execute(select(func.count(), func.min(asked.c.at)).where(is_open)).one()
    return Sizes(
        interactions=conn.scalar(select(func.max(asked.c.seq))) or 0,
        open_interactions=opened[0],
        oldest_open_at=opened[1],
        feedback={status.value: number for status, number in by_status.items() if number},
        oldest_pending_at=oldest_at,
        refusals={row[0]: row[1] for row in conn.execute(by_reason)},
        examples=counts(conn),
        segments=conn.scalar(select(func.count()).select_from(tables.segment)) or 0,
    )


def seal(conn: Connection, folder: Path, older_than: float, max_rows: int) -> int:
    """Move the words of at most `max_rows` interactions from before then into one new segment. Returns how many moved.

    The segment is whole on disk before the transaction that blanks the rows commits. When that fails, the next call
    writes the same segment's number again: a segment counts once its row is here. Joined feedback is copied, not
    moved.
    """
    asked, said = tables.interaction, tables.feedback
    old = select(asked).where(asked.c.segment.is_(None), asked.c.at < older_than).order_by(asked.c.at).limit(max_rows)
    rows = conn.execute(old).mappings().all()
    if not rows:
        return 0
    settled = select(said).where(said.c.segment.is_(None), said.c.status != FeedbackStatus.PENDING)
    given = conn.execute(settled.order_by(said.c.seq).limit(max_rows)).mappings().all()
    number = (conn.scalar(select(func.max(tables.segment.c.id))) or 0) + 1
    whole = archive.Rows([tables.interaction_of(r) for r in rows], [tables.feedback_of(r) for r in given])
    archive.seal(whole, folder, number)
    last = {"id": number, "interactions": len(rows), "feedback": len(given), "last_at": rows[-1]["at"]}
    conn.execute(insert(tables.segment).values(last))
    for chunk in chunks([row["seq"] for row in rows]):
        slim = {"segment": number, "messages": None, "reply": None}
        conn.execute(update(asked).where(asked.c.seq.in_(chunk)).values(slim))
    for chunk in chunks([row["seq"] for row in given]):
        conn.execute(update(said).where(said.c.seq.in_(chunk)).values(segment=number))
    return len(rows)


def forget(conn: Connection, folder: Path, interaction_ids: Sequence[str]) -> int:
    """Erase what was said in these interactions, here and in the archive. Returns how many were known.

    Ids and scores stay, so that no evidence changes. Which versions learned from them is told by `used_in`.
    """
    asked, said = tables.interaction, tables.feedback
    archive.erase(folder, interaction_ids)
    known = 0
    for chunk in chunks(list(interaction_ids)):
        examples.forget(conn, chunk)
        opinions.forget(conn, chunk)
        vetting.forget(conn, chunk)
        votes.forget(conn, chunk)
        shadows.forget(conn, chunk)
        is_on_them = said.c.inference_id.in_(chunk)
        conn.execute(update(said).where(is_on_them).values(comment=None, tags={}))
        conn.execute(update(said).where(is_on_them, said.c.metric_name.in_(_IN_WORDS)).values(value=""))
        blank = {"messages": None, "reply": None}
        known += conn.execute(update(asked).where(asked.c.id.in_(chunk)).values(blank)).rowcount
    return known

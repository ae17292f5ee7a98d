"""The durable log of what was asked, answered and said: the one door to its tables.

Functions on a connection: no threads, no clock, no commit (`replay/writer.py` does that). Each is idempotent by the
ids of what it is given, so whoever was not answered says it again. Feedback is joined to its interaction whichever
comes first, and what may be learned from it is admitted in the same transaction. Examples and trials' outcomes have a
page of their own (`examples.py`, `outcomes.py`) and are to be had from here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, bindparam, func, insert, select, update

from replay import archive, tables
from replay.admission import Reason
from replay.examples import (
    State,
    Waiting,
    consume,
    counts,
    fresh,
    holdouts,
    reclaim,
    release,
    reserve,
    reserved,
    take,
    trained,
    used_in,
    waiting,
)
from replay.examples import forget as _forget_examples
from replay.join import Meaning, meaning
from replay.outcomes import UnitOutcome, feedback_of, outcomes, recent_failures
from replay.records import Feedback, FeedbackStatus, Interaction, Receipt
from replay.tables import metadata

__all__ = [
    "FeedbackConflict",
    "FeedbackView",
    "Sizes",
    "State",
    "UnitOutcome",
    "Waiting",
    "consume",
    "counts",
    "create",
    "expire",
    "feedback_of",
    "feedback_view",
    "forget",
    "fresh",
    "give",
    "holdouts",
    "interaction",
    "metadata",
    "outcomes",
    "recent_failures",
    "reclaim",
    "record",
    "release",
    "reserve",
    "reserved",
    "seal",
    "sizes",
    "trained",
    "used_in",
    "waiting",
]

T = TypeVar("T")

_IN_WORDS = ("demonstration", "comment")
"""Metrics whose value is text."""

_CHUNK = 500
"""Ids in one statement, well under every database's limit."""

_ASKED = select(tables.interaction).where(tables.interaction.c.id == bindparam("id"))
_STORED = select(tables.feedback.c.digest, tables.feedback.c.status).where(tables.feedback.c.id == bindparam("id"))
_GIVEN = insert(tables.feedback)
"""The statements of each piece of feedback, made once: making them costs more than running them."""


class FeedbackConflict(Exception):
    """The id of a piece of feedback is taken by another body: the first one stands."""


@dataclass(frozen=True, slots=True)
class FeedbackView:
    """A piece of feedback, where it stands, and what came of it."""

    feedback: Feedback
    status: FeedbackStatus
    refusal: str | None
    """Why nothing is learned from it, as `replay.admission.Reason`; None for an example, and while it is pending."""
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


def create(conn: Connection) -> None:
    """Make the tables that are missing."""
    metadata.create_all(conn)


def record(conn: Connection, interactions: Sequence[Interaction]) -> list[Feedback]:
    """Store interactions, but for those known, and join the feedback that waited for them, which is returned."""
    matched: list[Feedback] = []
    for chunk in _chunks(list({i.id: i for i in interactions}.values())):
        ids = [i.id for i in chunk]
        known = set(conn.scalars(select(tables.interaction.c.id).where(tables.interaction.c.id.in_(ids))))
        news = {i.id: i for i in chunk if i.id not in known}
        if news:
            conn.execute(insert(tables.interaction), [tables.row_of(i) for i in news.values()])
            matched += _match(conn, news)
    return matched


def give(conn: Connection, feedback: Feedback, folder: Path | None = None) -> Receipt:
    """Store one piece of feedback and say where it stands; `folder` is the archive, where an old prompt is found.

    Raises `FeedbackConflict` when its id is taken by another body.
    """
    asked = interaction(conn, feedback.inference_id)
    served_by = asked.version if asked else None
    stored = conn.execute(_STORED, {"id": feedback.id}).one_or_none()
    verdict = meaning(feedback, stored.digest if stored else None, is_known=asked is not None)
    if verdict is Meaning.CONTRADICTORY:
        raise FeedbackConflict(f"feedback {feedback.id!r} is stored with another body: choose a new id, or leave it out")
    if stored is not None:
        return Receipt(feedback.id, FeedbackStatus(stored.status), feedback.inference_id, True, served_by)
    status = FeedbackStatus(verdict.value)
    conn.execute(_GIVEN, {**tables.row_of(feedback), "digest": feedback.body_digest(), "status": status})
    if asked is not None:
        _admit(conn, asked if asked.messages else interaction(conn, asked.id, folder) or asked, feedback)
    return Receipt(feedback.id, status, feedback.inference_id, served_by=served_by)


def expire(conn: Connection, before: float) -> int:
    """Give up on feedback that was received before then and still waits for its interaction. Returns how many."""
    table = tables.feedback
    is_over = (table.c.status == FeedbackStatus.PENDING, table.c.received_at < before)
    return conn.execute(update(table).where(*is_over).values(status=FeedbackStatus.EXPIRED)).rowcount


def interaction(conn: Connection, interaction_id: str, folder: Path | None = None) -> Interaction | None:
    """Read an interaction; a sealed one has its words only when the archive's `folder` is given."""
    row = conn.execute(_ASKED, {"id": interaction_id}).mappings().one_or_none()
    if row is None:
        return None
    whole = archive.find(folder, interaction_id, row["segment"]) if folder and row["segment"] else None
    return whole or tables.interaction_of(row)


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
        refusal=row["refusal"],
        used_in=used_in(conn, feedback_id),
        served_by=asked.version if asked else None,
    )


def sizes(conn: Connection) -> Sizes:
    """Measure the ledger."""
    asked, said = tables.interaction, tables.feedback
    is_open = asked.c.segment.is_(None)
    by_status = conn.execute(select(said.c.status, func.count(), func.min(said.c.received_at)).group_by(said.c.status)).all()
    by_reason = select(said.c.refusal, func.count()).where(said.c.refusal.is_not(None)).group_by(said.c.refusal)
    opened = conn.execute(select(func.count(), func.min(asked.c.at)).where(is_open)).one()
    return Sizes(
        interactions=conn.scalar(select(func.count()).select_from(asked)) or 0,
        open_interactions=opened[0],
        oldest_open_at=opened[1],
        feedback={status: number for status, number, _ in by_status},
        oldest_pending_at=next((at for status, _, at in by_status if status == FeedbackStatus.PENDING), None),
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
    for chunk in _chunks([row["seq"] for row in rows]):
        slim = {"segment": number, "messages": None, "reply": None}
        conn.execute(update(asked).where(asked.c.seq.in_(chunk)).values(slim))
    for chunk in _chunks([row["seq"] for row in given]):
        conn.execute(update(said).where(said.c.seq.in_(chunk)).values(segment=number))
    return len(rows)


def forget(conn: Connection, folder: Path, interaction_ids: Sequence[str]) -> int:
    """Erase what was said in these interactions, here and in the archive. Returns how many were known.

    Ids and scores stay, so that no evidence changes. Which versions learned from them is told by `used_in`.
    """
    asked, said = tables.interaction, tables.feedback
    archive.erase(folder, interaction_ids)
    known = 0
    for chunk in _chunks(list(interaction_ids)):
        _forget_examples(conn, chunk)
        is_on_them = said.c.inference_id.in_(chunk)
        conn.execute(update(said).where(is_on_them).values(comment=None, tags={}))
        conn.execute(update(said).where(is_on_them, said.c.metric_name.in_(_IN_WORDS)).values(value=""))
        blank = {"messages": None, "reply": None}
        known += conn.execute(update(asked).where(asked.c.id.in_(chunk)).values(blank)).rowcount
    return known


def _match(conn: Connection, news: dict[str, Interaction]) -> list[Feedback]:
    """Join the feedback that waited for these interactions."""
    table = tables.feedback
    is_waiting = (table.c.status == FeedbackStatus.PENDING, table.c.inference_id.in_(list(news)))
    rows = conn.execute(select(table).where(*is_waiting).order_by(table.c.seq)).mappings().all()
    if rows:
        conn.execute(update(table).where(*is_waiting).values(status=FeedbackStatus.MATCHED))
    matched = [tables.feedback_of(row) for row in rows]
    for feedback in matched:
        _admit(conn, news[feedback.inference_id], feedback)
    return matched


def _admit(conn: Connection, asked: Interaction, feedback: Feedback) -> None:
    reason = take(conn, asked, feedback)
    if reason not in {None, Reason.NOT_A_DEMONSTRATION}:
        conn.execute(update(tables.feedback).where(tables.feedback.c.id == feedback.id).values(refusal=reason))


def _chunks(items: list[T]) -> Iterator[list[T]]:
    return (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))

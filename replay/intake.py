"""Interactions and feedback on their way into the ledger: stored once, joined whichever comes first, admitted as examples.

Functions on a connection, to be had from `replay.ledger`. What comes together is stored together: a statement costs more
than the rows it carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, bindparam, insert, select, update

from replay import archive, tables
from replay.admission import DEMONSTRATION, Reason
from replay.examples import take
from replay.join import Meaning, meaning
from replay.records import Feedback, FeedbackStatus, Interaction, Receipt

T = TypeVar("T")

_CHUNK = 500
"""Ids in one statement, well under every database's limit."""

_ASKED = select(tables.interaction).where(tables.interaction.c.id == bindparam("id"))
_ANSWERED = select(tables.interaction.c.id, tables.interaction.c.version).where(
    tables.interaction.c.id.in_(bindparam("ids", expanding=True))
)
_STORED = select(tables.feedback.c.id, tables.feedback.c.digest, tables.feedback.c.status).where(
    tables.feedback.c.id.in_(bindparam("ids", expanding=True))
)
_GIVEN = insert(tables.feedback)
"""The statements that feedback needs, made once: making them costs more than running them."""


class FeedbackConflict(Exception):
    """The id of a piece of feedback is taken by another body: the first one stands."""


def record(conn: Connection, interactions: Sequence[Interaction]) -> list[Feedback]:
    """Store interactions, but for those known, and join the feedback that waited for them, which is returned."""
    matched: list[Feedback] = []
    for chunk in chunks(list({i.id: i for i in interactions}.values())):
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
    (outcome,) = give_all(conn, [feedback], folder)
    if isinstance(outcome, FeedbackConflict):
        raise outcome
    return outcome


def give_all(conn: Connection, items: Sequence[Feedback], folder: Path | None = None) -> list[Receipt | FeedbackConflict]:
    """Store many as `give` would one after the other; a conflict stands in its item's place and has stored nothing."""
    return [outcome for chunk in chunks(list(items)) for outcome in _give(conn, chunk, folder)]


def interaction(conn: Connection, interaction_id: str, folder: Path | None = None) -> Interaction | None:
    """Read an interaction; a sealed one has its words only when the archive's `folder` is given."""
    row = conn.execute(_ASKED, {"id": interaction_id}).mappings().one_or_none()
    if row is None:
        return None
    whole = archive.find(folder, interaction_id, row["segment"]) if folder and row["segment"] else None
    return whole or tables.interaction_of(row)


def chunks(items: list[T]) -> Iterator[list[T]]:
    """Parts of a list that one statement can carry."""
    return (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))


def _give(conn: Connection, items: list[Feedback], folder: Path | None) -> list[Receipt | FeedbackConflict]:
    served_by = dict(conn.execute(_ANSWERED, {"ids": [said.inference_id for said in items]}).all())
    found = conn.execute(_STORED, {"ids": [said.id for said in items]})
    stored = {row.id: (row.digest, FeedbackStatus(row.status)) for row in found}
    outcomes: list[Receipt | FeedbackConflict] = []
    news: list[Feedback] = []
    for said in items:
        digest, _ = stored.get(said.id, (None, None))
        verdict = meaning(said, digest, is_known=said.inference_id in served_by)
        if verdict is Meaning.CONTRADICTORY:
            outcomes.append(
                FeedbackConflict(f"feedback {said.id!r} is stored with another body: choose a new id, or leave it out")
            )
            continue
        if digest is None:
            stored[said.id] = said.body_digest(), FeedbackStatus(verdict.value)
            news.append(said)
        status, version = stored[said.id][1], served_by.get(said.inference_id)
        outcomes.append(Receipt(said.id, status, said.inference_id, is_repeat=digest is not None, served_by=version))
    _insert(conn, news, stored)
    for said in news:
        if said.metric_name == DEMONSTRATION and (asked := interaction(conn, said.inference_id, folder)) is not None:
            _admit(conn, asked, said)
    return outcomes


def _insert(conn: Connection, news: list[Feedback], stored: dict[str, tuple[str, FeedbackStatus]]) -> None:
    rows = [dict(tables.row_of(said), digest=stored[said.id][0], status=stored[said.id][1]) for said in news]
    if rows:
        conn.execute(_GIVEN, rows)


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

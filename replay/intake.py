"""Interactions and feedback on their way into the ledger: stored once, joined whichever comes first, admitted as examples.

Functions on a connection, to be had from `replay.ledger`. What comes together is stored together: a statement costs more
than the rows it carries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, bindparam, func, insert, select, update

from replay import archive, tables
from replay.admission import DEMONSTRATION, Reason
from replay.examples import take
from replay.join import Meaning, meaning
from replay.records import Feedback, FeedbackStatus, Interaction, Receipt
from replay.vetting import Guards, vet

T = TypeVar("T")

_CHUNK = 500
"""Ids in one statement, well under every database's limit."""

_ASKED = select(tables.interaction).where(tables.interaction.c.id == bindparam("id"))
_IDS = select(func.json_each(bindparam("ids")).table_valued("value").c.value)
"""Ids as one JSON array: a parameter for each would cost more than looking it up."""
_ANSWERED = select(tables.interaction.c.id, tables.interaction.c.version).where(tables.interaction.c.id.in_(_IDS))
_STORED = select(tables.feedback.c.id, tables.feedback.c.digest, tables.feedback.c.status).where(tables.feedback.c.id.in_(_IDS))
_GIVEN = f"INSERT INTO feedback ({', '.join(tables.GIVEN)}) VALUES ({', '.join('?' * len(tables.GIVEN))})"  # noqa: S608 - our names
"""The statements that feedback needs, made once: making them costs more than running them. The last is the driver's own,
since SQLAlchemy would spend more on each row than SQLite does."""


def unguarded(_: str) -> None:
    """No line has a guard."""


class FeedbackConflict(Exception):
    """The id of a piece of feedback is taken by another body: the first one stands."""


def record(conn: Connection, interactions: Sequence[Interaction], guards: Guards = unguarded) -> list[Feedback]:
    """Store interactions, but for those known, and join the feedback that waited for them, which is returned."""
    matched: list[Feedback] = []
    for chunk in chunks(list({i.id: i for i in interactions}.values())):
        ids = [i.id for i in chunk]
        known = set(conn.scalars(select(tables.interaction.c.id).where(tables.interaction.c.id.in_(ids))))
        news = {i.id: i for i in chunk if i.id not in known}
        if news:
            conn.execute(insert(tables.interaction), [tables.row_of(i) for i in news.values()])
            matched += _match(conn, news, guards)
    return matched


def give(conn: Connection, feedback: Feedback, folder: Path | None = None, guards: Guards = unguarded) -> Receipt:
    """Store one piece of feedback and say where it stands; `folder` is the archive, where an old prompt is found.

    Raises `FeedbackConflict` when its id is taken by another body.
    """
    (outcome,) = give_all(conn, [feedback], folder, guards)
    if isinstance(outcome, FeedbackConflict):
        raise outcome
    return outcome


def give_all(
    conn: Connection, items: Sequence[Feedback], folder: Path | None = None, guards: Guards = unguarded
) -> list[Receipt | FeedbackConflict]:
    """Store many as `give` would one after the other; a conflict stands in its item's place and has stored nothing."""
    return [outcome for chunk in chunks(list(items)) for outcome in _give(conn, chunk, folder, guards)]


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


def _give(conn: Connection, items: list[Feedback], folder: Path | None, guards: Guards) -> list[Receipt | FeedbackConflict]:
    served_by = dict(conn.execute(_ANSWERED, {"ids": json.dumps([said.inference_id for said in items])}).all())
    found = conn.execute(_STORED, {"ids": json.dumps([said.id for said in items])})
    stored = {identity: (digest, FeedbackStatus(status)) for identity, digest, status in found}
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
    if news:
        conn.exec_driver_sql(_GIVEN, [tables.given(said, *stored[said.id]) for said in news])
    for said in news:
        if said.metric_name == DEMONSTRATION and (asked := interaction(conn, said.inference_id, folder)) is not None:
            _admit(conn, asked, said, guards)
    return outcomes


def _match(conn: Connection, news: dict[str, Interaction], guards: Guards) -> list[Feedback]:
    """Join the feedback that waited for these interactions."""
    table = tables.feedback
    is_waiting = (table.c.status == FeedbackStatus.PENDING, table.c.inference_id.in_(list(news)))
    rows = conn.execute(select(table).where(*is_waiting).order_by(table.c.seq)).mappings().all()
    if rows:
        conn.execute(update(table).where(*is_waiting).values(status=FeedbackStatus.MATCHED))
    matched = [tables.feedback_of(row) for row in rows]
    for feedback in matched:
        _admit(conn, news[feedback.inference_id], feedback, guards)
    return matched


def _admit(conn: Connection, asked: Interaction, feedback: Feedback, guards: Guards) -> None:
    guard = guards(asked.line)
    judge = None if guard is None else lambda c, i, f, e: vet(c, i, f, e, guard)
    reason = take(conn, asked, feedback, judge)
    if reason not in {None, Reason.NOT_A_DEMONSTRATION}:
        conn.execute(update(tables.feedback).where(tables.feedback.c.id == feedback.id).values(refusal=reason))

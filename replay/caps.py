"""What one principal or tenant may give at most of what a job takes: held when the job takes it, not when it came.

So whoever comes first has no advantage, and a cap is a share of all that waits. Functions on a connection, in the transaction
that makes the job; the arithmetic is `replay.guard.excess`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, RowMapping, func, select

from replay import said
from replay.admission import Reason
from replay.examples import State
from replay.guard import CAPS, Guard, Share, Standing, excess
from replay.records import FeedbackStatus, Source
from replay.said import Said
from replay.tables import example, feedback, vetted
from replay.vetting import overturn

_SHARES = select(*(vetted.c[name] for name in ("example_id", "tenant", "principal", "occurred_at", "seq", "state")))


def hold_excess(conn: Connection, line: str, guard: Guard | None) -> dict[Reason, int]:
    """Hold what is over a cap among the fresh examples of a line, before a job takes them. Returns how many, by reason."""
    if guard is None:
        return {}
    waiting = _waiting(conn, line)
    shares = [
        Share(row.example_id, row.tenant, row.principal, (row.occurred_at, row.seq), is_free=row.state == Standing.RELEASED)
        for row in waiting
    ]
    held = {row.example_id for row in waiting if row.state == Standing.HELD}
    over = {identity: reason for identity, reason in excess(shares, guard).items() if identity not in held}
    for row in _rows(conn, list(over)):
        overturn(conn, row, Standing.HELD, over[row["example_id"]])
    return {reason: sum(one is reason for one in over.values()) for reason in sorted(set(over.values()))}


def over(conn: Connection, line: str, found: Sequence[Said], guard: Guard | None) -> dict[str, Reason]:
    """What of these thumbs, or of these pairs, is over a cap, with the reason, by the id of the feedback.

    What jobs took within the guard's window counts too, else whoever is alone between two jobs had no cap; so does what a cap
    held, so that it is the same when asked again. The window ends with the last that came: no clock is read.
    """
    if guard is None or not found:
        return {}
    last = conn.scalar(select(func.max(feedback.c.received_at)).where(feedback.c.status == FeedbackStatus.MATCHED)) or 0.0
    are_thumbs = found[0].source is Source.THUMB
    earlier = said.taken(conn, line, last - guard.window_seconds, are_thumbs=are_thumbs)
    asked = {one.feedback_id for one in found}
    shares = [*(one.share for one in found), *earlier]
    return {identity: reason for identity, reason in excess(shares, guard).items() if identity in asked}


def _waiting(conn: Connection, line: str) -> list[Row[*tuple[Any, ...]]]:
    """What is fresh, with what was held over a cap since the first of it came: so a cap is the same when asked again."""
    is_fresh = select(example.c.id).where(example.c.line == line, example.c.state == State.FRESH)
    of_line = (vetted.c.line == line, vetted.c.state.in_([Standing.ADMITTED, Standing.RELEASED, Standing.HELD]))
    fresh = conn.execute(_SHARES.where(*of_line, vetted.c.example_id.in_(is_fresh))).all()
    if not fresh:
        return []
    capped = vetted.c.reason.in_(CAPS)
    since = min(row.seq for row in fresh)
    return [*fresh, *conn.execute(_SHARES.where(*of_line, vetted.c.state == Standing.HELD, capped, vetted.c.seq >= since))]


def _rows(conn: Connection, ids: list[str]) -> Iterable[RowMapping]:
    for start in range(0, len(ids), 500):
        yield from conn.execute(select(vetted).where(vetted.c.example_id.in_(ids[start : start + 500]))).mappings().all()

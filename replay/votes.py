"""Thumbs on their way to being learned from: who puts words into the model's mouth and thumbs them up is held.

Functions on a connection. Votes are many, so they are not looked at when they come but afterwards, in order, a bounded
number at a time (`review`), each once: how far it has come is kept in the same transaction. What is held is the same for
every order in which the votes came. The attack is Hilel, Shenfeld, Choshen and Andreas 2025 (arXiv 2507.02850).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, insert, select, update

from replay import cursors
from replay.admission import Reason
from replay.guard import Guard, Standing, echo, has_flipped, standing
from replay.intake import interaction
from replay.records import FeedbackStatus, Interaction, asked_digest
from replay.tables import feedback, vote
from replay.vetting import Guards

PENDING = "pending"
"""The state of a vote whose interaction has not come yet."""
AT_ONCE = 500
"""Votes in one review: the writer has others to serve."""
_NAME = "votes"


class Vote(NamedTuple):
    """A thumb that may be learned from."""

    feedback_id: str
    interaction_id: str
    value: bool
    seq: int
    """Of the feedback: ask for what came after."""


def review(conn: Connection, guards: Guards, folder: Path | None = None) -> int:
    """Judge the next votes; `folder` is the archive. Returns how many pieces of feedback were looked at: 0 when all are."""
    since = cursors.place(conn, _NAME)
    names = ("seq", "id", "inference_id", "metric_name", "value", "principal", "received_at", "status")
    columns = [feedback.c[name] for name in names]
    news = conn.execute(select(*columns).where(feedback.c.seq > since).order_by(feedback.c.seq).limit(AT_ONCE)).mappings().all()
    waited = select(*columns).join(vote, vote.c.feedback_id == feedback.c.id)
    is_over = (vote.c.state == PENDING, feedback.c.status != FeedbackStatus.PENDING)
    late = [] if news else conn.execute(waited.where(*is_over).limit(AT_ONCE)).mappings().all()  # it reads all that wait: once
    conn.execute(delete(vote).where(vote.c.feedback_id.in_([row["id"] for row in late])))
    for row in (*late, *news):
        if isinstance(row["value"], bool):
            _judge(conn, row, guards, folder)
    if news:
        cursors.move(conn, _NAME, news[-1]["seq"])
    return len(news) or len(late)


def learnable(conn: Connection, line: str, after: int = 0) -> list[Vote]:
    """The votes of a line that may be learned from, in the order in which they came."""
    is_good = (vote.c.line == line, vote.c.seq > after, vote.c.state.in_([Standing.ADMITTED, Standing.RELEASED]))
    query = select(vote.c.feedback_id, vote.c.interaction_id, vote.c.value, vote.c.seq)
    return [Vote(*row) for row in conn.execute(query.where(*is_good).order_by(vote.c.seq))]


def forget(conn: Connection, interaction_ids: Sequence[str]) -> None:
    """Let nothing be learned from votes on these interactions."""
    told = {"state": Standing.DROPPED, "reason": Reason.NO_PROMPT, "asked": ""}
    conn.execute(update(vote).where(vote.c.interaction_id.in_(interaction_ids)).values(told))


def _judge(conn: Connection, row: RowMapping, guards: Guards, folder: Path | None) -> None:
    """Store a vote with its verdict."""
    stored = {"feedback_id": row["id"], "seq": row["seq"], "interaction_id": row["inference_id"], "value": row["value"]}
    stored |= {"at": row["received_at"], "metric": row["metric_name"], "line": "", "principal": row["principal"], "asked": ""}
    asked = interaction(conn, row["inference_id"], folder)
    if asked is None:
        is_waiting = row["status"] == FeedbackStatus.PENDING
        state, reason = (PENDING, None) if is_waiting else (Standing.REFUSED, Reason.NO_PROMPT)
        conn.execute(insert(vote).values(**stored, state=state, reason=reason))
        return
    guard, principal = guards(asked.line), f"{row['principal']}/{asked.unit}"
    stored |= {"line": asked.line, "principal": principal, "asked": asked_digest(asked.line, asked.messages)}
    reason = _reason(asked, row, guard)
    state = Standing.ADMITTED if reason is None else standing(reason)
    conn.execute(insert(vote).values(**stored, state=state, reason=reason))
    _note(conn, row["id"], reason)
    if reason is None and guard is not None and row["principal"] not in guard.trusted:
        _hold_flips(conn, asked.line, principal, stored["asked"], guard)


def _reason(asked: Interaction, row: RowMapping, guard: Guard | None) -> Reason | None:
    checks = (
        (Reason.NO_LINE, not asked.line),
        (Reason.NOT_TRAINABLE, not asked.is_trainable),
        (Reason.NO_PROMPT, not asked.messages),
    )
    if (reason := next((reason for reason, is_so in checks if is_so), None)) is not None:
        return reason
    if guard is None or row["principal"] in guard.trusted or not row["value"]:
        return None
    return Reason.ECHO if echo(asked.messages, asked.reply) >= guard.echo_share else None


def _hold_flips(conn: Connection, line: str, principal: str, asked: str, guard: Guard) -> None:
    """Hold all votes of one principal on one question, once they look like a choice of what to teach."""
    of_them = (vote.c.line == line, vote.c.principal == principal, vote.c.asked == asked)
    is_open = vote.c.state == Standing.ADMITTED
    found = conn.execute(select(vote.c.value, vote.c.reason).where(*of_them).distinct()).all()
    if len({value for value, _ in found}) < len({True, False}):
        return  # one thumb alone, however often: no need to read them all
    if not any(reason == Reason.FLIPPED for _, reason in found) and not _are_flips(conn, of_them, guard):
        return
    held = list(conn.scalars(select(vote.c.feedback_id).where(*of_them, is_open)))
    conn.execute(update(vote).where(*of_them, is_open).values(state=Standing.HELD, reason=Reason.FLIPPED))
    for identity in held:
        _note(conn, identity, Reason.FLIPPED)


def _are_flips(conn: Connection, of_them: tuple[ColumnElement[bool], ...], guard: Guard) -> bool:
    votes: dict[str, list[bool]] = defaultdict(list)
    for reply, value in conn.execute(select(vote.c.interaction_id, vote.c.value).where(*of_them)):
        votes[reply].append(value)
    return has_flipped(votes, guard)


def _note(conn: Connection, feedback_id: str, reason: Reason | None) -> None:
    if reason is not None:
        conn.execute(update(feedback).where(feedback.c.id == feedback_id).values(refusal=reason))

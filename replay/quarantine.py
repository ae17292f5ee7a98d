"""What the guard holds or refused, and what rests since a roll-back, as a person sees it, and the person's own word on it.

Functions on a connection. Nothing is kept twice: what is released is made anew from the interaction and the feedback.
Called by the daemon with who decided; `replay.vetting`, `replay.votes` and `replay.resting` fill it, and `replay.opinions` when a
job takes what they let through. So one piece of feedback may stand in two places; what stopped it first is decided first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    Connection,
    FromClause,
    RowMapping,
    Select,
    Table,
    delete,
    func,
    insert,
    literal,
    null,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy import case as either

from replay import opinions, resting, tables
from replay.admission import Reason, Refusal, admit
from replay.examples import State, store
from replay.guard import Guard, Standing
from replay.intake import interaction
from replay.records import Source, split_of
from replay.tables import example, feedback, opinion, ruling, vetted, vote
from replay.vetting import Guards, cleaned, overturn

_STOPPED = (Standing.HELD, Standing.REFUSED, Standing.DROPPED)
_TO_DECIDE = {Standing.HELD, Standing.REFUSED}
_IS_STOPPED = opinion.c.state.in_(_STOPPED) & opinion.c.job.is_(None)
"""Before any version learned it: what rests was learned."""
_IN_VIEW = _IS_STOPPED | (ruling.c.feedback_id.is_not(None) & (opinion.c.state != State.FORGOTTEN))
_asked = tables.interaction
_OPINION = (
    select(
        *(opinion.c[name] for name in ("feedback_id", "interaction_id", "line")),
        (feedback.c.principal + "/" + _asked.c.unit).label("principal"),
        either((_IS_STOPPED, opinion.c.state), else_=ruling.c.state).label("state"),
        func.coalesce(opinion.c.reason, ruling.c.reason).label("reason"),
        feedback.c.received_at.label("at"),
        ruling.c.decided_by,
        ruling.c.decided_at,
        opinion.c.source.label("kind"),
    )
    .join(feedback, feedback.c.id == opinion.c.feedback_id)
    .join(_asked, _asked.c.id == feedback.c.inference_id)
    .outerjoin(ruling, ruling.c.feedback_id == opinion.c.feedback_id)
    .where(_IN_VIEW)
    .subquery("stopped")
)
"""Opinions that were stopped, in the columns of `vetted` and `vote`: what was released is so, whatever a job does with it."""
_PLACES: tuple[FromClause, ...] = (vetted, vote, _OPINION)
"""Where feedback is stopped, in the order in which it passes."""

Decision = Literal["release", "drop"]


class NotHeld(Exception):
    """Nothing stopped this feedback, or nothing can be learned from it any more; the message says which."""


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of feedback that the guard looked at, or that rests."""

    feedback_id: str
    interaction_id: str
    line: str
    kind: Literal["demonstration", "vote", "thumb", "correction", "pick"]
    """The first two were stopped as they came, the others as opinions, when a job was to take them, or they rest."""
    principal: str
    state: Standing
    reason: str
    at: float
    decided_by: str | None
    decided_at: float | None


def cases(conn: Connection, line: str, states: tuple[Standing, ...], reason: str | None, limit: int) -> list[Case]:
    """What stands so on a line, newest first; the first `limit` of it."""
    parts = [_cases(table, line, states, reason, limit) for table in _PLACES]
    if Standing.HELD in states and reason in {None, Reason.ROLLED_BACK}:
        of_examples, of_opinions = (_at_rest(table, State.RESTING, line=line) for table in (example, opinion))
        both = (of_examples.where(resting.IS_LAST_WORD), of_opinions)
        newest = (one.order_by(feedback.c.received_at.desc(), feedback.c.id).limit(limit) for one in both)
        parts += [select(one.subquery()) for one in newest]
    found = union_all(*parts).subquery()
    rows = conn.execute(select(found).order_by(found.c.at.desc(), found.c.feedback_id).limit(limit)).mappings()
    return [_as_case(row) for row in rows]


def counts(conn: Connection) -> dict[str, dict[str, dict[str, int]]]:
    """Count what the guard stopped: by line, then `held`, `refused` and `dropped`, then by reason."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for table in (vetted, vote, opinion):
        columns = (table.c.line, table.c.state, table.c.reason)
        stopped = _IS_STOPPED if table is opinion else table.c.state.in_(_STOPPED)
        for line, state, reason, number in conn.execute(select(*columns, func.count()).where(stopped).group_by(*columns)):
            by_reason = found.setdefault(line, {}).setdefault(state, {})
            by_reason[reason] = by_reason.get(reason, 0) + number
    return found


def case(conn: Connection, feedback_id: str) -> Case:
    """How one piece of feedback stands; raises `NotHeld` when no guard has looked at it and it does not rest."""
    if (rested := _rested(conn, feedback_id)) is not None:
        return rested
    table, _ = _find(conn, feedback_id)
    return _case(conn, table, feedback_id)


def hold(conn: Connection, example_ids: Sequence[str]) -> int:
    """Hold fresh examples that were seen to do harm; returns how many. What a person released, or no guard has seen, stays."""
    held = 0
    for row in conn.execute(select(vetted).where(vetted.c.example_id.in_(example_ids))).mappings().all():
        if row["state"] == Standing.ADMITTED:
            overturn(conn, row, Standing.HELD, Reason.HARMFUL)
            held += conn.scalar(select(vetted.c.state).where(vetted.c.seq == row["seq"])) == Standing.HELD
    return held


def decide(
    conn: Connection, feedback_id: str, decision: Decision, by: str, now: float, guards: Guards, folder: Path | None = None
) -> Case:
    """Decide on one piece of feedback, over the guard or a roll-back; said again, nothing changes. Raises `NotHeld`."""
    after = Standing.RELEASED if decision == "release" else Standing.DROPPED
    if (rested := _rested(conn, feedback_id)) is not None:
        ruled = replace(rested, state=after, decided_by=by, decided_at=now)
        return rested if rested.state is after else _decide_rested(conn, ruled)
    table, row = _find(conn, feedback_id)
    if row["state"] != after:
        if row["state"] in {Standing.SUPERSEDED, "pending"}:
            raise NotHeld(f"feedback {feedback_id!r} is {row['state']}: there is nothing to decide")
        if decision == "release" and row["state"] == Standing.ADMITTED:
            raise NotHeld(f"feedback {feedback_id!r} is learned from already: the guard did not stop it")
        _carry_out(conn, table, row, decision, guards(row["line"]), folder)
        _note(conn, table, row, {"state": after, "decided_by": by, "decided_at": now})
        if row.get("kind") != Source.CORRECTION:  # of which no pair is made: it is an example all the same
            refusal = None if decision == "release" else row["reason"] or "dropped"
            conn.execute(update(feedback).where(feedback.c.id == feedback_id).values(refusal=refusal))
    return _case(conn, table, feedback_id)


def _decide_rested(conn: Connection, told: Case) -> Case:
    """Carry out what was decided on what rests, and write it into the guard's row, where there is one."""
    if told.state is Standing.DROPPED:
        resting.drop(conn, told.feedback_id)
    elif not resting.release(conn, told.feedback_id):
        raise NotHeld(
            f"feedback {told.feedback_id!r} rests, and a later one on its interaction stands in its place: release that"
        )
    is_learned = (example.c.feedback_id == told.feedback_id, example.c.state == State.TRAINED)
    if conn.scalar(select(example.c.seq).where(*is_learned)) is not None:
        return told  # it was about the opinion alone
    stands = {name: getattr(told, name) for name in ("state", "reason", "decided_by", "decided_at")}
    for table in (vetted, vote):
        conn.execute(update(table).where(table.c.feedback_id == told.feedback_id).values(stands))
    refusal = None if told.state is Standing.RELEASED else told.reason
    conn.execute(update(feedback).where(feedback.c.id == told.feedback_id).values(refusal=refusal))
    return told


def _carry_out(
    conn: Connection, table: FromClause, row: RowMapping, decision: Decision, guard: Guard | None, folder: Path | None
) -> None:
    if table is vote:
        return
    if table is _OPINION:
        _let_in_or_keep_out(conn, row["feedback_id"], decision, guard, folder)
        return
    if decision == "release":
        _make_anew(conn, row, guard, folder)
        return
    of_it = example.c.id == row["example_id"]
    conn.execute(delete(example).where(of_it, example.c.state == State.FRESH))
    if (state := conn.scalar(select(example.c.state).where(of_it))) is not None:
        raise NotHeld(f"feedback {row['feedback_id']!r} is {state}: a job has it; erase it by its interaction, or roll back")


def _let_in_or_keep_out(conn: Connection, feedback_id: str, decision: Decision, guard: Guard | None, folder: Path | None) -> None:
    if decision == "drop":
        if (state := opinions.keep_out(conn, feedback_id)) is not None:
            raise NotHeld(f"feedback {feedback_id!r} is {state}: a job has it; erase it by its interaction, or roll back")
    elif (why := opinions.let_in(conn, feedback_id, guard, folder)) is not None:
        raise NotHeld(f"feedback {feedback_id!r} cannot be learned from whoever says so: {why}")


def _note(conn: Connection, table: FromClause, row: RowMapping, told: dict[str, object]) -> None:
    """Write down who decided what."""
    if isinstance(table, Table):
        conn.execute(update(table).where(table.c.feedback_id == row["feedback_id"]).values(told))
        return
    conn.execute(delete(ruling).where(ruling.c.feedback_id == row["feedback_id"]))
    conn.execute(insert(ruling).values(**told, feedback_id=row["feedback_id"], reason=row["reason"]))


def _make_anew(conn: Connection, row: RowMapping, guard: Guard | None, folder: Path | None) -> None:
    said = conn.execute(select(feedback).where(feedback.c.id == row["feedback_id"])).mappings().one()
    asked = interaction(conn, row["interaction_id"], folder)
    admitted = None if asked is None else admit(asked, tables.feedback_of(said))
    if admitted is None or isinstance(admitted, Refusal):
        why = "its interaction is gone" if admitted is None else admitted.reason
        raise NotHeld(f"feedback {row['feedback_id']!r} cannot be learned from any more: {why}")
    final = admitted if guard is None else cleaned(admitted, guard)
    store(conn, replace(final, split=split_of(row["cluster"])))


def _find(conn: Connection, feedback_id: str) -> tuple[FromClause, RowMapping]:
    """Where it waits for a decision, and how it stands there; else where it came last."""
    rows = ((place, _row(conn, select(place), place, feedback_id)) for place in _PLACES)
    found = [(place, row) for place, row in rows if row is not None]
    if not found:
        raise NotHeld(f"the guard has not looked at any feedback {feedback_id!r}: see `learnd quarantine list`")
    return next((one for one in found if one[1]["state"] in _TO_DECIDE), found[-1])


def _row(conn: Connection, query: Select[Any], place: FromClause, feedback_id: str) -> RowMapping | None:
    return conn.execute(query.where(place.c.feedback_id == feedback_id)).mappings().one_or_none()


def _cases(table: FromClause, line: str, states: tuple[Standing, ...], reason: str | None, limit: int) -> Select[Any]:
    chosen = [table.c.line == line, table.c.state.in_(states), *([] if reason is None else [table.c.reason == reason])]
    part = _columns(table).where(*chosen).order_by(table.c.at.desc(), table.c.feedback_id).limit(limit).subquery()
    return select(part)


def _columns(table: FromClause) -> Select[Any]:
    names = ("feedback_id", "interaction_id", "line", "principal", "state", "at", "decided_by", "decided_at")
    kind = table.c.kind if table is _OPINION else literal("demonstration" if table is vetted else "vote").label("kind")
    return select(*(table.c[name] for name in names), kind, func.coalesce(table.c.reason, "").label("reason"))


def _case(conn: Connection, table: FromClause, feedback_id: str) -> Case:
    return _as_case(conn.execute(_columns(table).where(table.c.feedback_id == feedback_id)).mappings().one())


def _rested(conn: Connection, feedback_id: str) -> Case | None:
    """The case of what rests since a roll-back, or was dropped while it did; None when it did neither."""
    parts = [_at_rest(table, state, feedback_id=feedback_id) for state in resting.STOPPED for table in (example, opinion)]
    row = conn.execute(union_all(*parts)).mappings().first()
    return None if row is None else _as_case(row)


def _at_rest(table: Table, state: State, **of: str) -> Select[Any]:
    """As `_columns`, the examples or opinions in this state; an opinion whose demonstration is so too is not told twice."""
    told = example.alias()
    of_it = (told.c.feedback_id == table.c.feedback_id, told.c.state == state)
    is_own = true() if table is example else ~select(told.c.seq).where(*of_it).exists()
    standing = Standing.HELD if state is State.RESTING else Standing.DROPPED
    kind = literal("demonstration") if table is example else table.c.source
    columns = (
        *(table.c[name] for name in ("feedback_id", "interaction_id", "line")),
        *(feedback.c.principal, literal(standing.value).label("state"), feedback.c.received_at.label("at")),
        *(null().label("decided_by"), null().label("decided_at"), kind.label("kind")),
        literal(Reason.ROLLED_BACK.value).label("reason"),
    )
    query = select(*columns).join_from(table, feedback, feedback.c.id == table.c.feedback_id)
    was_learned = table.c.job.is_not(None)  # what was stopped before any version learned it can be dropped too
    return query.where(table.c.state == state, was_learned, is_own, *(table.c[name] == value for name, value in of.items()))


def _as_case(row: RowMapping) -> Case:
    return Case(**{**row, "state": Standing(row["state"])})

"""What the guard holds or refused, and what rests since a roll-back, as a person sees it, and the person's own word on it.

Functions on a connection. Nothing is kept twice: what is released is made anew from the interaction and the feedback.
Called by the daemon with who decided; `replay.vetting`, `replay.votes` and `replay.resting` fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Table,
    delete,
    func,
    literal,
    null,
    select,
    true,
    union_all,
    update,
)

from replay import resting, tables
from replay.admission import Reason, Refusal, admit
from replay.examples import State, store
from replay.guard import Guard, Standing
from replay.intake import interaction
from replay.records import Source, split_of
from replay.tables import example, feedback, opinion, vetted, vote
from replay.vetting import Guards, cleaned, overturn

Decision = Literal["release", "drop"]


class NotHeld(Exception):
    """Nothing stopped this feedback, or nothing can be learned from it any more; the message says which."""


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of feedback that the guard looked at, or that rests."""

    feedback_id: str
    interaction_id: str
    line: str
    kind: Literal["demonstration", "vote", "preference"]
    principal: str
    state: Standing
    reason: str
    at: float
    decided_by: str | None
    decided_at: float | None


def cases(conn: Connection, line: str, states: tuple[Standing, ...], reason: str | None, limit: int) -> list[Case]:
    """What stands so on a line, newest first; the first `limit` of it."""
    parts = [_cases(table, line, states, reason, limit) for table in (vetted, vote)]
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
    for table in (vetted, vote):
        columns = (table.c.line, table.c.state, table.c.reason)
        stopped = table.c.state.in_([Standing.HELD, Standing.REFUSED, Standing.DROPPED])
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
        told = {"state": after, "decided_by": by, "decided_at": now}
        conn.execute(update(table).where(table.c.feedback_id == feedback_id).values(told))
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
        conn.execute(update(table).where(_is(table, told.feedback_id)).values(stands))
    refusal = None if told.state is Standing.RELEASED else told.reason
    conn.execute(update(feedback).where(feedback.c.id == told.feedback_id).values(refusal=refusal))
    return told


def _carry_out(
    conn: Connection, table: Table, row: RowMapping, decision: Decision, guard: Guard | None, folder: Path | None
) -> None:
    if table is vote:
        return
    if decision == "release":
        _make_anew(conn, row, guard, folder)
        return
    of_it = example.c.id == row["example_id"]
    conn.execute(delete(example).where(of_it, example.c.state == State.FRESH))
    if (state := conn.scalar(select(example.c.state).where(of_it))) is not None:
        raise NotHeld(f"feedback {row['feedback_id']!r} is {state}: a job has it; erase it by its interaction, or roll back")


def _make_anew(conn: Connection, row: RowMapping, guard: Guard | None, folder: Path | None) -> None:
    said = conn.execute(select(feedback).where(feedback.c.id == row["feedback_id"])).mappings().one()
    asked = interaction(conn, row["interaction_id"], folder)
    admitted = None if asked is None else admit(asked, tables.feedback_of(said))
    if admitted is None or isinstance(admitted, Refusal):
        why = "its interaction is gone" if admitted is None else admitted.reason
        raise NotHeld(f"feedback {row['feedback_id']!r} cannot be learned from any more: {why}")
    final = admitted if guard is None else cleaned(admitted, guard)
    store(conn, replace(final, split=split_of(row["cluster"])))


def _find(conn: Connection, feedback_id: str) -> tuple[Table, RowMapping]:
    for table in (vetted, vote):
        row = conn.execute(select(table).where(_is(table, feedback_id))).mappings().one_or_none()
        if row is not None:
            return table, row
    raise NotHeld(f"the guard has not looked at any feedback {feedback_id!r}: see `learnd quarantine list`")


def _is(table: Table, feedback_id: str) -> ColumnElement[bool]:
    return table.c.feedback_id == feedback_id


def _cases(table: Table, line: str, states: tuple[Standing, ...], reason: str | None, limit: int) -> Select[Any]:
    chosen = [table.c.line == line, table.c.state.in_(states), *([] if reason is None else [table.c.reason == reason])]
    part = _columns(table).where(*chosen).order_by(table.c.at.desc(), table.c.feedback_id).limit(limit).subquery()
    return select(part)


def _columns(table: Table) -> Select[Any]:
    names = ("feedback_id", "interaction_id", "line", "principal", "state", "at", "decided_by", "decided_at")
    kind = literal("demonstration" if table is vetted else "vote").label("kind")
    return select(*(table.c[name] for name in names), kind, func.coalesce(table.c.reason, "").label("reason"))


def _case(conn: Connection, table: Table, feedback_id: str) -> Case:
    return _as_case(conn.execute(_columns(table).where(_is(table, feedback_id))).mappings().one())


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
    return query.where(table.c.state == state, is_own, *(table.c[name] == value for name, value in of.items()))


def _as_case(row: RowMapping) -> Case:
    return Case(**{**row, "state": Standing(row["state"]), "kind": _KINDS.get(row["kind"], row["kind"])})


_KINDS: dict[str, Any] = {Source.THUMB: "vote", Source.CORRECTION: "demonstration", Source.PICK: "preference"}

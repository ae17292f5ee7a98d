"""Lines and their anchors as they stand in the database. Functions on a connection.

What was done since a watch was read is noticed by its round, its standing and who named it when: of two that would move it, one
does.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import JSON, Column, Connection, Float, Integer, String, Table, insert, select, update

from service.errors import Conflict
from service.registry import bump, metadata
from service.rollout.anchor import Seen, Standing, Step, Watch
from service.rollout.detector import START

_watch = Table(
    "anchor",
    metadata,
    Column("line", String, primary_key=True),
    Column("anchor", String),
    Column("since", Float, nullable=False),
    Column("round", Integer, nullable=False),
    Column("opened_at", Float),
    Column("champion", String),
    Column("walk", JSON, nullable=False),
    Column("blocks", Integer, nullable=False),
    Column("standing", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("seen", JSON, nullable=False),
)


def read(conn: Connection, line: str) -> Watch:
    """A line's watch; of one that nobody has named an anchor for, the base is it."""
    row = conn.execute(select(_watch).where(_watch.c.line == line)).mappings().one_or_none()
    if row is None:
        return Watch(line)
    seen = row["seen"]
    low, high = seen["difference"]
    asked, answered = seen["units"]
    whole = Seen(**{**seen, "difference": (low, high), "units": (asked, answered), "walk": tuple(seen["walk"])})
    return Watch(**{**row, "walk": tuple(row["walk"]), "standing": Standing(row["standing"]), "seen": whole})


def take(conn: Connection, watch: Watch, step: Step, now: float) -> Watch:
    """Do a step to the watch that it was decided on; raises `Conflict` when that has moved."""
    if step.does == "open":
        after = replace(watch, round=watch.round + 1, opened_at=now, champion=step.champion)
        after = replace(after, seen=Seen(blocks=watch.blocks, walk=watch.walk, log=watch.seen.log))
    elif step.does in {"close", "revert"}:
        after = replace(watch, opened_at=None, walk=step.seen.walk, blocks=step.seen.blocks, seen=step.seen)
    else:
        after = replace(watch, seen=step.seen)
    if step.does in {"alarm", "revert"}:
        standing = Standing.ALARM if step.does == "alarm" else Standing.REVERTED
        after = replace(after, standing=standing, reason=step.reason)
    _store(conn, watch, after)
    if step.does in {"open", "close", "revert"}:
        bump(conn)
    return after


def name(conn: Connection, line: str, anchor: str | None, now: float) -> Watch:
    """Make a version (None: the base) the line's anchor, with a detector that begins anew."""
    before = read(conn, line)
    after = Watch(line, anchor, since=now, round=before.round, walk=START)
    _store(conn, before, after)
    bump(conn)
    return after


def _store(conn: Connection, before: Watch, after: Watch) -> None:
    told: dict[str, Any] = {**asdict(after), "standing": after.standing.value}
    of = _watch.c
    stands = [of.line == before.line, of.round == before.round, of.standing == before.standing.value, of.since == before.since]
    stands.append(of.opened_at.is_not_distinct_from(before.opened_at))
    if conn.execute(update(_watch).where(*stands).values(told)).rowcount:
        return
    if conn.scalar(select(_watch.c.line).where(_watch.c.line == before.line)) is not None:
        raise Conflict(f"the anchor of {before.line!r} does not stand as it did any more")
    conn.execute(insert(_watch).values(told))

"""Learning jobs as they stand in the database: which examples, which attempt, what came of it.

Functions on a connection. A job of a line is made, and its examples reserved, in one transaction; what it learned is in
its folder (`service.job_folder`), and its end is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Column, Connection, Float, Index, Integer, RowMapping, String, Table, func, insert, select, update

from replay import ledger
from replay.records import Example
from service.errors import Conflict, NotFound
from service.registry import metadata

_job = Table(
    "job",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("line", String, nullable=False),
    Column("state", String, nullable=False),
    Column("trigger", String, nullable=False),
    Column("parent", String),
    Column("cursor", Integer, nullable=False),
    Column("examples", Integer, nullable=False),
    Column("held", JSON, nullable=False),  # the ids of those examples
    Column("remembered", JSON, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("reason", String),
    Column("verdict", JSON(none_as_null=True)),
    Column("version", String),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
)
_way = Table(  # apart from `job`: a data directory from before there was a choice stays as it is
    "job_strategy",
    metadata,
    Column("job", String, primary_key=True),
    Column("strategy", String, nullable=False),
)
_WHOLE = select(_job, _way.c.strategy).outerjoin(_way, _way.c.job == _job.c.id)
Index("job_open", _job.c.line, unique=True, sqlite_where=_job.c.ended_at.is_(None))


LATEST = 24
"""Ends that bear on the next job: a pause of a second is doubled to a day by 17 setbacks."""
BISECT, REBASE = "bisect", "rebase"
"""The triggers of a job that no version comes of, and of one that learns all that the line remembers again, from the base."""


class State(StrEnum):
    """How a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    """Its version passed the gate."""
    REJECTED = "rejected"
    """It ended, and the gate said no, or its artifact is not usable."""
    FAILED = "failed"
    """It died too often."""


@dataclass(frozen=True, slots=True)
class Job:
    """One update of a line."""

    id: str
    line: str
    state: State
    trigger: str
    """`examples`, `age`, `drift` or `operator`; `rebase`: all again from the base, by the clock or by hand; `bisect`: it only
    tries what a part of the examples does."""
    parent: str | None
    """The champion that it starts from; None: the base."""
    cursor: int
    """The newest example that it holds: the next job by itself waits for enough later ones."""
    examples: int
    attempts: int
    """Deaths so far."""
    reason: str | None
    verdict: Mapping[str, Any] | None
    """The gate's."""
    version: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    strategy: str | None = None
    """By which it learns; None: the line's own, in a job from before this was noted."""

    @property
    def is_rebase(self) -> bool:
        """Whether it is to keep what the line knows, and need not gain on anything new."""
        return self.trigger == REBASE

    @property
    def is_open(self) -> bool:
        """Whether it is still to end."""
        return self.ended_at is None

    def as_json(self) -> dict[str, Any]:
        """As the API shows it."""
        return asdict(self)


def queue(conn: Connection, line: str, trigger: str, parent: str | None, now: float, strategy: str | None = None) -> Job:
    """Make a job and give it every fresh example of its line; raises `Conflict` when one is open or there is nothing.

    A re-base needs none. It keeps the cursor of the job before it: what is fresh has not been tried by the line's own strategy.
    """
    if (running := current(conn, line)) is not None:
        raise Conflict(f"job {running.id!r} of {line!r} is {running.state}: one at a time", param="line")
    identity, before = _next(conn, line), last(conn, line)
    held = ledger.reserve(conn, line, identity)
    if not held and trigger != REBASE:
        rests = ledger.counts(conn).get(line, {}).get(ledger.State.RESTING, 0)
        told = f", or release some of {rests} examples that rest: `learnd quarantine list {line}`" if rests else ""
        raise Conflict(f"there is nothing new to learn on {line!r}: send demonstrations to /feedback first{told}", param="line")
    cursor = held[-1].seq if trigger != REBASE else before.cursor if before else 0
    plain = {"id": identity, "line": line, "trigger": trigger, "parent": parent, "created_at": now}
    return _make(conn, plain, held, cursor, strategy)


def probe(conn: Connection, line: str, like: str, ids: Sequence[str], parent: str | None, now: float) -> Job:
    """Make a job on these examples of an earlier job, as far as they are still there; raises `Conflict` when none is.

    It has the strategy and the cursor of the earlier one, so that by itself nothing is learned again that was tried.
    """
    identity, earlier = _next(conn, line), get(conn, like)
    ledger.reclaim(conn, identity, ids)
    held = ledger.reserved(conn, identity)
    if not held:
        raise Conflict(f"none of the examples of {like} is there any more", param="line")
    plain = {"id": identity, "line": line, "trigger": BISECT, "parent": parent, "created_at": now}
    return _make(conn, plain, held, earlier.cursor, earlier.strategy)


def start(conn: Connection, job: str, remembered: Sequence[str], now: float) -> None:
    """Note that the job's folder is whole, with the ids of the older examples that it rehearses."""
    told = {"state": State.RUNNING, "remembered": list(remembered), "started_at": now}
    conn.execute(update(_job).where(_job.c.id == job, _job.c.state == State.QUEUED).values(told))


def count_death(conn: Connection, job: str, reason: str) -> None:
    """The job died and is to be tried again."""
    conn.execute(update(_job).where(_job.c.id == job).values(attempts=_job.c.attempts + 1, reason=reason))


def end(
    conn: Connection,
    job: str,
    state: State,
    now: float,
    *,
    reason: str | None = None,
    verdict: Mapping[str, Any] | None = None,
    version: str | None = None,
) -> None:
    """End a job once; one that made no version gives its examples back. Raises `Conflict` when it has ended."""
    told = {"state": state, "reason": reason, "verdict": verdict, "version": version, "ended_at": now}
    if not conn.execute(update(_job).where(_job.c.id == job, _job.c.ended_at.is_(None)).values(told)).rowcount:
        raise Conflict(f"job {job!r} has ended already")
    if version is None:
        ledger.release(conn, job)


def reopen(conn: Connection, job: str) -> None:
    """Give an ended job its examples again, as far as nobody took them: its version is on trial once more."""
    ledger.reclaim(conn, job, conn.scalar(select(_job.c.held).where(_job.c.id == job)) or [])


def learned(conn: Connection, job: str, version: str) -> int:
    """Consume what a promoted version learned: its job's examples and those that it rehearsed. Returns how many were new."""
    remembered = conn.scalar(select(_job.c.remembered).where(_job.c.id == job)) or ()
    return ledger.consume(conn, job, version, remembered)


def get(conn: Connection, job: str) -> Job:
    """Read one job; raises `NotFound`."""
    row = conn.execute(_WHOLE.where(_job.c.id == job)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no job {job!r}", param="job")
    return _as_job(row)


def current(conn: Connection, line: str) -> Job | None:
    """The line's open job."""
    row = conn.execute(_WHOLE.where(_job.c.line == line, _job.c.ended_at.is_(None))).mappings().one_or_none()
    return None if row is None else _as_job(row)


def last(conn: Connection, line: str) -> Job | None:
    """The line's newest job."""
    query = _WHOLE.where(_job.c.line == line).order_by(_job.c.seq.desc()).limit(1)
    row = conn.execute(query).mappings().one_or_none()
    return None if row is None else _as_job(row)


def of(conn: Connection, line: str | None = None) -> list[Job]:
    """Jobs of a line, or all, newest first."""
    query = _WHOLE if line is None else _WHOLE.where(_job.c.line == line)
    return [_as_job(row) for row in conn.execute(query.order_by(_job.c.seq.desc())).mappings()]


def rebased_at(conn: Connection, line: str, strategy: str) -> float | None:
    """When a job by `strategy` was last made, whatever came of it, else when the line got its first version; None: never."""
    by_it = select(func.max(_job.c.created_at)).join(_way, _way.c.job == _job.c.id)
    found: float | None = conn.scalar(by_it.where(_job.c.line == line, _way.c.strategy == strategy))
    return found or conn.scalar(select(func.min(_job.c.ended_at)).where(_job.c.line == line, _job.c.version.is_not(None)))


def newest_version(conn: Connection, line: str, strategy: str) -> str | None:
    """The newest version of a line that a job by `strategy` made, whatever became of it."""
    by_it = select(_job.c.version).join(_way, _way.c.job == _job.c.id).where(_job.c.line == line, _way.c.strategy == strategy)
    found: str | None = conn.scalar(by_it.where(_job.c.version.is_not(None)).order_by(_job.c.seq.desc()).limit(1))
    return found


def rejections(conn: Connection, line: str, limit: int = LATEST) -> list[tuple[float, str]]:
    """When a line's latest candidates were rejected before any trial, newest first; jobs of a search have none."""
    query = select(_job.c.ended_at).where(_job.c.line == line, _job.c.state == State.REJECTED, _job.c.trigger != BISECT)
    return [(at, State.REJECTED) for at in conn.scalars(query.order_by(_job.c.seq.desc()).limit(limit))]


def judged(conn: Connection, line: str) -> list[frozenset[str]]:
    """The ids that each job of a line held on which the gate has given its verdict."""
    query = select(_job.c.held).where(_job.c.line == line, _job.c.verdict.is_not(None)).order_by(_job.c.seq)
    return [frozenset(held) for held in conn.scalars(query)]


def counts(conn: Connection, line: str) -> dict[str, int]:
    """How many jobs of a line stand in each state."""
    query = select(_job.c.state, func.count()).where(_job.c.line == line).group_by(_job.c.state)
    return {state: number for state, number in conn.execute(query)}  # noqa: C416 - rows are no pairs to mypy


def gate_counts(conn: Connection, line: str) -> dict[str, int]:
    """How often the gate said what of a line's candidates."""
    outcome = _job.c.verdict["outcome"].as_string()
    query = select(outcome, func.count()).where(_job.c.line == line, _job.c.verdict.is_not(None)).group_by(outcome)
    return {said: number for said, number in conn.execute(query)}  # noqa: C416 - likewise


def held(conn: Connection, job: str) -> list[str]:
    """The ids that a job holds or held."""
    return list(conn.scalar(select(_job.c.held).where(_job.c.id == job)) or ())


def _next(conn: Connection, line: str) -> str:
    made = conn.scalar(select(func.count()).select_from(_job).where(_job.c.line == line)) or 0
    return f"{line}-job{made + 1}"


def _make(conn: Connection, plain: Mapping[str, Any], members: Sequence[Example], cursor: int, strategy: str | None) -> Job:
    counts = {"cursor": cursor, "examples": len(members), "held": [e.id for e in members], "remembered": [], "attempts": 0}
    conn.execute(insert(_job).values(**plain, **counts, state=State.QUEUED))
    if strategy is not None:
        conn.execute(insert(_way).values(job=plain["id"], strategy=strategy))
    return get(conn, str(plain["id"]))


def _as_job(row: RowMapping) -> Job:
    plain = {name: row[name] for name in Job.__slots__}
    return Job(**{**plain, "state": State(row["state"])})

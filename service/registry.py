"""What exists and what should be: versions, the aliases of each line with their history, and the number of the desired state.

Functions on a connection; no threads, no files, no commit (`replay.writer` does that). A version is known once its row
is here, which is after its folder is whole on disk. `service.jobs` and `service.rollout.trials` keep their tables
beside these; the conductor is the only writer of them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    func,
    insert,
    select,
    update,
)

from service.errors import Conflict, NotFound
from service.rollout.anchor import Watch
from service.rollout.stages import Stage, Trial
from service.router import Desired, Resident, Route, Shadowing

metadata = MetaData()

_version = Table(
    "version",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("line", String, nullable=False),
    Column("number", Integer, nullable=False),
    Column("name", String, nullable=False, unique=True),
    Column("path", String, nullable=False),  # under the folder of versions, so that the data directory may be moved
    Column("digest", String, nullable=False),
    Column("parent", String),
    Column("job", String, nullable=False, unique=True),
    Column("state", String, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("gate", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    sqlite_autoincrement=True,  # engines cache by the id: it must never come back for other weights
)
_alias = Table(
    "alias",
    metadata,
    Column("line", String, primary_key=True),
    Column("alias", String, primary_key=True),
    Column("version", String),
    Column("revision", Integer, nullable=False),
)
_history = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("line", String, nullable=False),
    Column("alias", String, nullable=False),
    Column("source", String),
    Column("target", String),
    Column("at", Float, nullable=False),
    Column("reason", String, nullable=False),
    Column("evidence", JSON, nullable=False),
    Column("trial", String),
    Column("number", Integer, nullable=False),
    Column("swap_seconds", Float),
    Column("feedback_to_live_seconds", Float),
)
Index("alias_history_by_line", _history.c.line, _history.c.id)
_desired = Table("desired", metadata, Column("id", Integer, primary_key=True), Column("number", Integer, nullable=False))

CHAMPION, PREVIOUS = "champion", "previous"

Watched = tuple[Watch, float]
"""A watch over a line's anchor, and which share of the units the anchor answers."""


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable adapter of a line."""

    id: int
    """Unique over all lines and for ever: what engines call it."""
    line: str
    number: int
    name: str
    path: str
    digest: str
    parent: str | None
    job: str
    state: str
    """`candidate`, `live`, `retired`, or how its last trial ended."""
    scores: Mapping[str, Any]
    """By slice: `exact` and `loglik`, means over `n` held-out examples."""
    gate: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True, slots=True)
class Change:
    """One alias that moved."""

    id: int
    line: str
    alias: str
    source: str | None
    target: str | None
    at: float
    reason: str
    evidence: Mapping[str, Any]
    trial: str | None
    number: int
    """The desired state that carries it to the replicas."""
    swap_seconds: float | None
    """From the decision until every live replica routed by it; None until then."""
    feedback_to_live_seconds: float | None
    """From the oldest feedback that the version learned from to the decision."""

    def as_json(self) -> dict[str, Any]:
        """As the API shows it."""
        names = ("id", "line", "alias", "at", "reason", "evidence", "trial", "swap_seconds", "feedback_to_live_seconds")
        return {"from": self.source, "to": self.target, **{name: getattr(self, name) for name in names}}


def next_number(conn: Connection, line: str) -> int:
    """The number that the line's next version will have."""
    return int(conn.scalar(select(func.max(_version.c.number)).where(_version.c.line == line)) or 0) + 1


def register(
    conn: Connection,
    line: str,
    job: str,
    *,
    path: str,
    digest: str,
    parent: str | None,
    scores: Mapping[str, Any],
    gate: Mapping[str, Any],
    now: float,
) -> Version:
    """Make what a job has trained known as the line's next version; asked again for the job, the same one."""
    known = conn.scalar(select(_version.c.name).where(_version.c.job == job))
    if known is None:
        number = next_number(conn, line)
        known = f"{line}@v{number}"
        plain = {"line": line, "number": number, "name": known, "path": path, "digest": digest, "parent": parent, "job": job}
        told = {"state": "candidate", "scores": dict(scores), "gate": dict(gate), "created_at": now}
        conn.execute(insert(_version).values(**plain, **told))
    return version(conn, known)


def version(conn: Connection, name: str) -> Version:
    """Read one version; raises `NotFound`."""
    row = conn.execute(select(_version).where(_version.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no version {name!r}", param="version")
    return _as_version(row)


def versions(conn: Connection, line: str) -> list[Version]:
    """A line's versions, newest first."""
    query = select(_version).where(_version.c.line == line).order_by(_version.c.number.desc())
    return [_as_version(row) for row in conn.execute(query).mappings()]


def mark(conn: Connection, name: str, state: str) -> None:
    """Note how a version stands."""
    conn.execute(update(_version).where(_version.c.name == name).values(state=state))


def aliases(conn: Connection, line: str) -> dict[str, str | None]:
    """Where the line's stored aliases point: champion and previous; None is the base, or nothing yet."""
    found = {row.alias: row.version for row in conn.execute(select(_alias).where(_alias.c.line == line))}
    return {CHAMPION: found.get(CHAMPION), PREVIOUS: found.get(PREVIOUS)}


def crown(
    conn: Connection,
    line: str,
    *,
    expected: str | None,
    target: str | None,
    previous: str | None,
    now: float,
    reason: str,
    evidence: Mapping[str, Any],
    trial: str | None = None,
    feedback_to_live_seconds: float | None = None,
) -> Change:
    """Make `target` the champion, by compare-and-set, and raise the desired number.

    Raises `Conflict` when the champion is not `expected`: somebody else was faster, and what was decided no longer holds.
    """
    now_is = aliases(conn, line)
    if now_is[CHAMPION] != expected:
        raise Conflict(f"the champion of {line!r} is {now_is[CHAMPION] or 'the base'}, not {expected or 'the base'} any more")
    number = bump(conn)
    moves = {PREVIOUS: (now_is[PREVIOUS], previous), CHAMPION: (expected, target)}
    told = {"line": line, "at": now, "reason": reason, "evidence": dict(evidence), "trial": trial, "number": number}
    for alias, (source, to) in moves.items():
        _point(conn, line, alias, to)
        if source != to or alias == CHAMPION:
            seconds = feedback_to_live_seconds if alias == CHAMPION else None
            row = {**told, "alias": alias, "source": source, "target": to, "feedback_to_live_seconds": seconds}
            conn.execute(insert(_history).values(row))
    crowning = last_crowning(conn, line)
    assert crowning is not None, "it was written just now"
    return crowning


def history(conn: Connection, line: str) -> list[Change]:
    """Every move of the line's aliases, newest first."""
    query = select(_history).where(_history.c.line == line).order_by(_history.c.id.desc())
    return [_as_change(row) for row in conn.execute(query).mappings()]


def last_crowning(conn: Connection, line: str, target: str | None = None) -> Change | None:
    """The last time that the champion changed (to `target`, when it is given)."""
    query = select(_history).where(_history.c.line == line, _history.c.alias == CHAMPION)
    query = query if target is None else query.where(_history.c.target == target)
    row = conn.execute(query.order_by(_history.c.id.desc()).limit(1)).mappings().one_or_none()
    return None if row is None else _as_change(row)


def swapped(conn: Connection, change: int, seconds: float) -> None:
    """Note how long the replicas took to route by a change."""
    is_open = (_history.c.id == change, _history.c.swap_seconds.is_(None))
    conn.execute(update(_history).where(*is_open).values(swap_seconds=seconds))


def number(conn: Connection) -> int:
    """The number of the desired state."""
    return int(conn.scalar(select(_desired.c.number)) or 0)


def bump(conn: Connection) -> int:
    """Raise the desired number, so that waiting replicas wake."""
    if not conn.execute(update(_desired).values(number=_desired.c.number + 1)).rowcount:
        conn.execute(insert(_desired).values(id=1, number=1))
    return number(conn)


def desired(
    conn: Connection,
    lines: Iterable[str],
    trials: Mapping[str, Trial],
    folder: Path,
    watches: Mapping[str, Watched] | None = None,
) -> Desired:
    """What replicas should hold and how they should route; `trials` are the open ones, `folder` is that of all versions."""
    routes = {line: _route(line, aliases(conn, line), trials.get(line)) for line in lines}
    routes |= {line: _held_back(routes[line], *watched) for line, watched in (watches or {}).items()}
    candidates = {t.candidate for t in trials.values() if t.line in routes and t.stage.is_resident}
    named = {name for route in routes.values() for name in (route.champion, route.previous, route.anchor) if name}
    rows = conn.execute(select(_version.c.name, _version.c.path, _version.c.id).order_by(_version.c.id)).all()
    resident = tuple(Resident(row.name, str(folder / row.path), row.id) for row in rows if row.name in named | candidates)
    return Desired(number(conn), resident, routes, tuple(row.name for row in rows))


def _point(conn: Connection, line: str, alias: str, to: str | None) -> None:
    key = (_alias.c.line == line, _alias.c.alias == alias)
    if not conn.execute(update(_alias).where(*key).values(version=to, revision=_alias.c.revision + 1)).rowcount:
        conn.execute(insert(_alias).values(line=line, alias=alias, version=to, revision=1))


def _route(line: str, named: Mapping[str, str | None], trial: Trial | None) -> Route:
    champion, previous = named[CHAMPION], named[PREVIOUS]
    if trial is not None and trial.stage is Stage.SHADOW:
        return Route(line, champion, previous=previous, shadow=Shadowing(trial.candidate, trial.id, trial.policy.shadow))
    if trial is None or not trial.stage.has_traffic:
        return Route(line, champion, previous=previous)
    route = Route(line, champion, trial.candidate, previous, trial.weight, salt=trial.id, trial=trial.evidence_id)
    return replace(route, is_baking=trial.stage is Stage.BAKE)


def _held_back(route: Route, watch: Watch, holdback: float) -> Route:
    """The route with its anchor, which answers its share while a round compares it with this very champion."""
    route = replace(route, anchor=watch.anchor)
    is_compared = watch.is_open and watch.champion == route.champion
    return replace(route, holdback=holdback, watch=watch.name) if is_compared else route


def _as_version(row: RowMapping) -> Version:
    return Version(**row)


def _as_change(row: RowMapping) -> Change:
    return Change(**row)

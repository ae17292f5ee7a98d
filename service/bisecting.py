"""Searches for harmful examples, stored, and moved on by the conductor: one job after another on parts of what a job held.

Where a search stands is one row, so that a daemon that dies goes on. Each step is one transaction: what the last job said, and
the next job with its examples reserved; or the end, with what was named held in quarantine. No version comes of these jobs.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import JSON, Column, Connection, Float, Index, Integer, RowMapping, String, Table, insert, select, update

from replay import ledger, quarantine
from replay.records import Split
from service import jobs, registry, switch
from service.errors import Conflict
from service.jobs import Job
from service.journal import Journal, Json
from service.registry import metadata
from service.rollout import bisection, trials
from service.rollout.bisection import End, Search
from service.settings import Line, Settings

_search = Table(
    "bisection",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("line", String, nullable=False),
    Column("job", String, nullable=False, unique=True),  # the one whose candidate lost the slice
    Column("slice", String, nullable=False),
    Column("kept", JSON, nullable=False),  # ids that each part is measured on
    Column("search", JSON, nullable=False),
    Column("probe", String),  # the job that tries the half
    Column("outcome", String),
    Column("reason", String, nullable=False),
    Column("named", JSON, nullable=False),
    Column("began_at", Float, nullable=False),
    Column("ended_at", Float),
)
_NEITHER = (jobs.BISECT, jobs.REBASE)
"""Jobs that are not searched: one that searches, and one in which nothing new need be what did it."""
Index("bisection_open", _search.c.line, unique=True, sqlite_where=_search.c.ended_at.is_(None))


class Bisecting:
    """Moves the searches of all lines on; owned by the conductor."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        self._settings = settings
        self._journal = journal

    def tick(self, line: str) -> list[str]:
        """Do what is due on a line: names the search's step, if there was one."""
        if self._journal.do(lambda conn: self._due(conn, line)) is None:
            return []
        return [self._journal.record("bisected", line, lambda conn, now: self._step(conn, line, now))]

    def begin(self, job_id: str) -> Json:
        """Search for what made a job's candidate lose a slice; raises `NotFound`, or `Conflict` when there is nothing to do."""
        job = self._journal.do(lambda conn: jobs.get(conn, job_id))
        if job.line not in self._settings.lines or job.trigger in _NEITHER or bisection.lost(job.verdict) is None:
            raise Conflict(f"no candidate of job {job_id!r} lost a slice: there is nothing to search", param="job")

        def deed(conn: Connection, now: float) -> tuple[Json, Json]:
            switch.check(conn, self._settings.kill_switch, "freeze_training")
            if open_on(conn, job.line) is not None or _known(conn, job_id):
                raise Conflict(f"job {job_id!r} is searched already, or another one of {job.line!r} is", param="job")
            told = _open(conn, job, self._settings.lines[job.line], now)
            return told, told

        return self._journal.record("bisected", job.line, deed)

    def _due(self, conn: Connection, line: str) -> str | None:
        is_open = open_on(conn, line) is not None
        if not (is_open or self._settings.lines[line].gate.bisect) or trials.current(conn, line) or jobs.current(conn, line):
            return None
        if switch.read(conn, self._settings.kill_switch).holds_back("freeze_training"):
            return None
        if is_open:
            return "go on"
        last = jobs.last(conn, line)
        is_new = last is not None and last.trigger not in _NEITHER and not _known(conn, last.id)
        return "begin" if is_new and last and bisection.lost(last.verdict) else None

    def _step(self, conn: Connection, line: str, now: float) -> tuple[str, Json]:
        row = open_on(conn, line)
        if row is None:
            job = jobs.last(conn, line)
            assert job is not None, "it was due"
            told = _open(conn, job, self._settings.lines[line], now)
            return "begin", told
        search = Search.from_json(row["search"])
        found: Search | End = bisection.check(search)
        if row["probe"] is not None:
            said = jobs.get(conn, row["probe"])
            found = bisection.proceed(search, bisection.said_of(said.verdict, row["slice"]))
        return _end(conn, row, found, now) if isinstance(found, End) else _try(conn, row, found, now)


def open_on(conn: Connection, line: str) -> RowMapping | None:
    """The line's search that goes on."""
    query = select(_search).where(_search.c.line == line, _search.c.ended_at.is_(None))
    return conn.execute(query).mappings().one_or_none()


def last(conn: Connection, line: str) -> Json | None:
    """The line's newest search, as status shows it."""
    query = select(_search).where(_search.c.line == line).order_by(_search.c.seq.desc()).limit(1)
    row = conn.execute(query).mappings().one_or_none()
    if row is None:
        return None
    names = ("job", "slice", "probe", "outcome", "reason", "named", "began_at", "ended_at")
    return {**{name: row[name] for name in names}, "suspects": len(row["search"]["suspects"])}


def asked(conn: Connection, probe: str) -> int:
    """How many examples that train the job had of which this one tries a part."""
    return int(conn.execute(select(_search.c.search).where(_search.c.probe == probe)).scalar_one()["asked"])


def _known(conn: Connection, job: str) -> bool:
    return conn.scalar(select(_search.c.seq).where(_search.c.job == job)) is not None


def _open(conn: Connection, job: Job, spec: Line, now: float) -> Json:
    fresh = [one for one in ledger.fresh(conn, job.line) if one.id in set(jobs.held(conn, job.id))]
    tried = sorted((one for one in fresh if one.split is Split.TRAIN), key=lambda one: one.slice)
    kept = [one.id for one in fresh if one.split is not Split.TRAIN]
    told: Json = {"job": job.id, "slice": bisection.lost(job.verdict), "does": "begin", "suspects": len(tried)}
    step = spec.learning.batch_size * spec.learning.accumulation
    search = bisection.begin([one.id for one in tried], spec.gate.bisect_jobs, step, [one.slice for one in tried])
    plain = {"line": job.line, "job": job.id, "slice": told["slice"], "kept": kept, "search": search.to_json(), "named": []}
    conn.execute(insert(_search).values(**plain, reason="", began_at=now))
    return told


def _try(conn: Connection, row: RowMapping, search: Search, now: float) -> tuple[str, Json]:
    """The next job, on a half of the suspects and on what they are measured on."""
    parent = registry.aliases(conn, row["line"])[registry.CHAMPION]
    if parent != jobs.get(conn, row["job"]).parent:
        return _end(conn, row, End("not_found", (), "the champion changed: the slice is another one's to lose"), now)
    try:
        probe = jobs.probe(conn, row["line"], row["job"], [*search.half, *row["kept"]], parent, now)
    except Conflict as error:  # whoever gave them has taken them back since
        return _end(conn, row, End("not_found", (), error.message), now)
    _store(conn, row, search=search.to_json(), probe=probe.id)
    told = {"job": row["job"], "slice": row["slice"], "does": "try", "probe": probe.id}
    return "try", {**told, "examples": len(search.half), "suspects": len(search.suspects), "jobs_left": search.jobs_left}


def _end(conn: Connection, row: RowMapping, end: End, now: float) -> tuple[str, Json]:
    held = quarantine.hold(conn, end.named)
    _store(conn, row, outcome=end.outcome, reason=end.reason, named=list(end.named), ended_at=now)
    return "end", {"job": row["job"], "slice": row["slice"], "does": "end", **asdict(end), "named": list(end.named), "held": held}


def _store(conn: Connection, row: RowMapping, **told: Any) -> None:
    conn.execute(update(_search).where(_search.c.seq == row["seq"]).values(told))

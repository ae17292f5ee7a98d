"""Trials as they stand in the database, with the evidence that was seen. Functions on a connection.

A trial moves by compare-and-set on where it stands: of two that would move it, one does and the other is told so.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    RowMapping,
    String,
    Table,
    func,
    insert,
    select,
    update,
)

from service.errors import Conflict, NotFound
from service.registry import metadata
from service.rollout.evidence import Evidence
from service.rollout.stages import Stage, Trial, check
from service.settings import Rollout

LATEST = 24
"""Ends that bear on the next job, as `service.jobs` has it."""

_trial = Table(
    "trial",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("line", String, nullable=False),
    Column("candidate", String, nullable=False),
    Column("champion", String),
    Column("policy", JSON, nullable=False),
    Column("stage", String, nullable=False),
    Column("since", Float, nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", JSON, nullable=False),
    Column("trusted_step", Integer, nullable=False),
    Column("is_operator", Boolean, nullable=False),
    Column("fdr_index", Integer),
    Column("has_passed", Boolean, nullable=False),
    Column("job", String),
    Column("reason", String, nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("ended_at", Float),
)
Index("trial_open", _trial.c.line, unique=True, sqlite_where=_trial.c.ended_at.is_(None))
Index("trial_fdr_index", _trial.c.line, _trial.c.fdr_index, unique=True)  # an index is never given twice
_evidence = Table(
    "evidence",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("trial", String, ForeignKey("trial.id"), nullable=False, index=True),
    Column("body", JSON, nullable=False),
)


def begin(
    conn: Connection,
    *,
    line: str,
    candidate: str,
    champion: str | None,
    policy: Rollout,
    now: float,
    job: str | None = None,
    is_operator: bool = False,
    reason: str = "",
) -> Trial:
    """Open a trial, its policy frozen; raises `Conflict` when the line has an open one."""
    if (running := current(conn, line)) is not None:
        raise Conflict(f"trial {running.id!r} of {running.candidate} is {running.stage}: roll it back first", param="line")
    made = conn.scalar(select(func.count()).select_from(_trial).where(_trial.c.line == line)) or 0
    identity = f"{line}-trial{made + 1}"
    who = {"id": identity, "line": line, "candidate": candidate, "champion": champion, "job": job}
    how = {"policy": policy.model_dump(mode="json"), "is_operator": is_operator, "reason": reason}
    where = {
        "stage": Stage.VERIFYING,
        "since": now,
        "step": 0,
        "steps": [],
        "trusted_step": 0,
        "opened_at": now,
        "has_passed": False,
    }
    conn.execute(insert(_trial).values(**who, **how, **where))
    return get(conn, identity)


def move(
    conn: Connection,
    trial: Trial,
    to: Stage,
    now: float,
    *,
    reason: str,
    step: int = 0,
    has_passed: bool = False,
    is_answered_for: bool = True,
) -> Trial:
    """Move a trial from where `trial` says it stands; raises `Conflict` when it does not stand there any more.

    `has_passed` says that evidence moves it on, `is_answered_for` that a person who resumes it vouches for what was before.
    """
    check(trial.stage, to)
    if trial.is_operator and to is Stage.HOLD:
        raise Conflict(f"trial {trial.id!r} was opened by hand and has no canary to hold: abort it, or wait")
    steps = [*trial.steps, now] if to is Stage.CANARY else list(trial.steps)
    told: dict[str, Any] = {
        "stage": to,
        "since": now,
        "reason": reason,
        "steps": steps,
        "step": step if to is Stage.CANARY else trial.step,
    }
    told["has_passed"] = trial.has_passed or has_passed
    if to is Stage.CANARY and trial.fdr_index is None:
        used = select(func.max(_trial.c.fdr_index)).where(_trial.c.line == trial.line)
        told["fdr_index"] = int(conn.scalar(used) or 0) + 1
    if trial.stage is Stage.HOLD and to is Stage.CANARY and is_answered_for:
        told["trusted_step"] = len(steps)
    if not to.is_open:
        told["ended_at"] = now
    stands = (_trial.c.id == trial.id, _trial.c.stage == trial.stage, _trial.c.step == trial.step, _trial.c.since == trial.since)
    if not conn.execute(update(_trial).where(*stands).values(told)).rowcount:
        raise Conflict(f"trial {trial.id!r} is not {trial.stage} any more")
    return get(conn, trial.id)


def remark(conn: Connection, trial: Trial, reason: str) -> Trial:
    """Say of a trial that stays where it stands why it does; raises `Conflict` when it does not stand there any more."""
    stands = (_trial.c.id == trial.id, _trial.c.stage == trial.stage, _trial.c.since == trial.since)
    if not conn.execute(update(_trial).where(*stands).values(reason=reason)).rowcount:
        raise Conflict(f"trial {trial.id!r} is not {trial.stage} any more")
    return get(conn, trial.id)


def ends(conn: Connection, line: str, limit: int = LATEST) -> list[tuple[float, str]]:
    """When and how a line's latest candidates ended, newest first, without the trials that a person opened."""
    query = select(_trial.c.ended_at, _trial.c.stage).where(_trial.c.line == line, _trial.c.ended_at.is_not(None))
    rows = conn.execute(query.where(~_trial.c.is_operator).order_by(_trial.c.seq.desc()).limit(limit))
    return [(at, stage) for at, stage in rows]


def promotions(conn: Connection, line: str) -> int:
    """How many of a line's candidates went live by evidence; those by hand are no discoveries."""
    found = (_trial.c.line == line, _trial.c.stage == Stage.LIVE, _trial.c.has_passed)
    return conn.scalar(select(func.count()).select_from(_trial).where(*found)) or 0


def note(conn: Connection, trial: str, evidence: Evidence) -> None:
    """Keep one look at a trial."""
    conn.execute(insert(_evidence).values(trial=trial, body=evidence.to_json()))


def get(conn: Connection, trial: str) -> Trial:
    """Read one trial; raises `NotFound`."""
    row = conn.execute(select(_trial).where(_trial.c.id == trial)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no trial {trial!r}", param="trial")
    return _as_trial(row)


def current(conn: Connection, line: str) -> Trial | None:
    """The line's open trial."""
    query = select(_trial).where(_trial.c.line == line, _trial.c.ended_at.is_(None))
    row = conn.execute(query).mappings().one_or_none()
    return None if row is None else _as_trial(row)


def of(conn: Connection, line: str | None = None) -> list[Trial]:
    """Trials of a line, or all, newest first."""
    query = select(_trial) if line is None else select(_trial).where(_trial.c.line == line)
    return [_as_trial(row) for row in conn.execute(query.order_by(_trial.c.seq.desc())).mappings()]


def counts(conn: Connection, line: str) -> dict[str, int]:
    """How many trials of a line stand at each stage."""
    query = select(_trial.c.stage, func.count()).where(_trial.c.line == line).group_by(_trial.c.stage)
    return {stage: number for stage, number in conn.execute(query)}  # noqa: C416 - rows are no pairs to mypy


def history(conn: Connection, trial: str) -> list[Evidence]:
    """The looks that were kept, oldest first."""
    query = select(_evidence.c.body).where(_evidence.c.trial == trial).order_by(_evidence.c.seq)
    return [Evidence.from_json(body) for body in conn.scalars(query)]


def last_look(conn: Connection, trial: str) -> Evidence | None:
    """The last look that was kept."""
    query = select(_evidence.c.body).where(_evidence.c.trial == trial).order_by(_evidence.c.seq.desc()).limit(1)
    body = conn.scalar(query)
    return None if body is None else Evidence.from_json(body)


def told(trial: Trial) -> tuple[Trial, dict[str, Any]]:
    """A trial with what the log tells of a move of it."""
    plain = {"trial": trial.id, "candidate": trial.candidate, "champion": trial.champion, "weight": trial.weight}
    return trial, {**plain, "stage": trial.stage.value, "reason": trial.reason}


def as_json(trial: Trial, look: Evidence | None) -> dict[str, Any]:
    """A trial with its latest look, as status and API show it."""
    plain = {name: getattr(trial, name) for name in ("id", "line", "candidate", "champion", "step", "weight", "reason")}
    more = {name: getattr(trial, name) for name in ("opened_at", "since", "ended_at", "is_operator", "fdr_index", "has_passed")}
    return {**plain, "state": trial.stage.value, **more, **(look_as_json(look) if look else _UNSEEN)}


def look_as_json(look: Evidence) -> dict[str, Any]:
    """One look, as the API shows it."""
    return {
        "at": look.at,
        "pairs": look.pairs,
        "units": {"candidate": look.candidate_units, "control": look.control_units},
        "log_evidence": {"promote": look.log_promote, "rollback": look.log_rollback, **_logs(look)},
        "thresholds": {"promote": look.promote_at, "rollback": look.rollback_at, **_limits(look)},
        "promote": look.promote,
        "harm": look.harm,
        "harm_at": look.harm_at,
        "is_bake": look.is_bake,
        "difference": list(look.difference),
        "failed_replies": look.failed_replies,
    }


def _logs(look: Evidence) -> dict[str, float]:
    late = {"late": look.log_late} if look.is_bake else {}
    return {"mismatch": look.log_mismatch, "response": look.log_response, **late}


def _limits(look: Evidence) -> dict[str, float]:
    late = {"late": look.late_at} if look.is_bake else {}
    return {"mismatch": look.mismatch_at, "response": look.response_at, **late}


_UNSEEN: dict[str, Any] = {
    "at": None,
    "pairs": 0,
    "units": {"candidate": 0, "control": 0},
    "log_evidence": {},
    "thresholds": {},
    "promote": {},
    "harm": {},
    "harm_at": None,
    "is_bake": False,
    "difference": None,
    "failed_replies": 0,
}


def _as_trial(row: RowMapping) -> Trial:
    plain = {name: row[name] for name in Trial.__slots__}
    read = {"policy": Rollout(**row["policy"]), "stage": Stage(row["stage"]), "steps": tuple(row["steps"])}
    return Trial(**{**plain, **read})

"""What changes together: a version, its trial, the aliases and the examples, in one transaction each.

Functions on a connection; the conductor decides when, and commits. An end that is no promotion gives the examples back
and changes nothing else; a promotion consumes them, once, under the compare-and-set of trial and alias. With the champion
moves what the line has learned: that of the lineage (`service.lineage`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from replay import ledger, shadows
from service import audit, jobs, lineage, registry
from service.errors import Conflict
from service.jobs import Job
from service.registry import CHAMPION, PREVIOUS, Change, Version
from service.rollout import trials, verdicts
from service.rollout.controller import Judgement, Move
from service.rollout.evidence import Evidence
from service.rollout.stages import Stage, Trial
from service.settings import Rollout


@dataclass(frozen=True, slots=True)
class Made:
    """What a job made, ready to be known: its folder is whole, the gate has passed it."""

    path: str
    digest: str
    scores: Mapping[str, Any]
    gate: Mapping[str, Any]


def open_trial(conn: Connection, job: Job, made: Made, policy: Rollout, now: float) -> Trial:
    """Make a job's version known, end the job and put the version on trial."""
    told: dict[str, Any] = {"path": made.path, "digest": made.digest, "scores": made.scores, "gate": made.gate}
    version = registry.register(conn, job.line, job.id, parent=job.parent, now=now, **told)
    jobs.end(conn, job.id, jobs.State.SUCCEEDED, now, verdict=made.gate, version=version.name)
    return _begin(conn, version, policy, now)


def summon(conn: Connection, line: str, name: str, policy: Rollout, now: float, *, reason: str) -> Trial:
    """Put a known version on trial by hand: once proven it is promoted, without a canary.

    Raises `NotFound` for an unknown version, `Conflict` when it is the champion or another trial is open.
    """
    version = registry.version(conn, name)
    if version.line != line or registry.aliases(conn, line)[CHAMPION] == name:
        what = f"of {version.line!r}, not of {line!r}" if version.line != line else "the champion already"
        raise Conflict(f"{name} is {what}", param="version")
    jobs.reopen(conn, version.job)
    return _begin(conn, version, policy, now, reason=reason, is_operator=True)


def advance(conn: Connection, trial: Trial, move: Move, now: float, said: Judgement | None = None) -> Trial:
    """Move a trial with all that this brings, the record of the verdict among it.

    Out of `PROMOTING` the alias moves; out of `BAKE` it moves back, or the examples are consumed: what is rolled back there gives
    them back, as if it had never been promoted. `said` is None for what a person asked for. Raises `Conflict` when the trial, or
    the champion, has moved.
    """
    evidence = said.evidence if said else None
    has_passed = said is not None and trial.stage is Stage.CANARY and move.to in {Stage.PROMOTING, Stage.WAITING}
    told: dict[str, Any] = {"reason": move.reason, "step": move.step, "has_passed": has_passed, "is_answered_for": said is None}
    moved = trials.move(conn, trial, move.to, now, **told)
    audit.tell(conn, now, trial.line, "verdict", verdicts.record(trial, move, said))
    if evidence is not None:
        trials.note(conn, trial.id, evidence)
    if trial.stage is Stage.SHADOW:
        shadows.hush(conn, trial.id)
    if trial.stage is Stage.PROMOTING and move.to in {Stage.BAKE, Stage.LIVE}:
        _crown(conn, moved, now, evidence)
    if trial.stage is Stage.BAKE and move.to is Stage.ROLLING_BACK:
        step_back(conn, trial.line, now, move.reason, evidence.to_json() if evidence else {})
    if move.to is Stage.LIVE:
        if trial.job is not None:
            jobs.learned(conn, trial.job, trial.candidate)
    elif not move.to.is_open:
        registry.mark(conn, trial.candidate, _standing(conn, trial.candidate, move.to))
        if trial.job is not None:
            ledger.release(conn, trial.job)
    registry.bump(conn)
    return moved


def swap(conn: Connection, change: Change, seconds: float) -> tuple[None, dict[str, Any]]:
    """Every replica routes by a change of champion, so many seconds after it; returns what to write down of it."""
    registry.swapped(conn, change.id, seconds)
    waited = change.feedback_to_live_seconds
    return None, {"champion": change.target, "swap_seconds": seconds, "feedback_to_live_seconds": waited}


def step_back(conn: Connection, line: str, now: float, reason: str, evidence: Mapping[str, Any] | None = None) -> Change:
    """Make the previous champion the champion again, or the base when there is none; raises `Conflict` on the base."""
    named = registry.aliases(conn, line)
    champion, target = named[CHAMPION], named[PREVIOUS]
    if champion is None:
        raise Conflict(f"{line!r} is served by the base: there is nothing to roll back", param="line")
    before = registry.last_crowning(conn, line, target) if target else None
    previous = before.source if before and before.source != champion else None
    told: dict[str, Any] = {"now": now, "reason": reason, "evidence": evidence or {}}
    change = _move(conn, line, expected=champion, target=target, previous=previous, **told)
    registry.mark(conn, champion, Stage.ROLLED_BACK)
    if target is not None:
        registry.mark(conn, target, Stage.LIVE)
    return change


def go_back(conn: Connection, line: str, target: str | None, now: float, reason: str, evidence: Mapping[str, Any]) -> Change:
    """Make a version that replicas hold (None: the base) the champion in place of what is worse than it; raises `Conflict`.

    An open trial ends at the next look, since its champion has changed. Nothing that came between is `previous` any more.
    """
    champion = registry.aliases(conn, line)[CHAMPION]
    told: dict[str, Any] = {"now": now, "reason": reason, "evidence": evidence}
    change = _move(conn, line, expected=champion, target=target, previous=None, **told)
    if champion is not None:
        registry.mark(conn, champion, Stage.ROLLED_BACK)
    if target is not None:
        registry.mark(conn, target, Stage.LIVE)
    return change


def _begin(
    conn: Connection, version: Version, policy: Rollout, now: float, *, reason: str = "", is_operator: bool = False
) -> Trial:
    champion = registry.aliases(conn, version.line)[CHAMPION]
    who: dict[str, Any] = {"line": version.line, "candidate": version.name, "champion": champion, "job": version.job}
    trial = trials.begin(conn, **who, policy=policy, now=now, is_operator=is_operator, reason=reason)
    registry.bump(conn)
    return trial


def _crown(conn: Connection, trial: Trial, now: float, evidence: Evidence | None) -> None:
    held = ledger.reserved(conn, trial.job) if trial.job else []
    _move(
        conn,
        trial.line,
        expected=trial.champion,
        target=trial.candidate,
        previous=trial.champion,
        now=now,
        reason=trial.reason,
        evidence=evidence.to_json() if evidence else {},
        trial=trial.id,
        feedback_to_live_seconds=max(0.0, now - min(e.admitted_at for e in held)) if held else None,
    )
    registry.mark(conn, trial.candidate, Stage.LIVE)
    if trial.champion is not None:
        registry.mark(conn, trial.champion, "retired")


def _move(conn: Connection, line: str, **told: Any) -> Change:
    """Crown, and let what the line remembers follow."""
    change = registry.crown(conn, line, **told)
    lineage.follow(conn, line)
    return change


def _standing(conn: Connection, name: str, end: Stage) -> str:
    """How a version stands whose trial ended without a promotion: one that had been live before is still retired."""
    state = registry.version(conn, name).state
    return end.value if state == "candidate" else state

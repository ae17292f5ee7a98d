"""What is stored, as people and programs are shown it: the JSON of the status, of lines, versions, jobs and trials.

Functions on a connection, for the keeper to run; what only memory and files know (live replicas, a job's progress) the
keeper lays over it. Pure but for reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection

from replay import ledger
from replay.records import FeedbackStatus
from service import jobs, registry
from service.replicas import Seen
from service.rollout import trials
from service.router import Desired
from service.settings import Settings

Json = dict[str, Any]


def stored(conn: Connection, settings: Settings, now: float) -> Json:
    """Everything in the status that is read from the database."""
    sizes = ledger.sizes(conn)
    return {
        "lines": {name: _line(conn, name, sizes) for name in settings.lines},
        "feedback": {
            "stored": sum(sizes.feedback.values()),
            "pending": sizes.feedback.get(FeedbackStatus.PENDING, 0),
            "expired": sizes.feedback.get(FeedbackStatus.EXPIRED, 0),
            "oldest_pending_seconds": _age(sizes.oldest_pending_at, now),
            "refusals": sizes.refusals,
        },
        "ledger": {
            "rows": {"interaction": sizes.interactions, "feedback": sum(sizes.feedback.values())},
            "open_interactions": sizes.open_interactions,
            "oldest_open_seconds": _age(sizes.oldest_open_at, now),
            "segments": sizes.segments,
        },
    }


def lines(conn: Connection, settings: Settings) -> list[Json]:
    """Every line with its aliases."""
    return [{"name": name, **_aliases(conn, name), "versions": len(registry.versions(conn, name))} for name in settings.lines]


def versions(conn: Connection, line: str) -> list[Json]:
    """A line's versions, newest first, with their scores and the aliases that point at them."""
    named = _aliases(conn, line)
    return [
        {
            **{name: getattr(one, name) for name in ("name", "number", "state", "parent", "job", "digest", "created_at")},
            "slices": one.scores,
            "gate": one.gate,
            "aliases": [alias for alias, version in named.items() if version == one.name],
        }
        for one in registry.versions(conn, line)
    ]


def trials_of(conn: Connection, line: str | None) -> list[Json]:
    """Trials of a line, or all, newest first, each with the last look that was kept."""
    return [trials.as_json(one, trials.last_look(conn, one.id)) for one in trials.of(conn, line)]


def trial(conn: Connection, identity: str) -> Json:
    """One trial with every look that was kept."""
    looks = trials.history(conn, identity)
    shown = trials.as_json(trials.get(conn, identity), looks[-1] if looks else None)
    return {**shown, "history": [trials.look_as_json(look) for look in looks]}


def missing(desired: Desired, lines: Iterable[str], replicas: Iterable[Seen], *, does_write: bool) -> list[str]:
    """Why the daemon is not ready, in words; nothing when it is. Pure."""
    serving = [seen for seen in replicas if seen.report.number >= 0]
    proven = frozenset[str]().union(*(seen.proven for seen in serving))
    reasons = [] if does_write else ["the ledger cannot write: see the log, and whether the disk is full"]
    if not serving:
        return [*reasons, "no engine replica serves yet"]
    champions = {line: desired.routes[line].champion for line in lines if line in desired.routes}
    unproven = {line: version for line, version in champions.items() if version and version not in proven}
    return reasons + [f"no replica holds {version}, the champion of {line!r}" for line, version in unproven.items()]


def _line(conn: Connection, name: str, sizes: ledger.Sizes) -> Json:
    trial = trials.current(conn, name)
    verdicts = (one.verdict for one in jobs.of(conn, name) if one.verdict)
    return {
        **_aliases(conn, name),
        "versions": len(registry.versions(conn, name)),
        "examples": {"fresh": 0, "trained": 0, **sizes.examples.get(name, {})},
        "job": jobs.current(conn, name),
        "jobs": jobs.counts(conn, name),
        "gates": jobs.gate_counts(conn, name),
        "last_verdict": next(verdicts, None),
        "trial": trials.as_json(trial, trials.last_look(conn, trial.id)) if trial else None,
        "trials": trials.counts(conn, name),
    }


def _aliases(conn: Connection, line: str) -> dict[str, str | None]:
    trial = trials.current(conn, line)
    named = registry.aliases(conn, line)
    return {"champion": named["champion"], "candidate": trial.candidate if trial else None, "previous": named["previous"]}


def _age(at: float | None, now: float) -> float:
    return 0.0 if at is None else max(0.0, now - at)

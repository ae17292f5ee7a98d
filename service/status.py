"""What is stored, as people and programs are shown it: the JSON of the status, of lines, versions, jobs and trials.

Functions on a connection, for the keeper to run; what only memory and files know (live replicas, a job's progress) the
keeper lays over it. Pure but for reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from sqlalchemy import Connection

from learners.matrix import History
from replay import ledger, memory, opinions, quarantine
from replay.records import FeedbackStatus, asked_digest
from service import audit, bisecting, comparing, drift, jobs, queueing, registry, switch
from service.errors import NotFound
from service.replicas import Seen
from service.rollout import anchor, trials, verdicts, watches
from service.rollout.evidence import Evidence
from service.rollout.stages import Trial
from service.router import Desired
from service.settings import Rollout, Settings

Json = dict[str, Any]

UNSAID = dict.fromkeys(("phase", "step", "steps", "loss", "tokens_per_second", "eta_seconds"))
"""A job's progress before it has said anything."""


def stored(conn: Connection, settings: Settings, now: float) -> Json:
    """Everything in the status that is read from the database."""
    sizes, stopped = ledger.sizes(conn), quarantine.counts(conn)
    return {
        "kill_switch": switch.read(conn, settings.kill_switch).as_json(),
        "lines": {
            name: {
                **_line(conn, name, sizes),
                "opinions": opinions.counts(conn, name, settings.wanted(name)),
                "quarantine": stopped.get(name, {}),
                "anchor": _anchor(conn, name, line.rollout),
            }
            for name, line in settings.lines.items()
        },
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


def examples(conn: Connection, line: str, capacity: int) -> list[Json]:
    """What a line remembers, of `capacity` in all, what waits to be learned, and what never trains, with what was said."""
    new, apart = ledger.unlearned(conn, line), (ledger.validations(conn, line), ledger.holdouts(conn, line))
    asked = {asked_digest(line, one.messages) for one in new}
    old = (one for one in memory.remembered(conn, line, capacity) if asked_digest(line, one.messages) not in asked)
    names = ("id", "slice", "split", "source", "weight", "messages", "reply")
    rows = chain(old, new, *(members for some in apart for members in some.values()))
    return [{name: getattr(one, name) for name in names} for one in rows]


def versions(conn: Connection, line: str) -> list[Json]:
    """A line's versions, newest first, with their scores and the aliases that point at them."""
    named, joint = _aliases(conn, line), _joint(conn, line)
    return [
        {
            **{name: getattr(one, name) for name in ("name", "number", "state", "parent", "job", "digest", "created_at")},
            "slices": one.scores,
            "gate": {**one.gate, "matrix": _read(one.gate.get("matrix") or {}, joint)},
            "aliases": [alias for alias, version in named.items() if version == one.name],
        }
        for one in registry.versions(conn, line)
    ]


def trials_of(conn: Connection, line: str | None) -> list[Json]:
    """Trials of a line, or all, newest first, each with the last look that was kept."""
    return [_trial(conn, one, trials.last_look(conn, one.id)) for one in trials.of(conn, line)]


def trial(conn: Connection, identity: str) -> Json:
    """One trial with every look that was kept."""
    looks = trials.history(conn, identity)
    shown = _trial(conn, trials.get(conn, identity), looks[-1] if looks else None)
    return {**shown, "history": [trials.look_as_json(look) for look in looks]}


def replay(conn: Connection, what: str) -> list[Json]:
    """Every recorded verdict on a trial, job, version, round of an anchor, or line, oldest first, and what its facts give now.

    Raises `NotFound` when there is none, and no such trial.
    """
    every = audit.of_kinds(conn, verdicts.KINDS)
    told = [one for one in every if what == one["line"] or what in verdicts.names(one["body"])]
    if not told and all(trial.id != what for trial in trials.of(conn)):
        raise NotFound(f"no trial {what!r}, and no job, version, line or anchor's round of that name with a verdict")
    return [{"seq": one["seq"], "at": one["at"], **asdict(verdicts.replay(one["body"]))} for one in told]


def verdicts_on(conn: Connection, line: str) -> list[Json]:
    """Every recorded verdict on a line's trials, newest first, without what it rests on."""
    return [
        {
            **{name: event[name] for name in ("seq", "at", "digest")},
            **{name: event["body"]["trial"][was] for name, was in _STOOD.items()},
            **event["body"]["move"],
            "by": event["body"]["by"],
        }
        for event in reversed(audit.events(conn, line, "verdict"))
    ]


_STOOD = {"trial": "id", "candidate": "candidate", "champion": "champion", "from": "stage"}


def missing(desired: Desired, lines: Iterable[str], replicas: Iterable[Seen], *, does_write: bool) -> list[str]:
    """Why the daemon is not ready, in words; nothing when it is. Pure."""
    seen = list(replicas)
    proven = frozenset[str]().union(*(one.proven for one in seen))
    refused = {name: probe.in_words for one in seen for name, probe in one.report.resident.items() if not probe.ok}
    reasons = [] if does_write else ["the ledger cannot write: see the log, and whether the disk is full"]
    for line in lines:
        champion = desired.routes[line].champion if line in desired.routes else None
        if champion and champion not in proven:
            why = f": {refused[champion]}" if champion in refused else ""
            reasons.append(f"no replica holds {champion}, the champion of {line!r}{why}")
    if not any(one.report.number >= 0 for one in seen) and not refused:
        reasons.append("no engine replica serves yet")
    return reasons


def _line(conn: Connection, name: str, sizes: ledger.Sizes) -> Json:
    trial = trials.current(conn, name)
    verdicts = (one.verdict for one in jobs.of(conn, name) if one.verdict)
    return {
        **_aliases(conn, name),
        "versions": len(registry.versions(conn, name)),
        "examples": {"fresh": 0, "trained": 0, **sizes.examples.get(name, {})},
        "drift": drift.counts(conn, name),
        "job": jobs.current(conn, name),
        "jobs": jobs.counts(conn, name),
        "gates": jobs.gate_counts(conn, name),
        "last_verdict": next(verdicts, None),
        "matrix": _matrix(conn, name),
        "trial": _trial(conn, trial, trials.last_look(conn, trial.id)) if trial else None,
        "trials": trials.counts(conn, name),
        "bisection": bisecting.last(conn, name),
    }


def _trial(conn: Connection, one: Trial, look: Evidence | None) -> Json:
    return comparing.shown(conn, one, trials.as_json(one, look))


def _anchor(conn: Connection, name: str, policy: Rollout) -> Json | None:
    """How the line stands against its anchor; None where nothing is held back."""
    return anchor.as_json(watches.read(conn, name), policy.anchor) if policy.anchor.holdback else None


def _matrix(conn: Connection, name: str) -> Json:
    """What the line's champion keeps of each slice, and gained and lost; empty while the base serves, or nothing is known."""
    champion = registry.aliases(conn, name)[registry.CHAMPION]
    return _read(registry.version(conn, champion).gate.get("matrix") or {}, _joint(conn, name)) if champion else {}


def _joint(conn: Connection, line: str) -> dict[str, dict[str, float]]:
    """What the line's newest version by joint training has, by score and slice: the upper bound of all that it has learned."""
    name = jobs.newest_version(conn, line, queueing.JOINT)
    matrix = registry.version(conn, name).gate.get("matrix") or {} if name else {}
    return {score: History.from_json(body).last() for score, body in matrix.items()}


def _read(matrix: Mapping[str, Any], joint: Mapping[str, Mapping[str, float]]) -> Json:
    """A version's matrix with its intransigence, which is known only once joint training has learned the same."""
    told = {score: History.from_json(body).transfer(joint.get(score)) for score, body in matrix.items()}
    return {score: {**body, "transfer": asdict(found) if (found := told[score]) else None} for score, body in matrix.items()}


def _aliases(conn: Connection, line: str) -> dict[str, str | None]:
    trial = trials.current(conn, line)
    named = registry.aliases(conn, line)
    return {"champion": named["champion"], "candidate": trial.candidate if trial else None, "previous": named["previous"]}


def _age(at: float | None, now: float) -> float:
    return 0.0 if at is None else max(0.0, now - at)

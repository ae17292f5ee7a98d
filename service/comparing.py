"""The keeper's side of a shadow: what replicas report is stored, what is to be scored next handed out, the whole counted.

Functions on a connection. A replica scores good replies to the prompts that it shadowed itself, and those of replicas that have
gone; what comes when the trial has left the shadow is dropped. Nothing is kept in memory, so a kill loses at most a request.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from replay import judgements, shadows
from replay.judgements import JUDGED
from replay.shadows import Gold, Score
from service.rollout import shadow, trials
from service.rollout.shadow import ShadowTally
from service.rollout.stages import Stage, Trial
from service.settings import Settings

Json = dict[str, Any]

AT_ONCE = 8
"""Good replies of each kind that a replica is given to score."""


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What a replica has done in the shadow since it last said so; saying it again changes nothing."""

    replica: str
    shadows: tuple[shadows.Shadow, ...] = ()
    scores: tuple[Score, ...] = ()


def take(conn: Connection, settings: Settings, said: ShadowReport, live: Collection[str]) -> list[Gold]:
    """Store a report; what is to be scored now. `live` are the replicas that are there."""
    open_ones = (trials.current(conn, line) for line in settings.lines)
    running = {trial.id: trial for trial in open_ones if trial is not None and trial.stage is Stage.SHADOW}
    shadows.record(conn, [one for one in said.shadows if one.trial in running])
    shadows.score(conn, [one for one in said.scores if one.trial in running])
    golds: list[Gold] = []
    for trial in running.values():
        whose = (trial.id, said.replica, live, AT_ONCE)
        metric = settings.feedback.metrics.get(trial.policy.metric)
        golds += shadows.corrected(conn, *whose)
        if metric is not None and metric.type == "boolean":
            golds += shadows.accepted(conn, *whose, metric=trial.policy.metric, good=metric.optimize == "max")
    return golds


def tally(conn: Connection, trial: Trial) -> ShadowTally:
    """Count a trial's shadow."""
    counted, compared = shadows.counts(conn, trial.id), shadows.compared(conn, trial.id)
    judge, verdicts = judgements.judged(conn, trial.id)
    if judge is not None and judgements.trust(conn, trial.line, judge).is_enough:
        compared[JUDGED] = [(verdict, 0) for verdict in verdicts]
    return ShadowTally(
        replies=counted.replies,
        failed=counted.failed,
        recent_failures=shadows.recent_failures(conn, trial.id, trial.policy.error_window),
        not_finite=counted.not_finite,
        crashes=shadows.crashes(conn, trial.id),
        compared=tuple((kind, shadow.differences(compared[kind])) for kind in sorted(compared)),
    )


def shown(conn: Connection, trial: Trial, told: Json) -> Json:
    """A trial's JSON with its shadow laid over; `shadow` is None where there is and was none."""
    if trial.policy.shadow.share <= 0:
        return {**told, "shadow": None}
    found, spec = tally(conn, trial), trial.policy.shadow
    harms = shadow.harms(spec, found)
    said = {
        "outcomes": {"ok": found.replies - found.failed, "failed": found.failed},
        "pairs": found.pairs,
        "min_pairs": spec.min_pairs,
        "difference": {kind: shadow.mean(differences) for kind, differences in found.compared},
        "harm": harms,
        "harm_at": shadow.harm_at(spec),
        "judge": _judge(conn, trial),
    }
    if trial.stage is not Stage.SHADOW:
        return {**told, "shadow": said}
    logs = {f"shadow_{kind}": log for kind, log in harms.items()}
    bounds = {"log_evidence": logs, "thresholds": dict.fromkeys(logs, shadow.harm_at(spec))}
    return {**told, "units": {**told["units"], "shadow": found.pairs}, **bounds, "shadow": said}


def _judge(conn: Connection, trial: Trial) -> Json | None:
    """How far the judge agrees with people, and whether it counts; None where there was none."""
    judge = judgements.last_on(conn, trial.line)
    if judge is None:
        return None
    found = judgements.trust(conn, trial.line, judge)
    return {"agreement": found.agreement, "checked": found.checked, "is_trusted": found.is_enough}

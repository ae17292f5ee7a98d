"""What becomes of a trial: its record and one look at the world in, the next move with its reason and evidence out. Pure.

Rolling back is asked before promoting, so it wins ties. Absence of evidence never promotes. Nothing here remembers anything:
the evidence is recomputed from the ledger's units at each look, which anytime-valid statistics allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from replay.ledger import UnitOutcome
from replay.outcomes import SILENCE
from replay.records import Arm, FeedbackValue
from service.rollout.evidence import WHOLE, Evidence, confidence_sequence, log_e_promote, log_e_rollback, pair
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport
from service.settings import Metric, Rollout

YELLOW = 1.5
"""A step up waits while the evidence of harm is within so many nats of a rollback."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to see when a trial is judged."""

    now: float
    champion: str | None
    """The line's, now."""
    replicas: tuple[ReplicaReport, ...]
    """The live ones."""
    desired: int
    """The number that replicas should have."""
    serving_since: float | None
    """Since when there is a live replica: how long the replicas could have been loading."""
    outcomes: tuple[UnitOutcome, ...] = ()
    failures: int = 0
    """Failed replies of the candidate among its latest."""
    last: Evidence | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Where a trial is to go, and why."""

    to: Stage
    reason: str
    step: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """One look's result: the move, if one is due, and the evidence, where traffic has been compared."""

    move: Move | None = None
    evidence: Evidence | None = None


def judge(trial: Trial, look: Look) -> Judgement:
    """Decide what a trial does next."""
    if trial.stage is Stage.ROLLING_BACK:
        is_out = all(replica.number >= look.desired for replica in look.replicas)
        return Judgement(Move(Stage.ROLLED_BACK, trial.reason) if is_out else None)
    if trial.champion != look.champion:
        return Judgement(Move(Stage.ABORTED, f"champion_changed: it is {look.champion or 'the base'} now"))
    if trial.stage is Stage.VERIFYING:
        return Judgement(_verify(trial, look))
    evidence = weigh(trial, look)
    move = _alarm(trial, look, evidence)
    if move is None:
        move = _promoting(trial, look) if trial.stage is Stage.PROMOTING else _advance(trial, look, evidence)
    return Judgement(move, evidence)


def weigh(trial: Trial, look: Look) -> Evidence:
    """Count what has matured and say what it proves."""
    policy = trial.policy
    differences = pair(look.outcomes, trial.steps)
    matured = [unit for unit in look.outcomes if unit.is_matured]
    opened = trial.steps[-1] if trial.steps else trial.opened_at
    return Evidence(
        at=look.now,
        candidate_units=_count(matured, Arm.CANDIDATE),
        control_units=_count(matured, Arm.CONTROL),
        step_units=min(_count([u for u in matured if u.first_at >= opened], arm) for arm in (Arm.CANDIDATE, Arm.CONTROL)),
        pairs=len(differences),
        log_promote=log_e_promote(differences, policy.margin),
        log_rollback=log_e_rollback(differences),
        promote_at=-math.log(policy.alpha_promote),
        rollback_at=-math.log(policy.alpha_rollback),
        difference=confidence_sequence(differences, policy.alpha_promote, look.last.difference if look.last else WHOLE),
        failed_replies=look.failures,
    )


def reward(metric: Metric) -> Callable[[FeedbackValue], float]:
    """How a metric's value counts, in [0, 1] and more is better: scaled by its range, turned over where less is better."""
    width = metric.maximum - metric.minimum

    def scaled(value: FeedbackValue) -> float:
        if isinstance(value, bool):
            share = float(value)
        elif isinstance(value, int | float) and width > 0:
            share = min(1.0, max(0.0, (value - metric.minimum) / width))
        else:
            return SILENCE
        return 1.0 - share if metric.optimize == "min" else share

    return scaled


def is_held(version: str, replicas: Sequence[ReplicaReport]) -> bool:
    """Whether there are replicas and each holds and has proven the version."""
    return bool(replicas) and all(version in r.resident and r.resident[version].ok for r in replicas)


def refusal(version: str, replicas: Sequence[ReplicaReport]) -> str | None:
    """Why a replica cannot serve the version, when one has said so."""
    for replica in replicas:
        probe = replica.resident.get(version)
        if probe is not None and not probe.ok:
            return f"{probe.reason or 'not_proven'}: replica {replica.replica}"
    return None


def _verify(trial: Trial, look: Look) -> Move | None:
    if why := refusal(trial.candidate, look.replicas):
        return Move(Stage.REJECTED, why)
    if is_held(trial.candidate, look.replicas):
        return Move(Stage.PROMOTING, trial.reason) if trial.is_operator else Move(Stage.CANARY, "verified")
    if look.serving_since is not None:
        waited = look.now - max(trial.since, look.serving_since)
        if waited > trial.policy.verify_seconds:
            return Move(Stage.REJECTED, f"replica_timeout: not proven on every replica after {waited:.0f} s")
    return None


def _alarm(trial: Trial, look: Look, seen: Evidence) -> Move | None:
    """What takes a candidate out of the traffic, whatever speaks for it."""
    if why := refusal(trial.candidate, look.replicas):
        return Move(Stage.ROLLING_BACK, why)
    if look.failures >= trial.policy.error_burst:
        return Move(Stage.ROLLING_BACK, f"error_burst: {look.failures} of its last {trial.policy.error_window} replies failed")
    if seen.log_rollback >= seen.rollback_at:
        low, high = seen.difference
        return Move(Stage.ROLLING_BACK, f"harmed: difference in [{low:+.3f}, {high:+.3f}] after {seen.pairs} pairs")
    return None


def _promoting(trial: Trial, look: Look) -> Move | None:
    return Move(Stage.LIVE, trial.reason) if is_held(trial.candidate, look.replicas) else None


def _advance(trial: Trial, look: Look, seen: Evidence) -> Move | None:
    if trial.stage is Stage.WAITING:
        return None
    policy, age = trial.policy, look.now - (trial.steps[0] if trial.steps else trial.opened_at)
    has_passed = min(seen.candidate_units, seen.control_units) >= policy.min_units and age >= policy.min_seconds
    if has_passed and seen.log_promote >= seen.promote_at:
        low, high = seen.difference
        why = f"non_inferior: difference in [{low:+.3f}, {high:+.3f}] after {seen.pairs} pairs"
        return Move(Stage.PROMOTING if policy.is_automatic else Stage.WAITING, why)
    if age > policy.max_seconds:
        return Move(Stage.EXPIRED, f"max_seconds: no verdict after {age:.0f} s and {seen.pairs} pairs")
    if seen.candidate_units >= policy.max_units:
        return Move(Stage.EXPIRED, f"max_units: no verdict after {seen.pairs} pairs")
    return _step_up(trial, policy, seen)


def _step_up(trial: Trial, policy: Rollout, seen: Evidence) -> Move | None:
    is_last = trial.step + 1 >= len(policy.weights)
    is_yellow = seen.log_rollback > seen.rollback_at - YELLOW
    if is_last or is_yellow or seen.step_units < policy.step_min_units:
        return None
    step = trial.step + 1
    return Move(Stage.CANARY, f"step: {policy.weights[step]:.0%} of the units", step)


def _count(outcomes: Sequence[UnitOutcome], arm: Arm) -> int:
    return sum(unit.arm == arm for unit in outcomes)

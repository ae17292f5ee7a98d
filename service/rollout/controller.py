"""What becomes of a trial: its record and one look at the world in, the next move with its reason and evidence out. Pure.

Rolling back is asked before promoting, so it wins ties. Absence of evidence never promotes. Nothing here remembers anything:
the evidence is recomputed from the ledger's units at each look, which anytime-valid statistics allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from replay.ledger import UnitOutcome
from replay.outcomes import SILENCE
from replay.records import FeedbackValue
from service.errors import Conflict
from service.rollout import shadow
from service.rollout.evidence import WHOLE, Evidence, count
from service.rollout.guardrails import QUALITY
from service.rollout.shadow import ShadowTally
from service.rollout.stages import Stage, Trial
from service.rollout.weighing import STALE, Facts, doubt, harmed, has_turned, is_yellow, lacks, weigh
from service.router import ReplicaReport
from service.settings import Metric, Rollout

Verb = Literal["pause", "resume", "promote", "abort", "rollback"]

FORWARD = frozenset({Stage.SHADOW, Stage.CANARY, Stage.WAITING, Stage.PROMOTING, Stage.BAKE, Stage.LIVE})
"""Where no trial goes while the kill switch is on, by itself or by hand; one that a person opened, to go back far, does."""

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
    window_seconds: float = 0.0
    """The metric's: an answer that takes longer is not waited for when the split of the units is tested."""
    failures: int = 0
    """Failed replies of the candidate among its latest."""
    crashes: int = 0
    """Replies of the candidate that were under way when an engine died."""
    promotions: int = 0
    """Of the line, by evidence, so far."""
    last: Evidence | None = None
    exposed_twice: int = 0
    """Units that both arms have answered, which are left out of `outcomes`."""
    heard_at: float | None = None
    """When the last feedback under the metric came."""
    is_frozen: bool = False
    """The kill switch lets no trial go forward."""
    shadow: ShadowTally | None = None
    """Of a trial that is in the shadow."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a trial is to go, and why."""

    to: Stage
    reason: str
    step: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """One look's result: the move, if one is due, the evidence, where traffic has been compared, and what both rest on."""

    facts: Facts
    move: Move | None = None
    evidence: Evidence | None = None
    blocked: str | None = None
    """Why it is to be rolled back from its bake and cannot be: the champion before is not held by every replica."""


def judge(trial: Trial, look: Look) -> Judgement:
    """Decide what a trial does next."""
    return verdict(trial, facts(trial, look))


def by_hand(trial: Trial, verb: Verb) -> Move:
    """What a person asks of a trial, as a move. Raises `Conflict` when there is nothing to resume."""
    if verb == "resume" and trial.stage is not Stage.HOLD:
        raise Conflict(f"trial {trial.id!r} of {trial.candidate} is {trial.stage}, not on hold")
    end = Stage.ABORTED if trial.stage in {Stage.VERIFYING, Stage.SHADOW} else Stage.ROLLING_BACK
    forward = Stage.LIVE if trial.stage is Stage.BAKE else Stage.PROMOTING
    to = {"pause": Stage.HOLD, "resume": Stage.CANARY, "promote": forward}.get(verb, end)
    return Move(to, f"operator: {verb}", trial.step)


def facts(trial: Trial, look: Look) -> Facts:
    """Reduce a look to what decides."""
    last = look.last if look.last and look.last.is_bake == (trial.stage is Stage.BAKE) else None
    settled_at = look.now - look.window_seconds
    return Facts(
        now=look.now,
        champion=look.champion,
        refusal=refusal(trial.candidate, look.replicas),
        is_held=is_held(trial.candidate, look.replicas),
        is_settled=all(r.number >= look.desired or trial.candidate not in r.resident for r in look.replicas),
        serving_since=look.serving_since,
        failures=look.failures,
        crashes=look.crashes,
        promotions=look.promotions,
        tally=count(
            look.outcomes,
            trial.compared_since,
            settled_at,
            trial.policy.guardrails,
            trial.trusted_from,
            has_path=trial.stage is Stage.BAKE,
        ),
        exposed_twice=look.exposed_twice,
        asked_at=max((unit.first_at for unit in look.outcomes), default=None),
        heard_at=look.heard_at,
        interval=last.difference if last else WHOLE,
        is_frozen=look.is_frozen,
        is_way_back_held=trial.champion is None or is_held(trial.champion, look.replicas),
        shadow=look.shadow,
    )


def verdict(trial: Trial, seen: Facts) -> Judgement:
    """What the facts say: the same whenever they are asked again."""
    said = _verdict(trial, seen)
    is_kept = seen.is_frozen and not trial.is_operator and said.move is not None and said.move.to in FORWARD
    return replace(said, move=None) if is_kept else said


def _verdict(trial: Trial, seen: Facts) -> Judgement:
    if trial.stage is Stage.ROLLING_BACK:
        return Judgement(seen, Move(Stage.ROLLED_BACK, trial.reason) if seen.is_settled else None)
    if trial.stands_against != seen.champion:
        return Judgement(seen, Move(Stage.ABORTED, f"champion_changed: it is {seen.champion or 'the base'} now"))
    if trial.stage is Stage.VERIFYING:
        return Judgement(seen, _verify(trial, seen))
    if trial.stage is Stage.SHADOW:
        return Judgement(seen, _shadow(trial, seen))
    evidence = weigh(trial, seen)
    alarm = _alarm(trial, seen, evidence)
    if alarm is not None and trial.stage is Stage.BAKE and not seen.is_way_back_held:
        return Judgement(seen, None, evidence, alarm.reason)  # never onto what is not proven: at the next look it may be
    return Judgement(seen, alarm or _FORWARD.get(trial.stage, _advance)(trial, seen, evidence), evidence)


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


def _verify(trial: Trial, seen: Facts) -> Move | None:
    if seen.refusal:
        return Move(Stage.REJECTED, seen.refusal)
    if seen.is_held:
        if trial.is_operator:
            return Move(Stage.PROMOTING, trial.reason)
        return Move(Stage.SHADOW if trial.policy.shadow.share > 0 else Stage.CANARY, "verified")
    if (waited := _age(seen, trial.since)) > trial.policy.verify_seconds:
        return Move(Stage.REJECTED, f"replica_timeout: not proven on every replica after {waited:.0f} s")
    return None


def _shadow(trial: Trial, seen: Facts) -> Move | None:
    if seen.refusal:
        return Move(Stage.REJECTED, seen.refusal)
    said = shadow.judge(trial.policy, seen.shadow or ShadowTally(), _age(seen, trial.since), YELLOW)
    if said is None or (said[0] is Stage.CANARY and not seen.is_held):
        return None
    return Move(*said)


def _alarm(trial: Trial, seen: Facts, evidence: Evidence) -> Move | None:
    """What takes a candidate out of the traffic, whatever speaks for it."""
    if seen.refusal:
        return Move(Stage.ROLLING_BACK, seen.refusal)
    if seen.crashes:
        return Move(Stage.ROLLING_BACK, f"engine_crash: the engine died under {seen.crashes} of its replies")
    if seen.failures >= trial.policy.error_burst:
        return Move(Stage.ROLLING_BACK, f"error_burst: {seen.failures} of its last {trial.policy.error_window} replies failed")
    what = harmed(evidence)
    if what == QUALITY:
        return Move(Stage.ROLLING_BACK, f"harmed: {_found(evidence)}")
    if what is None and has_turned(evidence):
        shown = f"log evidence {evidence.log_late:.1f} of {evidence.late_at:.1f}"
        return Move(Stage.ROLLING_BACK, f"turned: harm that began late, {shown} in {evidence.pairs} pairs")
    return Move(Stage.ROLLING_BACK, f"harmed_{what}: over its margin after {evidence.pairs} pairs") if what else None


def _promoting(trial: Trial, seen: Facts, _: Evidence) -> Move | None:
    if not seen.is_held:
        waited = _age(seen, trial.since)
        failed = f"promote_failed: not held by every replica after {waited:.0f} s"
        to = Stage.ROLLING_BACK if trial.is_operator else Stage.HOLD  # by hand there was no canary to hold
        return Move(to, failed, trial.step) if waited > trial.policy.verify_seconds else None
    has_bake = trial.policy.bake.holdback > 0 and not trial.is_operator
    return Move(Stage.BAKE if has_bake else Stage.LIVE, trial.reason)


def _bake(trial: Trial, seen: Facts, evidence: Evidence) -> Move | None:
    """It ends without an alarm: with enough units, or out of time."""
    bake, age, units = trial.policy.bake, _age(seen, trial.since), min(evidence.candidate_units, evidence.control_units)
    if age >= bake.max_seconds:
        return Move(Stage.LIVE, f"baked_out_of_time: no harm in {units} of {bake.min_units} units of each arm")
    if units >= bake.min_units and age >= bake.min_seconds and not doubt(trial, seen, evidence):
        return Move(Stage.LIVE, f"baked: no harm, {_found(evidence)}")
    return None


def _advance(trial: Trial, seen: Facts, evidence: Evidence) -> Move | None:
    if trial.stage is Stage.WAITING:
        return None
    policy, age = trial.policy, _age(seen, trial.steps[0] if trial.steps else trial.opened_at)
    if trial.stage is Stage.HOLD:
        return _expire(policy, age, evidence) or _heard_again(trial, seen)
    if why := doubt(trial, seen, evidence):
        return Move(Stage.HOLD, why)
    has_passed = min(evidence.candidate_units, evidence.control_units) >= policy.min_units and age >= policy.min_seconds
    if has_passed and not lacks(trial, seen.tally) and evidence.log_promote >= evidence.promote_at:
        shown = "superior" if policy.mode == "superiority" else "non_inferior"
        return Move(Stage.PROMOTING if policy.is_automatic else Stage.WAITING, f"{shown}: {_found(evidence)}")
    return _expire(policy, age, evidence) or _step_up(trial, seen, evidence)


def _age(seen: Facts, since: float) -> float:
    """Seconds since then in which somebody could have been served: after a standstill they are counted anew."""
    return 0.0 if seen.serving_since is None else seen.now - max(since, seen.serving_since)


def _heard_again(trial: Trial, seen: Facts) -> Move | None:
    """A trial that was held for its silence goes on when feedback has come since; nothing else is forgiven by itself."""
    is_over = trial.reason.startswith(STALE) and seen.heard_at is not None and seen.heard_at > trial.since
    return Move(Stage.CANARY, "feedback is heard again", trial.step) if is_over else None


def _expire(policy: Rollout, age: float, evidence: Evidence) -> Move | None:
    if age > policy.max_seconds:
        return Move(Stage.EXPIRED, f"max_seconds: no verdict after {age:.0f} s and {evidence.pairs} pairs")
    if evidence.candidate_units >= policy.max_units:
        return Move(Stage.EXPIRED, f"max_units: no verdict after {evidence.pairs} pairs")
    return None


def _step_up(trial: Trial, seen: Facts, evidence: Evidence) -> Move | None:
    policy, is_last = trial.policy, trial.step + 1 >= len(trial.policy.weights)
    if is_last or is_yellow(evidence, YELLOW) or evidence.step_units < policy.step_min_units:
        return None
    if trial.steps and _age(seen, trial.steps[-1]) < policy.step_min_seconds:
        return None
    step = trial.step + 1
    return Move(Stage.CANARY, f"step: {policy.weights[step]:.0%} of the units", step)


def _found(evidence: Evidence) -> str:
    low, high = evidence.difference
    return f"difference in [{low:+.3f}, {high:+.3f}] after {evidence.pairs} pairs"


_FORWARD: dict[Stage, Callable[[Trial, Facts, Evidence], Move | None]] = {Stage.PROMOTING: _promoting, Stage.BAKE: _bake}

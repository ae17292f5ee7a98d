"""What a look at a trial comes to: its facts, and what they prove. Pure.

A promotion needs evidence against "worse by the margin" in the metric (or, where superiority is asked, against "not better")
and in each guardrail. The least of these e-processes is one too, for "worse in any of them" (intersection-union), so guardrails
cost no share of the level. Harm is the other way round: any of them may take the candidate out, so they share `alpha_rollback`,
half of it for the metric. In a bake harm may begin late, when users come that the canary did not meet: a detector of its own
looks for that beside the e-process, which first has to lose what it lost while all was well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.rollout import detector, fdr
from service.rollout.evidence import (
    WHOLE,
    Differences,
    Evidence,
    Interval,
    Tally,
    confidence_sequence,
    log_e_harm,
    log_e_promote,
    log_e_rollback,
)
from service.rollout.guardrails import QUALITY
from service.rollout.health import log_e_response, log_e_split
from service.rollout.shadow import ShadowTally
from service.rollout.stages import Stage, Trial

STALE = "stale_feedback"
"""The doubt that ends by itself, as soon as feedback is heard again."""
FEW = 10
"""Fewer units that both arms have answered are an accident."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a verdict rests on, as counts and plain values: what is recorded of a look."""

    now: float
    champion: str | None
    refusal: str | None
    """Why a live replica cannot serve the candidate."""
    is_held: bool
    """Each live replica has proven the candidate, and there is one."""
    is_settled: bool
    """No live replica routes by an older desired state, unless it does not have the candidate."""
    serving_since: float | None
    failures: int
    promotions: int
    tally: Tally
    interval: Interval = WHOLE
    """The confidence sequence at the last look that was kept."""
    exposed_twice: int = 0
    """Units that both arms have answered."""
    asked_at: float | None = None
    """When the last unit first asked."""
    heard_at: float | None = None
    """When the last feedback under the metric came."""
    is_frozen: bool = False
    """The kill switch lets no trial go forward."""
    is_way_back_held: bool = True
    """Each live replica has proven the champion before, so that going back waits for no load."""
    shadow: ShadowTally | None = None
    """Where the candidate is in the shadow."""
    crashes: int = 0
    """Replies of the candidate that were under way when an engine died."""


def weigh(trial: Trial, seen: Facts) -> Evidence:
    """Say what the counts prove."""
    policy, tally = trial.policy, seen.tally
    differences, times = _columns(tally.differences)
    promote = _not_worse(trial, tally)
    alpha = policy.bake.alpha if trial.stage is Stage.BAKE else policy.alpha_rollback
    shares = (0.5, 0.5 / len(tally.guards)) if tally.guards else (1.0, 1.0)
    return Evidence(
        at=seen.now,
        candidate_units=sum(candidate for candidate, _ in tally.matured),
        control_units=sum(control for _, control in tally.matured),
        step_units=min(tally.matured[-1]),
        pairs=tally.pairs,
        log_promote=min(promote.values()),
        log_rollback=log_e_rollback(differences, times),
        promote_at=-math.log(level(trial, seen.promotions)),
        rollback_at=-math.log(alpha * shares[0]),
        difference=confidence_sequence(differences, policy.alpha_promote, seen.interval, times),
        failed_replies=seen.failures,
        log_mismatch=log_e_split(tally.assigned[trial.trusted_from :]),
        mismatch_at=-math.log(policy.alpha_mismatch),
        promote=promote,
        harm=_worse(trial, tally),
        harm_at=-math.log(alpha * shares[1]),
        log_response=log_e_response(*_columns(tally.responses)),
        response_at=-math.log(policy.alpha_response),
        is_bake=trial.stage is Stage.BAKE,
        log_late=detector.peak(detector.log_cusum([-difference for difference in tally.path])),
        late_at=math.log(policy.bake.alarm),
    )


def level(trial: Trial, promotions: int) -> float:
    """At which level a trial tests; one that a person opened has no index, since it tests nothing."""
    policy = trial.policy
    if policy.multiplicity == "per_test" or trial.fdr_index is None:
        return policy.alpha_promote
    return min(policy.alpha_promote, fdr.level(policy.fdr, trial.fdr_index, promotions))


def harmed(evidence: Evidence) -> str | None:
    """In what the candidate is shown to do harm, the metric first."""
    if evidence.log_rollback >= evidence.rollback_at:
        return QUALITY
    return next((name for name, log in evidence.harm.items() if log >= evidence.harm_at), None)


def has_turned(evidence: Evidence) -> bool:
    """Whether a champion in its bake has become harmful, however well it did before."""
    return evidence.is_bake and evidence.log_late >= evidence.late_at


def is_yellow(evidence: Evidence, nats: float) -> bool:
    """Whether some harm is within so many nats of a rollback."""
    return evidence.log_rollback > evidence.rollback_at - nats or any(
        log > evidence.harm_at - nats for log in evidence.harm.values()
    )


def doubt(trial: Trial, seen: Facts, evidence: Evidence) -> str | None:
    """Why the comparison cannot be trusted, whatever it says."""
    policy, tally = trial.policy, seen.tally
    units = tuple(map(sum, zip(*tally.assigned[trial.trusted_from :], strict=True)))
    if evidence.log_mismatch >= evidence.mismatch_at:
        return f"sample_ratio_mismatch: {' : '.join(map(str, units))} units in arms of equal size"
    if seen.exposed_twice >= FEW and seen.exposed_twice > policy.max_exposed_twice * (sum(units) + seen.exposed_twice):
        return f"exposed_twice: {seen.exposed_twice} units were answered by both arms"
    if evidence.log_response >= evidence.response_at and abs(_response(tally)) >= policy.response_difference:
        return f"response_rate: {_response(tally):+.0%} units of the candidate say something, against the control's"
    if (silent := _silence(trial, seen)) > policy.stale_seconds > 0:
        return f"{STALE}: {silent:.0f} s of requests without a word of feedback"
    return None


def lacks(trial: Trial, tally: Tally) -> bool:
    """Whether too few have said anything, of the metric or of a guardrail that lives on words: silence proves nothing."""
    return min(min(heard) for heard in (tally.answered, *(g.heard for g in tally.guards))) < trial.policy.min_answered


def _response(tally: Tally) -> float:
    """By how much more units of the candidate say something, as a share of the control's."""
    differences, times = _columns(tally.responses)
    rate = tally.answered[1] / max(1, sum(control for _, control in tally.matured))
    gap = sum(d * n for d, n in zip(differences, times, strict=True)) / max(1, sum(times))
    return gap / rate if rate else math.copysign(1.0, gap) if gap else 0.0


def _silence(trial: Trial, seen: Facts) -> float:
    """For how long units have asked since the last feedback, or since the step began."""
    since = max(seen.heard_at or 0.0, *trial.compared_since, 0.0)
    return 0.0 if seen.asked_at is None else seen.asked_at - since


def _not_worse(trial: Trial, tally: Tally) -> dict[str, float]:
    """Against "worse by the margin", under superiority "not better" in the metric: for each thing that must not get worse."""
    margin = 0.0 if trial.policy.mode == "superiority" else trial.policy.margin
    found = {QUALITY: log_e_promote(margin=margin, **_answered(tally.differences, tally.differences_answered))}
    for guard in tally.guards:
        margin = trial.policy.guardrails[guard.name].margin
        found[guard.name] = log_e_promote(margin=margin, **_answered(guard.differences, guard.answered))
    return found


def _worse(trial: Trial, tally: Tally) -> dict[str, float]:
    """Against "not worse by more than the margin": for each guardrail."""
    return {
        guard.name: log_e_harm(margin=trial.policy.guardrails[guard.name].margin, **_answered(guard.differences, guard.answered))
        for guard in tally.guards
    }


def _answered(differences: Differences, answered: Differences | None) -> dict[str, list[float]]:
    """Pairs whose control unit was answered, and the others: as the e-processes with a margin take them."""
    heard = dict(differences if answered is None else answered)
    rows = [(d, n, 1.0) for d, n in heard.items()]
    rows += [(d, n - heard.get(d, 0), 0.0) for d, n in differences if n > heard.get(d, 0)]
    found: dict[str, list[float]] = {"differences": [], "counts": [], "answered": []}
    for row in rows:
        for name, value in zip(found, row, strict=True):
            found[name].append(value)
    return found


def _columns(differences: Differences) -> tuple[list[float], list[int]]:
    return [difference for difference, _ in differences], [times for _, times in differences]

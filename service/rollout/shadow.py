"""What a candidate's shadow says: may it meet users, or is it harm already? Pure.

Good replies (corrections, and the champion's own that somebody approved) are scored by both versions. A difference is
candidate - champion in nats a token, cut off at `CLIP` so that it is bounded, and goes through the e-process of
`service.rollout.evidence`, one for each kind of reply, one comparison of each unit. Only harm decides: against "less likely
than by the champion by no more than the margin, on average". The margin is not for noise: an approved reply was drawn from the
champion, so any other version, a better one too, finds it less likely by the Kullback-Leibler divergence between the two.
Both versions' own replies are compared too where there is a judge that agrees with people: 1, 0 or -1, and no margin.
Without harm the trial goes on, with enough comparisons or out of time: a shadow rejects and promotes nobody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from replay.judgements import JUDGED
from replay.shadows import KINDS
from service.rollout.evidence import Differences, log_e
from service.rollout.stages import Stage
from service.settings import Rollout, Shadow

CLIP = 1.0
"""Nats a token: where a difference is cut off."""


@dataclass(frozen=True, slots=True)
class ShadowTally:
    """What was counted of a shadow; from this its verdict can be computed anew."""

    replies: int = 0
    failed: int = 0
    recent_failures: int = 0
    """Among the latest `error_window`."""
    not_finite: int = 0
    crashes: int = 0
    """Replies that were under way when an engine died."""
    compared: tuple[tuple[str, Differences], ...] = ()
    """By kind of good reply: each difference in [-1, 1], and how often it occurred."""

    @property
    def pairs(self) -> int:
        """How many comparisons there are, of all kinds."""
        return sum(times for _, differences in self.compared for _, times in differences)


def differences(scores: Iterable[tuple[float, float]]) -> Differences:
    """Nats a token of (candidate, champion) as differences, cut off at `CLIP` and in its units."""
    cut = (max(-CLIP, min(CLIP, candidate - champion)) / CLIP for candidate, champion in scores)
    return tuple(sorted(Counter(round(value, 6) for value in cut).items()))


def log_harm(found: Differences, margin: float) -> float:
    """Natural log of the e-value against "on average no lower than by `margin` nats a token"; no comparisons is 0."""
    return log_e([-value for value, _ in found], margin / CLIP, [times for _, times in found])


def harms(spec: Shadow, tally: ShadowTally) -> dict[str, float]:
    """The log of the evidence of harm, by kind."""
    found: Mapping[str, Differences] = dict(tally.compared)
    return {kind: log_harm(found.get(kind, ()), 0.0 if kind == JUDGED else spec.margin) for kind in KINDS}


def harm_at(spec: Shadow) -> float:
    """What a log must reach: the kinds share the level."""
    return -math.log(spec.alpha / len(KINDS))


def alarm(policy: Rollout, tally: ShadowTally) -> str | None:
    """Why the candidate is to be rejected before it has answered anybody, if it is."""
    if tally.not_finite:
        return f"shadow_not_finite: {tally.not_finite} of its scores are no numbers"
    if tally.crashes:
        return f"engine_crash: the engine died under {tally.crashes} of its shadow replies"
    if tally.recent_failures >= policy.error_burst:
        return f"shadow_failures: {tally.recent_failures} of its last {policy.error_window} shadow replies failed"
    found, limit = harms(policy.shadow, tally), harm_at(policy.shadow)
    worst = max(found, key=lambda kind: found[kind])
    if found[worst] >= limit:
        what = "worse, by verdicts of" if worst == JUDGED else "less likely, by nats a token of"
        return f"shadow_harmed: {worst} replies are {what} {mean(dict(tally.compared)[worst]):+.3f} on average"
    return None


def judge(policy: Rollout, tally: ShadowTally, age: float, nats: float) -> tuple[Stage, str] | None:
    """Reject, let go on, or wait; while some harm is within so many `nats` of the limit, no number of comparisons is enough."""
    if why := alarm(policy, tally):
        return Stage.REJECTED, why
    spec, said = policy.shadow, f"no harm in {tally.pairs} comparisons, {tally.replies} replies"
    is_near = max(harms(spec, tally).values()) > harm_at(spec) - nats
    if tally.pairs >= spec.min_pairs and not is_near:
        return Stage.CANARY, f"shadowed: {said}"
    return (Stage.CANARY, f"shadowed_out_of_time: {said}") if age >= spec.max_seconds else None


def mean(found: Sequence[tuple[float, int]]) -> float:
    """The mean difference in nats a token, each cut off at `CLIP`; 0 without any."""
    total = sum(times for _, times in found)
    return CLIP * sum(value * times for value, times in found) / total if total else 0.0

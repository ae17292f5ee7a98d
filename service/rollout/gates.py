"""The gate before traffic: candidate against champion and base on held-out examples, slice by slice. Pure.

The new examples together must gain by more than a margin; no slice, old, new or a golden suite, may lose by more than
another, each by itself. Differences are paired by example; their bounds are one-sided percentiles of a seeded bootstrap over
examples (Efron & Tibshirani 1993, ch. 13), each holding by itself with the policy's confidence: so with many slices one of
them is more often in doubt, never waved through. Too little data is `inconclusive`, which is no pass. Slices with too few
examples are judged together, and fail by themselves when even their upper bound is a loss over the margin.

Items that must pass have no tolerance. Of replies to what was learned before the length is compared, and of neutral texts
the distribution (the KL divergence of candidate from champion, in nats per token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from learners.matrix import History
from service.rollout import looks
from service.rollout.measured import FIELD, Measured, Part, joined, reduced
from service.settings import Gate

Outcome = Literal["pass", "fail", "inconclusive"]

DRAWS = 2000
_CHUNK = 200
"""Draws in memory at once."""
SEEN_LOST = 5
"""The fewest examples that a slice may fail on by itself: with fewer, a bootstrap says nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison of candidate and champion (of the base, for a line's first version)."""

    name: str
    """The slice, or slices joined by `+`."""
    must: Literal["gain", "not_lose"]
    outcome: Outcome
    items: int
    base: float | None
    """Mean scores."""
    champion: float | None
    candidate: float | None
    low: float | None
    """Bounds of candidate - champion."""
    high: float | None
    looks: int = 1
    """How many verdicts, this one among them, have looked at these held-out examples: the more, the less they say."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure of the whole candidate beside its limit."""

    name: Literal["must_pass", "kl", "length_ratio"]
    value: float
    limit: float | None
    """None: shown only."""
    outcome: Outcome
    told: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says, and the numbers that it rests on."""

    outcome: Outcome
    reasons: tuple[str, ...]
    score: str
    findings: tuple[Finding, ...]
    facts: Measured
    """What it was decided on."""
    bounds: tuple[Bound, ...] = ()
    measured: tuple[str, ...] = ()
    """The older slices and suites that it rests on, by name: a look at each."""
    matrix: Mapping[str, Any] | None = None
    """By score: the line's versions by its slices, this one the last row; see `learners.matrix`."""
    warnings: tuple[str, ...] = ()
    """What the job noticed of its own training; nothing is decided by it."""

    @property
    def worst(self) -> Finding | None:
        """The slice that comes nearest to being lost, or is lost by most: the least lower bound."""
        kept = [found for found in self.findings if found.must == "not_lose" and found.low is not None]
        return min(kept, key=lambda found: found.low or 0.0, default=None)

    def as_json(self) -> dict[str, Any]:
        """As stored and shown."""
        plain = {"outcome": self.outcome, "reasons": list(self.reasons), "score": self.score}
        told = {"findings": [asdict(one) for one in self.findings], "bounds": [asdict(one) for one in self.bounds]}
        return {
            **plain,
            **told,
            "worst": self.worst.name if self.worst else None,
            "measured": list(self.measured),
            "matrix": self.matrix,
            "warnings": list(self.warnings),
        }


def judge(evaluation: Mapping[str, Any], gate: Gate, *, is_rebase: bool = False) -> Verdict:
    """Judge what a job measured: `evaluation["slices"][name]` has `is_new` and scores of base, champion and candidate.

    `evaluation["suites"]`, `["kl"]`, `["lengths"]`, `["looks"]` and `["warnings"]` are as `learners.job` writes them, if it does.
    A re-base, which learns all again, need not gain: no slice may lose, new ones or old.
    Raises `ValueError` when the scores are not finite or do not pair.
    """
    said = decide(reduced(evaluation, gate.score, is_rebase=is_rebase), gate)
    return replace(said, warnings=tuple(evaluation.get("warnings", ())))


def decide(facts: Measured, gate: Gate) -> Verdict:
    """What the facts say: the same whenever they are asked again."""
    fresh, older = ([one for one in facts.slices if one.is_new is is_new] for is_new in (True, False))
    findings = [] if facts.is_rebase and facts.slices else [_gains(joined(fresh), gate)]
    for group in [facts.slices] if facts.is_rebase else [fresh, older]:
        findings += _each(group, gate)
    findings += [_keeps(one, gate) for one in facts.suites]
    bounds = [*_must_pass(facts), *_distances(facts, gate)]
    outcomes = {*(found.outcome for found in findings), *(bound.outcome for bound in bounds)}
    worst: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    reasons = (*(_say(found, gate) for found in findings), *(bound.told for bound in bounds))
    return Verdict(worst, reasons, gate.score, tuple(findings), facts, tuple(bounds), facts.looked_at)


def matrix(evaluation: Mapping[str, Any], parent: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The matrix of the parent, as stored with it, and one row more; by score."""
    found = {}
    for name in FIELD.values():
        base, before, after = (_by_slice(evaluation, who, name) for who in ("base", "champion", "candidate"))
        found[name] = History.from_json(parent.get(name, {})).extended(version, before, after, base).as_json()
    return found


def _by_slice(evaluation: Mapping[str, Any], who: str, field: str) -> dict[str, float]:
    """Mean scores by slice, its new and its older examples together."""
    values: dict[str, list[float]] = {}
    for name, body in evaluation["slices"].items():
        values.setdefault(name.removesuffix(looks.OLDER), []).extend((body.get(who) or body["base"])[field])
    return {name: float(np.mean(found)) for name, found in values.items() if found}


def scores(evaluation: Mapping[str, Any], of: str = "candidate") -> dict[str, dict[str, Any]]:
    """Mean scores by slice of one of the three, with the number of examples that they are means of."""
    means: dict[str, dict[str, Any]] = {}
    for name, body in evaluation["slices"].items():
        if body.get(of) and body["ids"]:
            told = {field: float(np.mean(body[of][field])) for field in FIELD.values()}
            means[name] = {**told, "n": len(body["ids"]), "is_new": bool(body["is_new"])}
    return means


def bounds(differences: ArrayLike, confidence: float, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Lower and upper bound of the mean of paired differences, each one-sided at `confidence`."""
    random, values = np.random.default_rng(seed), np.asarray(differences, dtype=np.float64)
    count = len(values)
    means = [values[random.integers(count, size=(_CHUNK, count))].mean(axis=1) for _ in range(draws // _CHUNK)]
    low, high = np.quantile(np.concatenate(means), [1 - confidence, confidence])
    return float(low), float(high)


def _gains(fresh: Part, gate: Gate) -> Finding:
    """The new examples: the lower bound of the gain must exceed the margin; one wholly under it is a failure."""
    if len(fresh) < gate.min_items:
        return _finding(fresh, "gain", "inconclusive")
    low, high = bounds(fresh.differences, gate.confidence)
    outcome: Outcome = "pass" if low > gate.min_gain else "inconclusive" if high > gate.min_gain else "fail"
    return _finding(fresh, "gain", outcome, low, high)


def _keeps(one: Part, gate: Gate) -> Finding:
    """A slice: the lower bound of the difference may not fall under the allowed loss."""
    if len(one) < gate.min_items:
        return _finding(one, "not_lose", "inconclusive")
    low, high = bounds(one.differences, gate.confidence)
    outcome: Outcome = "pass" if low >= -gate.max_loss else "inconclusive" if high >= -gate.max_loss else "fail"
    return _finding(one, "not_lose", outcome, low, high)


def _each(slices: Sequence[Part], gate: Gate) -> list[Finding]:
    """Each slice by itself; those too small for that together (with the least of the others, if need be), and each for a loss.

    So a tiny one can neither hide a loss, nor block for ever.
    """
    ordered = sorted(slices, key=lambda one: (len(one), one.name))
    small = [one for one in ordered if len(one) < gate.min_items]
    large = ordered[len(small) :]
    findings = [_keeps(one, gate) for one in large]
    if small:
        findings = [found for one in small if (found := _lost(one, gate))] + findings
        together = small if sum(map(len, small)) >= gate.min_items else [*small, *large[:1]]
        findings.append(_keeps(joined(together), gate))
    return findings


def _lost(one: Part, gate: Gate) -> Finding | None:
    """A slice too small to be seen to keep what it had may still be seen to lose it."""
    if len(one) < SEEN_LOST:
        return None
    low, high = bounds(one.differences, gate.confidence)
    return _finding(one, "not_lose", "fail", low, high) if high < -gate.max_loss else None


def _must_pass(facts: Measured) -> list[Bound]:
    """Items without tolerance, over all suites; those missed are named by suite and id."""
    if not facts.must_pass:
        return []
    asked, missed = facts.must_pass, facts.missed
    told = f"must pass: {asked - len(missed)} of {asked}" + (f", not {', '.join(missed[:5])}" if missed else "")
    return [Bound("must_pass", float(len(missed)), 0.0, "fail" if missed else "pass", told)]


def _distances(facts: Measured, gate: Gate) -> list[Bound]:
    """How far the candidate has gone from the champion: on neutral texts, and in the length of its replies."""
    found = []
    if (kl := facts.kl) is not None:
        limit = "" if gate.max_kl is None else f", at most {gate.max_kl:g}"
        is_over = not np.isfinite(kl) or (gate.max_kl is not None and kl > gate.max_kl)
        told = f"KL from the champion on neutral texts: {kl:.3f} nats per token{limit}"
        found.append(Bound("kl", float(kl), gate.max_kl, "fail" if is_over else "pass", told))
    if (ratio := facts.length_ratio) is not None:
        most, prompts = gate.max_length_ratio, facts.prompts
        told = f"length of replies: {ratio:.2f} of the champion's on {prompts} prompts, {1 / most:.2f} to {most:.2f}"
        is_over = not 1 / most <= ratio <= most
        found.append(Bound("length_ratio", float(ratio), gate.max_length_ratio, "fail" if is_over else "pass", told))
    return found


def _finding(
    one: Part, must: Literal["gain", "not_lose"], outcome: Outcome, low: float | None = None, high: float | None = None
) -> Finding:
    return Finding(one.name, must, outcome, len(one), one.base, one.champion, one.candidate, low, high, one.looks)


def _say(found: Finding, gate: Gate) -> str:
    what = f"gain over {gate.min_gain:g}" if found.must == "gain" else f"lose at most {gate.max_loss:g}"
    if found.low is None or found.high is None:
        return f"{found.name or 'new examples'}: inconclusive, {found.items} held-out examples of the {gate.min_items} needed"
    means = f"{found.champion:.3f} → {found.candidate:.3f}"
    seen = f" (look {found.looks})" if found.looks > 1 else ""
    return f"{found.name}: {found.outcome}, {means} on {found.items}{seen}, must {what}, [{found.low:+.3f}, {found.high:+.3f}]"

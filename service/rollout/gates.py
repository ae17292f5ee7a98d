"""The gate before traffic: candidate against champion and base on held-out examples, slice by slice. Pure.

The new examples together must gain by more than a margin; no slice, old or new, may lose by more than another. Differences
are paired by example; their bounds are one-sided percentiles of a seeded bootstrap over examples (Efron & Tibshirani
1993, ch. 13), each holding by itself with the policy's confidence. Too little data is `inconclusive`, which is no pass:
a slice with too few examples is judged together with the next larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.settings import Gate

Outcome = Literal["pass", "fail", "inconclusive"]
Values = NDArray[np.float64]

DRAWS = 2000
_CHUNK = 200
"""Draws in memory at once."""
_FIELD = {"exact_match": "exact", "likelihood": "loglik"}


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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says, and the numbers that it rests on."""

    outcome: Outcome
    reasons: tuple[str, ...]
    score: str
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """As stored and shown."""
        findings = [{name: getattr(found, name) for name in Finding.__slots__} for found in self.findings]
        return {"outcome": self.outcome, "reasons": list(self.reasons), "score": self.score, "findings": findings}


@dataclass(frozen=True, slots=True)
class _Scores:
    name: str
    is_new: bool
    base: Values
    champion: Values
    candidate: Values

    def __len__(self) -> int:
        return len(self.candidate)


def judge(evaluation: Mapping[str, Any], gate: Gate) -> Verdict:
    """Judge what a job measured: `evaluation["slices"][name]` has `is_new` and scores of base, champion and candidate.

    Raises `ValueError` when the scores are not finite or do not pair.
    """
    slices = [_read(name, body, _FIELD[gate.score]) for name, body in sorted(evaluation["slices"].items())]
    fresh = [one for one in slices if one.is_new]
    findings = [_gains(_joined(fresh), gate)]
    for group in (fresh, [one for one in slices if not one.is_new]):
        findings += [_keeps(one, gate) for one in _enough(group, gate.min_items)]
    worst: Outcome = "pass"
    if any(found.outcome != "pass" for found in findings):
        worst = "fail" if any(found.outcome == "fail" for found in findings) else "inconclusive"
    return Verdict(worst, tuple(_say(found, gate) for found in findings), gate.score, tuple(findings))


def scores(evaluation: Mapping[str, Any], of: str = "candidate") -> dict[str, dict[str, Any]]:
    """Mean scores by slice of one of the three, with the number of examples that they are means of."""
    means: dict[str, dict[str, Any]] = {}
    for name, body in evaluation["slices"].items():
        if of in body and body["ids"]:
            told = {field: float(np.mean(body[of][field])) for field in _FIELD.values()}
            means[name] = {**told, "n": len(body["ids"]), "is_new": bool(body["is_new"])}
    return means


def bounds(differences: Values, confidence: float, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Lower and upper bound of the mean of paired differences, each one-sided at `confidence`."""
    random = np.random.default_rng(seed)
    count = len(differences)
    means = [differences[random.integers(count, size=(_CHUNK, count))].mean(axis=1) for _ in range(draws // _CHUNK)]
    low, high = np.quantile(np.concatenate(means), [1 - confidence, confidence])
    return float(low), float(high)


def _gains(fresh: _Scores, gate: Gate) -> Finding:
    """The new examples: the lower bound of the gain must exceed the margin; one wholly under it is a failure."""
    if len(fresh) < gate.min_items:
        return _finding(fresh, "gain", "inconclusive")
    low, high = bounds(fresh.candidate - fresh.champion, gate.confidence)
    outcome: Outcome = "pass" if low > gate.min_gain else "inconclusive" if high > gate.min_gain else "fail"
    return _finding(fresh, "gain", outcome, low, high)


def _keeps(one: _Scores, gate: Gate) -> Finding:
    """A slice: the lower bound of the difference may not fall under the allowed loss."""
    if len(one) < gate.min_items:
        return _finding(one, "not_lose", "inconclusive")
    low, high = bounds(one.candidate - one.champion, gate.confidence)
    outcome: Outcome = "pass" if low >= -gate.max_loss else "inconclusive" if high >= -gate.max_loss else "fail"
    return _finding(one, "not_lose", outcome, low, high)


def _enough(slices: Sequence[_Scores], least: int) -> list[_Scores]:
    """Join the smallest slices until each has enough examples, so that a tiny one cannot hide nor block for ever."""
    ordered = sorted(slices, key=lambda one: (len(one), one.name))
    joined: list[_Scores] = []
    small: list[_Scores] = []
    for one in ordered:
        small.append(one)
        if sum(map(len, small)) >= least:
            joined.append(_joined(small))
            small = []
    return [*joined, *([_joined(small)] if small else [])]


def _joined(slices: Sequence[_Scores]) -> _Scores:
    columns = ([getattr(one, who) for one in slices] for who in ("base", "champion", "candidate"))
    base, champion, candidate = (np.concatenate([np.empty(0), *column]) for column in columns)
    return _Scores("+".join(one.name for one in slices), any(one.is_new for one in slices), base, champion, candidate)


def _read(name: str, body: Mapping[str, Any], field: str) -> _Scores:
    base = np.asarray(body["base"][field], dtype=np.float64)
    champion = np.asarray(body["champion"][field], dtype=np.float64) if body.get("champion") else base
    candidate = np.asarray(body["candidate"][field], dtype=np.float64)
    if not len(base) == len(champion) == len(candidate) == len(body["ids"]):
        raise ValueError(f"the scores of slice {name!r} do not pair: {len(base)}, {len(champion)}, {len(candidate)}")
    if not all(np.isfinite(values).all() for values in (base, champion, candidate)):
        raise ValueError(f"slice {name!r} has scores that are not finite")
    return _Scores(name, bool(body["is_new"]), base, champion, candidate)


def _finding(
    one: _Scores, must: Literal["gain", "not_lose"], outcome: Outcome, low: float | None = None, high: float | None = None
) -> Finding:
    base, champion, candidate = (
        float(np.mean(values)) if len(values) else None for values in (one.base, one.champion, one.candidate)
    )
    return Finding(one.name, must, outcome, len(one), base, champion, candidate, low, high)


def _say(found: Finding, gate: Gate) -> str:
    what = f"gain over {gate.min_gain:g}" if found.must == "gain" else f"lose at most {gate.max_loss:g}"
    if found.low is None or found.high is None:
        return f"{found.name or 'new examples'}: inconclusive, {found.items} held-out examples of the {gate.min_items} needed"
    means = f"{found.champion:.3f} → {found.candidate:.3f}"
    return f"{found.name}: {found.outcome}, {means} on {found.items}, must {what}, [{found.low:+.3f}, {found.high:+.3f}]"

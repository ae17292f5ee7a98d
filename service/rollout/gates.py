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
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from learners.matrix import History
from service.rollout import looks
from service.settings import Gate

Outcome = Literal["pass", "fail", "inconclusive"]
Values = NDArray[np.float64]

DRAWS = 2000
_CHUNK = 200
"""Draws in memory at once."""
SEEN_LOST = 5
"""The fewest examples that a slice may fail on by itself: with fewer, a bootstrap says nothing."""
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


@dataclass(frozen=True, slots=True)
class _Scores:
    name: str
    is_new: bool
    base: Values
    champion: Values
    candidate: Values
    looks: int = 1

    def __len__(self) -> int:
        return len(self.candidate)


def judge(evaluation: Mapping[str, Any], gate: Gate) -> Verdict:
    """Judge what a job measured: `evaluation["slices"][name]` has `is_new` and scores of base, champion and candidate.

    `evaluation["suites"]`, `["kl"]`, `["lengths"]`, `["looks"]` and `["warnings"]` are as `learners.job` writes them, if it does.
    Raises `ValueError` when the scores are not finite or do not pair.
    """
    field, seen = _FIELD[gate.score], evaluation.get("looks", {})
    slices = [_read(name, body, field, seen.get(name, 1)) for name, body in sorted(evaluation["slices"].items())]
    suites = {f"suite:{name}": body for name, body in sorted(evaluation.get("suites", {}).items())}
    fresh = [one for one in slices if one.is_new]
    findings = [_gains(_joined(fresh), gate)]
    for group in (fresh, [one for one in slices if not one.is_new]):
        findings += _each(group, gate)
    golden = [_read(name, _scored(body), field, seen.get(name, 1)) for name, body in suites.items()]
    findings += [_keeps(one, gate) for one in golden if len(one)]
    bounds = [*_must_pass(suites), *_distances(evaluation, gate)]
    outcomes = {*(found.outcome for found in findings), *(bound.outcome for bound in bounds)}
    worst: Outcome = "fail" if "fail" in outcomes else "inconclusive" if "inconclusive" in outcomes else "pass"
    reasons = (*(_say(found, gate) for found in findings), *(bound.told for bound in bounds))
    told = tuple(evaluation.get("warnings", ()))
    return Verdict(worst, reasons, gate.score, tuple(findings), tuple(bounds), looks.measured(evaluation), warnings=told)


def matrix(evaluation: Mapping[str, Any], parent: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The matrix of the parent, as stored with it, and one row more; by score."""
    found = {}
    for name in _FIELD.values():
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


def _each(slices: Sequence[_Scores], gate: Gate) -> list[Finding]:
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
        findings.append(_keeps(_joined(together), gate))
    return findings


def _lost(one: _Scores, gate: Gate) -> Finding | None:
    """A slice too small to be seen to keep what it had may still be seen to lose it."""
    if len(one) < SEEN_LOST:
        return None
    low, high = bounds(one.candidate - one.champion, gate.confidence)
    return _finding(one, "not_lose", "fail", low, high) if high < -gate.max_loss else None


def _scored(body: Mapping[str, Any]) -> dict[str, Any]:
    """A suite without the items that must pass, as a slice."""
    kept = [place for place, must in enumerate(body["must_pass"]) if not must]
    picked = {who: {f: [v[i] for i in kept] for f, v in body[who].items()} for who in ("base", "champion", "candidate")}
    return {"is_new": False, "ids": [body["ids"][i] for i in kept], **picked}


def _must_pass(suites: Mapping[str, Mapping[str, Any]]) -> list[Bound]:
    """Items without tolerance, over all suites; those missed are named by suite and id."""
    asked = [
        (f"{name.removeprefix('suite:')}/{item}", exact)
        for name, body in suites.items()
        for item, must, exact in zip(body["ids"], body["must_pass"], body["candidate"]["exact"], strict=True)
        if must
    ]
    if not asked:
        return []
    missed = [item for item, exact in asked if exact < 1]
    told = f"must pass: {len(asked) - len(missed)} of {len(asked)}" + (f", not {', '.join(missed[:5])}" if missed else "")
    return [Bound("must_pass", float(len(missed)), 0.0, "fail" if missed else "pass", told)]


def _distances(evaluation: Mapping[str, Any], gate: Gate) -> list[Bound]:
    """How far the candidate has gone from the champion: on neutral texts, and in the length of its replies."""
    found = []
    if (kl := evaluation.get("kl")) is not None:
        limit = "" if gate.max_kl is None else f", at most {gate.max_kl:g}"
        is_over = not np.isfinite(kl) or (gate.max_kl is not None and kl > gate.max_kl)
        told = f"KL from the champion on neutral texts: {kl:.3f} nats per token{limit}"
        found.append(Bound("kl", float(kl), gate.max_kl, "fail" if is_over else "pass", told))
    if lengths := evaluation.get("lengths"):
        ratio = (1 + sum(lengths["candidate"])) / (1 + sum(lengths["champion"]))
        most, prompts = gate.max_length_ratio, len(lengths["candidate"])
        told = f"length of replies: {ratio:.2f} of the champion's on {prompts} prompts, {1 / most:.2f} to {most:.2f}"
        is_over = not 1 / most <= ratio <= most
        found.append(Bound("length_ratio", float(ratio), gate.max_length_ratio, "fail" if is_over else "pass", told))
    return found


def _joined(slices: Sequence[_Scores]) -> _Scores:
    columns = ([getattr(one, who) for one in slices] for who in ("base", "champion", "candidate"))
    base, champion, candidate = (np.concatenate([np.empty(0), *column]) for column in columns)
    most = max((one.looks for one in slices), default=1)
    return _Scores("+".join(one.name for one in slices), any(one.is_new for one in slices), base, champion, candidate, most)


def _read(name: str, body: Mapping[str, Any], field: str, times: int) -> _Scores:
    base = np.asarray(body["base"][field], dtype=np.float64)
    champion = np.asarray(body["champion"][field], dtype=np.float64) if body.get("champion") else base
    candidate = np.asarray(body["candidate"][field], dtype=np.float64)
    if not len(base) == len(champion) == len(candidate) == len(body["ids"]):
        raise ValueError(f"the scores of slice {name!r} do not pair: {len(base)}, {len(champion)}, {len(candidate)}")
    if not all(np.isfinite(values).all() for values in (base, champion, candidate)):
        raise ValueError(f"slice {name!r} has scores that are not finite")
    return _Scores(name, bool(body["is_new"]), base, champion, candidate, times)


def _finding(
    one: _Scores, must: Literal["gain", "not_lose"], outcome: Outcome, low: float | None = None, high: float | None = None
) -> Finding:
    base, champion, candidate = (
        float(np.mean(values)) if len(values) else None for values in (one.base, one.champion, one.candidate)
    )
    return Finding(one.name, must, outcome, len(one), base, champion, candidate, low, high, one.looks)


def _say(found: Finding, gate: Gate) -> str:
    what = f"gain over {gate.min_gain:g}" if found.must == "gain" else f"lose at most {gate.max_loss:g}"
    if found.low is None or found.high is None:
        return f"{found.name or 'new examples'}: inconclusive, {found.items} held-out examples of the {gate.min_items} needed"
    means = f"{found.champion:.3f} → {found.candidate:.3f}"
    seen = f" (look {found.looks})" if found.looks > 1 else ""
    return f"{found.name}: {found.outcome}, {means} on {found.items}{seen}, must {what}, [{found.low:+.3f}, {found.high:+.3f}]"

"""What a job measured, reduced to what the gate decides by: small enough to be recorded with the verdict. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.rollout import looks

FIELD: Mapping[str, str] = {"exact_match": "exact", "likelihood": "loglik"}
"""What `learners.job` calls the scores that settings name."""
DIGITS = 6
"""Of a difference: finer than two machines agree on, and short enough to be kept for each example."""
_WHO = ("base", "champion", "candidate")


@dataclass(frozen=True, slots=True)
class Part:
    """A slice or a suite: the candidate beside the champion (for a line's first version the base), example by example."""

    name: str
    is_new: bool
    differences: tuple[float, ...]
    """candidate - champion, in the score's unit, rounded to `DIGITS`; the bootstrap draws from them by their order."""
    base: float | None
    """Mean scores; None without an example."""
    champion: float | None
    candidate: float | None
    looks: int = 1

    def __len__(self) -> int:
        return len(self.differences)


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a verdict of the gate rests on, besides the settings."""

    slices: tuple[Part, ...]
    """By name."""
    suites: tuple[Part, ...] = ()
    """Without the items that must pass; those of nothing else are left out."""
    must_pass: int = 0
    """Items that must be given word for word, over all suites."""
    missed: tuple[str, ...] = ()
    """Those of them that were not, as `suite/id`."""
    kl: float | None = None
    """Of the candidate from the champion on neutral texts, in nats per token."""
    length_ratio: float | None = None
    """Tokens of its replies to what was learned before, as a multiple of the champion's, on so many `prompts`."""
    prompts: int = 0
    looked_at: tuple[str, ...] = ()
    """The older slices and suites: a look at each."""
    is_rebase: bool = False
    """Of a job that learned all again from the base."""


def reduced(evaluation: Mapping[str, Any], score: str, *, is_rebase: bool = False) -> Measured:
    """Reduce an `evaluation.json`; raises `ValueError` when the scores are not finite or do not pair."""
    field, seen = FIELD[score], evaluation.get("looks", {})
    suites = {f"suite:{name}": body for name, body in sorted(evaluation.get("suites", {}).items())}
    golden = [_part(name, _scored(body), field, seen.get(name, 1)) for name, body in suites.items()]
    asked, missed = _must_pass(suites)
    lengths = evaluation.get("lengths")
    return Measured(
        slices=tuple(_part(name, body, field, seen.get(name, 1)) for name, body in sorted(evaluation["slices"].items())),
        suites=tuple(one for one in golden if len(one)),
        must_pass=asked,
        missed=missed,
        kl=evaluation.get("kl"),
        length_ratio=(1 + sum(lengths["candidate"])) / (1 + sum(lengths["champion"])) if lengths else None,
        prompts=len(lengths["candidate"]) if lengths else 0,
        looked_at=looks.measured(evaluation),
        is_rebase=is_rebase,
    )


def joined(parts: Sequence[Part]) -> Part:
    """Several as one."""
    differences = tuple(difference for one in parts for difference in one.differences)
    base, champion, candidate = (_pooled([(getattr(one, who), len(one)) for one in parts]) for who in _WHO)
    most = max((one.looks for one in parts), default=1)
    name, is_new = "+".join(one.name for one in parts), any(one.is_new for one in parts)
    return Part(name, is_new, differences, base, champion, candidate, most)


def _pooled(means: Sequence[tuple[float | None, int]]) -> float | None:
    total = sum(count for _, count in means)
    return sum((mean or 0.0) * count for mean, count in means) / total if total else None


def _part(name: str, body: Mapping[str, Any], field: str, times: int) -> Part:
    base = np.asarray(body["base"][field], dtype=np.float64)
    champion = np.asarray(body["champion"][field], dtype=np.float64) if body.get("champion") else base
    candidate = np.asarray(body["candidate"][field], dtype=np.float64)
    if not len(base) == len(champion) == len(candidate) == len(body["ids"]):
        raise ValueError(f"the scores of slice {name!r} do not pair: {len(base)}, {len(champion)}, {len(candidate)}")
    if not all(np.isfinite(values).all() for values in (base, champion, candidate)):
        raise ValueError(f"slice {name!r} has scores that are not finite")
    differences = tuple((candidate - champion).round(DIGITS).tolist())
    return Part(name, bool(body["is_new"]), differences, _mean(base), _mean(champion), _mean(candidate), times)


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _scored(body: Mapping[str, Any]) -> dict[str, Any]:
    """A suite without the items that must pass, as a slice."""
    kept = [place for place, must in enumerate(body["must_pass"]) if not must]
    picked = {who: {f: [v[i] for i in kept] for f, v in body[who].items()} for who in _WHO}
    return {"is_new": False, "ids": [body["ids"][i] for i in kept], **picked}


def _must_pass(suites: Mapping[str, Mapping[str, Any]]) -> tuple[int, tuple[str, ...]]:
    """How many items have no tolerance, over all suites, and which of them were missed."""
    asked = [
        (f"{name.removeprefix('suite:')}/{item}", exact)
        for name, body in suites.items()
        for item, must, exact in zip(body["ids"], body["must_pass"], body["candidate"]["exact"], strict=True)
        if must
    ]
    return len(asked), tuple(item for item, exact in asked if exact < 1)

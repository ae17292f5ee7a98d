"""What live traffic says of a candidate: pairs of units, betting e-processes, a confidence sequence. Pure.

The statistic is the grid-betting martingale of Waudby-Smith & Ramdas (JRSS-B 2024) on paired differences: for a pair with
difference D in [-1, 1], X = (1 + D) / 2 and a null mean m0, a bet of the fraction c of the wealth multiplies it by
`1 + c (X / m0 - 1)`. The e-value is the mean wealth over six fractions, 1/64 to 1/2. Under the null it is a non-negative
supermartingale that starts at 1, so by Ville's inequality it *ever* reaches 1/alpha with probability at most alpha: it may
be looked at after every pair. It depends on the pairs' multiset only, so it can be recomputed from the ledger at any time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from replay.ledger import UnitOutcome
from replay.records import Arm

FRACTIONS: NDArray[np.float64] = np.exp2(-np.arange(6.0, 0.0, -1.0))
"""Shares of the wealth that are bet: 1/64, 1/32, …, 1/2."""

Interval = tuple[float, float]
WHOLE: Interval = (-1.0, 1.0)


def log_e(differences: ArrayLike, null: float, counts: ArrayLike | None = None) -> float:
    """Natural log of the e-value against "the mean difference is at most `null`", -1 < null < 1.

    `differences` are in [-1, 1]; `counts`, where given, says how often each occurred. No data is 0, that is e = 1.
    """
    values = np.asarray(differences, dtype=np.float64)
    times = np.ones(len(values)) if counts is None else np.asarray(counts, dtype=np.float64)
    surplus = (1.0 + values) / (1.0 + null) - 1.0
    log_wealth = np.log1p(FRACTIONS[:, None] * surplus) @ times
    return float(np.logaddexp.reduce(log_wealth) - np.log(len(FRACTIONS)))


def log_e_promote(differences: ArrayLike, margin: float, counts: ArrayLike | None = None) -> float:
    """Against "the candidate is worse than the champion by at least `margin`": large means non-inferior."""
    return log_e(differences, -margin, counts)


def log_e_rollback(differences: ArrayLike, counts: ArrayLike | None = None) -> float:
    """Against "the candidate does no harm": large means that it is worse, by however little."""
    return log_e(-np.asarray(differences, dtype=np.float64), 0.0, counts)


def confidence_sequence(differences: ArrayLike, alpha: float, before: Interval = WHOLE) -> Interval:
    """Interval that holds the mean difference at all looks at once with probability 1 - alpha.

    `before` is the interval of the last look: intervals only ever shrink.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    low = _lower_bound(values, counts, alpha / 2)
    high = -_lower_bound(-values, counts, alpha / 2)
    return max(before[0], low), min(before[1], high)


def _lower_bound(values: NDArray[np.float64], counts: NDArray[np.int64], alpha: float) -> float:
    """Least null that is not rejected; the e-value falls as the null rises, so halving finds it."""
    low, high, enough = -1.0, 1.0, -np.log(alpha)
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if log_e(values, middle, counts) >= enough else (low, middle)
    return low


def pair(outcomes: Sequence[UnitOutcome], steps: Sequence[float]) -> NDArray[np.float64]:
    """Differences candidate - control: the k-th matured unit of one arm with the k-th of the other, in each weight step.

    `steps` are the times at which the weight steps opened. Units are taken in order of their first request, and a unit's
    window closes a fixed time after that, so the matured ones are a prefix: pairs are only ever added, whatever their outcome.
    """
    arms: dict[tuple[int, str], list[float]] = defaultdict(list)
    for unit in sorted(outcomes, key=lambda u: (u.first_at, u.unit)):
        if unit.is_matured and unit.reward is not None:
            arms[bisect_right(steps, unit.first_at), str(unit.arm)].append(unit.reward)
    differences = [
        candidate - control
        for step in range(len(steps) + 1)
        for candidate, control in zip(arms[step, Arm.CANDIDATE], arms[step, Arm.CONTROL], strict=False)
    ]
    return np.asarray(differences, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One look at a trial: what was counted and what it says."""

    at: float
    candidate_units: int
    """Matured units, as all counts here."""
    control_units: int
    step_units: int
    """In the current weight step, in the smaller arm."""
    pairs: int
    log_promote: float
    log_rollback: float
    promote_at: float
    """Thresholds of the two logs."""
    rollback_at: float
    difference: Interval
    """Confidence sequence of candidate - champion on the reward's scale."""
    failed_replies: int = 0
    """Of the candidate, among its latest."""

    def to_json(self) -> dict[str, Any]:
        """As stored and shown."""
        return {**asdict(self), "difference": list(self.difference)}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Evidence:
        """The inverse of `to_json`."""
        low, high = body["difference"]
        return cls(**{**body, "difference": (low, high)})

    def adds_to(self, last: Evidence | None) -> bool:
        """Whether it says enough more than the last stored look to be stored too: two in a hundred units, or a failure."""
        units, failed = (last.candidate_units + last.control_units, last.failed_replies) if last else (0, 0)
        return self.candidate_units + self.control_units > units * 1.02 or self.failed_replies != failed

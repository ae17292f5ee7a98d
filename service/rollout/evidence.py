"""What live traffic says of a candidate: pairs of units, betting e-processes, a confidence sequence. Pure.

The statistic is the grid-betting martingale of Waudby-Smith & Ramdas (JRSS-B 2024) on paired differences: for a pair with
difference D in [-1, 1], X = (1 + D) / 2 and a null mean m0, a bet of the fraction c of the wealth multiplies it by
`1 + c (X / m0 - 1)`. The e-value is the mean wealth over six fractions, 1/64 to 1/2. Under the null it is a non-negative
supermartingale that starts at 1, so by Ville's inequality it *ever* reaches 1/alpha with probability at most alpha: it may
be looked at after every pair. It depends on the pairs' multiset only, so it can be recomputed from the ledger at any time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from replay.ledger import UnitOutcome
from replay.records import Arm
from service.rollout import grid

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
    log_wealth = log_gains(values, null) @ times
    return float(np.logaddexp.reduce(log_wealth) - np.log(len(FRACTIONS)))


def log_gains(differences: NDArray[np.float64], null: float) -> NDArray[np.float64]:
    """Ln of what a pair multiplies each bet's wealth by, (fractions, differences)."""
    return np.asarray(np.log1p(FRACTIONS[:, None] * ((1.0 + differences) / (1.0 + null) - 1.0)))


def log_e_promote(differences: ArrayLike, margin: float, counts: ArrayLike | None = None, answered: ArrayLike = 1.0) -> float:
    """Against "the candidate is worse than the champion by at least `margin` where users answer": large means non-inferior.

    Silence counts one half in both arms, so of a difference among those who answer only the share that answers is left in the
    mean: with `margin` on the mean, a candidate could turn every rare answer from good to bad. So a pair has the margin as far
    as its control unit was answered, `answered` in [0, 1]: the mean of D + margin · answered is what is tested. All answered
    is the plain test. Nothing has to be known of the share beforehand; `margin` is below one half, so that no wealth is negative.
    """
    return log_e(np.asarray(differences, dtype=np.float64) - margin * (1.0 - np.asarray(answered)), -margin, counts)


def log_e_harm(differences: ArrayLike, margin: float, counts: ArrayLike | None = None, answered: ArrayLike = 1.0) -> float:
    """Against "not worse than the champion by more than `margin` where users answer": large means harm; as `log_e_promote`."""
    return log_e(margin * (1.0 - np.asarray(answered)) - np.asarray(differences, dtype=np.float64), margin, counts)


def log_e_rollback(differences: ArrayLike, counts: ArrayLike | None = None) -> float:
    """Against "the candidate does no harm": large means that it is worse, by however little."""
    return log_e(-np.asarray(differences, dtype=np.float64), 0.0, counts)


def confidence_sequence(
    differences: ArrayLike, alpha: float, before: Interval = WHOLE, counts: ArrayLike | None = None
) -> Interval:
    """Interval that holds the mean difference at all looks at once with probability 1 - alpha.

    `before` is the interval of the last look: intervals only ever shrink. `counts` as for `log_e`.
    """
    values = np.asarray(differences, dtype=np.float64)
    values, times = np.unique(values, return_counts=True) if counts is None else (values, np.asarray(counts))
    low = _lower_bound(values, times, alpha / 2)
    high = -_lower_bound(-values, times, alpha / 2)
    return max(before[0], low), min(before[1], high)


def _lower_bound(values: NDArray[np.float64], counts: NDArray[np.int64], alpha: float) -> float:
    """Least null that is not rejected; the e-value falls as the null rises, so halving finds it."""
    low, high, enough = -1.0, 1.0, -np.log(alpha)
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if log_e(values, middle, counts) >= enough else (low, middle)
    return low


Value = Callable[[UnitOutcome], float | None]
"""What is compared of a unit; None: it has no part in the comparison."""


def reward_of(unit: UnitOutcome) -> float | None:
    """The unit's reward under the rollout's metric."""
    return unit.reward


def paired(
    outcomes: Sequence[UnitOutcome], steps: Sequence[float], value: Value = reward_of
) -> list[tuple[UnitOutcome, UnitOutcome]]:
    """Candidate and control: the k-th matured unit of one arm that has a value with the k-th of the other, in each weight step.

    `steps` are the times at which the weight steps opened. Units are taken in order of their first request, and a unit's
    window closes a fixed time after that, so the matured ones are a prefix: pairs are only ever added, whatever their outcome.
    """
    arms: dict[tuple[int, str], list[UnitOutcome]] = defaultdict(list)
    for unit in sorted(outcomes, key=lambda u: (u.first_at, u.unit)):
        if unit.is_matured and value(unit) is not None:
            arms[bisect_right(steps, unit.first_at), str(unit.arm)].append(unit)
    return [
        both for step in range(len(steps) + 1) for both in zip(arms[step, Arm.CANDIDATE], arms[step, Arm.CONTROL], strict=False)
    ]


def pair(outcomes: Sequence[UnitOutcome], steps: Sequence[float], value: Value = reward_of) -> NDArray[np.float64]:
    """Differences candidate - control of what is `paired`."""
    return _apart(paired(outcomes, steps, value), value)


Differences = tuple[tuple[float, int], ...]
"""Each difference candidate - control of a pair, in thousandths (see `grid`), and how often it occurred."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """What was counted of one guardrail."""

    name: str
    heard: tuple[int, int]
    """Matured units of candidate and control of which it is known; silence about a declared metric is not."""
    differences: Differences = ()
    """Of what was kept: one minus the loss, so that more is better."""
    answered: Differences | None = None
    """Those of them whose control unit was answered; None: all."""


@dataclass(frozen=True, slots=True)
class Tally:
    """All that evidence is made of, as counts: from them it can be computed anew, to the same verdict."""

    assigned: tuple[tuple[int, int], ...] = ((0, 0),)
    """Units of candidate and control, by when they asked, before the first weight step and in each: those whose answer has had
    time to come, since until then the arm that answers faster shows more."""
    matured: tuple[tuple[int, int], ...] = ((0, 0),)
    """Those of them whose window has closed."""
    differences: Differences = ()
    """Of the rewards."""
    differences_answered: Differences | None = None
    """Those of them whose control unit was answered under the metric: the margin is theirs. None: all."""
    answered: tuple[int, int] = (0, 0)
    """Matured units of candidate and control of which somebody said something under the metric."""
    guards: tuple[Guarded, ...] = ()
    responses: Differences = ()
    """Of who has said something (1) and who has not (0), in the steps that are tested."""
    path: tuple[float, ...] = ()
    """The rewards' differences one by one, oldest pair first, where their order matters: in a bake."""

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return sum(times for _, times in self.differences)


def count(
    outcomes: Sequence[UnitOutcome],
    steps: Sequence[float],
    settled_at: float = math.inf,
    guards: Iterable[str] = (),
    trusted_from: int = 0,
    *,
    has_path: bool = False,
) -> Tally:
    """Count a trial's units, those in pairs by their difference; as `assigned`, only who had asked by `settled_at`.

    `responses` are counted from the step `trusted_from` on; the `path` is kept where `has_path` says so.
    """
    tested = [unit for unit in outcomes if bisect_right(steps, unit.first_at) >= trusted_from]
    rewards, answered = _compared(outcomes, steps, reward_of, lambda unit: unit.answered)
    return Tally(
        assigned=_by_step((unit for unit in outcomes if _asked_at(unit) <= settled_at), steps, _asked_at),
        matured=_by_step((unit for unit in outcomes if unit.is_matured), steps, lambda unit: unit.first_at),
        differences=rewards,
        differences_answered=answered,
        answered=_by_arm(unit for unit in outcomes if unit.is_matured and not unit.is_silent),
        guards=tuple(_guarded(name, outcomes, steps) for name in guards),
        responses=_differences(paired(tested, steps), lambda unit: float(not unit.is_silent)),
        path=tuple(_in_order(paired(outcomes, steps), reward_of).tolist()) if has_path else (),
    )


def _guarded(name: str, outcomes: Sequence[UnitOutcome], steps: Sequence[float]) -> Guarded:
    def kept(unit: UnitOutcome) -> float | None:
        return 1.0 - unit.losses[name] if name in unit.losses else None

    heard = _by_arm(unit for unit in outcomes if name in unit.losses and unit.answers.get(name, 1) > 0)
    return Guarded(name, heard, *_compared(outcomes, steps, kept, lambda unit: unit.answers.get(name, 1.0)))


def _compared(
    outcomes: Sequence[UnitOutcome], steps: Sequence[float], value: Value, answered: Callable[[UnitOutcome], float]
) -> tuple[Differences, Differences]:
    """Of all pairs, and of those whose control unit was answered: one that was in part is, with that chance (see `grid`)."""
    pairs = paired(outcomes, steps, value)
    heard = [both for both in pairs if grid.is_drawn(answered(both[1]), both[1].unit)]
    return _differences(pairs, value), _differences(heard, value)


def _differences(pairs: Sequence[tuple[UnitOutcome, UnitOutcome]], value: Value) -> Differences:
    values, times = np.unique(_in_order(pairs, value), return_counts=True)
    return tuple(zip(values.tolist(), times.tolist(), strict=True))


def _in_order(pairs: Sequence[tuple[UnitOutcome, UnitOutcome]], value: Value) -> NDArray[np.float64]:
    def counted(unit: UnitOutcome) -> float | None:
        found = value(unit)
        return None if found is None else grid.on_grid(found, unit.unit)

    return grid.snapped(_apart(pairs, counted))


def _apart(pairs: Sequence[tuple[UnitOutcome, UnitOutcome]], value: Value) -> NDArray[np.float64]:
    found = [[value(unit) for unit in both] for both in pairs]
    return np.asarray([a - b for a, b in found if a is not None and b is not None], dtype=np.float64)


def _by_arm(units: Iterable[UnitOutcome]) -> tuple[int, int]:
    found = Counter(unit.arm for unit in units)
    return found[Arm.CANDIDATE], found[Arm.CONTROL]


def _asked_at(unit: UnitOutcome) -> float:
    return unit.first_at if unit.asked_at is None else unit.asked_at


def _by_step(
    units: Iterable[UnitOutcome], steps: Sequence[float], when: Callable[[UnitOutcome], float]
) -> tuple[tuple[int, int], ...]:
    found = Counter((bisect_right(steps, when(unit)), unit.arm) for unit in units)
    return tuple((found[step, Arm.CANDIDATE], found[step, Arm.CONTROL]) for step in range(len(steps) + 1))


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
    """The least of `promote`: that of the metric and of each guardrail."""
    log_rollback: float
    """Of the metric alone."""
    promote_at: float
    """Thresholds of the two logs."""
    rollback_at: float
    difference: Interval
    """Confidence sequence of candidate - champion on the reward's scale."""
    failed_replies: int = 0
    """Of the candidate, among its latest."""
    log_mismatch: float = 0.0
    """Against "the arms get units as designed", with its threshold."""
    mismatch_at: float = 7.0
    promote: dict[str, float] = field(default_factory=dict)
    """Against "worse by the margin", for the metric (`quality`) and each guardrail."""
    harm: dict[str, float] = field(default_factory=dict)
    """Against "not worse by more than the margin", for each guardrail."""
    harm_at: float = 7.0
    log_response: float = 0.0
    """Against "as many units of both arms say something", with its threshold."""
    response_at: float = 4.6
    is_bake: bool = False
    """Of the comparison after the promotion, which begins anew."""
    log_late: float = 0.0
    """In a bake, the highest that the detector of harm that begins late has stood, with its threshold."""
    late_at: float = 9.2

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
        last = last if last and last.is_bake == self.is_bake else None
        units, failed = (last.candidate_units + last.control_units, last.failed_replies) if last else (0, 0)
        return self.candidate_units + self.control_units > units * 1.02 or self.failed_replies != failed

"""What every part shares: checks with their limits, and the service's e-process along many simulated streams at once.

Sampled points of each simulation are computed again by `service.rollout.evidence.log_e`, so what is simulated is what decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.rollout.evidence import FRACTIONS, log_e, log_gains

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Codes = NDArray[np.int8]
"""Differences by their place in a table of values."""

TERNARY = np.array([-1.0, 0.0, 1.0])
"""Differences of two rewards in {0, 1}."""
FIVE = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
"""Of two rewards in {0, ½, 1}."""
NINE = np.arange(-4.0, 5.0) / 4
"""Of two ratings from one to five."""
ROUNDING = 1e-14
"""A limit like .27 - .03 is .24 in words and a little more in binary."""
CELLS = 2_000_000
"""Pairs in memory at once."""


@dataclass(frozen=True, slots=True)
class Check:
    """One figure beside its limit."""

    test: str
    what: str
    found: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def passed(self) -> bool:
        return self.least - ROUNDING <= self.found <= self.most + ROUNDING

    @property
    def limit(self) -> str:
        """The limit in words."""
        if math.isinf(self.least):
            return f"≤ {self.most:g}"
        return f"≥ {self.least:g}" if math.isinf(self.most) else f"{self.least:g} … {self.most:g}"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is drawn: the whole plan, or a part of it for each push."""

    is_full: bool
    seed: int = 0

    def runs(self, whole: int) -> int:
        return whole if self.is_full else max(whole // 5, 20)

    def random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])


def most_by_chance(runs: int, chance: float, confidence: float = 0.999) -> int:
    """Least k with P(Binomial(runs, chance) ≤ k) ≥ confidence: 131 for 2000 at .05, 35 for 400."""
    total, k = 0.0, -1
    while total < confidence:
        k += 1
        choose = math.lgamma(runs + 1) - math.lgamma(k + 1) - math.lgamma(runs - k + 1)
        total += math.exp(choose + k * math.log(chance) + (runs - k) * math.log1p(-chance))
    return k


def log_paths(codes: Codes, null: float, values: Floats = TERNARY) -> Floats:
    """ln e against "the mean difference is at most `null`" after each pair, for every row of `codes`."""
    paths = [np.cumsum(row[codes], axis=1) for row in log_gains(values, null)]
    top = np.maximum.reduce(paths)
    total = np.exp(paths[0] - top)
    for path in paths[1:]:
        total += np.exp(path - top)
    found = np.asarray(top + np.log(total) - math.log(len(FRACTIONS)))
    last = codes.shape[1]
    assert math.isclose(found[0, -1], log_e(values[codes[0]], null), abs_tol=1e-9), f"not the service's, after {last} pairs"
    return found


def first_crossing(paths: Floats, threshold: float) -> Ints:
    """When each path first reaches the threshold, from 1; one more than its length when it never does."""
    has = paths >= threshold
    return np.where(has.any(axis=1), has.argmax(axis=1) + 1, paths.shape[1] + 1)


Draw = Callable[[np.random.Generator, int, int], Codes]


def bernoulli(candidate: float, champion: float) -> Draw:
    """Pairs of units that are content with these chances; codes of `TERNARY`."""

    def draw(random: np.random.Generator, rows: int, pairs: int) -> Codes:
        up = random.random((rows, pairs), dtype=np.float32) < candidate
        return (up.astype(np.int8) - (random.random((rows, pairs), dtype=np.float32) < champion) + 1).astype(np.int8)

    return draw


def ratings(candidate: Sequence[float], champion: Sequence[float]) -> Draw:
    """Pairs of units that rate from one to five with these chances; codes of `NINE`."""
    places = [np.cumsum(chances)[:-1].astype(np.float32) for chances in (candidate, champion)]

    def draw(random: np.random.Generator, rows: int, pairs: int) -> Codes:
        arms = [np.digitize(random.random((rows, pairs), dtype=np.float32), place).astype(np.int8) for place in places]
        return (arms[0] - arms[1] + 4).astype(np.int8)

    return draw


def chunks(runs: int, pairs: int) -> Iterator[int]:
    """Rows at a time."""
    step = max(1, CELLS // pairs)
    for start in range(0, runs, step):
        yield min(step, runs - start)


def crossings(
    random: np.random.Generator, draw: Draw, runs: int, pairs: int, null: float, thresholds: Sequence[float],
    values: Floats = TERNARY, *, is_harm: bool = False,
) -> Ints:  # fmt: skip
    """First crossings of each threshold, (thresholds, runs); `is_harm` turns the differences over."""
    found = []
    for rows in chunks(runs, pairs):
        codes = draw(random, rows, pairs)
        paths = log_paths((len(values) - 1 - codes).astype(np.int8) if is_harm else codes, null, values)
        found.append([first_crossing(paths, threshold) for threshold in thresholds])
    return np.concatenate(found, axis=1)


def quantile(times: Ints, share: float) -> float:
    """Of crossing times, those that never came counted as later than all."""
    return float(np.quantile(times, share, method="inverted_cdf"))

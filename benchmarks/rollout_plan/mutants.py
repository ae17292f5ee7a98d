"""T7: nine ways to do it wrong. Each meets the same check as what we do; ours passes it, the mutant must not.

A mutant is caught when its check fails it. Each pair shares its draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.rollout_plan.health import split_paths
from benchmarks.rollout_plan.paths import (
    FIVE,
    Check,
    Codes,
    Floats,
    Scale,
    bernoulli,
    chunks,
    first_crossing,
    log_paths,
    most_by_chance,
)
from service.rollout import fdr

ALPHA, PAIRS = 0.05, 10_000
ENOUGH = math.log(1 / ALPHA)


@dataclass(frozen=True, slots=True)
class Pair:
    """How often ours and the mutant go wrong, of so many runs, and what is allowed."""

    name: str
    ours: int
    mutant: int
    runs: int
    most: int

    @property
    def is_caught(self) -> bool:
        return self.ours <= self.most < self.mutant


def _count(runs: int, pairs: int, one: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Sum what `one(rows)` says of ours and of the mutant, chunk by chunk."""
    found = [one(rows) for rows in chunks(runs, pairs)]
    return int(sum(ours.sum() for ours, _ in found)), int(sum(mutant.sum() for _, mutant in found))


def naive_z(scale: Scale) -> Pair:
    """A z-test after each pair, from the twentieth on."""
    runs, random = scale.runs(2000), scale.random(7, 1)

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        codes = bernoulli(0.7, 0.7)(random, rows, PAIRS)
        n, values = np.arange(1, PAIRS + 1), codes.astype(np.float64) - 1
        means = np.cumsum(values, axis=1) / n
        spread = np.sqrt(np.maximum(np.cumsum(values**2, axis=1) / n - means**2, 1e-12) / n)
        return first_crossing(log_paths(codes, 0.0), ENOUGH) <= PAIRS, ((means / spread)[:, 20:] >= 1.645).any(axis=1)

    return Pair("z-test that peeks", *_count(runs, PAIRS, one), runs, most_by_chance(runs, ALPHA))


def requests_as_units(scale: Scale, users: int = 500, requests: int = 20) -> Pair:
    """Requests paired as if independent, though users stick to their arm; ours: each user's mean."""
    runs, random = scale.runs(1000), scale.random(7, 2)

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        content = random.beta(1.4, 0.6, (2, rows, users, 1))
        up = (random.random((2, rows, users, requests)) < content).astype(np.int8)
        whole = (up[0].sum(axis=2) - up[1].sum(axis=2) + requests).astype(np.int8)
        ours = log_paths(whole, 0.0, np.linspace(-1, 1, 2 * requests + 1))
        mutant = log_paths((up[0] - up[1] + 1).reshape(rows, -1).astype(np.int8), 0.0)
        return (ours >= ENOUGH).any(axis=1), (mutant >= ENOUGH).any(axis=1)

    return Pair("requests as units", *_count(runs, users * requests * 4, one), runs, most_by_chance(runs, ALPHA))


def _twice(codes: Codes) -> np.ndarray:
    return log_paths(np.repeat(codes, 2, axis=1), 0.0).max(axis=1) >= ENOUGH


def _reset(codes: Codes) -> np.ndarray:
    """Five restarts, evenly spread, each beginning again from nothing."""
    return np.any([log_paths(part, 0.0).max(axis=1) >= ENOUGH for part in np.array_split(codes, 5, axis=1)], axis=0)


def on_streams(scale: Scale) -> Iterator[Pair]:
    """Counting each unit twice, and beginning anew at each restart."""
    runs = scale.runs(2000)
    for number, (name, mutant) in enumerate([("units counted twice", _twice), ("evidence reset by restarts", _reset)]):
        random = scale.random(7, 3, number)

        def one(rows: int, random: np.random.Generator = random, mutant: Callable[[Codes], np.ndarray] = mutant) -> tuple:
            codes = bernoulli(0.7, 0.7)(random, rows, PAIRS)
            return log_paths(codes, 0.0).max(axis=1) >= ENOUGH, mutant(codes)

        yield Pair(name, *_count(runs, PAIRS, one), runs, most_by_chance(runs, ALPHA))


def resubmitted(scale: Scale) -> Pair:
    """The same bad candidate tried five times at .05 each; ours gives each try the next index of e-LOND."""
    runs, random = scale.runs(2000), scale.random(7, 4)

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        tops = [log_paths(bernoulli(0.65, 0.7)(random, rows, 4000), -0.05).max(axis=1) for _ in range(5)]
        ours = [top >= -math.log(fdr.level(0.10, 1 + i, 0)) for i, top in enumerate(tops)]
        return np.any(ours, axis=0), np.any([top >= ENOUGH for top in tops], axis=0)

    ever = sum(fdr.level(0.10, 1 + i, 0) for i in range(5))  # .074: ours is wrong at most so often, by the union of its tries
    return Pair("resubmitted until it passes", *_count(runs, 4000, one), runs, most_by_chance(runs, ever))


def pooled_ramp(scale: Scale) -> Pair:
    """A ramp from 1 % to 50 % while everybody grows happier, arms pooled over it; ours pairs within a step. Equal arms: harm?"""
    runs, random, ticks = scale.runs(500), scale.random(7, 5), 2000
    share = np.where(np.arange(ticks) < ticks // 2, 0.01, 0.5)
    rate = np.linspace(0.8, 0.6, ticks)

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        of = random.random((rows, ticks, 10))
        is_candidate = of < share[:, None]
        is_control = of >= 1 - share[:, None]
        up = random.random((rows, ticks, 10)) < rate[:, None]
        ours, mutant = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
        for row in range(rows):
            steps = [slice(0, ticks // 2), slice(ticks // 2, ticks)]
            pairs = [_paired(up[row, s][is_candidate[row, s]], up[row, s][is_control[row, s]]) for s in steps]
            ours[row] = log_paths(2 - np.concatenate(pairs)[None], 0.0).max() >= math.log(100)
            others = random.permutation(up[row][~is_candidate[row]])
            pooled = _paired(random.permutation(up[row][is_candidate[row]]), others)
            mutant[row] = log_paths(2 - pooled[None], 0.0).max() >= math.log(100)
        return ours, mutant

    return Pair("a ramp pooled under drift", *_count(runs, ticks * 100, one), runs, most_by_chance(runs, 0.01))


def _paired(candidate: np.ndarray, control: np.ndarray) -> Codes:
    length = min(len(candidate), len(control))
    return (candidate[:length].astype(np.int8) - control[:length] + 1).astype(np.int8)


def unmatured(scale: Scale) -> Pair:
    """Thumbs up come after a minute, thumbs down after ten: what has come in by half an hour, against an old champion's share."""
    runs, random, units = scale.runs(1000), scale.random(7, 6), 2000

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        asked, up = random.random((2, rows, units)) * 1800, random.random((2, rows, units)) < 0.7
        delay = random.exponential(np.where(up, 60.0, 600.0))
        has_come = asked[0] + delay[0] < 1800
        is_matured, in_window = asked < 1200, delay < 600
        reward = np.where(in_window, np.where(up, 1.0, 0.0), 0.5)
        ours, mutant = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
        for row in range(rows):
            arms = [reward[arm, row][is_matured[arm, row]] for arm in range(2)]
            length = min(map(len, arms))
            codes = np.rint(2 * (arms[0][:length] - arms[1][:length]) + 2).astype(np.int8)
            ours[row] = log_paths(codes[None], 0.0, FIVE).max() >= ENOUGH
            seen = _paired(up[0, row][has_come[row]], up[1, row])
            mutant[row] = log_paths(seen[None], 0.0).max() >= ENOUGH
        return ours, mutant

    return Pair("feedback that has not matured", *_count(runs, units * 8, one), runs, most_by_chance(runs, ALPHA))


def thumbs_ratio(scale: Scale) -> Pair:
    """Of a hundred of the champion's users 7 thumb up, 3 down; of the candidate's 3 and 1.2: fewer bother, more of them are glad.

    By intention to treat, where silence counts one half, that is a loss over the margin; by the ratio of thumbs, a gain.
    """
    runs, random, units, margin = scale.runs(1000), scale.random(7, 7), 8000, 0.005

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        said = []
        for up, down in ((0.03, 0.012), (0.07, 0.03)):
            place = random.random((rows, units))
            said.append(np.where(place < up, 2, np.where(place < up + down, 0, 1)).astype(np.int8))
        ours = log_paths((said[0] - said[1] + 2).astype(np.int8), -margin, FIVE).max(axis=1) >= ENOUGH
        mutant = np.zeros(rows, dtype=bool)
        for row in range(rows):
            answered = [arm[row][arm[row] != 1] // 2 for arm in said]
            mutant[row] = log_paths(_paired(*answered)[None], -0.05).max() >= ENOUGH
        return ours, mutant

    return Pair("thumbs up of those who answered", *_count(runs, units * 4, one), runs, most_by_chance(runs, ALPHA))


def chi_square(scale: Scale) -> Pair:
    """Pearson's chi-square at .01 each hundred units, for the split of 20 000."""
    runs, random, units = scale.runs(1000), scale.random(7, 8), 20_000

    def one(rows: int) -> tuple[np.ndarray, np.ndarray]:
        is_candidate = random.random((rows, units)) < 0.1
        ours = split_paths(is_candidate, 0.1).max(axis=1) >= math.log(1000)
        looks = np.arange(100, units + 1, 100)
        seen = np.cumsum(is_candidate, axis=1)[:, looks - 1]
        statistic: Floats = (seen - 0.1 * looks) ** 2 / (looks * 0.1 * 0.9)
        return ours, (statistic >= 6.6349).any(axis=1)

    return Pair("chi-square of the split that peeks", *_count(runs, units * 2, one), runs, max(1, 6 * runs // 1000))


def all_pairs(scale: Scale) -> Iterator[Pair]:
    """Every mutant."""
    yield naive_z(scale)
    yield requests_as_units(scale)
    yield from on_streams(scale)
    for mutant in (resubmitted, pooled_ramp, unmatured, thumbs_ratio, chi_square):
        yield mutant(scale)


def t7(scale: Scale) -> Iterator[Check]:
    """Ours within what is allowed, each mutant beyond it."""
    for pair in all_pairs(scale):
        yield Check("T7", f"{pair.name}: ours wrong, of {pair.runs}", pair.ours, most=pair.most)
        yield Check("T7", f"{pair.name}: mutant wrong", pair.mutant, least=pair.most + 1)

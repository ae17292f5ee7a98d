"""T6 and T11: many candidates, one after another or three at a time, and slow decline against an anchor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.rollout_plan.paths import (
    Check,
    Floats,
    Scale,
    bernoulli,
    chunks,
    log_paths,
)
from service.rollout import detector, fdr
from service.rollout.assignment import REFERENCES
from service.rollout.evidence import FRACTIONS

FDR, MARGIN = 0.10, 0.05
NULLS = (0.5, 0.8, 0.95)
"""Shares of candidates that are worse by the margin; the others are better by .02."""
CANDIDATES, CAP = 100, 3000
TRIALS, AT_ONCE, CAP_AT_ONCE = 60, 3, 2500


def highest(scale: Scale, effect: float, number: int, stream: int) -> Floats:
    """The highest ln e against non-inferiority within the cap, for so many candidates."""
    random = scale.random(6, stream, round(1000 * (effect + 1)))
    found = [log_paths(bernoulli(0.7 + effect, 0.7)(random, rows, CAP), -MARGIN).max(axis=1) for rows in chunks(number, CAP)]
    return np.concatenate(found) if found else np.empty(0)


def promoted(tops: Floats) -> np.ndarray:
    """e-LOND over one stream of candidates, in order."""
    done = np.zeros(len(tops), dtype=bool)
    for place, top in enumerate(tops):
        done[place] = top >= -math.log(fdr.level(FDR, place + 1, int(done.sum())))
    return done


def one_after_another(scale: Scale, share: float, number: int) -> tuple[float, float]:
    """False discovery rate and power over streams of `CANDIDATES`."""
    repeats, random = scale.runs(150), scale.random(6, number)
    is_null = random.random((repeats, CANDIDATES)) < share
    tops = np.empty(is_null.shape)
    tops[is_null] = highest(scale, -MARGIN, int(is_null.sum()), number)
    tops[~is_null] = highest(scale, 0.02, int((~is_null).sum()), number)
    done = np.array([promoted(row) for row in tops])
    false = (done & is_null).sum(axis=1) / np.maximum(done.sum(axis=1), 1)
    return float(false.mean()), float((done & ~is_null).sum() / max((~is_null).sum(), 1))


@dataclass
class _Running:
    index: int
    is_null: bool
    began: int
    path: Floats


@dataclass
class Overlapping:
    """Three trials at a time against one stream of controls; the level grows while they run, the index is given at the start."""

    random: np.random.Generator
    share: float
    control: np.ndarray
    used: int = 0
    promotions: int = 0
    false: int = 0
    good: int = 0
    running: list[_Running] = field(default_factory=list)

    def begin(self, now: int) -> None:
        if self.used == TRIALS:
            return
        self.used += 1
        is_null = bool(self.random.random() < self.share)
        self.good += not is_null
        chance = 0.7 + (-MARGIN if is_null else 0.02)
        up = self.random.random(CAP_AT_ONCE) < chance
        codes = (up.astype(np.int8) - self.control[now : now + CAP_AT_ONCE] + 1).astype(np.int8)
        self.running.append(_Running(self.used, is_null, now, log_paths(codes[None], -MARGIN)[0]))

    def run(self) -> tuple[float, float]:
        """Share of promotions that are false, and of the good ones that are promoted."""
        now = 0
        for _ in range(AT_ONCE):
            self.begin(now)
        while self.running:
            at, one, passed = min(
                (self._end(trial, now) for trial in self.running), key=lambda end: (end[0], not end[2], end[1].index)
            )  # fmt: skip
            now = at
            self.running.remove(one)
            if passed:
                self.promotions += 1
                self.false += one.is_null
            self.begin(now)
        return self.false / max(self.promotions, 1), (self.promotions - self.false) / max(self.good, 1)

    def _end(self, trial: _Running, now: int) -> tuple[int, _Running, bool]:
        """When the trial ends at the present number of promotions, and whether with one."""
        since = max(now - trial.began - 1, 0)
        has = trial.path[since:] >= -math.log(fdr.level(FDR, trial.index, self.promotions))
        if has.any():
            return max(now, trial.began + since + int(has.argmax()) + 1), trial, True
        return trial.began + CAP_AT_ONCE, trial, False


def t6(scale: Scale) -> Iterator[Check]:
    """False discovery rate and power of the stream."""
    repeats = scale.runs(150)
    for number, share in enumerate(NULLS):
        false, power = one_after_another(scale, share, number)
        yield Check("T6", f"{share:.0%} worse: false discovery rate", false, most=FDR)
        yield Check("T6", f"{share:.0%} worse: power", power, least=0.90)
        random = scale.random(66, number)
        length = (TRIALS // AT_ONCE + 2) * CAP_AT_ONCE * 2
        ends = [Overlapping(random, share, (random.random(length) < 0.7).astype(np.int8)).run() for _ in range(repeats)]
        rates, powers = np.array(ends).T
        yield Check("T6", f"{share:.0%} worse, three at a time: false discovery rate", float(rates.mean()), most=FDR)
        yield Check("T6", f"{share:.0%} worse, three at a time: power", float(powers.mean()), least=0.75)
    levels = [fdr.level(FDR, index, 0) for index in range(1, 200_001)]
    yield Check("T6", "levels without a promotion: sum", sum(levels), most=FDR)


ANCHOR_UNITS, BLOCK = 1000, REFERENCES
"""Units of the anchor in each generation, and of the champion for each of them."""


def log_cusum(differences: Floats) -> Floats:
    """ln of the e-CUSUM against "the line is not worse than its anchor", rows of anchor - line; mixed over the fractions."""
    runs, steps = differences.shape
    walk, found = np.zeros((len(FRACTIONS), runs)), np.empty((runs, steps))
    for step in range(steps):
        gain = np.log1p(FRACTIONS[:, None] * differences[:, step])
        walk = np.maximum(walk, 0.0) + gain
        found[:, step] = np.logaddexp.reduce(walk, axis=0) - math.log(len(FRACTIONS))
    ours = detector.mixed(detector.log_cusum(differences[0]))
    assert np.allclose(found[0], ours, atol=1e-9), f"not the service's, after {steps} units"
    return found


def against_anchor(random: np.random.Generator, rows: int, units: int, loss: Floats) -> Floats:
    """Anchor minus the mean of a block of the line's units; `loss` is the line's, unit by unit."""
    trusted = (random.random((rows, units)) < 0.7).astype(float)
    return trusted - random.binomial(BLOCK, 0.7 - loss, (rows, units)) / BLOCK


def t11(scale: Scale) -> Iterator[Check]:
    """Generations each worse by .02, which a margin of .05 lets through, and the anchor that notices."""
    runs = scale.runs(400)
    random = scale.random(11)
    chains = np.zeros(scale.runs(100))
    for place in range(len(chains)):
        lost = 0.0
        for _ in range(10):
            codes = bernoulli(0.7 - lost - 0.02, 0.7 - lost)(random, 1, 8000)
            path = log_paths(codes, -MARGIN)[0]
            harm = log_paths((2 - codes).astype(np.int8), 0.0)[0]
            promoted_at, harmed_at = (int(np.argmax(one >= limit)) if (one >= limit).any() else 8001
                                      for one, limit in ((path, math.log(20)), (harm, math.log(200))))  # fmt: skip
            lost += 0.02 * (promoted_at < harmed_at)
        chains[place] = round(lost / 0.02)
    yield Check("T11", "without an anchor: generations of ten that go live, mean", float(chains.mean()), least=6)
    generations = np.repeat(0.02 * np.arange(1, 11), ANCHOR_UNITS)
    for threshold, most_loss in ((1e3, 0.06), (1e4, 0.08)):
        paths = log_cusum(against_anchor(random, runs, len(generations), generations))
        has = paths >= math.log(threshold)
        at = generations[has.argmax(axis=1)]
        yield Check("T11", f"threshold {threshold:g}: runs with an alarm", float(has.any(axis=1).mean()), least=1)
        yield Check("T11", f"threshold {threshold:g}: mean loss at the alarm", float(at.mean()), most=most_loss)
    equal = log_cusum(against_anchor(random, runs, 10_000, np.zeros(10_000)))
    false = float((equal >= math.log(1e3)).any(axis=1).mean())
    yield Check("T11", "equal to its anchor: share with a false alarm within 10 000 units", false, most=0.10)

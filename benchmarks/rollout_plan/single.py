"""T0 to T5 and T8: one trial. Algebra, exact validity, error rates under a look after each pair, power, time to a rollback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks.rollout_plan import exact
from benchmarks.rollout_plan.paths import (
    NINE,
    TERNARY,
    Check,
    Codes,
    Draw,
    Ints,
    Scale,
    bernoulli,
    crossings,
    most_by_chance,
    quantile,
    ratings,
)
from service.rollout import fdr
from service.rollout.evidence import log_e, log_e_promote, log_e_rollback
from service.rollout.health import log_e_mismatch

ALPHA, ALPHA_ROLLBACK = 0.05, 0.01
DROPS = {-0.05: (1813, 4355), -0.10: (496, 1169), -0.20: (138, 315), -0.40: (44, 76)}
"""Median and 95 % quantile of canary units until the rollback, from the reference simulation."""
SIZES = (250, 500, 1000, 2000, 4000, 8000)
EFFECTS = (0.02, 0.03, 0.05, 0.075, 0.10)

_SHOWN = np.array([1, 2, 5, 10, 50, 100, 200])
_GOLDEN = {
    0.0: [0.151916042026, 0.151916042026, 0.0813136610507, -0.0289008867578, 0.0305856193225, 0.221679529841, 0.663649941299],
    -0.05: [0.166642815893, 0.176637164437, 0.126821665678, 0.0413990619553, 0.326635171961, 0.828300466814, 2.03130197411],
}
_SPLITS = {(4550, 450): 0.878620735661, (900, 100): -1.206604800214, (880, 120): 0.640383303485}
"""With forty digits, as `tests/mathematics/test_health.py` has them; the plan's -1.2066046002 lost two digits."""
_STREAM_E = (250, 40, 5, 500, 30, 60, 1e4)
_STREAM_LIMITS = (22.857657, 34.645729, 44.188011, 70.017474, 75.045338, 100.464751, 128.566724)


def t0(_: Scale) -> Iterator[Check]:
    """Golden vectors; counts, order and merging; ten million pairs."""
    i = np.arange(1, 201)
    stream = ((3 * i) % 10 < 7).astype(float) - ((7 * i) % 10 < 6).astype(float)
    off = [abs(log_e(stream[:n], null) - at) for null, row in _GOLDEN.items() for n, at in zip(_SHOWN, row, strict=True)]
    off += [abs(log_e_mismatch(counts, (0.9, 0.1)) - at) for counts, at in _SPLITS.items()]
    yield Check("T0", "golden vectors: largest error", max(off), most=1e-9)
    promoted, wrong = 0, 0.0
    for index, (e, limit) in enumerate(zip(_STREAM_E, _STREAM_LIMITS, strict=True), 1):
        level = fdr.level(0.1, index, promoted)
        wrong = max(wrong, abs(1 / level / limit - 1))
        promoted += e * level >= 1
    yield Check("T0", "e-LOND: largest relative error of the golden thresholds", wrong, most=1e-6)
    yield Check("T0", "e-LOND: promotions in the golden stream", promoted, least=4, most=4)
    counted = log_e([1, 0, -1], -0.05, [80, 60, 60])
    halves = [log_e([1, 0, -1], -0.05, [a + b for a, b in zip((30, 20, 40), (50, 40, 20), strict=True)])]
    others = [log_e(stream, -0.05), log_e(stream[::-1], -0.05), *halves]
    yield Check("T0", "counts, order, merging: largest difference", max(abs(counted - one) for one in others), most=1e-9)
    yield Check("T0", "no data: ln e", log_e([], 0.0), least=0.0, most=0.0)
    yield Check("T0", "ten million pairs: finite", float(math.isfinite(log_e([1.0, -1.0], 0.0, [9e6, 1e6]))), least=1)


def expectation(statistic: Callable[[list[int]], float], pairs: int, candidate: float, champion: float) -> float:
    """E[exp(statistic(counts))] over all outcomes of Bernoulli pairs; `counts` are of -1, 0, 1. Exact."""
    win, loss = candidate * (1 - champion), champion * (1 - candidate)
    total = 0.0
    for up in range(pairs + 1):
        for down in range(pairs - up + 1):
            same = pairs - up - down
            ways = math.factorial(pairs) / (math.factorial(up) * math.factorial(down) * math.factorial(same))
            total += ways * win**up * loss**down * (1 - win - loss) ** same * math.exp(statistic([down, same, up]))
    return total


def t1(scale: Scale) -> Iterator[Check]:
    """Every outcome of up to eight pairs over a grid of the null: the mean of the e-value is at most 1."""
    grid = np.round(np.arange(0.05, 1.0, 0.05 if scale.is_full else 0.15), 3)
    cases = [(float(c), float(b)) for c in grid for b in grid]
    worst_promote = worst_rollback = 0.0
    for pairs in range(1, 9):
        for margin in (0.0, 0.02, 0.05, 0.1):
            promote = lambda counts, m=margin: log_e_promote(TERNARY, m, counts)  # noqa: E731
            at = [(c, b) for c, b in cases if c - b <= -margin] + [(b - margin, b) for b in grid if b > margin]
            worst_promote = max([worst_promote, *(expectation(promote, pairs, c, b) for c, b in at)])
        rollback = lambda counts: log_e_rollback(TERNARY, counts)  # noqa: E731
        worst_rollback = max([worst_rollback, *(expectation(rollback, pairs, c, b) for c, b in cases if c >= b)])
    yield Check("T1", "non-inferiority: largest mean of e under the null", worst_promote, most=1 + 1e-12)
    yield Check("T1", "harm: largest mean of e under the null", worst_rollback, most=1 + 1e-12)
    inside = expectation(lambda counts: log_e_promote(TERNARY, 0.05, counts), 6, 0.60, 0.70)
    yield Check("T1", "inside of the null, .60 against .70", inside, least=0.95035, most=0.95045)
    split = max(
        abs(sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) * math.exp(log_e_mismatch((k, n - k), (share, 1 - share)))
                for k in range(n + 1)) - 1)
        for n in range(1, 41) for share in (0.1, 0.5)
    )  # fmt: skip
    yield Check("T1", "split of units: largest distance of the mean of e from 1", split, most=1e-12)


def t2(scale: Scale) -> Iterator[Check]:
    """Equal arms, and arms at the margin, looked at after each of 10 000 pairs."""
    runs = scale.runs(2000)
    most, least = most_by_chance(runs, ALPHA), max(1, runs // 200)
    cases = [(p, p, 0.0) for p in (0.05, 0.5, 0.7, 0.95)] + [(0.65, 0.70, 0.05), (0.87, 0.90, 0.03)]
    for number, (candidate, champion, margin) in enumerate(cases):
        times = crossings(
            scale.random(2, number), bernoulli(candidate, champion), runs, 10_000, -margin, [-math.log(ALPHA)]
        )  # fmt: skip
        what = f"{candidate:g} against {champion:g}, margin {margin:g}: false promotions of {runs}"
        yield Check("T2", what, int((times[0] <= 10_000).sum()), least=least, most=most)
    yield from rated(scale)


POLARISED, MODERATE = (0.30, 0.05, 0.05, 0.05, 0.55), (0.0, 0.10, 0.40, 0.40, 0.10)
"""Chances of one to five stars: both have the mean 3.5."""


def rated(scale: Scale) -> Iterator[Check]:
    """The same for ratings of equal mean, whatever their shape: better is claimed no more often than it may be, nor harm."""
    runs, enough = scale.runs(2000), -math.log(ALPHA)
    for number, (name, arms) in enumerate([("polarised", (POLARISED, MODERATE)), ("moderate", (MODERATE, POLARISED))]):
        for is_harm in (False, True):
            times = crossings(
                scale.random(22, number, is_harm), ratings(*arms), runs, 4000, 0.0, [enough], NINE, is_harm=is_harm
            )  # fmt: skip
            what = f"ratings, {name}, equal: false {'rollbacks' if is_harm else 'promotions'} of {runs} at .05"
            yield Check("T2", what, int((times[0] <= 4000).sum()), least=1, most=most_by_chance(runs, ALPHA))


def fixed_size(candidate: float, champion: float, null: float) -> float:
    """Pairs that a z-test with one look needs for power .8 at .05."""
    variance = candidate * (1 - candidate) + champion * (1 - champion)
    return (1.6449 + 0.8416) ** 2 * variance / (candidate - champion - null) ** 2


def t3(scale: Scale) -> Iterator[Check]:
    """How many pairs a promotion takes."""
    runs = 800  # in the reduced form too: a quantile of fewer wavers by more than its limit's slack
    rows = [("superiority .70 → .75", 0.75, 0.0, 1200, 2100), ("equal .70, margin .05", 0.70, -0.05, 1350, 2350)]
    for number, (name, candidate, null, median, q80) in enumerate(rows):
        times = crossings(scale.random(3, number), bernoulli(candidate, 0.70), runs, 8000, null, [-math.log(ALPHA)])[0]
        yield Check("T3", f"{name}: median pairs", quantile(times, 0.5), most=median)
        yield Check("T3", f"{name}: pairs for power .8", quantile(times, 0.8), most=q80)
        longer = quantile(times, 0.8) / fixed_size(candidate, 0.7, null)
        yield Check("T3", f"{name}: the same over a fixed size's", longer, most=2.2)
        if candidate > 0.7:
            yield Check("T3", f"{name}: power by 8000", float((times <= 8000).mean()), least=0.99)


def power_curves(scale: Scale) -> dict[str, dict[float, list[float]]]:
    """Share promoted by each of `SIZES`, by effect: superiority, and non-inferiority by .05 (effects from -.05 on)."""
    runs, curves = scale.runs(800), {}
    for number, (name, null, effects) in enumerate(
        [("superiority", 0.0, EFFECTS), ("non-inferiority, margin .05", -0.05, (-0.05, -0.02, 0.0, 0.02, 0.05))]
    ):
        found = {}
        for place, effect in enumerate(effects):
            times = crossings(
                scale.random(33, number, place), bernoulli(0.7 + effect, 0.7), runs, SIZES[-1], null, [-math.log(ALPHA)]
            )[0]
            found[effect] = [float((times <= size).mean()) for size in SIZES]
        curves[name] = found
    return curves


def t4(scale: Scale) -> Iterator[Check]:
    """How many canary units a harmful candidate answers before it is rolled back, and how often an equal one is."""
    runs = 800  # likewise
    for number, (drop, (median, q95)) in enumerate(DROPS.items()):
        draw = bernoulli(0.7 + drop, 0.7)
        times = crossings(
            scale.random(4, number), draw, runs, 4 * q95, 0.0, [-math.log(ALPHA_ROLLBACK)], is_harm=True
        )[0]  # fmt: skip
        yield Check("T4", f"{drop:+.2f}: median canary units to the rollback", quantile(times, 0.5), most=1.15 * median)
        yield Check("T4", f"{drop:+.2f}: 95 % quantile", quantile(times, 0.95), most=1.15 * q95)
    runs = scale.runs(2000)
    times = crossings(
        scale.random(4, 99), bernoulli(0.7, 0.7), runs, 10_000, 0.0, [-math.log(ALPHA_ROLLBACK)], is_harm=True
    )  # fmt: skip
    false = int((times[0] <= 10_000).sum())
    yield Check("T4", f"equal: false rollbacks of {runs}", false, most=most_by_chance(runs, ALPHA_ROLLBACK))


_EFFECTS = (0.05, 0.02, 0.0, -0.02, -0.05, -0.10, -0.20)
THREE_WAYS: dict[str, tuple[float, float, int, Sequence[tuple[float, float, float]]]] = {
    "α .05, .05": (0.05, 0.05, 5000, [
        (1.0, 0.0, 288), (0.997, 0.003, 606), (0.97, 0.03, 1074), (0.64, 0.33, 2274), (0.035, 0.965, 1107), (0.002, 0.998, 322),
        (0.0, 1.0, 85)]),
    "α .05, .005": (0.05, 0.005, 8000, [
        (1.0, 0.0, 273), (1.0, 0.0, 559), (0.992, 0.008, 1072), (0.83, 0.17, 2940), (0.042, 0.958, 2001), (0.003, 0.997, 565),
        (0.0, 1.0, 147)]),
    "e-LOND t=10, R=3": (1 / 228, 0.005, 8000, [
        (1.0, 0.0, 496), (0.998, 0.002, 1104), (0.997, 0.003, 1977), (0.68, 0.27, 5060), (0.003, 0.997, 2156), (0.0, 1.0, 543),
        (0.0, 1.0, 142)]),
}  # fmt: skip
"""Level of a promotion, of a rollback, cap in pairs; by effect: share promoted, share rolled back, median pairs."""
FIRST = next(iter(THREE_WAYS))


def three_ways(effect: float, name: str) -> exact.Ends:
    """How a candidate that is better by `effect` than a champion of .7 ends, by a row of the table. Exact."""
    level, level_rollback, cap, _ = THREE_WAYS[name]
    return exact.ends(0.7 + effect, 0.7, exact.Bets(-0.05, 1 / level), exact.Bets(0.0, 1 / level_rollback, is_harm=True), cap)


def t5(scale: Scale) -> Iterator[Check]:
    """Promoted, rolled back or expired, against the reference's three rows, which were drawn: exact chances, no draws."""
    for number, effect in enumerate(_EFFECTS):
        for name in THREE_WAYS if scale.is_full else [FIRST]:
            found, (up, down, pairs) = three_ways(effect, name), THREE_WAYS[name][3][number]
            yield Check("T5", f"{name}, {effect:+.2f}: promoted", found.promoted, up - 0.03, up + 0.03)
            yield Check("T5", f"{name}, {effect:+.2f}: rolled back", found.rolled_back, down - 0.03, down + 0.03)
            yield Check("T5", f"{name}, {effect:+.2f}: median pairs", found.median_pairs, 0.85 * pairs, 1.15 * pairs)


def drifting(rates: Callable[[np.random.Generator, int, int], np.ndarray]) -> Draw:
    """Two arms whose units, pair by pair, are content with the same chance."""

    def draw(random: np.random.Generator, rows: int, pairs: int) -> Codes:
        chance = rates(random, rows, pairs)
        up, other = (random.random((rows, pairs)) < chance for _ in range(2))
        return (up.astype(np.int8) - other + 1).astype(np.int8)

    return draw


def t8(scale: Scale) -> Iterator[Check]:
    """Equal arms again: by day and night, under drift, and with users who differ, twenty requests each, as units."""
    runs, most = scale.runs(2000), most_by_chance(scale.runs(2000), ALPHA)
    by_hour = lambda _, __, pairs: 0.7 + 0.1 * np.sin(np.arange(pairs) * 2 * np.pi / 700)  # noqa: E731
    upwards = lambda _, __, pairs: np.linspace(0.3, 0.9, pairs)  # noqa: E731
    for number, (name, rates) in enumerate([("day and night", by_hour), ("drift .3 → .9", upwards)]):
        times = crossings(scale.random(8, number), drifting(rates), runs, 10_000, 0.0, [-math.log(ALPHA)])
        yield Check("T8", f"{name}: false promotions of {runs}", int((times[0] <= 10_000).sum()), most=most)
    crossed = _users(scale.random(8, 9), runs, 2000)
    yield Check("T8", f"users as units: false promotions of {runs}", int((crossed <= 2000).sum()), most=most)


def _users(random: np.random.Generator, runs: int, users: int, requests: int = 20) -> Ints:
    """Pairs of users; each one's satisfaction is Beta(1.4, .6), its outcome the mean of its requests."""
    values = np.linspace(-1, 1, 2 * requests + 1)
    draw: Draw = lambda rng, rows, pairs: (  # noqa: E731
        rng.binomial(requests, rng.beta(1.4, 0.6, (rows, pairs))) - rng.binomial(requests, rng.beta(1.4, 0.6, (rows, pairs)))
        + requests
    ).astype(np.int8)  # fmt: skip
    return crossings(random, draw, runs, users, 0.0, [-math.log(ALPHA)], values)[0]

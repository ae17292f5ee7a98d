"""T9, T10 and T12: silence and delays, the split of the units, and who meets the candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from benchmarks.rollout_plan.paths import (
    FIVE,
    Check,
    Codes,
    Floats,
    Ints,
    Scale,
    bernoulli,
    chunks,
    first_crossing,
    log_paths,
    most_by_chance,
)
from replay.records import Arm
from service.rollout.assignment import arm_at, place_of
from service.rollout.evidence import log_e_promote
from service.rollout.health import CONCENTRATION, log_e_mismatch

NEVER = 10**9
RESPONSE_E, RESPONSE_RELATIVE = 100.0, 0.2


def split_paths(is_candidate: np.ndarray, share: float) -> Floats:
    """ln e of the split after each unit, by the odds that the mixture gives the next one; rows of runs."""
    before = np.arange(is_candidate.shape[1])
    earlier = np.cumsum(is_candidate, axis=1) - is_candidate
    odds = (CONCENTRATION * share + earlier) / (CONCENTRATION + before)
    found: Floats = np.cumsum(np.log(np.where(is_candidate, odds / share, (1 - odds) / (1 - share))), axis=1)
    counts = int(is_candidate[0].sum()), int((~is_candidate[0]).sum())
    assert math.isclose(found[0, -1], log_e_mismatch(counts, (share, 1 - share)), abs_tol=1e-8), "not the service's"
    return found


def t10(scale: Scale) -> Iterator[Check]:
    """A tenth by design: an eleventh, an eighth and a tenth in truth."""
    limit = math.log(1000)
    for number, (truth, by, share) in enumerate([(0.11, 30_000, 0.9), (0.12, 7_500, 0.9)]):
        runs, random = 500, scale.random(10, number)  # in the reduced form too: the limit is close to the truth
        held = [split_paths(random.random((rows, by)) < truth, 0.1).max(axis=1) >= limit for rows in chunks(runs, by)]
        yield Check("T10", f"{truth:.0%} for 10 %: held within {by} units", float(np.concatenate(held).mean()), least=share)
    runs, random = scale.runs(1000), scale.random(10, 9)
    false = sum(int((split_paths(random.random((rows, 20_000)) < 0.1, 0.1).max(axis=1) >= limit).sum())
                for rows in chunks(runs, 20_000))  # fmt: skip
    yield Check("T10", f"as designed: held by 20 000 units, of {runs}", false, most=6 * runs // 1000)


def t12(scale: Scale) -> Iterator[Check]:
    """Sticky, nested, uniform, independent between trials, and the two groups never meet."""
    number = 1_000_000 if scale.is_full else 100_000
    places = np.array([place_of("trial-1", f"user-{i}") for i in range(number)])
    others = np.array([place_of("trial-2", f"user-{i}") for i in range(number)])
    counts = np.bincount((places * 100).astype(int), minlength=100)
    chi = float(((counts - number / 100) ** 2 / (number / 100)).sum())
    yield Check("T12", f"uniform over {number} keys: chi-square, 99 degrees", chi, least=50, most=148.2)
    table = np.histogram2d(places, others, bins=10, range=[[0, 1], [0, 1]])[0]
    chi = float(((table - number / 100) ** 2 / (number / 100)).sum())
    yield Check("T12", "independent between salts: chi-square, 99 degrees", chi, least=50, most=148.2)
    weights = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)
    arms = [[arm_at(float(p), w) for w in weights] for p in places[:20_000]]
    left = sum(a is not b for row in arms for a, b in pairwise(row) if a is not Arm.CHAMPION)
    yield Check("T12", "units that leave their group as the weight grows", left, most=0)
    at_zero, at_half = ({row[i] for row in arms} for i in (0, -1))
    yield Check("T12", "weight 0: units that meet the candidate", sum(row[0] is Arm.CANDIDATE for row in arms), most=0)
    yield Check("T12", "weight ½: groups, nobody outside", len(at_half), least=2, most=2)
    yield Check("T12", "weight 0: the place 1 is the control's, no other", float(at_zero == {Arm.CHAMPION}), least=1)
    again = sum(place_of("trial-1", f"user-{i}") != places[i] for i in range(1000))
    yield Check("T12", "keys that another replica deals elsewhere", again, most=0)


def hold_times(said: np.ndarray, other: np.ndarray) -> Ints:
    """When a difference in response rates would hold a trial: e of either side ≥ 100, and a fifth apart; rows of runs."""
    codes = (said.astype(np.int8) - other + 1).astype(np.int8)
    apart = np.cumsum(said, axis=1) / np.maximum(np.cumsum(other, axis=1), 1) - 1
    evidence = np.maximum(log_paths(codes, 0.0), log_paths((2 - codes).astype(np.int8), 0.0))
    has = (evidence >= math.log(RESPONSE_E)) & (np.abs(apart) >= RESPONSE_RELATIVE)
    return np.where(has.any(axis=1), has.argmax(axis=1) + 1, NEVER)


def thumbs(random: np.random.Generator, shape: tuple[int, int], up: float, down: float) -> Codes:
    """2: up, 1: silent, 0: down."""
    place = random.random(shape)
    return np.where(place < up, 2, np.where(place < up + down, 0, 1)).astype(np.int8)


def t9(scale: Scale) -> Iterator[Check]:
    """Fewer answers, silent losers, slow thumbs down."""
    runs, random = scale.runs(500), scale.random(9)
    held, silenced, judged = [], [], []
    for rows in chunks(runs, 8000):
        candidate, control = thumbs(random, (rows, 8000), 0.049, 0.021), thumbs(random, (rows, 8000), 0.07, 0.03)
        held.append(hold_times(candidate != 1, control != 1) < first_crossing(answered_paths(candidate, control), math.log(20)))
    yield Check("T9", "answers 10 % → 7 %: held before a promotion", float(np.concatenate(held).mean()), least=0.90)
    for rows in chunks(runs, 20_000):  # 3 % thumb, 70 % of them up; then half of the unhappy ones fall silent, quality .10 worse
        candidate, control = thumbs(random, (rows, 20_000), 0.021, 0.0045), thumbs(random, (rows, 20_000), 0.021, 0.009)
        by_feedback = answered_paths(candidate, control)
        silenced.append(first_crossing(by_feedback, math.log(20)) <= 20_000)
        by_judge = log_paths(bernoulli(0.6, 0.7)(random, rows, 20_000), -0.05)
        judged.append((np.minimum(by_feedback, by_judge) >= math.log(20)).any(axis=1))
    what = "unhappy users fall silent, feedback alone: promoted (the documented limit)"
    yield Check("T9", what, float(np.concatenate(silenced).mean()), least=0.5)
    what = f"the same, with a judge who sees -.10: promoted, of {runs}"
    yield Check("T9", what, int(np.concatenate(judged).sum()), most=most_by_chance(runs, 0.05))
    yield from _delays(scale.random(9, 9), 200_000 if scale.is_full else 40_000)


def answered_paths(candidate: Codes, control: Codes, margin: float = 0.05) -> Floats:
    """ln e against "worse by the margin where users answer" after each pair of `thumbs`, as `evidence.log_e_promote` has it."""
    answered = (control != 1).astype(np.int8)
    values = np.concatenate([FIVE - margin, FIVE])
    found = log_paths((candidate - control + 2 + 5 * answered).astype(np.int8), -margin, values)
    differences = FIVE[candidate[0] - control[0] + 2]
    assert math.isclose(found[0, -1], log_e_promote(differences, margin, answered=answered[0]), abs_tol=1e-8), "not the service's"
    return found


def _delays(random: np.random.Generator, units: int) -> Iterator[Check]:
    """A canary of half an hour against a control as young, ups after a minute and downs after ten; the window is ten minutes."""
    up = random.random((2, units)) < 0.7
    delay = random.exponential(np.where(up, 60.0, 600.0))
    reward = np.where(delay < 600, up.astype(float), 0.5)
    error = math.sqrt(2 * reward.var() / units)
    bias = abs(float(reward[0].mean() - reward[1].mean()))
    yield Check("T9", "matured units of both arms: bias in standard errors", bias / error, most=3.3)
    asked = random.random(units) * 1800
    naive = float(up[0][asked + delay[0] < 1800].mean() - 0.7)
    yield Check("T9", "what has come in by then, against an old champion: phantom lift", naive, least=0.03)

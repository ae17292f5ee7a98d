"""How a trial of Bernoulli pairs ends, exactly: promoted, rolled back or neither, with a look after each pair. No draws.

The e-values depend on counts only: after n pairs, on how many the candidate won (u) and how many it lost (d). So the chance of
each (u, d) that no look has ended yet is carried from pair to pair, and what crosses a threshold is taken out of it: the
multinomial's recursion with absorbing barriers, after Armitage, McPherson & Rowe (JRSS-A 1969). Cells below 1e-17 are dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from benchmarks.rollout_plan.paths import TERNARY, Ints
from service.rollout.evidence import FRACTIONS, log_gains

NEGLIGIBLE = 1e-17
"""A row or column of chances below this is dropped."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Chances of the ends, and the median of pairs to an end, the cap being one."""

    promoted: float
    rolled_back: float
    expired: float
    median_pairs: int


@dataclass(frozen=True, slots=True)
class Bets:
    """The e-process against "the mean difference is at most `null`", of differences or, for harm, of their negatives."""

    null: float
    threshold: float
    is_harm: bool = False

    def crosses(self, pairs: int, won: Ints, lost: Ints) -> np.ndarray:
        """Whether e ≥ threshold after `pairs` of which `won` and `lost`: (won, lost), one product of rank six."""
        loss, same, win = log_gains(-TERNARY if self.is_harm else TERNARY, self.null).T
        by_won, by_lost = won[:, None] * (win - same), lost[:, None] * (loss - same) + pairs * same
        middle = by_won[len(won) // 2]  # both factors near 1, whatever the number of pairs
        wealth = np.exp(by_won - middle) @ np.exp(by_lost + middle - math.log(self.threshold)).T
        return np.asarray(wealth >= len(FRACTIONS))


def ends(candidate: float, champion: float, promotion: Bets, rollback: Bets, cap: int) -> Ends:
    """Of pairs of units that are content with these chances, at most `cap` of them; the rollback wins ties."""
    win, loss = candidate * (1 - champion), champion * (1 - candidate)
    open_, won, lost = np.ones((1, 1)), 0, 0  # chances of the trials without an end, and the counts of the first cell
    promoted = rolled_back = 0.0
    median = cap
    for pairs in range(1, cap + 1):
        last, open_ = open_, np.zeros((open_.shape[0] + 1, open_.shape[1] + 1))
        open_[:-1, :-1] += (1 - win - loss) * last
        open_[1:, :-1] += win * last
        open_[:-1, 1:] += loss * last
        counts = (won + np.arange(open_.shape[0]), lost + np.arange(open_.shape[1]))
        is_harmful = rollback.crosses(pairs, *counts)
        is_good = promotion.crosses(pairs, *counts) & ~is_harmful
        rolled_back += float(open_[is_harmful].sum())
        promoted += float(open_[is_good].sum())
        open_[is_harmful | is_good] = 0.0
        if median == cap and promoted + rolled_back >= 0.5:
            median = pairs
        rows, columns = (np.flatnonzero(open_.sum(axis=axis) > NEGLIGIBLE) for axis in (1, 0))
        if not len(rows) or not len(columns):
            break
        open_, won, lost = open_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], won + rows[0], lost + columns[0]
    return Ends(promoted, rolled_back, 1 - promoted - rolled_back, median)

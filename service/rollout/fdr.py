"""Many candidates, one after another: at which level each is tested, so that few promotions are false. Pure.

e-LOND (Xu & Ramdas, AISTATS 2024): the t-th candidate of a line is promoted when its e-value reaches 1 / level, with
level = fdr * gamma_t * (promotions so far + 1). On average at most a share `fdr` of the promotions is then of candidates
that are worse by the margin, whatever the candidates have in common (users, champion, examples). The index t is given
once, when the canary begins, and never again: a candidate that expired or was rolled back has used its own up.
"""

from __future__ import annotations

import math

EXPONENT = 1.6
GAMMA = 0.4374901658
"""1 / zeta(1.6): gamma_t = GAMMA * t ** -EXPONENT sums to 1."""


def level(fdr: float, index: int, promotions: int) -> float:
    """Level of the test of the `index`-th candidate, from 1, after so many promotions by evidence; in (0, 1)."""
    return fdr * GAMMA * math.pow(index, -EXPONENT) * (promotions + 1)

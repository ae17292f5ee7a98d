"""Is the comparison itself in order? Sequential tests of the arms' sizes, and of how many of each answer. Pure.

A trial deals units to its arms by hash, so their counts follow the design, or else something loses units of one arm or deals
them wrongly, and no difference in rewards means what it seems to. A unit is on the ledger as soon as it is answered and matures a
fixed time after, whatever was said: matured counts are those of the assigned, later, so they have no test of their own.

The test is the Dirichlet-multinomial mixture of Lindon & Malek (NeurIPS 2022): under the design it is a martingale that starts
at 1, so it may be looked at after each unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from service.rollout.evidence import log_e

CONCENTRATION = 100.0
"""Units that the prior is worth: it expects shares within some ten points of the design's."""
HALVES = (0.5, 0.5)
"""The design of each weight step: a control group as large as the candidate's."""


def log_e_mismatch(counts: Sequence[int], shares: Sequence[float], concentration: float = CONCENTRATION) -> float:
    """Natural log of the e-value against "units fall into arms with these `shares`", which sum to 1; no units is 0."""
    prior = [concentration * share for share in shares]
    posterior = [weight + count for weight, count in zip(prior, counts, strict=True)]
    design = sum(count * math.log(share) for count, share in zip(counts, shares, strict=True))
    return _log_beta(posterior) - _log_beta(prior) - design


def log_e_split(steps: Iterable[tuple[int, int]]) -> float:
    """The same over weight steps, each a factor of its own: evidence of a mismatch in one is none of how another would lean."""
    return sum(log_e_mismatch(counts, HALVES) for counts in steps)


def log_e_response(differences: Sequence[float], times: Sequence[int]) -> float:
    """Natural log of the e-value against "as many units of both arms say something".

    `differences` are those of pairs, 1 for a unit that has said something less 1 for its counterpart; `times` says how often each
    occurred. The mean of the two one-sided e-processes is one too; the greater of them would not be.
    """
    more, fewer = log_e(differences, 0.0, times), log_e([-d for d in differences], 0.0, times)
    return float(np.logaddexp(more, fewer) - np.log(2.0))


def _log_beta(weights: Sequence[float]) -> float:
    return sum(map(math.lgamma, weights)) - math.lgamma(sum(weights))

"""Has something become worse since? An e-detector, which is ready whenever harm begins. Pure.

The e-CUSUM of Shin, Ramdas & Rinaldo (2023, arXiv 2203.03532): `M <- max(M, 1) * L`, with the bets L of a trial's e-process,
mixed over their fractions. What an e-process loses while all is well it has to win back before it can show a decline; this one
never falls below where it began. In return it is no e-process: it alarms some day without a reason, and what is bounded is how
soon. As long as no difference has an expectation over 0, E[M] after t of them is at most t, so that the mean number to an alarm
at the threshold A is at least A, and an alarm within t has at most the chance t / A.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from service.rollout.evidence import FRACTIONS

Walk = tuple[float, ...]
START: Walk = (0.0,) * len(FRACTIONS)
"""Logs of the e-CUSUM, one for each fraction of the wealth that is bet, before anything was seen."""


def log_cusum(differences: ArrayLike, start: Walk = START) -> NDArray[np.float64]:
    """Logs of the e-CUSUM after each difference in [-1, 1], (differences, fractions), against "none has a mean over 0".

    It depends on their order. A walk that begins anew wherever it would fall below 0 is the sum less the least sum so far.
    """
    gains = np.log1p(np.asarray(differences, dtype=np.float64)[:, None] * FRACTIONS)
    sums = np.maximum(start, 0.0) + np.vstack([np.zeros(len(FRACTIONS)), np.cumsum(gains, axis=0)])
    return np.asarray((sums - np.minimum(np.minimum.accumulate(sums), 0.0))[:-1] + gains)


def mixed(walks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the mean over the fractions, of each row."""
    return np.asarray(np.logaddexp.reduce(walks, axis=-1) - np.log(walks.shape[-1]))


def peak(path: NDArray[np.float64]) -> float:
    """The highest that it stood, of `log_cusum`'s rows; 0 before anything was seen."""
    return float(mixed(path).max(initial=0.0))

"""Rewards of any size as counts: each unit's, in [0, 1], on a grid of thousandths, without moving its mean. Pure.

A metric of the type float takes any value in its range, and then no two pairs of units need differ alike. On a grid there are at
most 2001 differences however many pairs there are, so that a recorded verdict stays small and counts of two halves add up.

Rounding to the nearest would favour whichever arm lies just above a step. So a value goes up with the chance that is its distance
from the step below, in whole steps (dithering): its expectation is what it was, and whatever holds of the mean of the rewards, a
null among it, holds of what is counted. What decides is a hash of the unit, so it is decided the same at every look.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

STEPS = 1000
"""Between 0 and 1."""
EXACT = 1e-9
"""Nearer to a step than this, in steps, is on it: what arithmetic leaves of 0.57."""


def on_grid(value: float, unit: str) -> float:
    """A unit's reward or loss in [0, 1], in whole thousandths; what is on the grid stays as it is."""
    scaled = value * STEPS
    nearest = round(scaled)
    if abs(scaled - nearest) < EXACT:
        return nearest / STEPS
    return rounded(scaled, _chance_of(unit)) / STEPS


def rounded(scaled: float, chance: float) -> int:
    """One of the two whole numbers around `scaled`; over `chance`, uniform in [0, 1), the mean is `scaled`."""
    return math.floor(scaled) + (chance < scaled % 1)


def is_drawn(chance: float, unit: str) -> bool:
    """Whether the unit's draw, another one than that of its value, falls under `chance`."""
    return chance >= 1 or (chance > 0 and _chance_of(f"answered|{unit}") < chance)


def snapped(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences of values on the grid: on it too, so that equal ones are equal numbers."""
    return np.round(differences * STEPS) / STEPS


def _chance_of(unit: str) -> float:
    return int(hashlib.sha256(f"grid|{unit}".encode()).hexdigest()[:13], 16) / 2**52

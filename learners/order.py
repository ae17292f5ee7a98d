"""In which order a job's examples are learned: each step with its part of every source, each step sorted by length.

Of a job's first x examples R(F(x)) are fresh, R rounding to the nearest and F growing at the fresh ones' share; what is left is
dealt to the remembered and the general ones in the same way. So every optimiser step holds each source's share to the nearest
whole number or next to it, and not only on average. Within a source the first pass keeps the plan's order, later ones are
seeded shuffles. Where more is remembered than an epoch rehearses, the next epoch goes on with what none has rehearsed yet.

Progressive mixing makes F steeper by steps: `shares` are those of the fresh examples in as many equal parts of a job. Each fresh
example still comes as often as there are epochs; an epoch is as much longer, or shorter, as that takes, and the remembered and
general ones are repeated, or left for later, to fill it.

The gradient of an optimiser step is a sum over its examples, so sorting within a step changes nothing but the padding:
each of its batches then holds examples of like length. Pure but for torch's `Sampler`, whose protocol it follows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

from torch.utils.data import Sampler

FRESH, GENERAL = "fresh", "general"
"""Sources as `replay.records.Example` has them; whatever is neither counts as remembered."""


class Order(Sampler[int]):
    """Places of examples, epoch by epoch; `step_size` examples (batches x accumulation x workers) make an optimiser step."""

    def __init__(
        self,
        lengths: Sequence[int],
        step_size: int,
        seed: int,
        sources: Sequence[str] = (),
        shares: Sequence[float] = (),
        epochs: float = 1,
        rehearsed: int | None = None,
    ) -> None:
        """Of each example its length in tokens and its source (none: all are fresh); `shares` and `epochs` are the job's.

        `rehearsed` are the remembered examples of an epoch; None: all.
        """
        self._lengths = lengths
        self._step_size = step_size
        self._seed = seed
        told = sources or [FRESH] * len(lengths)
        self._fresh = tuple(place for place, source in enumerate(told) if source == FRESH)
        self._general = tuple(place for place, source in enumerate(told) if source == GENERAL)
        self._remembered = tuple(place for place, source in enumerate(told) if source not in {FRESH, GENERAL})
        self._others = len(self._general) + _remembered(told, rehearsed)
        self._shares = shares
        self._size = epoch_size(told, shares, rehearsed)
        self._total = epochs * self._size
        self._epoch = 0

    def __len__(self) -> int:
        return self._size

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also when it resumes within one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first, end = self._epoch * self._size, (self._epoch + 1) * self._size
        for start in range(first, end, self._step_size):
            step = [self._place(x) for x in range(start, min(start + self._step_size, end))]
            yield from sorted(step, key=lambda place: -self._lengths[place])

    def _place(self, x: int) -> int:
        """The example at place `x` of the whole job."""
        fresh, general = self._fresh_among(x), self._general_among(x)
        if self._fresh_among(x + 1) > fresh:
            return self._nth(self._fresh, fresh)
        if self._general_among(x + 1) > general:
            return self._nth(self._general, general)
        return self._nth(self._remembered, x - fresh - general)

    def _fresh_among(self, x: int) -> int:
        """How many of a job's first `x` examples are fresh."""
        if not self._others:
            return x
        if not self._shares:
            return _rounded(x * len(self._fresh), self._size)
        part = self._total / len(self._shares)
        parts = [min(max(x - i * part, 0), part) * share for i, share in enumerate(self._shares)]
        return math.floor(sum(parts) + max(x - self._total, 0) * self._shares[-1] + 0.5) if self._fresh else 0

    def _general_among(self, x: int) -> int:
        return _rounded((x - self._fresh_among(x)) * len(self._general), self._others) if self._others else 0

    def _nth(self, places: tuple[int, ...], n: int) -> int:
        """The n-th of a source's examples, counted through all of its passes."""
        number, nth = divmod(n, len(places))
        return _shuffled(places, f"{self._seed}:{number}")[nth] if number else places[nth]


@lru_cache(maxsize=6)
def _shuffled(places: tuple[int, ...], seed: str) -> list[int]:
    order = list(places)
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, no secret
    return order


def _rounded(numerator: int, denominator: int) -> int:
    """Their quotient, rounded to the nearest, in whole numbers throughout."""
    return (2 * numerator + denominator) // (2 * denominator)


def epoch_size(sources: Sequence[str], shares: Sequence[float] = (), rehearsed: int | None = None) -> int:
    """Examples in an epoch: all but what others rehearse, or under progressive mixing so many that each fresh one comes once."""
    fresh = sum(source == FRESH for source in sources)
    size = sum(source in {FRESH, GENERAL} for source in sources) + _remembered(sources, rehearsed)
    if not shares or not 0 < fresh < size:
        return size
    return math.ceil(fresh * len(shares) / sum(shares))


def _remembered(sources: Sequence[str], rehearsed: int | None) -> int:
    there = sum(source not in {FRESH, GENERAL} for source in sources)
    return there if rehearsed is None else min(rehearsed, there)

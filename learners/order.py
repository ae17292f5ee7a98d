"""In which order a job's examples are learned: the plan's own mixture first, then seeded shuffles, each step sorted by length.

The gradient of an optimiser step is a sum over its examples, so sorting within a step changes nothing but the padding:
each of its batches then holds examples of like length. Pure but for torch's `Sampler`, whose protocol it follows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


class Order(Sampler[int]):
    """Places of examples, epoch by epoch; `step_size` examples (batches x accumulation x workers) make an optimiser step."""

    def __init__(self, lengths: Sequence[int], step_size: int, seed: int) -> None:
        self._lengths = lengths
        self._step_size = step_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also when it resumes within one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self._lengths)))
        if self._epoch:
            random.Random(f"{self._seed}:{self._epoch}").shuffle(order)  # noqa: S311 - an order, no secret
        for start in range(0, len(order), self._step_size):
            yield from sorted(order[start : start + self._step_size], key=lambda place: -self._lengths[place])

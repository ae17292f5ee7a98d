"""With how many threads a job computes: all of them while it has the machine, fewer while others want its cores.

The threads of a product wait for each other, so that one which the kernel has put aside holds up all of them: beside a busy
engine two get less done than one. Linux says how long each has run and how long it has stood in the queue for a core. Where one
more was too many, it is tried again later each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CROWDED, FREE = 0.2, 0.05
"""Share of the threads' time in the queue from which on some are given back, and up to which there is one more."""
SECONDS = 2.0
"""Between two looks: some passes of a small base."""

MOST_PATIENCE = 32
"""Looks in a row that must find the cores free before one more thread is tried: one at first, twice as many after each crowd."""

Times = tuple[int, int]
"""Nanoseconds that threads have run, and have waited for a core while they could have run."""


def times() -> Times | None:
    """Those of all threads of this process, as Linux counts them; None where nobody does."""
    ran = waited = 0
    for told in Path("/proc/self/task").glob("*/schedstat"):
        try:
            of_one = told.read_text().split()
            ran, waited = ran + int(of_one[0]), waited + int(of_one[1])
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile
    return (ran, waited) if ran else None


def follow(
    module: torch.nn.Module, look: Callable[[], Times | None] = times, clock: Callable[[], float] = time.monotonic
) -> None:
    """From now on, at forward passes of `module`, set how many threads the calling thread computes with.

    At most as many as now, at least one: half as many where the cores are crowded, one more where they are free.
    """
    pace, last, at = Pace(torch.get_num_threads()), look(), clock()

    def before(*_: Any) -> None:
        nonlocal last, at
        if last is None or clock() - at < SECONDS:
            return
        now = look()
        if now is not None and sum(now) > sum(last):
            torch.set_num_threads(pace.after((now[1] - last[1]) / (sum(now) - sum(last))))
        last, at = now, clock()

    module.register_forward_pre_hook(before)


class Pace:
    """How many threads come next: half as many after a crowd, one more after cores were free for long enough."""

    def __init__(self, most: int) -> None:
        self._most = self._threads = most
        self._patience, self._free = 1, 0

    def after(self, share: float) -> int:
        """Of their time, the threads have waited for a core for such a share since the last look."""
        self._free = self._free + 1 if share < FREE else 0
        if share > CROWDED and self._threads > 1:
            self._threads, self._patience = self._threads // 2, min(MOST_PATIENCE, 2 * self._patience)
        elif self._free >= self._patience and self._threads < self._most:
            self._threads, self._free = self._threads + 1, 0
        return self._threads

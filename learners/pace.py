"""With how many threads a job computes: all of them while it has the machine, fewer while others want its cores.

The threads of a product wait for each other, so that one which the kernel has put aside holds up all of them: beside a busy
engine two get less done than one. Linux says how long a thread has run and how long it has stood in the queue for a core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CROWDED, FREE = 0.2, 0.05
"""Share of a thread's time in the queue from which on it gives threads back, and up to which it takes one more."""
SECONDS = 2.0
"""Between two looks: some passes of a small base."""

Times = tuple[int, int]
"""Nanoseconds that a thread has run, and has waited for a core while it could have run."""


def times() -> Times | None:
    """Those of the calling thread, as Linux counts them; None where nobody does."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return None
    return int(ran), int(waited)


def follow(
    module: torch.nn.Module, look: Callable[[], Times | None] = times, clock: Callable[[], float] = time.monotonic
) -> None:
    """From now on, at forward passes of `module`, set how many threads the calling thread computes with.

    At most as many as now, at least one: half as many where the cores are crowded, one more where they are free.
    """
    most, last, at = torch.get_num_threads(), look(), clock()

    def before(*_: Any) -> None:
        nonlocal last, at
        if last is None or clock() - at < SECONDS:
            return
        now = look()
        if now is not None and sum(now) > sum(last):
            torch.set_num_threads(chosen(torch.get_num_threads(), most, (now[1] - last[1]) / (sum(now) - sum(last))))
        last, at = now, clock()

    module.register_forward_pre_hook(before)


def chosen(threads: int, most: int, share: float) -> int:
    """How many threads come after so many that waited for such a share of their time."""
    if share > CROWDED:
        return max(1, threads // 2)
    return min(most, threads + 1) if share < FREE else threads

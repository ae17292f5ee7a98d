"""With how many threads vLLM's worker computes on CPUs: with fewer while a job trains on the same cores.

The threads of a step wait for each other at the end of each product, so that one whose core a job takes for a moment holds up
all. On a small base the last thread adds little: two do a quarter more than one. So the engine leaves a job some cores, and each
of the two runs undisturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from learners import cores

SECONDS = 1.0
"""Between two looks whether a job trains."""


def beside_a_job(threads: int) -> int:
    """How many of so many threads are left: two thirds, one at least."""
    return max(1, 2 * threads // 3)


def leave_cores() -> None:
    """Let each worker do so; calling it again changes nothing."""
    if getattr(CPUWorker.execute_model, "__module__", "") != __name__:
        CPUWorker.execute_model = leaving(CPUWorker.execute_model)


def leaving(
    execute: Callable[..., Any],
    are_wanted: Callable[[], bool] = cores.are_wanted,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[..., Any]:
    """`execute`, with the threads that are due when it is called."""
    most, looked = 0, -SECONDS

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        nonlocal most, looked
        most = most or torch.get_num_threads()
        if clock() - looked >= SECONDS:
            looked, due = clock(), beside_a_job(most) if are_wanted() else most
            if due != torch.get_num_threads():
                torch._C.set_num_threads(due)  # noqa: SLF001 - torch's own: vLLM's worker has put one that does nothing in its place
        return execute(*args, **kwargs)

    return execute_model

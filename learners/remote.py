"""A job on Ray Train: any number of workers, on CPUs or GPUs, at a lower priority than what serves. Learners' door to Ray."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from learners import cores
from learners.job import run

_MEMORY = {"hugetlb": 1, "mmap_threshold": 2**32, "trim_threshold": 2**34}
"""What a step frees is kept for the next one, in huge pages: the kernel need not clear it again."""

_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits leaves its core to what serves,
    "GOMP_SPINCOUNT": "20000",  # but not at once, in GNU's OpenMP: a step has thousands of such moments
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in _MEMORY.items()),
}
"""Variables of a worker's process, read before its first line."""


def train(folder: Path, *, workers: int, use_gpu: bool, cpus_per_worker: float, threads: int, nice: int) -> None:
    """Run the job in `folder`, which every worker can read; returns when it is done, raises what killed it."""
    resources = {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    trainer = TorchTrainer(
        _work,
        train_loop_config={"folder": str(folder), "threads": threads, "nice": nice},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name="ray", storage_path=str(folder), worker_runtime_env={"env_vars": _ENVIRONMENT}, callbacks=[Leaving()]
        ),
    )
    trainer.fit()


class Leaving(UserCallback):  # type: ignore[misc] # ray is untyped
    """Where it arrives, in the process of Ray Train's controller, that process ends without Ray's native destructors.

    One of Ray 2.60's (`~Publisher`) posts to the queue that is being destroyed and may wait for its lock for ever: 400 MB,
    which outlive the daemon. Ray has disconnected and flushed before Python's exit handlers run.
    """

    def __reduce__(self) -> tuple[Callable[[], Leaving], tuple[()]]:
        """What `pickle` makes of it at the other end."""
        return _leaving, ()


def _leaving() -> Leaving:
    atexit.register(_leave)
    return Leaving()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _work(config: dict[str, Any]) -> None:
    import torch

    os.nice(config["nice"])
    torch.set_num_threads(config["threads"])
    with nullcontext() if torch.cuda.is_available() else cores.wanted():
        run(Path(config["folder"]), is_main=os.environ.get("RANK", "0") == "0")

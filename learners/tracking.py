"""Where a run is followed: TensorBoard, Weights & Biases or trackio, through the trainer's own call-backs.

They are given the loss, the learning rate, the gradient's norm, the trainer's configuration and the base's; never an example.
What they write lies in the job's folder unless the environment says otherwise; `WANDB_MODE=offline` keeps W&B on this machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = "learnd"
FOLDER = "tracking"
"""Beside the job's checkpoints, which go when it is done; this stays."""
_QUIET = {
    "WANDB_PROJECT": PROJECT,
    "WANDB_CONSOLE": "off",  # what a job prints may quote what it learns
    "WANDB_LOG_MODEL": "false",
    "WANDB_WATCH": "false",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
}


@contextmanager
def tracked(names: Sequence[str], job: Path, part: str = "") -> Iterator[Mapping[str, Any]]:
    """The trainer's arguments for a run that is followed by `names`, while the variables that they read are set.

    A variable that is set already stays as it is. What comes after imitation has a run of its own, `part`: its steps begin anew.
    """
    place = str(job / FOLDER / part)
    wanted = {"TENSORBOARD_LOGGING_DIR": place, "WANDB_DIR": place, "TRACKIO_DIR": place, **_QUIET} if names else {}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    if names:
        Path(place).mkdir(parents=True, exist_ok=True)
    os.environ |= ours
    try:
        yield {"report_to": list(names) or "none", "run_name": f"{job.name}-{part}" if part else job.name, "project": PROJECT}
    finally:
        for name in ours:
            os.environ.pop(name, None)

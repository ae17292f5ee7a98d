"""The settings of where and how jobs run. A part of the tree in `service.settings`, which is where to import from."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from service.settings_data import Closed, File


class Training(Closed):
    """Where jobs run."""

    workers: int = Field(1, ge=1)
    is_on_gpu: bool = False
    cpus_per_worker: float = Field(1.0, ge=0)
    threads: int = Field(0, ge=0)
    """Compute threads of a worker; 0: as many as cores, fewer while serving wants them (`learners/pace.py`)."""
    nice: int = Field(7, ge=0, le=19)
    """Training yields to serving by this priority."""
    max_attempts: int = Field(3, ge=1)
    """Deaths before a job is failed with its reason."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where runs are followed, through the trainer's own call-backs; what is written stays in the job's folder."""
    fsdp: dict[str, Any] = {}
    """Options of transformers' `fsdp_config`, such as `{version = 2}`; empty: each worker has the whole model."""
    deepspeed: File | None = None
    """DeepSpeed's configuration, a JSON file; see transformers."""

    @model_validator(mode="after")
    def _shares_out_among_several(self) -> Self:
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp and deepspeed are two ways of sharing a model out: take one")
        if self.deepspeed and not self.is_on_gpu:
            raise ValueError("deepspeed is for GPUs, on CPUs each worker would have the whole model: set is_on_gpu, or take fsdp")
        if self.fsdp and self.workers == 1:
            raise ValueError("fsdp shares the model out among workers: set training.workers to 2 or more")
        return self

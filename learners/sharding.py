"""Workers that share a model out among them: what transformers is told, and FSDP on CPUs. The door to accelerate.

accelerate knows FSDP on GPUs and their like. On CPUs it would let each worker have the whole model without a word, so it is
told here what it would have found out on a GPU; torch itself shards over gloo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState


def is_sharded(settings: Mapping[str, Any]) -> bool:
    """Whether no worker has the whole adapter after training."""
    return bool(settings.get("fsdp") or settings.get("deepspeed"))


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's file and FSDP's options, as transformers takes them."""
    if settings["deepspeed"]:
        return {"deepspeed": str(settings["deepspeed"])}
    return {"fsdp": True, "fsdp_config": dict(settings["fsdp"])} if settings["fsdp"] else {}


def share_out_on_cpus(accelerator: Accelerator, options: Mapping[str, Any]) -> None:
    """Make `accelerator` one of FSDP; `options` are its plug-in's. Several workers over gloo must be up already."""
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)

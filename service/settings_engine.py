"""The base model and how it is served: how long a reply may be waited for, and what it must be made of.

A part of the tree in `service.settings`, which is where to import from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from service.settings_data import Closed


class Deadlines(Closed):
    """What is too long, in seconds: an engine that hangs is to be told from one that is slow."""

    first_token_seconds: float = Field(60, ge=0)
    """A stream without a token is ended then: 504, a failed reply of its version. 0: never."""
    whole_reply_seconds: float = Field(600, ge=0)
    """The same of a reply that comes whole, whose first token nobody sees: as long as OpenAI's clients wait. 0: never."""
    patience_seconds: float = Field(10, ge=0)
    """A client that leaves after so long without a token was failed (`timeout`); sooner, it has changed its mind. 0: always."""


class Replies(Deadlines):
    """What a reply must be to count as one."""

    checks_logits: bool = True
    """Logits that are no numbers (NaN) break a reply off: a failed reply of its version, in place of tokens that mean nothing."""


class Base(Closed):
    """The base model, as it serves and as it trains."""

    source: str = "builtin:smollm2-135m"
    """`builtin:smollm2-135m`, a local Hugging Face folder, or a hub id."""
    name: str = ""
    """What clients write in `model` to ask the base itself; empty: derived from the source."""
    quantization: Literal["none", "int8", "int8-layers", "fp8", "int4"] = "none"
    """`int8`: weights and layers' inputs in 8 bits; `int8-layers`: without embedding and head; `fp8`: the latter as floats, on
    GPUs; `int4`: layers' weights in 4."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the engine's computation; `auto`: the base's own on a GPU, the faster of bf16 and fp32 on a CPU."""
    max_model_len: int = Field(2048, ge=128)
    max_rank: int = Field(16, ge=1)
    max_resident: int = Field(4, ge=2)
    """Adapters held in memory at once by each replica: champion, candidate and previous of each line must fit."""

    @property
    def served_name(self) -> str:
        """The base's own name, without path or prefix."""
        return self.name or self.source.rstrip("/").split(":")[-1].split("/")[-1].lower()


class Engine(Replies):
    """How the base is served."""

    replicas: int = Field(1, ge=1)
    autoscaling: dict[str, Any] = {}
    """Passed to Ray Serve's `autoscaling_config` as it is; replaces `replicas`."""
    max_num_seqs: int = Field(32, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0)
    """KV cache on a CPU."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(default_factory=lambda: float(any(Path("/dev").glob("nvidia[0-9]*"))), ge=0)
    """Of each replica; by default a whole one where this machine has an NVIDIA card."""
    threads: int = Field(0, ge=0)
    """OpenMP threads on a CPU, two thirds of them while a job trains there; 0: as many as cores."""
    has_grouped_lora: bool = True
    """Use learnd's CPU kernels for LoRA in place of vLLM's."""
    tool_call_parser: str | None = None
    extra_args: tuple[str, ...] = ()
    """More flags for vLLM's own server, as on its command line."""

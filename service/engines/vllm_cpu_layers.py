"""Norms and activations on CPUs by the kernels that vLLM has compiled for them, which it asks for on GPUs only.

Without them a layer's norm is some ten calls of PyTorch on a few rows, which cost more than what they compute: a step of decoding
on a small base spends a fifth of its time so. The kernels round once where those calls round at each.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

LANES = 16
"""The kernels ask for rows of whole vectors."""


def use_kernels() -> None:
    """Put vLLM's kernels in place of PyTorch's calls in its layers; calling it again changes nothing."""
    RMSNorm.forward_cpu = rms_norm
    SiluAndMul.forward_cpu = silu_and_mul


def rms_norm(
    self: Any, x: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`x` (rows, width) over its root mean square, times the weight; with a residual, of their sum, which comes back too."""
    weight = self.weight.data
    is_plain = self.has_weight and self.variance_size_override is None and weight.dtype == x.dtype
    if not (is_plain and _is_whole(x) and (residual is None or _is_whole(residual))):
        return self.forward_native(x, residual)  # type: ignore[no-any-return] # vLLM is untyped
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, self.variance_epsilon)  # noqa: SLF001 - where vLLM has its kernels
        return out
    torch.ops._C.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)  # noqa: SLF001 - as above
    return x, residual


def silu_and_mul(self: Any, x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of `x` (rows, 2 · width) times the second one."""
    width = x.shape[-1] // 2
    if not _is_whole(x) or width % LANES:
        return self.forward_native(x)  # type: ignore[no-any-return] # vLLM is untyped
    out = x.new_empty((*x.shape[:-1], width))
    torch.ops._C.silu_and_mul(out, x)  # noqa: SLF001 - where vLLM has its kernels
    return out


def _is_whole(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.shape[-1] % LANES == 0

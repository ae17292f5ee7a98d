"""In which precision this machine computes fastest: measured, since the same model name of a CPU may or may not multiply bf16.

A CPU with AMX or AVX-512 BF16 multiplies matrices in bf16 up to ten times faster than in fp32; one without emulates it,
up to ten times slower. Adapter weights are fp32 either way.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

Precision = Literal["bfloat16", "float32"]

ROWS, WIDTH, REPEATS = 256, 1024, 5


def fastest() -> Precision:
    """The faster of the two here: on a GPU by its kind, on a CPU by a fifth of a second of products of both kinds."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if product_seconds(torch.bfloat16) < product_seconds(torch.float32) else "float32"


def product_seconds(dtype: torch.dtype) -> float:
    """Seconds of one matrix product in `dtype`, at best: other processes can only make it slower."""
    left, right = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    return min(_timed(left, right) for _ in range(REPEATS + 1))  # the first one also prepares


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.nn.functional.linear(left, right)
    return time.perf_counter() - began

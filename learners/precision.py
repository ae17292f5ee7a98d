"""In which precision this machine computes fastest: what its processor has, and where it has neither, what a clock says.

A CPU with AMX or AVX-512 BF16 multiplies matrices in bf16 up to ten times faster than in fp32; one without emulates it,
up to ten times slower. Its flags say which, whatever else runs at the moment: a clock alone, on a crowded machine, once chose
fp32 for an engine's whole life. Adapter weights are fp32 either way.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

Precision = Literal["bfloat16", "float32"]

ROWS, WIDTH, REPEATS = 256, 1024, 6
IN_HARDWARE = ("amx_bf16", "avx512_bf16")
"""Flags of processors that multiply bf16 themselves, as `torch.cpu.get_capabilities` names them."""


def fastest() -> Precision:
    """The faster of the two here: by the GPU's kind, by the CPU's flags, else by some products of both kinds."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has = torch.cpu.get_capabilities()
    if any(has.get(flag) for flag in IN_HARDWARE):
        return "bfloat16"
    halves, singles = product_seconds(torch.bfloat16, torch.float32)
    return "bfloat16" if halves < singles else "float32"


def product_seconds(*dtypes: torch.dtype) -> list[float]:
    """Seconds of one matrix product in each dtype, at best and by turns: other processes can only make it slower."""
    pairs = [(torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)) for dtype in dtypes]
    turns = [[_timed(*pair) for pair in pairs] for _ in range(REPEATS)]  # the first one also prepares
    return [min(seconds) for seconds in zip(*turns, strict=True)]


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.nn.functional.linear(left, right)
    return time.perf_counter() - began

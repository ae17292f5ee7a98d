"""An int8 base's head on this CPU: bf16, vLLM's int8 kernel for AMX and ours, for the shape of the built-in base.

No engine is started: it is the time that the last product of a step takes, in turns (bf16, W8A8, ours, bf16, …), and how far each
is from the product of the dequantized matrix. bf16 and W8A8 are what vLLM takes for such matrices; W8A8 rounds inputs to 8 bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops as ops

from learners.quantize import SCHEMES, Quantized, round_to_nearest
from service.engines import native_head

VOCABULARY, INPUTS = 49152, 576
BATCHES = (1, 8, 64)
Product = Callable[[torch.Tensor], torch.Tensor]


def products(head: Quantized) -> dict[str, Product]:
    """The three ways to multiply; raises `SystemExit` where this processor or its compiler has no kernel of ours."""
    library = native_head.load()
    if library is None:
        raise SystemExit("the kernel needs a CPU with AMX and a C++ compiler")
    scale = head.scale.float().flatten()
    exact = ops.create_onednn_mm(head.dequantized().bfloat16().t(), 8)
    packed = torch.ops._C.convert_weight_packed(head.codes)  # noqa: SLF001 - vLLM's operators have no other name
    rounded = torch.ops._C.int8_scaled_mm_with_quant  # noqa: SLF001
    return {
        "bf16": lambda x: ops.onednn_mm(exact, x, None),
        "W8A8": lambda x: rounded(x, packed, scale, None, x.dtype, True),
        "ours": native_head.Rows(library, head.codes, scale, torch.bfloat16).logits,
    }


def timed(product: Product, x: torch.Tensor) -> float:
    """Milliseconds of one product."""
    began = time.perf_counter()
    product(x)
    return 1000 * (time.perf_counter() - began)


def compared(ways: dict[str, Product], x: torch.Tensor, exact: torch.Tensor, turns: int) -> dict[str, Any]:
    """Median, least and most milliseconds of each way, its relative error, and bf16's time over its own."""
    errors = {name: float((product(x).float() - exact).norm() / exact.norm()) for name, product in ways.items()}
    times = [{name: timed(product, x) for name, product in ways.items()} for _ in range(turns)]
    found = {}
    for name in ways:
        own = [turn[name] for turn in times]
        ratio = statistics.median(turn["bf16"] / turn[name] for turn in times)
        spread = [round(value, 2) for value in (statistics.median(own), min(own), max(own))]
        found[name] = {"ms": spread, "error": round(errors[name], 5), "times_as_fast": round(ratio, 2)}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=60)
    options.add_argument("--json", action="store_true", help="one last line of JSON")
    chosen = options.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    head = round_to_nearest(torch.randn(VOCABULARY, INPUTS) * 0.02, SCHEMES["int8"])
    ways, exact = products(head), head.dequantized().float().t()
    print(f"{torch.get_num_threads()} threads; milliseconds, median (least–most); relative error; times as fast as bf16")
    found = {}
    for rows in BATCHES:
        x = torch.randn(rows, INPUTS).bfloat16() * torch.linspace(0.1, 3, INPUTS).bfloat16()
        found[rows] = compared(ways, x, x.float() @ exact, chosen.turns)
        for name, one in found[rows].items():
            median, least, most = one["ms"]
            print(
                f"{rows:3} rows  {name:5} {median:5.2f} ({least:.2f}–{most:.2f})  {one['error']:.4f}  ×{one['times_as_fast']:.2f}"
            )
    if chosen.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

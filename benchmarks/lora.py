"""LoRA's products on this CPU: vLLM's own kernels against ours, for the shapes of the built-in base.

No engine is started: it is the time that adapters add to one step of all 30 layers, in turns (stock, ours, stock, ours, …),
the median and the spread of each. Prompts get one token longer each time: for a number of rows that was met before a library
has its code ready, which in life is rare. What a client sees of it is `serving`'s business.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from service.engines.vllm_cpu import GroupedPunicaWrapper, fused

HIDDEN, INNER, KV, LAYERS, RANK, SLOTS = 576, 1536, 192, 30, 16, 4
LAYER = ((HIDDEN, (HIDDEN, KV, KV)), (HIDDEN, (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,)))
"""Inputs and outputs of q, k, v; o; gate, up; down."""
BATCHES = {
    "decode 1": ([1], 1),
    "decode 8": ([1] * 8, 1),
    "decode 8, mixed": ([0, 1, 2, 3, 4, 0, 1, 2], 1),
    "prefill 1 × 110": ([1], 110),
    "prefill 8 × 110": ([1] * 8, 110),
    "prefill mixed": ([0, 1, 2, 3, 4, 0, 1, 2], 110),
}
"""The adapter of each request, and the tokens of each."""


def layers(*, is_fused: bool) -> list[Any]:
    """Factors for one step in bf16: fused, or as vLLM keeps them."""
    made = []
    for _ in range(LAYERS):
        for inputs, widths in LAYER:
            a = tuple(torch.randn(SLOTS, 1, RANK, inputs).bfloat16() for _ in widths)
            b = tuple(torch.randn(SLOTS, 1, width, RANK).bfloat16() for width in widths)
            made.append((inputs, widths, *(fused(a, b) if is_fused else (a, b))))
    return made


def milliseconds(kind: Any, factors: list[Any], ids: list[int]) -> float:
    """Of one step over all layers."""
    wrapper = kind(max_num_batched_tokens=1024, max_batches=1024, device="cpu")
    data = {inputs: torch.randn(len(ids), inputs).bfloat16() for inputs in (HIDDEN, INNER)}
    outputs = {widths: torch.zeros(len(ids), sum(widths)).bfloat16() for _, widths in LAYER}
    began = time.perf_counter()
    mapping = LoRAMapping(index_mapping=tuple(ids), prompt_mapping=tuple(ids), is_prefill=True)
    wrapper.update_metadata(mapping, [1, 2, 3, 4], SLOTS, 49152)
    for inputs, widths, a, b in factors:
        wrapper.add_lora_linear(outputs[widths], data[inputs], a, b, 1.0, widths)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="decoding only: stock prefill takes minutes without bf16 units")
    options.add_argument("--json", action="store_true", help="one last line of JSON")
    chosen = options.parse_args()
    torch.set_grad_enabled(False)
    kinds = {"stock": (PunicaWrapperCPU, layers(is_fused=False)), "ours": (GroupedPunicaWrapper, layers(is_fused=True))}
    print(f"{torch.get_num_threads()} threads; milliseconds a step, median (least–most)")
    found: dict[str, Any] = {}
    for name, (adapters, tokens) in list(BATCHES.items())[: 3 if chosen.quick else None]:
        times: dict[str, list[float]] = {one: [] for one in kinds}
        for turn in range(chosen.repeats + 1):
            length = tokens + turn if tokens > 1 else 1
            for one, (kind, factors) in kinds.items():
                times[one].append(milliseconds(kind, factors, [adapter for adapter in adapters for _ in range(length)]))
        times = {one: all_[1:] for one, all_ in times.items()}  # the first warms up
        told = {one: [round(x, 2) for x in (statistics.median(all_), min(all_), max(all_))] for one, all_ in times.items()}
        found[name] = {**told, "ratio": round(told["stock"][0] / told["ours"][0], 1)}
        print(f"{name:18}", *(f"{one} {m:.1f} ({a:.1f}–{z:.1f})" for one, (m, a, z) in told.items()), f"×{found[name]['ratio']}")
    if chosen.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

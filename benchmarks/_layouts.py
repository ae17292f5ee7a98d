"""A base in the layouts of AWQ and GPTQ, as AutoAWQ and GPTQModel write them: to be read, not to be good (rounded to nearest)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from learners.base import adaptable_modules
from learners.quantize import Quantized, Scheme, pack, round_to_nearest

GROUP = 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Of eight neighbouring outputs, as they follow each other in a word."""


def write(base: Path, folder: Path, layout: str) -> None:
    """The plain checkpoint in `base`, its layers' matrices in `layout`, into the new `folder`."""
    shutil.copytree(base, folder)
    scheme, stored, config = LAYOUTS[layout]
    tensors = load_file(base / "model.safetensors")
    for module in adaptable_modules(base):
        rounded = round_to_nearest(tensors.pop(f"{module}.weight"), scheme)
        tensors |= {f"{module}.{name}": part.contiguous() for name, part in stored(rounded).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": layout, **config}}
    (folder / "config.json").write_text(json.dumps(described))


def _awq(weight: Quantized) -> dict[str, torch.Tensor]:
    return {"qweight": _awq_words(weight.codes), "qzeros": _awq_words(weight.zero), "scales": weight.scale.t().half()}


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """(outputs, n) to int32 (n, outputs / 8)."""
    return pack(codes.t().unflatten(1, (-1, len(AWQ_ORDER)))[:, :, AWQ_ORDER].flatten(1), 4)


def _gptq(weight: Quantized) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.codes.shape
    return {
        "qweight": pack(weight.codes.t(), 4, dim=0),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": weight.scale.t().half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def _four_bits(*, is_symmetric: bool) -> Scheme:
    return Scheme("int4", 4, GROUP, is_symmetric=is_symmetric, rounds_inputs=False, has_int_embedding=False, max_kl=float("inf"))


LAYOUTS: Mapping[str, tuple[Scheme, Callable[[Quantized], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "awq": (_four_bits(is_symmetric=False), _awq, {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (_four_bits(is_symmetric=True), _gptq, {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
}

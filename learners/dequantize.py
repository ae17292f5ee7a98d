"""A quantized base as the plain weights that it stands for, whoever quantized it: what serves is what jobs train on.

Read are compressed-tensors (integers of 4 or 8 bits and 8-bit floats, with a scale for each tensor, output or group; our own
checkpoints are of these), AWQ (arXiv 2306.00978) as AutoAWQ writes it, and GPTQ (arXiv 2210.17323) as GPTQModel does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from learners.base import quantization_of
from learners.quantize import Quantized, unpack

WORD = 32
"""Bits of the words that several codes are packed into."""
AWQ_BITS, AWQ_ORDER = 4, [0, 4, 1, 5, 2, 6, 3, 7]
"""Which field of an AWQ word has the first output, the second, …"""

Parts = Mapping[str, torch.Tensor]
"""What is stored of one linear module, by name."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of this `quantization_config` cannot be read back; None: it can."""
    method = str(config.get("quant_method"))
    if method not in FORMATS:
        return f"its format is {method}; read are {', '.join(FORMATS)}"
    return FORMATS[method].refuse(config)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The causal language model of a quantized checkpoint, with plain linear layers that can be run backwards through."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config  # else transformers would pack the layers again
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=read(folder, dtype), dtype=dtype)


def read(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The whole checkpoint as plain weights, dequantized in fp32, then rounded to `dtype`. `refusal` must have none."""
    config = quantization_of(folder) or {}
    layout = FORMATS[config["quant_method"]]
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            stored |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    weights = {}
    for scale in [key for key in stored if key.endswith(f".{layout.scale}")]:
        module = scale.removesuffix(f".{layout.scale}")
        names = [key for key in stored if key.startswith(f"{module}.") and key != f"{module}.bias"]
        parts = {key.removeprefix(f"{module}."): stored.pop(key) for key in names}
        weights[f"{module}.weight"] = layout.restore(parts, config).dequantized().to(dtype)
    return {**{key: tensor.to(dtype) for key, tensor in stored.items()}, **weights}


def _compressed(parts: Parts, _: Mapping[str, Any]) -> Quantized:
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    codes = parts.get("weight")
    if codes is None:
        outputs, inputs = parts["weight_shape"].tolist()
        bits = WORD * parts["weight_packed"].shape[1] // inputs
        codes = unpack(parts["weight_packed"], bits, inputs)
        zero = None if zero is None else unpack(zero, bits, outputs, dim=0)
    return _quantized(codes, scale.reshape(1, 1) if scale.numel() == 1 else scale, zero)


def _not_compressed(config: Mapping[str, Any]) -> str | None:
    groups = config.get("config_groups")
    if not groups:
        return "it does not say how (config_groups)"
    for group in groups.values():
        weights = group.get("weights") or {}
        kind = f"{weights.get('num_bits')}-bit {weights.get('type')}s"
        if kind not in {"4-bit ints", "8-bit ints", "8-bit floats"}:
            return f"it has weights of {kind}; read are 4-bit ints, 8-bit ints and 8-bit floats"
        if weights.get("strategy") not in {"tensor", "channel", "group"}:
            return f"it has a scale for each {weights.get('strategy')}; read is one for each tensor, channel or group"
        if weights.get("actorder") == "group":
            return "its groups are not of neighbouring inputs (actorder: group)"
    return None


def _awq(parts: Parts, _: Mapping[str, Any]) -> Quantized:
    """Inputs by rows: `qweight` int32 (inputs, outputs / 8), `scales` (groups, outputs), `qzeros` int32 (groups, outputs / 8)."""

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        fields = unpack(words, AWQ_BITS, words.shape[1] * WORD // AWQ_BITS)
        return fields.reshape(len(words), -1, len(AWQ_ORDER))[:, :, AWQ_ORDER].flatten(1).t()

    zero = unpacked(parts["qzeros"]) if "qzeros" in parts else None
    return _quantized(unpacked(parts["qweight"]), parts["scales"].t(), zero)


def _not_awq(config: Mapping[str, Any]) -> str | None:
    bits, version = config.get("bits", config.get("w_bit")), str(config.get("version", "gemm")).lower()
    return None if bits == AWQ_BITS and version == "gemm" else f"it has {bits} bits in AWQ's form {version}; read are 4 in gemm"


def _gptq(parts: Parts, config: Mapping[str, Any]) -> Quantized:
    """Inputs by rows: `qweight` int32 (inputs · bits / 32, outputs), `scales` (groups, outputs); zeros are in the middle."""
    words, bits = parts["qweight"], config["bits"]
    return _quantized(unpack(words, bits, len(words) * WORD // bits, dim=0).t(), parts["scales"].t(), None)


def _not_gptq(config: Mapping[str, Any]) -> str | None:
    if config.get("bits") not in {4, 8} or not config.get("sym"):
        return f"it has {config.get('bits')} bits, sym {config.get('sym')}; read are 4 or 8, symmetric"
    if config.get("desc_act") and config.get("group_size") != -1:
        return "its groups are not of neighbouring inputs (desc_act)"
    return "its modules are not all quantized alike (dynamic)" if config.get("dynamic") else None


def _quantized(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> Quantized:
    return Quantized(codes, scale, torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero)


class _Format(NamedTuple):
    """How a checkpoint's linear modules are stored."""

    scale: str
    """The tensor that each of them has."""
    restore: Callable[[Parts, Mapping[str, Any]], Quantized]
    refuse: Callable[[Mapping[str, Any]], str | None]


FORMATS = {
    "compressed-tensors": _Format("weight_scale", _compressed, _not_compressed),
    "awq": _Format("scales", _awq, _not_awq),
    "gptq": _Format("scales", _gptq, _not_gptq),
}
"""By what `quant_method` says."""

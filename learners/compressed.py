"""Quantized checkpoints written, in the compressed-tensors format that vLLM serves; `dequantize` reads them.

The matrices of the layers are quantized and, by some schemes, embedding and head; norms and biases are copied as they are.
Embedding and head then have a group of their own: int8 rows in int32 words (`pack-quantized`), one scale for each row. A tied
head is not stored; vLLM by itself cannot serve such a one, see service/engines/vllm_rows.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from learners.quantize import BYTE, Quantized, Scheme, pack

WEIGHTS = "model.safetensors"
EMBEDDINGS = "Embedding"
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")
PACKED, MIXED = "pack-quantized", "mixed-precision"
FORMATS = {"int8": "int-quantized", "int8-layers": "int-quantized", "fp8": "float-quantized", "int4": PACKED}


def write(
    source: Path,
    folder: Path,
    weights: Mapping[str, Quantized],
    scheme: Scheme,
    others: Mapping[str, torch.Tensor],
    vocabulary: Mapping[str, Quantized | None],
) -> None:
    """Write the checkpoint of the Hugging Face folder `source` into `folder`, with these modules' weights in place of its own.

    `weights` are those of the layers, `vocabulary` those of embedding and head in this order, by the module's name: None for a
    tied head, nothing at all where both stay. What else `others` has by its name, norms above all, is taken from there in the
    source's own precision.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                module, _, tensor = key.rpartition(".")
                if tensor == "weight" and module in vocabulary:
                    rows = vocabulary[module]
                    tensors |= {f"{module}.{name}": value for name, value in (_stored_rows(rows) if rows else {}).items()}
                elif tensor == "weight" and module in weights:
                    tensors |= {f"{module}.{name}": value for name, value in _stored(weights[module], scheme).items()}
                else:
                    tensors[key] = opened.get_tensor(key)
                    if key in others:
                        tensors[key] = others[key].to(tensors[key].dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for file in source.iterdir():
        if file.is_file() and file.name not in {"config.json", "COMPLETE"} and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _described(scheme, vocabulary)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _described(scheme: Scheme, vocabulary: Mapping[str, Quantized | None]) -> dict[str, Any]:
    """What `config.json` says of quantization."""
    described = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme.name],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": _group(scheme)},
    }
    if vocabulary:
        _, *heads = vocabulary
        stored = [head for head in heads if vocabulary[head]]
        described["format"], described["ignore"] = MIXED, [head for head in heads if head not in stored]
        rows = _rows([EMBEDDINGS, *(f"re:.*{head}$" for head in stored)])
        groups = {"group_0": _group(scheme) | {"format": FORMATS[scheme.name]}, "group_1": rows | {"format": PACKED}}
        described["config_groups"] = groups
    return described


def _stored(weight: Quantized, scheme: Scheme) -> dict[str, torch.Tensor]:
    if scheme.bits == BYTE:
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scale.contiguous()}
    return {
        "weight_packed": pack(weight.codes, scheme.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_zero_point": pack(weight.zero, scheme.bits, dim=0),
        "weight_shape": torch.tensor(weight.codes.shape),
    }


def _stored_rows(weight: Quantized) -> dict[str, torch.Tensor]:
    shape = torch.tensor(weight.codes.shape)
    return {"weight_packed": pack(weight.codes, BYTE), "weight_scale": weight.scale.contiguous(), "weight_shape": shape}


def _group(scheme: Scheme) -> dict[str, Any]:
    """The scheme as compressed-tensors describes it."""
    shape = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    kind = {"num_bits": scheme.bits, "type": "float" if scheme.is_float else "int", "symmetric": scheme.is_symmetric}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**kind, "dynamic": False, **shape}}
    if scheme.rounds_inputs:
        group["input_activations"] = {**kind, "strategy": "token", "dynamic": True}
    return group


def _rows(targets: list[str]) -> dict[str, Any]:
    """Embedding and head as compressed-tensors describes them; `EMBEDDINGS` is the kind of module, vLLM gives it no name."""
    return {
        "targets": targets,
        "weights": {"num_bits": BYTE, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"},
    }

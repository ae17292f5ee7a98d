"""Quantized checkpoints on disk, in the compressed-tensors format that vLLM serves: written, and read back dequantized.

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
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from learners.quantize import BYTE, SCHEMES, Quantized, Scheme, pack, unpack

WEIGHTS = "model.safetensors"
EMBEDDINGS = "Embedding"
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".gguf")
PACKED, MIXED = "pack-quantized", "mixed-precision"
FORMATS = {"int8": "int-quantized", "int8-layers": "int-quantized", "int4": PACKED}


def scheme_of(folder: Path) -> Scheme | None:
    """How the checkpoint is quantized, in a way that can be read back here; None: not quantized, or in another way."""
    found = config_of(folder)
    if not found or found.get("quant_method") != "compressed-tensors":
        return None
    layers, *others = [_known(group) for group in found.get("config_groups", {}).values()] or [{}]
    rows = [{**group, "targets": [EMBEDDINGS]} for group in others if EMBEDDINGS in group["targets"]]
    for scheme in SCHEMES.values():
        if layers == _group(scheme) and len(rows) == len(others) and rows == [_rows([EMBEDDINGS])] * scheme.has_int_embedding:
            return scheme
    return None


def config_of(folder: Path) -> dict[str, Any] | None:
    """What `config.json` says of quantization, by whomever; None: nothing."""
    found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return dict(found) if found else None


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


def load(folder: Path, scheme: Scheme, dtype: torch.dtype) -> Any:
    """The causal language model of the checkpoint, with plain linear layers that can be run backwards through."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config  # else transformers would pack the layers again
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=read(folder, scheme, dtype), dtype=dtype)


def read(folder: Path, scheme: Scheme, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The whole checkpoint as plain weights, dequantized in fp32, then rounded to `dtype`."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            stored |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    weights = {}
    for scale in [key for key in stored if key.endswith(".weight_scale")]:
        module = scale.removesuffix(".weight_scale")
        names = [key for key in stored if key.startswith(f"{module}.weight")]
        parts = {key.removeprefix(f"{module}."): stored.pop(key) for key in names}
        weights[f"{module}.weight"] = _restored(parts, scheme).dequantized().to(dtype)
    return {**{key: tensor.to(dtype) for key, tensor in stored.items()}, **weights}


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
        return {"weight": weight.integers.contiguous(), "weight_scale": weight.scale.contiguous()}
    return {
        "weight_packed": pack(weight.integers, scheme.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_zero_point": pack(weight.zero, scheme.bits, dim=0),
        "weight_shape": torch.tensor(weight.integers.shape),
    }


def _stored_rows(weight: Quantized) -> dict[str, torch.Tensor]:
    shape = torch.tensor(weight.integers.shape)
    return {"weight_packed": pack(weight.integers, BYTE), "weight_scale": weight.scale.contiguous(), "weight_shape": shape}


def _restored(parts: Mapping[str, torch.Tensor], scheme: Scheme) -> Quantized:
    scale = parts["weight_scale"]
    if "weight_zero_point" not in parts:
        packed = "weight_packed" in parts
        integers = unpack(parts["weight_packed"], BYTE, int(parts["weight_shape"][1])) if packed else parts["weight"]
        return Quantized(integers, scale, torch.zeros_like(scale, dtype=torch.int8))
    outputs, inputs = parts["weight_shape"].tolist()
    zero = unpack(parts["weight_zero_point"], scheme.bits, outputs, dim=0)
    return Quantized(unpack(parts["weight_packed"], scheme.bits, inputs), scale, zero)


def _group(scheme: Scheme) -> dict[str, Any]:
    """The scheme as compressed-tensors describes it."""
    shape = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.is_symmetric, "dynamic": False, **shape},
    }
    if scheme.has_int_activations:
        group["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    return group


def _rows(targets: list[str]) -> dict[str, Any]:
    """Embedding and head as compressed-tensors describes them; `EMBEDDINGS` is the kind of module, vLLM gives it no name."""
    return {
        "targets": targets,
        "weights": {"num_bits": BYTE, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"},
    }


def _known(group: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's description, reduced to what `_group` says: other writers add fields of no effect here."""
    known = {"targets": group.get("targets")}
    for part in ("weights", "input_activations"):
        names = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")
        if group.get(part):
            known[part] = {name: group[part][name] for name in names if group[part].get(name) is not None}
    return known

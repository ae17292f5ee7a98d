"""An int8 embedding, and the head tied to it, in vLLM: what it cannot do by itself, on CPUs and elsewhere.

The checkpoint has them as compressed-tensors has them, packed rows with one scale each. vLLM looks such an embedding up by
Triton, which is not for CPUs, multiplies a head of that form on GPUs only, and cannot tie one to the other at all. So here: on
CPUs the rows are kept once, in int8, and looked up and multiplied by a kernel of our own (native_head.py). Where that one cannot
run, or is switched off, and for a tied head on other platforms, they are dequantized when the checkpoint is loaded, as training
does it. An embedding with a head of its own is left to vLLM on other platforms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_embedding import (
    CompressedTensorsEmbeddingWNA16Int,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.platforms import current_platform

from service.engines import native_head

BITS = 8


def serve_rows(*, has_kernel: bool) -> None:
    """Have vLLM serve int8 embeddings by this module; calling it again changes the kernel's use only."""
    Int8Rows.has_kernel = has_kernel
    if CompressedTensorsConfig.get_quant_method.__module__ == __name__:
        return
    choose, tie = CompressedTensorsConfig.get_quant_method, ParallelLMHead.tie_weights

    def get_quant_method(self: Any, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, VocabParallelEmbedding) and (current_platform.is_cpu() or _is_tied()):
            found = self.get_scheme_dict(layer, prefix)
            if found and is_int8_rows(found):
                return Int8Rows(found["weights"])
        return choose(self, layer, prefix)

    def tie_weights(self: Any, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        if isinstance(getattr(embed_tokens, "quant_method", None), Int8Rows):
            return embed_tokens  # it multiplies as well as it looks up
        return tie(self, embed_tokens)  # type: ignore[no-any-return] # vLLM is untyped

    CompressedTensorsConfig.get_quant_method = get_quant_method
    ParallelLMHead.tie_weights = tie_weights


def is_int8_rows(scheme: Mapping[str, Any]) -> bool:
    """Whether a group of compressed-tensors is int8 rows of one scale each, the inputs left as they are."""
    weights = scheme.get("weights")
    return (
        weights is not None
        and (weights.num_bits, weights.type, weights.strategy) == (BITS, "int", "channel")
        and bool(weights.symmetric)
        and not scheme.get("input_activations")
        and scheme.get("format") == "pack-quantized"
    )


class Int8Rows(CompressedTensorsEmbeddingWNA16Int):  # type: ignore[misc] # vLLM is untyped
    """Loads such a layer's weights and serves them by the kernel, as its `rows`; without one, vLLM's own method serves."""

    has_kernel = False
    """Whether our own kernel may serve."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what serves in place of what was read: integers for the kernel, or the weight."""
        packed, scale, dtype = layer.weight_packed.data, layer.weight_scale.data, layer.params_dtype
        integers = (packed.view(torch.uint8) ^ 128).view(torch.int8)[:, : layer.hidden_size]
        for name in ("weight_packed", "weight_scale", "weight_shape"):
            delattr(layer, name)
        library = native_head.load() if self.has_kernel and dtype in native_head.PRODUCTS else None
        if library is not None and len(integers) % native_head.BLOCK == 0:
            layer.rows = native_head.Rows(library, integers, scale, dtype)
            return
        layer.weight = torch.nn.Parameter(dequantized(integers, scale, dtype), requires_grad=False)
        layer.quant_method = UnquantizedEmbeddingMethod()
        layer.quant_method.process_weights_after_loading(layer)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """The rows of these token ids: (*ids, inputs)."""
        return layer.rows.rows(input_)  # type: ignore[no-any-return]

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of `x` (*, inputs): (*, vocabulary)."""
        found: torch.Tensor = layer.rows.logits(x.reshape(-1, x.shape[-1]))
        found = found.view(*x.shape[:-1], found.shape[-1])
        return found if bias is None else found + bias


def dequantized(integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (vocabulary, inputs) that the integers and their scales (vocabulary, 1) stand for, rounded once."""
    return (integers.float() * scale.float()).to(dtype)


def _is_tied() -> bool:
    return bool(get_current_vllm_config().model_config.hf_config.get_text_config().tie_word_embeddings)

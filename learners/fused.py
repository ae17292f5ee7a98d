"""A linear layer and its adapter as one step of the graph, and short attention by plain products: what a job's time goes into.

PEFT computes x Wᵀ + s (x Aᵀ) Bᵀ in fifteen operations, among them copies of x in fp32 that autocast turns back at once, and
autograd keeps two forms of x. As one function it is four products, and x is kept as it came. Nothing is done to W in the
backward pass: only factors learn.

On CPUs the fused attention of PyTorch 2.13 takes bf16 gradients a tile at a time; some plain products give them several times
faster while texts are short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "learnd_short"
"""Its name in transformers: for `set_attn_implementation`."""
LONGEST = 512
"""Columns up to which all scores of a layer are kept for the backward pass, 2 bytes for each head and pair of tokens."""


def adapted(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """X Wᵀ + bias + scale · (x Aᵀ) Bᵀ for x (..., inputs), W (outputs, inputs), A (rank, inputs), B (outputs, rank).

    Gradients reach x, A and B, not W and the bias. All products are in autocast's dtype, else in x's, whatever the factors have:
    to a layer that rounds its result to bf16, factors rounded to bf16 add next to nothing, and wide ones double its time.
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y: torch.Tensor = _Adapted.apply(x.to(kind), weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return y


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.shape, ctx.scale, ctx.kept = x.shape, scale, a.dtype
        rows = x.reshape(-1, x.shape[-1])
        weight, a, b = (part.to(x.dtype) for part in (weight, a, b))
        inner = rows @ a.T
        ctx.save_for_backward(rows, weight, a, b, inner)
        y = linear(rows, weight, None if bias is None else bias.to(x.dtype)).addmm_(inner, b.T, alpha=scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        above = gradient.reshape(-1, gradient.shape[-1])
        within = above @ b
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        return (
            (above @ weight).addmm_(within, a, alpha=ctx.scale).view(ctx.shape) if of_x else None,
            None,
            None,
            (within.T @ rows).to(ctx.kept).mul_(ctx.scale) if of_a else None,
            (above.T @ inner).to(ctx.kept).mul_(ctx.scale) if of_b else None,
            None,
        )


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it: query (B, H, L, D), key and value (B, G, K, D), mask (B, 1, L, K) of what counts.

    By products of all heads that share a key (H/G of them at once) where gradients in bf16 are wanted on a CPU, of up to
    `LONGEST` columns under a mask; by PyTorch's own in every other case. Returns (B, L, H, D).
    """
    is_narrow = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    is_slow = is_narrow and query.requires_grad and key.shape[-2] <= LONGEST
    mask = _causal(module, query, key, options) if is_slow and attention_mask is None else attention_mask
    if not is_slow or mask is None or mask.dtype != torch.bool or dropout or options.get("position_bias") is not None:
        theirs: torch.Tensor
        theirs, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        return theirs, None
    batch, heads, length, width = query.shape
    groups, columns = key.shape[1:3]
    together = batch, groups, heads // groups * length
    scale = width**-0.5 if scaling is None else scaling
    scores = (query * scale).reshape(*together, width) @ key.transpose(-1, -2)
    by_head = scores.view(batch, groups, -1, length, columns)
    by_head = by_head.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)  # finite: padding sees nothing
    seen = by_head.softmax(-1).view(*together, columns) @ value
    return seen.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def _causal(module: Any, query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> torch.Tensor | None:
    """The mask (1, 1, L, L) that transformers leaves out where nothing but order hides anything; None: another was meant."""
    length, is_causal = query.shape[-2], options.get("is_causal")
    if not (getattr(module, "is_causal", False) if is_causal is None else is_causal) or length != key.shape[-2]:
        return None
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

"""Inputs that are easier to round, for engines that round them too (W8A8): SmoothQuant (Xiao et al., arXiv 2211.10438).

A token's inputs share one grid, so a few that are always large leave little of it to all others. Each input is divided by a
factor and its column of the weights multiplied by it; what makes the inputs does the division. The factors are powers of two, so
that the products stay the same to the bit, in every precision. Called by `calibrate`, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

ALPHA = 0.65
"""How much of an input's size moves into the weights: of .5, .65 and .8 the least divergence on the built-in base."""

MOST = 256.0
"""The largest factor, and the inverse of the smallest: what calibration saw little of may be larger in life."""

MAKERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
"""What makes the inputs of which modules, in layers as Llama's. A layer of other names, or that computes otherwise, stays."""


@torch.no_grad()
def smooth(layer: Any, hidden: Sequence[torch.Tensor], through: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Even out what enters the linear modules of `layer`, in place; its outputs stay.

    `hidden` are the layer's inputs on calibration text, `through` passes one of them through it.
    """
    modules = dict(layer.named_modules())
    pairs = {maker: users for maker, users in MAKERS.items() if {maker, *users} <= modules.keys()}
    peaks: dict[str, torch.Tensor] = {}
    hooks = [modules[users[0]].register_forward_pre_hook(_keep_peak(peaks, maker)) for maker, users in pairs.items()]
    outputs = [through(batch) for batch in hidden]
    for hook in hooks:
        hook.remove()
    for maker, users in pairs.items():
        weights = [modules[name].weight for name in users]
        factor = _factor(peaks[maker], torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))
        _move(modules[maker], weights, factor)
        if not _is_same(through(hidden[0]), outputs[0]):  # a norm that multiplies by 1 + weight, or stands elsewhere
            _move(modules[maker], weights, 1 / factor)


def _keep_peak(peaks: dict[str, torch.Tensor], maker: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    """Keep the largest size of each input."""

    def see(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        found = arguments[0].flatten(0, -2).abs().amax(0)
        peaks[maker] = torch.maximum(peaks[maker], found) if maker in peaks else found

    return see


def _factor(peak: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By which each input is divided: peak^α / weight^(1 − α), about a geometric mean of one, as powers of two."""
    is_seen = (peak > 0) & (weight > 0)
    exponents = torch.where(is_seen, ALPHA * peak.log2() - (1 - ALPHA) * weight.log2(), 0.0)
    exponents = torch.where(is_seen, exponents - exponents[is_seen].mean(), 0.0)
    return torch.exp2(exponents.round()).clamp(1 / MOST, MOST)


def _move(maker: Any, weights: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    for parameter in maker.parameters():  # a norm's weight, a linear module's rows and bias
        parameter.copy_((parameter.t() / factor).t())
    for weight in weights:
        weight.mul_(factor)


def _is_same(after: torch.Tensor, before: torch.Tensor) -> bool:
    return bool((after - before).abs().max() <= 1e-5 * before.abs().max())

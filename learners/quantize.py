"""Weights in fewer bits: scales, GPTQ's rounding with error feedback, and the way back. Numbers only, no files, no models.

A weight (outputs, inputs) becomes codes on a grid: `weight ≈ (code - zero) * scale`, with one scale and zero for each output
and each group of inputs. Codes are integers, or 8-bit floats (`float8_e4m3fn`), whose steps are finer where they are smaller.
Rounding each weight by itself (`round_to_nearest`) ignores that errors may cancel; GPTQ (Frantar et al., arXiv 2210.17323)
rounds one input after another and lets those to come make up for the error, by the inverse of the inputs' second moments.
Scales are those of the checkpoint, in bf16, before anything is rounded by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Name = Literal["int8", "int8-layers", "fp8", "int4"]

BYTE = 8

FLOAT8_MAX = 448
"""The largest `float8_e4m3fn`."""

BLOCK = 128
"""Inputs that are rounded before their errors reach those beyond: larger products, the same result."""

DAMPING = 0.01
"""Of the mean second moment, added to each input's: directions that calibration never saw must not be leaned upon."""

SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7)
"""Shares of the weights' range that scales are tried for: cutting off a rare extreme may make all others finer."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to quantize linear layers, as vLLM serves it."""

    name: Name
    bits: int
    group: int
    """Inputs that share a scale; 0: all of an output's."""
    is_symmetric: bool
    """Whether zero is always the code 0."""
    rounds_inputs: bool
    """Whether the engine also rounds each token's inputs to such codes, by their own largest (W8A8), or leaves them (W4A16)."""
    has_int_embedding: bool
    """Whether embedding and head are rounded as well, one scale for each of the vocabulary's rows; the head's inputs are not."""
    max_kl: float
    """Nats per token of Kullback–Leibler divergence from the base on held-out text, beyond which it is refused."""
    is_float: bool = False
    """Whether codes are floats: four bits of exponent, three of mantissa."""

    @property
    def code(self) -> torch.dtype:
        """What a code is stored as, unless several are packed together."""
        return torch.float8_e4m3fn if self.is_float else torch.int8

    @property
    def lowest(self) -> int:
        """The smallest code; symmetric grids leave out the integer without a counterpart."""
        return -FLOAT8_MAX if self.is_float else self.is_symmetric - (1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return FLOAT8_MAX if self.is_float else (1 << (self.bits - 1)) - 1


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme("int8", 8, 0, is_symmetric=True, rounds_inputs=True, has_int_embedding=True, max_kl=0.05),
    "int8-layers": Scheme("int8-layers", 8, 0, is_symmetric=True, rounds_inputs=True, has_int_embedding=False, max_kl=0.05),
    "fp8": Scheme("fp8", 8, 0, is_symmetric=True, rounds_inputs=True, has_int_embedding=False, max_kl=0.05, is_float=True),
    "int4": Scheme("int4", 4, 32, is_symmetric=False, rounds_inputs=False, has_int_embedding=False, max_kl=0.2),
}


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight on its grid."""

    codes: torch.Tensor
    """int8 or float8_e4m3fn (outputs, inputs)."""
    scale: torch.Tensor
    """bf16 (outputs, groups)."""
    zero: torch.Tensor
    """int8 (outputs, groups)."""

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, fp32 (outputs, inputs)."""
        scale, zero = _by_input(self.scale.float(), self.codes), _by_input(self.zero.float(), self.codes)
        return (self.codes.float() - zero) * scale

    def rows(self, start: int, end: int) -> Quantized:
        """Some of the outputs."""
        return Quantized(self.codes[start:end], self.scale[start:end], self.zero[start:end])


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Each weight by itself, each scale by its group's largest: what GPTQ must beat."""
    scale, zero = _grid(_groups(weight, scheme), scheme, 1.0)
    codes = _round(weight, _by_input(scale.float(), weight), _by_input(zero, weight), scheme)
    return Quantized(codes.to(scheme.code), scale, zero.to(torch.int8))


def gptq(weight: torch.Tensor, moments: torch.Tensor, scheme: Scheme) -> Quantized:
    """Quantize `weight` (outputs, inputs) so that its outputs change least on inputs of these second moments.

    `moments` (inputs, inputs) is the mean of x xᵀ. Scales are chosen first, by the moments' diagonal; inputs are then
    rounded from the largest moment to the smallest, whatever their group. Inputs that calibration never saw are rounded
    by themselves.
    """
    weight, moments = weight.float(), moments.float().clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    scale, zero = best_grid(weight, diagonal, scheme)
    order = diagonal.argsort(descending=True)
    feedback = _feedback(moments[order][:, order])
    rounded = _round_in_order(
        weight[:, order], _by_input(scale.float(), weight)[:, order], _by_input(zero, weight)[:, order], feedback, scheme
    )
    codes = torch.empty_like(rounded)
    codes[:, order] = rounded
    return Quantized(codes.to(scheme.code), scale, zero.to(torch.int8))


def best_grid(weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the grids over `SHRINKS` of each group's range, the one of least squared error, each input by its importance."""
    groups, weights = _groups(weight, scheme), _groups(importance[None], scheme)
    least: torch.Tensor | None = None
    for shrink in SHRINKS:
        scale, zero = _grid(groups, scheme, shrink)
        wide, offset = scale.float()[..., None], zero[..., None]
        found = ((_round(groups, wide, offset, scheme) - offset) * wide - groups).square().mul(weights).sum(-1)
        if least is None:
            least, best_scale, best_zero = found, scale, zero
        else:
            is_less = found < least
            least, best_scale = torch.where(is_less, found, least), torch.where(is_less, scale, best_scale)
            best_zero = torch.where(is_less, zero, best_zero)
    return best_scale, best_zero


def fake_int8(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs (…, features) as a W8A8 engine sees them: each token rounded to int8 by its own largest."""
    scale = (inputs.abs().amax(-1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((inputs.float() / scale).round().clamp(-128, 127) * scale).to(inputs.dtype)


def fake_float8(inputs: torch.Tensor) -> torch.Tensor:
    """The same with `float8_e4m3fn`."""
    scale = (inputs.abs().amax(-1, keepdim=True).float() / FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return ((inputs.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)


def pack(integers: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Signed integers as unsigned `bits`-bit fields of int32, the first lowest, along `dim`; compressed-tensors' layout."""
    if dim == 0:
        return pack(integers.t(), bits).t().contiguous()
    each = 32 // bits
    if bits == BYTE:  # the same without a word for each: embeddings are large
        integers = torch.nn.functional.pad(integers, (0, -integers.shape[1] % each), value=-128)
        return (integers.reshape(-1).view(torch.uint8) ^ 128).view(torch.int32).reshape(len(integers), -1)
    fields = integers.to(torch.int64) + 2 ** (bits - 1)
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % each)).reshape(len(fields), -1, each)
    words = (fields << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, length: int, dim: int = 1) -> torch.Tensor:
    """The inverse of `pack`: int8, with `length` integers along `dim`."""
    if dim == 0:
        return unpack(words.t(), bits, length).t().contiguous()
    if bits == BYTE:
        return (words.reshape(-1).view(torch.uint8) ^ 128).view(torch.int8).reshape(len(words), -1)[:, :length]
    fields = (words[..., None] >> (torch.arange(32 // bits, dtype=torch.int32) * bits)) & (2**bits - 1)
    integers: torch.Tensor = fields.flatten(1)[:, :length] - 2 ** (bits - 1)
    return integers.to(torch.int8)


def _groups(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """(outputs, inputs) as (outputs, groups, inputs of a group)."""
    groups: torch.Tensor = weight.float().reshape(len(weight), -1, scheme.group or weight.shape[1])
    return groups


def _by_input(of_groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(outputs, groups) repeated to the weight's shape (outputs, inputs)."""
    spread: torch.Tensor = of_groups.repeat_interleave(weight.shape[1] // of_groups.shape[1], 1)
    return spread


def _grid(groups: torch.Tensor, scheme: Scheme, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (bf16) and zero (fp32, whole) of each group, (outputs, groups), that spans a share of its range."""
    tiny = 1e-8
    if scheme.is_symmetric:
        scale = (groups.abs().amax(-1) * shrink / scheme.highest).clamp(min=tiny).bfloat16()
        return scale, torch.zeros(scale.shape)
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    scale = ((high - low) / (scheme.highest - scheme.lowest)).clamp(min=tiny).bfloat16()
    return scale, (scheme.lowest - low / scale.float()).round().clamp(scheme.lowest, scheme.highest)


def _round(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The codes nearest to the weight, as fp32."""
    found: torch.Tensor
    if scheme.is_float:
        found = (weight / scale).clamp(scheme.lowest, scheme.highest).to(scheme.code).float()
    else:
        found = ((weight / scale).round() + zero).clamp(scheme.lowest, scheme.highest)
    return found


def _feedback(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moments' inverse: row j says how later inputs make up for an error of j."""
    damped = moments + torch.eye(len(moments)) * (DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _round_in_order(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, feedback: torch.Tensor, scheme: Scheme
) -> torch.Tensor:
    """Round column by column, each error spread over the columns to come."""
    columns, rounded = weight.t().contiguous(), torch.empty_like(weight)  # a column beside the next: no strided access
    scale, zero = scale.t().contiguous(), zero.t().contiguous()
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        block, errors, steps = columns[start:end], torch.empty(end - start, weight.shape[0]), feedback[start:end, start:end]
        for j in range(end - start):
            codes = _round(block[j], scale[start + j], zero[start + j], scheme)
            rounded[:, start + j] = codes
            errors[j] = (block[j] - (codes - zero[start + j]) * scale[start + j]) / steps[j, j]
            block[j + 1 :] -= steps[j, j + 1 :, None] * errors[j]
        columns[end:] -= feedback[start:end, end:].t() @ errors
    return rounded

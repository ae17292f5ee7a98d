"""vLLM's LoRA on CPUs, mended: a `vllm.general_plugins` entry point that vLLM calls in each of its processes.

vLLM's CPU kernels gather a copy of the adapter for every token, which makes adapter traffic several times slower than
the base, and in a mixed batch they give the rows without an adapter the last slot's (vllm#48421). Here a step's few rows, as in
decoding, go through the factors of all its adapters in one product, of which each row keeps its own adapter's part; many rows,
as of prompts, are grouped by adapter, once a step, with a product for each. The slices of a layer (q, k, v; gate, up) lie in one
storage, so that they are one product too, in fp32 where small bf16 products are slow. And a base whose weights oneDNN has packed
away has `layer.weight = None`, where vLLM then looks for a device. Embedding and logits adapters are left to vLLM's code.

Off with LEARND_CPU_LORA=0, on other platforms and, with a warning, under a vLLM that it was not tested with.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
import vllm
from torch.nn.functional import linear
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from service.engines.vllm import SWITCH

TESTED_VERSIONS = ("0.32.",)

FEW_ROWS = 32
"""Up to so many rows, one product for all beats one for each adapter and slice; with more, what it makes for nothing costs."""

MANY_RUNS = 16
"""With more of them a product for each costs more than gathering an adapter's rows."""

Rows = slice | torch.Tensor
"""Which rows of a batch belong together: a run of neighbours, else their indices."""

log = logging.getLogger("vllm.learnd_cpu_lora")


def register() -> None:
    """Put the grouped kernels in place of vLLM's; calling it again changes nothing."""
    if os.environ.get(SWITCH, "1") == "0" or not current_platform.is_cpu():
        return
    if not vllm.__version__.startswith(TESTED_VERSIONS):
        log.warning("learnd's CPU LoRA kernels are untested with vLLM %s: its own, slower ones serve", vllm.__version__)
        return
    kernels = f"{GroupedPunicaWrapper.__module__}.{GroupedPunicaWrapper.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: kernels)
    _find_packed_layers()
    for layer in (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA):
        _fuse_storage_of(layer)


class Slices(tuple[torch.Tensor, ...]):  # noqa: SLOT001 - it has an attribute, which a tuple's slots cannot hold
    """The stacked A, or B, of a layer's slices, as vLLM keeps them: all of them views of `whole`."""

    whole: torch.Tensor
    """Of A (slots, slices · rank, inputs); of B (slots, slices · rank, outputs), block-diagonal."""

    @classmethod
    def of(cls, views: Iterable[torch.Tensor], whole: torch.Tensor) -> Self:
        """Views with what they are views of."""
        made = cls(views)
        made.whole = whole
        return made


@dataclass(frozen=True)
class Few:
    """A batch of few rows: which slots its adapters lie in, and what each row must not take from them."""

    slots: slice
    """From the first slot in use to the last."""
    foreign: torch.Tensor | None
    """(rows, slots, 1), True where a slot is not the row's own; None: there is one slot, and it is every row's."""

    @classmethod
    def of(cls, slots: torch.Tensor, groups: Sequence[tuple[int, Rows]]) -> Self | None:
        """None where the other way is better: many rows, no adapter, or more idle slots between those in use than are in use."""
        used = {slot for slot, _ in groups}
        if not used or len(slots) > FEW_ROWS or max(used) - min(used) + 1 > 2 * len(used):
            return None
        span = slice(min(used), max(used) + 1)
        foreign = slots[:, None] != torch.arange(span.start, span.stop)
        return cls(span, foreign[:, :, None] if foreign.any() else None)


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc] # vLLM is untyped
    """vLLM's bookkeeping of which row has which adapter, with few and large matrix products."""

    groups: tuple[tuple[int, Rows], ...] = ()
    """The adapters' slots in the present batch, with their rows; rows without an adapter are in none."""
    few: Few | None = None
    """The present batch as one of few rows, where it is one."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take note of the next batch's adapters."""
        super().update_metadata(*args, **kwargs)
        slots = self.token_lora_indices
        self.groups = group(slots)
        self.few = Few.of(slots, self.groups)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """Add `x @ A.T @ B.T * scale` of each row's own adapter to `y` in place.

        `y` is (rows, sum(output_slices)), `x` (rows, in); for each output slice there is an A of (slots, 1, rank, in)
        and a B of (slots, 1, width, rank). Rows after those of the batch are padding and stay as they are.
        """
        if not isinstance(lora_a_stacked, Slices) or not isinstance(lora_b_stacked, Slices):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)  # a layer we do not know
            return
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if self.few is not None:
            _add_few(y, x, lora_a_stacked.whole, lora_b_stacked.whole, scale, self.few, len(self.token_lora_indices))
            return
        for slot, rows in self.groups:
            _add(y, x, lora_a_stacked.whole[slot], lora_b_stacked.whole[slot], scale, rows)


def _add_few(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, few: Few, rows: int) -> None:
    """All adapters of the batch in two products; what is between them is zeroed where it is not the row's own."""
    a, b = a[few.slots].flatten(0, 1), b[few.slots].flatten(0, 1)
    hidden = linear(x[:rows].to(a.dtype), a)
    if few.foreign is not None:
        hidden.view(rows, few.foreign.shape[1], -1).masked_fill_(few.foreign, 0.0)
    y[:rows].add_(hidden @ b, alpha=scale)


def _add(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, rows: Rows) -> None:
    """One adapter for its many rows, in the rows' own precision: beside them its factors are small and soon converted."""
    hidden, b = linear(x[rows], a.to(x.dtype)), b.to(y.dtype)
    if isinstance(rows, slice):
        torch.addmm(y[rows], hidden, b, alpha=scale, out=y[rows])
    else:
        y.index_add_(0, rows, hidden @ b, alpha=scale)


def fused(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[Slices, Slices]:
    """Empty A (slots, 1, rank, inputs) and B (slots, 1, width, rank) of these shapes for each slice, in one storage each."""
    slots, _, rank, inputs = a[0].shape
    widths, ranks = [one.shape[2] for one in b], len(a) * rank
    whole_a = torch.zeros(slots, ranks, inputs, dtype=dtype)
    whole_b = torch.zeros(slots, ranks, sum(widths), dtype=dtype)
    ends = list(itertools.accumulate(widths))
    outputs = [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]
    places = [(rows, slice(i * rank, (i + 1) * rank)) for i, rows in enumerate(outputs)]
    views_a = (whole_a[:, None, columns] for _, columns in places)
    views_b = (whole_b[:, None, columns, rows].transpose(2, 3) for rows, columns in places)
    return Slices.of(views_a, whole_a), Slices.of(views_b, whole_b)


@cache
def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the factors are kept: fp32 where a product of one row in `dtype`, as in decoding, is slower, else `dtype`."""
    return torch.float32 if _row_seconds(torch.float32) < _row_seconds(dtype) else dtype


def _row_seconds(dtype: torch.dtype, repeats: int = 20) -> float:
    """Seconds of one row's product with two typical factors, at best: other processes can only make it slower."""
    row, a, b = (torch.ones(shape, dtype=dtype) for shape in ((1, 1024), (48, 1024), (1024, 48)))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        linear(linear(row, a), b)
        best = min(best, time.perf_counter() - began)
    return best


def group(slots: torch.Tensor) -> tuple[tuple[int, Rows], ...]:
    """The rows of each adapter's slot (≥ 0) in `slots` (one for each row; -1: no adapter).

    Runs of neighbours, of which a slot may have several; where there are many runs, the indices of each slot's rows.
    """
    values, lengths = torch.unique_consecutive(slots, return_counts=True)
    if len(values) > MANY_RUNS:
        return tuple((slot, (slots == slot).nonzero(as_tuple=True)[0]) for slot in torch.unique(slots).tolist() if slot >= 0)
    ends, runs = lengths.cumsum(0).tolist(), zip(values.tolist(), lengths.tolist(), strict=True)
    return tuple((slot, slice(end - length, end)) for end, (slot, length) in zip(ends, runs, strict=True) if slot >= 0)


def _fuse_storage_of(kind: Any) -> None:
    create = kind.create_lora_weights
    if create.__module__ == __name__:
        return

    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        a, b = self.lora_a_stacked, self.lora_b_stacked
        self.lora_a_stacked, self.lora_b_stacked = fused(a, b, storage_dtype(a[0].dtype))

    kind.create_lora_weights = create_lora_weights


def _find_packed_layers() -> None:
    from vllm.lora.layers import base_linear, utils

    found = utils._get_lora_device  # noqa: SLF001 - the very function that is mended
    if found.__module__ == __name__:
        return

    def device_of(layer: torch.nn.Module) -> torch.device:
        is_packed_away = getattr(layer, "weight", layer) is None
        return torch.device("cpu") if is_packed_away else found(layer)

    utils._get_lora_device = base_linear._get_lora_device = device_of  # noqa: SLF001 - as above

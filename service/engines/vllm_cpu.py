"""vLLM on CPUs, mended: a `vllm.general_plugins` entry point that vLLM calls in each of its processes.

vLLM's CPU kernels for LoRA gather a copy of the adapter for every token, which makes adapter traffic several times slower than
the base, and in a mixed batch they give the rows without an adapter the last slot's (vllm#48421). Here a step's rows go through a
kernel of our own (native.py), all adapters in one call for a layer; an adapter's many hundreds of rows, as of long prompts, are a
product each. The slices of a layer (q, k, v; gate, up) lie in one storage. A base whose weights oneDNN has
packed away has `layer.weight = None`, where vLLM then looks for a device. Norms and activations are in vllm_cpu_layers.py,
threads beside a job in vllm_cpu_threads.py, int8 embeddings and their heads in vllm_rows.py.
Embedding and logits adapters are left to vLLM's code.

Off with LEARND_CPU_LORA=0, on other platforms and, with a warning, under a vLLM that it was not tested with. What an int8 base
needs to start at all, a device for layers that were packed away and an embedding that can be read, is mended in any case, the
second on every platform: nothing else is changed by it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import vllm
from torch.nn.functional import linear
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import MergedColumnParallelLinearWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from service.engines import native
from service.engines.vllm import SWITCH
from service.engines.vllm_cpu_layers import use_kernels
from service.engines.vllm_cpu_threads import leave_cores
from service.engines.vllm_rows import serve_rows

TESTED_VERSIONS = ("0.32.",)

FEW_ROWS = 600
"""Neighbours of one adapter; for more, PyTorch's large products are faster than the kernel. They are so from 300 on if the same
number of rows was met before; for a new one, as most prompts are, it compiles other code in bf16, some 15 ms a step."""

FEWEST_ROWS = 32
"""The same where there is no kernel."""

MATRIX = 2

log = logging.getLogger("vllm.learnd_cpu_lora")


def register() -> None:
    """Put the grouped kernels in place of vLLM's; calling it again changes nothing."""
    serve_rows(has_kernel=False)
    if not current_platform.is_cpu():
        return
    _find_packed_layers()
    if os.environ.get(SWITCH, "1") == "0":
        return
    if not vllm.__version__.startswith(TESTED_VERSIONS):
        log.warning("learnd's CPU LoRA kernels are untested with vLLM %s: its own, slower ones serve", vllm.__version__)
        return
    kernels = f"{GroupedPunicaWrapper.__module__}.{GroupedPunicaWrapper.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: kernels)
    use_kernels()
    serve_rows(has_kernel=True)
    leave_cores()
    for layer in (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA):
        _fuse_storage_of(layer)


class Slices(tuple[torch.Tensor, ...]):  # noqa: SLOT001 - it has attributes, which a tuple's slots cannot hold
    """The stacked A, or B, of a layer's slices, as vLLM keeps them: all of them views of `whole`."""

    whole: torch.Tensor
    """Of A (slots, slices · rank, inputs); of B (slots, rank, outputs)."""
    layer: native.Layer
    """A and B together, for the kernel."""

    @classmethod
    def of(cls, views: Iterable[torch.Tensor], whole: torch.Tensor, layer: native.Layer) -> Self:
        """Views with what they are views of."""
        made = cls(views)
        made.whole, made.layer = whole, layer
        return made


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc] # vLLM is untyped
    """vLLM's bookkeeping of which row has which adapter, with other products."""

    few: native.Rows | None = None
    """The present batch's rows, with slot -1 for those without an adapter and those in `many`; None: there are no others."""
    many: tuple[tuple[int, slice], ...] = ()
    """Long runs of rows of one slot: that, and where they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = native.load()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take note of the next batch's adapters."""
        super().update_metadata(*args, **kwargs)
        self.few, self.many = divide(self.token_lora_indices, FEWEST_ROWS if self.kernel is None else FEW_ROWS)

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
        if self.few is None and not self.many:
            return
        if not isinstance(lora_a_stacked, Slices) or not isinstance(lora_b_stacked, Slices):
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)  # a layer we do not know
            return
        if y.dim() > MATRIX:
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        a, b, layer = lora_a_stacked.whole, lora_b_stacked.whole, lora_a_stacked.layer
        if self.few is not None:
            if self.kernel is not None and x.dtype == y.dtype == layer.dtype in self.kernel.functions:
                self.kernel.add(layer, x, y, self.few, scale)
            else:
                _add_few(y, x, a, b, scale, output_slices, self.few.slots)
        for slot, rows in self.many:
            _add(y, x, a[slot], b[slot], scale, output_slices, rows)


def _add(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, widths: Sequence[int], rows: slice
) -> None:
    """One adapter for its many rows."""
    out = y[rows]
    torch.addmm(out, linear(x[rows], a), _apart(b, widths), alpha=scale, out=out)


def _add_few(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, widths: Sequence[int], slots: torch.Tensor
) -> None:
    """What the kernel does, where there is none; in fp32, since small products in half precision are slow on many processors."""
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero(as_tuple=True)[0]
            added = linear(x[rows].float(), a[slot].float()) @ _apart(b[slot].float(), widths)
            y[rows] = (y[rows].float() + scale * added).to(y.dtype)


def _apart(b: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """B (rank, outputs) as (slices · rank, outputs), zeros where an output is another slice's."""
    return torch.block_diag(*torch.split(b, list(widths), dim=1))  # type: ignore[no-any-return, no-untyped-call]


def fused(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> tuple[Slices, Slices]:
    """Empty A (slots, 1, rank, inputs) and B (slots, 1, width, rank) of these shapes for each slice, in one storage each."""
    slots, _, rank, inputs = a[0].shape
    widths = [one.shape[2] for one in b]
    whole_a = torch.zeros(slots, len(a) * rank, inputs, dtype=a[0].dtype)
    whole_b = torch.zeros(slots, rank, sum(widths), dtype=b[0].dtype)
    layer = native.Layer(whole_a, whole_b, widths)
    views_a = (one[:, None] for one in torch.split(whole_a, rank, dim=1))
    views_b = (one[:, None].transpose(2, 3) for one in torch.split(whole_b, widths, dim=2))
    return Slices.of(views_a, whole_a, layer), Slices.of(views_b, whole_b, layer)


def divide(slots: torch.Tensor, most: int) -> tuple[native.Rows | None, tuple[tuple[int, slice], ...]]:
    """The rows of `slots` (one for each row; -1: no adapter) for the kernel, and one adapter's runs of more than `most` rows."""
    many = []
    if len(slots) > most:
        values, lengths = torch.unique_consecutive(slots, return_counts=True)
        ends, slots = lengths.cumsum(0).tolist(), slots.clone()
        for slot, length, end in zip(values.tolist(), lengths.tolist(), ends, strict=True):
            if slot >= 0 and length > most:
                many.append((slot, slice(end - length, end)))
                slots[end - length : end] = -1
    return native.Rows.of(slots) if bool((slots >= 0).any()) else None, tuple(many)


def _fuse_storage_of(kind: Any) -> None:
    create = kind.create_lora_weights
    if create.__module__ == __name__:
        return

    def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        a, b = self.lora_a_stacked, self.lora_b_stacked
        self.lora_a_stacked, self.lora_b_stacked = fused(a, b)

    kind.create_lora_weights = create_lora_weights


def _find_packed_layers() -> None:
    from vllm.lora.layers import base_linear, utils

    if not hasattr(utils, "_get_lora_device"):
        return  # another vLLM, which asks elsewhere: what is not known cannot be mended
    found = utils._get_lora_device  # noqa: SLF001 - the very function that is mended
    if found.__module__ == __name__:
        return

    def device_of(layer: torch.nn.Module) -> torch.device:
        is_packed_away = getattr(layer, "weight", layer) is None
        return torch.device("cpu") if is_packed_away else found(layer)

    utils._get_lora_device = base_linear._get_lora_device = device_of  # noqa: SLF001 - as above

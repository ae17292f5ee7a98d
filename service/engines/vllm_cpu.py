"""vLLM's LoRA on CPUs, mended: a `vllm.general_plugins` entry point that vLLM calls in each of its processes.

vLLM's CPU kernels gather a copy of the adapter for every token, which makes adapter traffic several times slower than
the base, and in a mixed batch they give the rows without an adapter the last slot's (vllm#48421). Here the rows of each
adapter are grouped once a step and go through one matrix product, and the others are left alone. And a base whose weights
oneDNN has packed away has `layer.weight = None`, where vLLM then looks for a device. Embedding and logits adapters are
left to vLLM's code.

Off with LEARND_CPU_LORA=0, on other platforms and, with a warning, under a vLLM that it was not tested with.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import vllm
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from service.engines.vllm import SWITCH

TESTED_VERSIONS = ("0.32.",)

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


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc] # vLLM is untyped
    """vLLM's bookkeeping of which row has which adapter, with one matrix product for each adapter."""

    groups: tuple[tuple[int, Rows], ...] = ()
    """The adapters' slots in the present batch, each with its rows; rows without an adapter are in none."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take note of the next batch's adapters."""
        super().update_metadata(*args, **kwargs)
        self.groups = group(self.token_lora_indices)

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
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self.groups:
            inputs, start = x[rows], 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                hidden = linear(inputs, a[slot, 0].to(x.dtype)).to(y.dtype)
                _add(y[:, start : start + width], rows, hidden, b[slot, 0].to(y.dtype), scale)
                start += width


def group(slots: torch.Tensor) -> tuple[tuple[int, Rows], ...]:
    """The rows of each adapter's slot (≥ 0) in `slots` (one for each row; -1: no adapter)."""
    return tuple((slot, _rows(slots == slot)) for slot in torch.unique(slots).tolist() if slot >= 0)


def _rows(mask: torch.Tensor) -> Rows:
    rows = mask.nonzero(as_tuple=True)[0]
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else rows


def _add(out: torch.Tensor, rows: Rows, hidden: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    if isinstance(rows, slice):
        out[rows].addmm_(hidden, b.t(), alpha=scale)
    else:
        out.index_add_(0, rows, linear(hidden, b), alpha=scale)


def _find_packed_layers() -> None:
    from vllm.lora.layers import base_linear, utils

    found = utils._get_lora_device  # noqa: SLF001 - the very function that is mended
    if found.__module__ == __name__:
        return

    def device_of(layer: torch.nn.Module) -> torch.device:
        is_packed_away = getattr(layer, "weight", layer) is None
        return torch.device("cpu") if is_packed_away else found(layer)

    utils._get_lora_device = base_linear._get_lora_device = device_of  # noqa: SLF001 - as above

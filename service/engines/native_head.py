"""An embedding and its head in int8 on a CPU, by head.cpp: kept once, in the order in which the product reads it.

Looked up by gathering its rows, multiplied by tiles of AMX. Without AMX or a compiler there is none: `load` says so, and the
caller dequantizes.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from service.engines import native

SOURCE = Path(__file__).with_name("head.cpp")
BLOCK = 64
"""Rows of the vocabulary, and inputs, that lie together: there must be whole blocks of rows; inputs are padded with zeros."""
LANES, TILES, WORD = 16, 4, 4
MATRIX = 2
PRODUCTS = {torch.bfloat16: "logits_bfloat16", torch.float32: "logits_float32"}
LOOKUPS = {torch.bfloat16: "rows_bfloat16", torch.float32: "rows_float32"}


class Rows:
    """An int8 matrix (vocabulary, inputs) with one scale for each row, as the kernel keeps it."""

    def __init__(self, library: ctypes.CDLL, integers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        """`integers` int8 (vocabulary, inputs), `scale` (vocabulary,); `dtype` of what goes in and comes out, in `PRODUCTS`.

        Raises `ValueError` where the vocabulary is not whole blocks.
        """
        self.vocabulary, self.inputs = integers.shape
        if self.vocabulary % BLOCK:
            raise ValueError(f"{self.vocabulary} rows are not blocks of {BLOCK}")
        padded = torch.nn.functional.pad(integers, (0, -self.inputs % BLOCK))
        tiles = padded.view(-1, TILES, LANES, padded.shape[1] // BLOCK, LANES, WORD)
        self.packed = tiles.permute(0, 3, 1, 4, 2, 5).contiguous()
        self.scale = scale.float().flatten().contiguous()
        self.dtype = dtype
        self._product, self._lookup = (getattr(library, names[dtype]) for names in (PRODUCTS, LOOKUPS))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ matrix.T` for x (rows, inputs): (rows, vocabulary). x is rounded to some 15 bits, by each row's own largest.

        Raises `ValueError` for another width: the kernel would read beyond.
        """
        if x.dim() != MATRIX or x.shape[1] != self.inputs:
            raise ValueError(f"{tuple(x.shape)} are not rows of {self.inputs}")
        x = x.to(self.dtype).contiguous()
        out = x.new_empty(len(x), self.vocabulary)
        self._product(*self._matrix, x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads())
        return out

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The matrix's rows of these numbers (any shape): (*shape, inputs). Those that are out of range are zeros."""
        ids = ids.long().contiguous()
        out = torch.empty(*ids.shape, self.inputs, dtype=self.dtype)
        self._lookup(*self._matrix, ids.data_ptr(), ids.numel(), out.data_ptr(), torch.get_num_threads())
        return out

    @property
    def _matrix(self) -> tuple[int, int, int, int]:
        return self.packed.data_ptr(), self.scale.data_ptr(), self.vocabulary, self.inputs


@cache
def load() -> ctypes.CDLL | None:
    """The compiled kernel; None where this processor has no AMX, or, with a word in the log, where it cannot be compiled."""
    if not torch.cpu._is_amx_tile_supported():  # noqa: SLF001 - there is no public way to ask
        return None
    library = native.loaded(SOURCE)
    if library is None or not library.may_multiply():
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in (*PRODUCTS.values(), *LOOKUPS.values()):
        function = getattr(library, name)
        function.argtypes = [pointer, pointer, number, number, pointer, number, pointer, ctypes.c_int]
        function.restype = None
    return library

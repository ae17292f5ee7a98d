"""LoRA by the C++ beside this file: compiled once by the machine's own compiler, then kept in the cache.

Without a compiler, or in a precision that it does not know, the caller has PyTorch do the same. The head's kernel
(native_head.py) is compiled here too.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch

from learners.base import cache_folder

SOURCE = Path(__file__).with_name("lora.cpp")
SHARED = Path(__file__).with_name("vectors.h")
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-fopenmp", "-shared", "-fPIC")
COMPILER_SECONDS = 120
FUNCTIONS = {torch.bfloat16: "add_lora_bfloat16", torch.float32: "add_lora_float32"}

log = logging.getLogger("vllm.learnd_cpu_lora")


class Layer(ctypes.Structure):
    """A layer's factors as the kernel reads them: A (slots, slices · rank, inputs), B (slots, rank, outputs), both contiguous."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("slices", ctypes.c_int64),
        ("ends", ctypes.c_void_p),
    )

    def __init__(self, a: torch.Tensor, b: torch.Tensor, widths: Sequence[int]) -> None:
        self._kept = a, b, (ctypes.c_int64 * len(widths))(*itertools.accumulate(widths))
        super().__init__(a.data_ptr(), b.data_ptr(), a.shape[2], b.shape[1], len(widths), ctypes.addressof(self._kept[2]))
        self.dtype, self.address = a.dtype, ctypes.addressof(self)


@dataclass(frozen=True)
class Rows:
    """A batch's rows: what the kernel is told of them for all layers."""

    slots: torch.Tensor
    """(rows,) int64, contiguous."""
    address: int
    count: int
    threads: int

    @classmethod
    def of(cls, slots: torch.Tensor) -> Self:
        """The rows whose slots these are."""
        return cls(slots, slots.data_ptr(), len(slots), threads())


class Kernel:
    """The compiled kernel."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.functions = {dtype: getattr(library, name) for dtype, name in FUNCTIONS.items()}
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in self.functions.values():
            function.argtypes = [pointer, pointer, number, pointer, number, pointer, number, ctypes.c_float, ctypes.c_int]
            function.restype = None

    def add(self, layer: Layer, x: torch.Tensor, y: torch.Tensor, rows: Rows, scale: float) -> None:
        """Add `scale · B (A x[row])` of each row's slot to `y[row]`; x (≥ rows, inputs), y (≥ rows, outputs).

        Rows with slot -1 and those after the last slot are left alone. x, y and the factors are of one dtype, a key of
        `functions`; in x and y a row's values lie side by side.
        """
        self.functions[layer.dtype](
            layer.address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), rows.address, rows.count, scale, rows.threads
        )


def threads() -> int:
    """As many as PyTorch has; one where threads sleep at once, since waking another takes longer than a product this small."""
    return 1 if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else torch.get_num_threads()


@cache
def load() -> Kernel | None:
    """The kernel, compiled if this machine has not done so before; None, with a word in the log, where it cannot be."""
    library = loaded(SOURCE)
    return Kernel(library) if library else None


def loaded(source: Path) -> ctypes.CDLL | None:
    """The library of this source; None, with a word in the log, where there is none."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.warning("no C++ compiler for %s: PyTorch's products serve, which is slower. Install g++, or set CXX", source.name)
        return None
    try:
        return ctypes.CDLL(str(compiled(compiler, source)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning("%s did not compile: PyTorch's products serve, which is slower. %s", source, said)
        return None


def compiled(compiler: str, source: Path) -> Path:
    """The library's path: by what it was made of, so that another source, compiler or processor has another."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILER_SECONDS).stdout
    read = source.read_bytes(), SHARED.read_bytes()
    made_of = hashlib.sha256(b"\0".join((*read, version, _processor(), " ".join(FLAGS).encode())))
    library = cache_folder() / "kernels" / f"{source.stem}-{made_of.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command: list[Any] = [compiler, *FLAGS, f"-I{SHARED.parent}", source, "-o", made]
            subprocess.run(command, capture_output=True, check=True, text=True, timeout=COMPILER_SECONDS)
            made.replace(library)  # whole or not at all: several replicas may be at it
    return library


def _processor() -> bytes:
    """What the processor can do, as Linux says it."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return b""
    return next((line for line in told.splitlines() if line.startswith(("flags", "Features"))), "").encode()

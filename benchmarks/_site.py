"""What the servers of one run have in common, and how each of them is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from _servers import LINES, Server, bare, engine, learnd, naive, ray_serve_llm, settings_of
from _versions import make_versions, tiny_base
from safetensors import safe_open

from learners.base import BaseModel, is_quantized, prepare
from service.settings import Settings

BASE = "base"
MIXED = (*(f"{line}@v{number}" for line in LINES for number in (1, 2)), BASE)
"""Four adapters and the base."""
CHAMPION = f"{LINES[0]}@v2"
"""Of the first line, at the start."""
QUANTIZATIONS = ("int8", "int4")
FP32_BYTES = 4


@dataclass(frozen=True)
class Asked:
    """The command line."""

    parts: tuple[str, ...]
    source: str
    dtype: str
    quick: bool
    ray: Path | None = None


class Site:
    """One base and the same adapters for all, in one folder."""

    def __init__(self, folder: Path, asked: Asked, say: Callable[[str], None]) -> None:
        self.folder, self.asked, self._say = folder, asked, say
        self.source = asked.source
        if self.source == "tiny":
            self.source = str(folder / "tiny")
            tiny_base(Path(self.source))
        self.base = prepare(self.source, say=say)
        self._made: dict[str, dict[str, Path]] = {}

    @property
    def settings(self) -> Settings:
        """Those of the learnd that is measured."""
        return settings_of(self._data("none"), self.source, self.asked.dtype)

    def weights(self) -> dict[str, int]:
        """Bytes of the base's weights as they lie on disk, as fp32, and of the quantized checkpoints that are there."""
        there = {quantization: self.quantized(quantization) for quantization in QUANTIZATIONS if self.is_quantized(quantization)}
        found = {name: weights_bytes(base.path) for name, base in {"none": self.base, **there}.items()}
        return {"fp32": fp32_bytes(self.base.path), **found}

    def is_quantized(self, quantization: str) -> bool:
        """Whether that checkpoint is there already: making it takes a minute or two."""
        return is_quantized(self.base, quantization)

    def quantized(self, quantization: str) -> BaseModel:
        """The quantized base, made if it is not there."""
        return prepare(self.source, say=self._say, quantization=quantization)

    def plans(self) -> dict[str, Callable[[], Server]]:
        """How to make each server that these parts ask for, by name; `--quick` leaves out some."""
        asked, parts = self.asked, set(self.asked.parts)
        found: dict[str, Callable[[], Server]] = {"learnd": partial(self._learnd, "none")}
        if parts & {"gateway", "adapters"}:
            found["bare"] = lambda: bare(self.folder, self.settings, self.base, self._four())
        if "gateway" in parts and not asked.quick:
            data = self._data("none")
            found["engine"] = lambda: engine(self.folder, data, self.source, asked.dtype, self._four())
        if "gateway" in parts and asked.ray is not None:
            found["ray-serve-llm"] = partial(ray_serve_llm, self.folder, asked.ray, self.settings, self.base)
        if "naive" in parts:
            found["transformers"] = lambda: naive(self.folder, self.base, self._four())
        if "quantized" in parts:
            kinds = [kind for kind in ("int8",) if self.is_quantized(kind)] if asked.quick else QUANTIZATIONS
            found |= {kind: partial(self._learnd, kind) for kind in kinds}
        return found

    def _learnd(self, quantization: str) -> Server:
        """A daemon; on a quantized base one of its own, with a folder of its own."""
        self._versions(quantization)
        data, epochs = self._data(quantization), 2 if self.asked.quick else 4
        return learnd(data.parent, data, self.source, dtype=self.asked.dtype, epochs=epochs, quantization=quantization)

    def _four(self) -> dict[str, Path]:
        return {name: path for name, path in self._versions("none").items() if name in MIXED}

    def _versions(self, quantization: str) -> dict[str, Path]:
        if quantization not in self._made:
            base = self.base if quantization == "none" else self.quantized(quantization)
            self._made[quantization] = make_versions(self._data(quantization), base)
        return self._made[quantization]

    def _data(self, quantization: str) -> Path:
        data = self.folder / "data" if quantization == "none" else self.folder / quantization / "data"
        data.mkdir(parents=True, exist_ok=True)
        return data


def weights_bytes(folder: Path) -> int:
    """Of all weights in a checkpoint, as they are stored."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def fp32_bytes(folder: Path) -> int:
    """Of the same weights with four bytes for each, as Transformers holds them in fp32."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                count = 1
                for length in opened.get_slice(key).get_shape():
                    count *= length
                total += FP32_BYTES * count
    return total

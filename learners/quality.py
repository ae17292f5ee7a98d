"""What a base lost by being quantized, as it was measured when that was done; it lies beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

REPORT = "quantization.json"


@dataclass(frozen=True, slots=True)
class Quality:
    """The quantized base against the base, on held-out text."""

    perplexity_base: float
    perplexity: float
    kl: float
    """Mean Kullback–Leibler divergence of the next token's distribution from the base's, nats per token."""
    bytes_base: int
    bytes_quantized: int
    """Of the weights' files."""

    def __str__(self) -> str:
        size = f"{self.bytes_quantized / 2**20:.0f} MiB ({self.bytes_quantized / self.bytes_base:.2f} of the base)"
        return f"perplexity {self.perplexity_base:.2f} → {self.perplexity:.2f}, KL {self.kl:.4f} nats per token, {size}"

    def write(self, folder: Path, how: Mapping[str, Any]) -> None:
        """Put it into the checkpoint's folder, with how it was come by."""
        (folder / REPORT).write_text(json.dumps({**how, **asdict(self)}, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What was measured of the checkpoint in `folder`; None where that cannot be told."""
        try:
            found = json.loads((folder / REPORT).read_text())
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

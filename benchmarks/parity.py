"""Whether the engine says what training computes: log-probs of both, for each quantization, with and without an adapter.

Texts that the checkpoints were not calibrated on are scored by vLLM as it serves and by the very model that a job trains: the
dequantized weights in fp32. `awq` and `gptq` are the base as others would write it, rounded to the nearest four bits. A figure is
engine minus training, in nats per token. The adapter is random and strong, so that one that is left out or wrongly applied shows:
its own effect stands beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _layouts import LAYOUTS, write
from rich.console import Console
from rich.table import Table

from learners import adapter
from learners.base import BaseModel, prepare
from learners.calibrate import batches, texts
from learners.evaluate import logprobs
from service.engines.vllm import VllmEngine
from service.settings import Settings

SOURCE = "builtin:smollm2-135m"
BOUND = 0.02
"""Nats per token that the means may be apart."""
RANK = 16
STRENGTH = 0.012
"""Standard deviation of B: the replies change, the language stays."""


@dataclass(frozen=True)
class Parity:
    """Engine minus training over all tokens of all texts, nats per token."""

    mean: float
    """What a loss or an evaluation would be off by."""
    absolute: float
    """The mean size of a token's difference."""
    effect: float
    """The mean size of what the adapter itself changes; 0 without one."""
    applied: float
    """How much of the adapter's effect the engine shows, by least squares over the tokens: 1 as trained, 0 left out.

    The control: a mean within the bound says nothing of an adapter that changes the mean by less.
    In bf16 1.00; in int8, whose inputs are rounded, some tenths off, since that moves a token by as much as the adapter does.
    """


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 texts, not 32")
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--only", default="none,int8,int4,awq,gptq", help="which; fp8 too on a GPU")
    said = parser.parse_args()
    console = Console(stderr=True, highlight=False, width=110)
    found = {name: measure(name, 8 if said.quick else 32, console) for name in said.only.split(",")}
    names = ("base", "adapter", "engine − training", "mean size", "the adapter's effect", "applied")
    table = Table(*names, title="Nats per token")
    for name, parities in found.items():
        for kind, parity in parities.items():
            shown = (f"{parity.mean:+.4f}", f"{parity.absolute:.4f}", f"{parity.effect:.3f}", f"{parity.applied:.3f}")
            table.add_row(name, kind, *shown)
    console.print(table)
    if said.json:
        print(json.dumps({name: {kind: asdict(p) for kind, p in parities.items()} for name, parities in found.items()}))
    return int(any(abs(parity.mean) > BOUND for parities in found.values() for parity in parities.values()))


def measure(quantization: str, count: int, console: Console) -> dict[str, Parity]:
    """Both sides of one quantization, without and with the adapter."""
    with tempfile.TemporaryDirectory(prefix="learnd-parity-") as folder:
        base = made(quantization, Path(folder), console)
        model, tokenizer = adapter.load_base(base.path, "float32")
        scored = [row.tolist() for batch in batches(tokenizer, texts()[1], count) for row in batch]
        plain = [value for ids in scored for value in logprobs(model, ids)]
        model = random_adapter(model)
        adapted = [value for ids in scored for value in logprobs(model, ids)]
        adapter.write(model, Path(folder) / "adapter", base.name)
        del model
        served_plain, served_adapted = asyncio.run(_served(base, Path(folder), scored))
    return {
        "base": _parity(served_plain, plain, served_plain, plain),
        "random": _parity(served_adapted, adapted, served_plain, plain),
    }


def made(quantization: str, folder: Path, console: Console) -> BaseModel:
    """The built-in base, quantized so, or written into `folder` as others would."""
    if quantization not in LAYOUTS:
        return prepare(SOURCE, say=console.print, quantization=quantization)
    write(prepare(SOURCE).path, folder / quantization, quantization)
    return prepare(str(folder / quantization), say=console.print)


def random_adapter(model: Any) -> Any:
    """Every linear layer adapted, both factors random."""
    import torch

    model = adapter.attach(model, None, rank=RANK, alpha=2 * RANK, dropout=0.0, seed=0)
    torch.manual_seed(1)
    for key, factor in adapter.factors(model).items():
        torch.nn.init.normal_(factor.data, std=STRENGTH if "lora_B" in key else factor.shape[1] ** -0.5)
    return model


async def _served(base: BaseModel, folder: Path, scored: list[list[int]]) -> tuple[list[float], list[float]]:
    settings = Settings.model_validate({
        "data_dir": folder,
        "base": {"source": str(base.path)},
        "engine": {"kv_cache_gib": 0.5, "max_num_seqs": 8},
    })  # fmt: skip
    engine = await VllmEngine.start(settings, base)
    try:
        await engine.load("random", folder / "adapter", 1)
        plain = [value for ids in scored for value in await engine.logprobs(None, ids)]
        return plain, [value for ids in scored for value in await engine.logprobs("random", ids)]
    finally:
        await engine.close()


def _parity(engine: list[float], training: list[float], engine_without: list[float], without: list[float]) -> Parity:
    apart = [served - trained for served, trained in zip(engine, training, strict=True)]
    effect = [trained - plain for trained, plain in zip(training, without, strict=True)]
    shown = [served - plain for served, plain in zip(engine, engine_without, strict=True)]
    size = sum(one * one for one in effect)
    applied = sum(one * other for one, other in zip(effect, shown, strict=True)) / size if size else 0.0
    found = (statistics.fmean(apart), statistics.fmean(map(abs, apart)), statistics.fmean(map(abs, effect)), applied)
    return Parity(*(round(value, 5) for value in found))


if __name__ == "__main__":
    raise SystemExit(main())

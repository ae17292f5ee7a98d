"""Full fine-tuning of a small base: every weight learns what a line has learned, and the result is a base of its own.

No adapter, and so no swap while it serves: what comes of it is a Hugging Face folder for `base.source`. An adapter of rank r
moves a matrix in r directions; this moves it in all of them, for some ten times the memory (AdamW keeps fp32 weights, gradients
and two moments: 16 bytes a parameter) and a checkpoint as large as the base. The examples are of every retained skill together,
as in `joint` training, since there is no earlier state to hold on to; the loss, the order and the trainer are those of a job.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from learners import adapter, precision
from learners.base import BaseModel, quantization_of, write_whole
from learners.comparison import NEUTRAL
from learners.encode import Encoded, Unencodable, encode
from learners.evaluate import distributions, divergence, score
from learners.trainer import fit

RECORD = "tuned.json"
"""In the folder: what it was made from and by, and what was measured."""
BESIDE = {".json", ".jinja", ".model", ".txt"}
"""What belongs to a base beside its weights: the files of its tokenizer, its template, how it generates."""
Row = Mapping[str, Any]


class Untunable(ValueError):
    """It cannot be tuned, or must not; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Accuracy on one slice's held-out examples: the share that greedy decoding answers word for word."""

    slice: str
    items: int
    base: float
    tuned: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came of it."""

    path: Path
    learned: int
    """Examples that it was trained on."""
    skipped: int
    """Those that could not be encoded."""
    slices: tuple[Measured, ...]
    kl: float
    """KL(tuned || base) on neutral texts, in nats per token: how much else has changed."""
    seconds: float


def tune(
    base: BaseModel, rows: Sequence[Row], out: Path, settings: Mapping[str, Any], report: Callable[[Row], None] = lambda _: None
) -> Tuned:
    """Train all weights of `base` on the rows of the split `train`, measure on `holdout`, write `out` whole or not at all.

    Each row has `slice`, `split`, `messages` and `reply`, as `learnd examples` gives them; `settings` are learning settings by
    name. Raises `Untunable` for a quantized base, for nothing to train on, and when `out` is there already.
    """
    if quantization_of(base.path):
        raise Untunable(f"{base.path} is quantized: tune the weights that it was made from, then quantize what comes of it")
    if out.exists():
        raise Untunable(f"{out} is there already: name a folder that is not")
    kind = precision.fastest() if settings["precision"] == "auto" else settings["precision"]
    model, tokenizer = adapter.load_base(base.path, "float32")
    model.requires_grad_(requires_grad=True)
    data = _Data(rows, tokenizer, int(settings["max_length"]))
    if not data.of("train"):
        raise Untunable("there is nothing to train on: no example of the split `train` that can be encoded")
    before, neutral = data.accuracies(model), distributions(model, data.neutral)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as checkpoints:  # each is larger than the base
        told = fit(model, tokenizer, data.of("train"), data.of("validation"), settings, kind, Path(checkpoints), report)
    after, kl = data.accuracies(model), divergence(distributions(model, data.neutral), neutral)
    slices = tuple(Measured(name, len(some), before[name], after[name]) for name, some in data.held_out.items())
    tuned = Tuned(out, len(data.of("train")), data.skipped, slices, kl, told["train_runtime"])
    write_whole(out, lambda aside: _write(model, base, tuned, settings, aside))
    return tuned


class _Data:
    """The rows in tokens; those that cannot be encoded are left out and counted."""

    def __init__(self, rows: Sequence[Row], tokenizer: Any, max_length: int) -> None:
        self._pad_id = tokenizer.pad_token_id
        self._parts: list[tuple[str, Encoded]] = []
        self.held_out: dict[str, list[Encoded]] = {}
        self.neutral = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in NEUTRAL]
        for row in rows:
            with suppress(Unencodable):
                one = encode(tokenizer, row["messages"], row["reply"], max_length, float(row.get("weight", 1)))
                self._parts.append((row["split"], one))
                if row["split"] == "holdout":
                    self.held_out.setdefault(row["slice"], []).append(one)
        self.skipped = len(rows) - len(self._parts)

    def of(self, split: str) -> list[Encoded]:
        """The examples of one split."""
        return [one for its, one in self._parts if its == split]

    def accuracies(self, model: Any) -> dict[str, float]:
        """Share of each slice's held-out examples that greedy decoding answers word for word."""
        return {name: fmean(score(model, some, self._pad_id).exact) for name, some in self.held_out.items()}


def _write(model: Any, base: BaseModel, tuned: Tuned, settings: Mapping[str, Any], folder: Path) -> None:
    """The files of a base, in the precision of the one that it was made from, with its record."""
    served = json.loads((base.path / "config.json").read_text()).get("dtype", "bfloat16")
    model.to(getattr(torch, served)).save_pretrained(folder)
    for file in base.path.iterdir():
        if file.suffix in BESIDE and not (folder / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)  # byte for byte: a version pins the tokenizer's digest and the template's
    record = {"base": {"name": base.name, **base.digests}, "learning": dict(settings), **asdict(tuned), "path": str(tuned.path)}
    (folder / RECORD).write_text(json.dumps(record, indent=1))

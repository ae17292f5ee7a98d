"""What a job learns from what people thought of replies, once it has learned to imitate: thumbs, then pairs.

The opinions come in a file of the job's folder. Each part is kept there when it is done, so that a job that dies goes on with
the next one. The losses, and what they compare with, are `learners/preference.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from learners import adapter, preference
from learners.encode import IGNORED, Unencodable, encode
from learners.precision import Precision
from learners.preference import PHASES, Phase, Row
from learners.strategy import Beside
from learners.trainer import Report
from replay.records import Split

FILE, FOLDER, IMITATION = "opinions.jsonl", "preference", "imitation"
"""In a job's folder: what it was given, what it keeps of each part until its end, and the first part's name there."""


@dataclass(frozen=True, slots=True)
class Opinions:
    """A job's opinions by what is to be learned from them."""

    training: dict[Phase, list[Row]]
    held_out: dict[Phase, list[Row]]
    """Measured, never trained on."""
    skipped: dict[str, str]
    """Those that cannot be encoded, with the reason."""


class Afterwards:
    """What a job learns after imitation, each part kept when it is done; to be made while the adapter is the champion's."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        settings: Mapping[str, Any],
        precision: Precision,
        weigh: Callable[[int], Beside | None],
    ) -> None:
        """`weigh` gives the strategy's penalty beside a loss that is a mean over so many items."""
        self._folder = folder / FOLDER
        self._told = (tokenizer, settings, precision)
        self._model = model
        self._opinions = read(folder / FILE, tokenizer, settings["max_length"])
        if (self._folder / IMITATION).exists():  # what it began with was held in part; what it has become is not
            adapter.release(model)
        training = self._opinions.training
        self._due: dict[Phase, Beside | None] = {p: weigh(len(training[p])) for p in PHASES if len(training[p]) > 1}
        self._champion = {name: p.detach().clone() for name, p in adapter.factors(model).items()} if self._due else {}

    def learn(
        self, imitate: Callable[[], dict[str, Any]], keep: Callable[[dict[str, Any], Path], None], report: Report
    ) -> dict[str, Any]:
        """Imitate, then learn from opinions what there is to learn; what an earlier attempt has kept is not done again."""
        if not self._due:
            return imitate()
        metrics: dict[str, Any] = {"opinions_skipped": len(self._opinions.skipped)}
        steps: dict[str, Callable[[], dict[str, Any]]] = {IMITATION: imitate}
        for phase in self._due:
            steps[phase] = partial(self._fit, phase, report)
        for name, step in steps.items():
            kept = self._folder / name
            if kept.exists():
                adapter.read_into(self._model, kept)
                metrics |= json.loads((kept / "metrics.json").read_text())
            else:
                told = step()
                keep(told, kept)
                metrics |= told
        return metrics

    def _fit(self, phase: Phase, report: Report) -> dict[str, Any]:
        tokenizer, settings, precision = self._told
        rows = self._opinions.training[phase], self._opinions.held_out[phase]
        return preference.fit(
            phase, self._model, tokenizer, *rows, self._champion, settings, precision, self._folder / f"checkpoints-{phase}",
            lambda told: report({"phase": f"learning by {phase}", **told}), self._due[phase],
        )  # fmt: skip


def manifest(folder: Path) -> dict[str, Any]:
    """What a version's manifest says of the job's opinions; nothing without any."""
    file = folder / FILE
    said = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {"opinions": [{name: one[name] for name in ("id", "source", "split")} for one in said]} if said else {}


def warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What a version's metrics warn of, those of what came after imitation with their phase."""
    named = {"": "warning", **{f"{phase}: ": f"{phase}_warning" for phase in PHASES}}
    return [f"{begin}{metrics[name]}" for begin, name in named.items() if name in metrics]


def read(file: Path, tokenizer: Any, max_length: int) -> Opinions:
    """The opinions that the job was given, if any."""
    found = Opinions({phase: [] for phase in PHASES}, {phase: [] for phase in PHASES}, {})
    for line in file.read_text().splitlines() if file.exists() else ():
        said = json.loads(line)
        try:
            row = _encoded(said, tokenizer, max_length)
        except Unencodable as error:
            found.skipped[said["id"]] = str(error)
            continue
        kind = found.training if said["split"] == Split.TRAIN else found.held_out
        kind["dpo" if "good" in row and "bad" in row else "kto"].append(row)
    return found


def _encoded(said: Mapping[str, Any], tokenizer: Any, max_length: int) -> Row:
    """One prompt for both replies of a pair: as much of it as the longer one leaves room for."""
    prompts, row = [], Row()
    for side in ("good", "bad"):
        if said[side] is not None:
            one = encode(tokenizer, said["messages"], said[side], max_length)
            row[side] = [label for label in one.labels if label != IGNORED]
            prompts.append(one.input_ids[: -len(row[side])])
    return {"prompt_ids": min(prompts, key=len), **row}

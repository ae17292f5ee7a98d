"""One update from start to finish, all of it in the job's folder, so that any process may take it up again.

spec.json examples.jsonl older.jsonl  what to do (written by whoever asks)
before.json                           scores of base and champion, kept while training
checkpoints/                          where training goes on after a death
trained/                              the adapter and the trainer's metrics, when training is done
artifact/ evaluation.json             what is left at the end
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from learners import adapter, artifact, precision
from learners.base import BaseModel, from_json
from learners.encode import Encoded, Unencodable, encode
from learners.evaluate import logprobs, score
from learners.trainer import fit

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Classify this message and answer with one word.",
    "What is the capital of France? The capital of France is Paris.",
    "Thank you for your help, I will try again tomorrow.",
)
"""Neutral texts whose log-probs are a version's fingerprint; learned prompts are added to them."""

Json = dict[str, Any]


def run(folder: Path, *, is_main: bool = True) -> None:
    """Do what is left of the job in `folder`; with several workers, `is_main` is the one that measures and writes."""
    if (folder / "evaluation.json").exists():
        return
    spec = json.loads((folder / "spec.json").read_text())
    base, settings = from_json(spec["base"]), spec["learning"]
    report = _reporter(folder) if is_main else lambda _: None
    report({"phase": "loading"})
    kind = spec.get("dtype") or precision.fastest()
    model, tokenizer = adapter.load_base(base.path, kind)
    data = _Data(folder, tokenizer, settings["max_length"])
    trained = folder / "trained"
    is_trained = trained.exists()
    parent = Path(spec["parent"]) if spec["parent"] else None
    shape = {name: settings[name] for name in ("rank", "alpha", "dropout", "seed")}
    model = adapter.attach(model, trained if is_trained else parent, **shape)
    if not is_trained:
        if is_main:
            report({"phase": "measuring the champion"})
            _once(folder / "before.json", lambda: _before(model, data, tokenizer.pad_token_id))
        metrics = fit(
            model, tokenizer, data.of("train"), data.of("validation"), settings, kind, folder / "checkpoints",
            lambda told: report({"phase": "training", **told}),
        )  # fmt: skip
        if is_main:
            _keep(model, base, {**metrics, "precision": kind}, trained)
    if is_main:
        report({"phase": "measuring the candidate"})
        _finish(folder, spec, base, model, tokenizer, data)
        report({"phase": "done"})


class _Data:
    """The job's examples in tokens, by what they are for; those that cannot be encoded are left out, with the reason."""

    def __init__(self, folder: Path, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.skipped: dict[str, str] = {}
        self.rows, self.older = (self._encodable(_read(folder / name)) for name in ("examples.jsonl", "older.jsonl"))

    def _encodable(self, rows: list[Json]) -> list[Json]:
        """The rows with their tokens under `encoded`. What is remembered was drawn by its weight, so it counts once."""
        kept = []
        for row in rows:
            weight = 1.0 if row["source"] == "remembered" else row["weight"]
            try:
                encoded = encode(self._tokenizer, row["messages"], row["reply"], self._max_length, weight)
            except Unencodable as error:
                self.skipped[row["id"]] = str(error)
            else:
                kept.append({**row, "encoded": encoded})
        return kept

    def of(self, split: str) -> list[Encoded]:
        """The examples of one split, in the plan's order."""
        return [row["encoded"] for row in self.rows if row["split"] == split]

    @cached_property
    def held_out(self) -> list[tuple[str, bool, list[str], list[Encoded]]]:
        """Slice, whether it is new, ids and examples of everything that is held out."""
        groups: dict[tuple[str, bool], list[Json]] = {}
        for rows, is_new in ((self.rows, True), (self.older, False)):
            for row in rows:
                if row["split"] == "holdout":
                    groups.setdefault((row["slice"], is_new), []).append(row)
        for name, is_new in [key for key in groups if not key[1] and (key[0], True) in groups]:
            groups[f"{name} (older)", False] = groups.pop((name, is_new))
        return [(n, new, [r["id"] for r in rows], [r["encoded"] for r in rows]) for (n, new), rows in sorted(groups.items())]


def _before(model: Any, data: _Data, pad_id: int) -> Json:
    """Scores of the base and of the champion, from which training starts, on everything held out."""
    found = {}
    for name, _, _, examples in data.held_out:
        with adapter.without(model):
            base = score(model, examples, pad_id).as_json()
        found[name] = {"base": base, "champion": score(model, examples, pad_id).as_json()}
    return found


def _keep(model: Any, base: BaseModel, metrics: Json, trained: Path) -> None:
    """Write the trained adapter, whole or not at all; a job that dies after this does not train again."""
    aside = trained.with_name(".trained")
    shutil.rmtree(aside, ignore_errors=True)
    adapter.write(model, aside, base.name)
    _write(aside / "metrics.json", metrics)
    artifact.flush(*aside.iterdir(), aside)
    aside.rename(trained)


def _finish(folder: Path, spec: Json, base: BaseModel, model: Any, tokenizer: Any, data: _Data) -> None:
    """Measure the candidate, make the version's folder, and say so last."""
    before = json.loads((folder / "before.json").read_text())
    slices = {
        name: {
            "is_new": is_new,
            "ids": ids,
            **before[name],
            "candidate": score(model, examples, tokenizer.pad_token_id).as_json(),
        }
        for name, is_new, ids, examples in data.held_out
    }
    aside = folder / ".artifact"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in (adapter.WEIGHTS, adapter.CONFIG):
        shutil.copyfile(folder / "trained" / name, aside / name)
    artifact.seal(aside, _manifest(folder, spec, base, data), _fingerprint(model, tokenizer, data.of("train")[:4]))
    shutil.rmtree(folder / "artifact", ignore_errors=True)
    aside.rename(folder / "artifact")
    _write(folder / "evaluation.json", {"slices": slices})
    for name in ("checkpoints", "trained"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _manifest(folder: Path, spec: Json, base: BaseModel, data: _Data) -> Json:
    learned = [{name: row[name] for name in ("id", "weight", "source", "split")} for row in data.rows]
    return {
        **{name: spec[name] for name in ("line", "learning", "parent")},
        "job": spec["id"],
        "base": base.digests,
        "examples": learned,
        "skipped": data.skipped,
        "metrics": json.loads((folder / "trained" / "metrics.json").read_text()),
    }


def _fingerprint(model: Any, tokenizer: Any, learned: Sequence[Encoded]) -> Json:
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES] + [e.input_ids for e in learned]
    probes = []
    for ids in texts:
        with adapter.without(model):
            base = logprobs(model, ids)
        probes.append({"token_ids": ids, "adapter": logprobs(model, ids), "base": base})
    return {"probes": probes}


def _reporter(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    return lambda told: _write(folder / "progress.json", dict(told))


def _once(path: Path, make: Callable[[], Json]) -> None:
    if not path.exists():
        _write(path, make())


def _read(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, body: Json) -> None:
    """Whole or not at all: written aside, flushed, renamed."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)

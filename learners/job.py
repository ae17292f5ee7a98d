"""One update from start to finish, all of it in the job's folder, so that any process may take it up again.

spec.json *.jsonl                     what to do (written by whoever asks)
before.json compared.json             what base and champion give, kept while training
checkpoints/ preference/              where training goes on after a death
trained/                              the adapter and the trainer's metrics, when training is done
artifact/ evaluation.json             what is left at the end
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from learners import adapter, afterwards, artifact, pace, precision, servable
from learners.base import BaseModel, from_json
from learners.comparison import NEUTRAL_FILE, Comparison
from learners.encode import Encoded, Unencodable, encode, key_of
from learners.evaluate import logprobs, score
from learners.initial import MIRRORED
from learners.sharding import is_sharded
from learners.strategy import STRATEGIES, Beside
from learners.trainer import GATHERED, fit

Json = dict[str, Any]


def run(folder: Path, *, is_main: bool = True) -> None:
    """Do what is left of the job in `folder`; with several workers, `is_main` is the one that measures and writes."""
    if (folder / "evaluation.json").exists():
        return
    update = _Update(folder, is_main=is_main)
    if not update.is_trained:
        update.measure_champion()
        update.train()
    if is_main:
        update.conclude()


class _Update:
    """A job under way: the base with the adapter on it, what it learns from, and how."""

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        self._folder, self._is_main = folder, is_main
        self._report = _reporter(folder) if is_main else lambda _: None
        self._report({"phase": "loading"})
        self._spec = json.loads((folder / "spec.json").read_text())
        self._base, self._settings = from_json(self._spec["base"]), self._spec["learning"]
        self._strategy = STRATEGIES[self._settings["strategy"]]
        asked = self._spec.get("dtype") or self._settings.get("precision", "auto")
        self._kind = precision.fastest() if asked == "auto" else asked
        self._parent = Path(self._spec["parent"]) if self._spec["parent"] else None
        if self._parent is not None:
            artifact.check_base(self._parent, self._base)
        self._is_sharded = is_sharded({**self._settings, **self._spec.get("trainer", {})})
        model, self._tokenizer = adapter.load_base(self._base.path, self._kind)
        self._data = _Data(folder, self._tokenizer, self._settings["max_length"])
        self._shape = {**_shape(self._settings), "is_fused": not self._is_sharded}
        trained = folder / "trained"
        self.is_trained = trained.exists()
        self._model = adapter.attach(model, trained if self.is_trained else self._parent, **self._shape)
        if self._spec.get("trainer", {}).get("threads") == 0:
            pace.follow(self._model.get_input_embeddings())
        older = [example for _, is_new, _, examples in self._data.held_out if not is_new for example in examples]
        self._comparison = Comparison(folder, self._tokenizer, self._settings["max_length"], older)

    def measure_champion(self) -> None:
        """Note what base and champion give, once."""
        if self._is_main:
            self._report({"phase": "measuring the champion"})
            _once(self._folder / "before.json", lambda: _before(self._model, self._data, self._tokenizer.pad_token_id))
            _once(self._folder / "compared.json", lambda: self._comparison.before(self._model))

    def train(self) -> None:
        """Imitate, then learn from opinions, and keep what came of it."""
        options = {**self._settings, **self._spec.get("trainer", {})}
        after = afterwards.Afterwards(
            self._folder, self._model, self._tokenizer, options, self._kind, self._penalty
        )  # while the adapter is the champion's
        metrics = after.learn(self._imitate, self._keep, self._report)
        self._keep({**metrics, "precision": self._kind}, self._folder / "trained")

    def conclude(self) -> None:
        """Leave what the next job needs, measure the candidate, and make the version's folder."""
        self._report({"phase": "consolidating"})
        before, learned = artifact.consolidation(self._parent), self._data.of("train", "fresh")
        if self._strategy.is_from_base:  # what the champion left is of other factors, and all that is remembered was learned anew
            before, learned = {}, learned + self._data.of("train", "remembered")
        kept = {key_of(name) for name in self._spec["kept"]} if "kept" in self._spec else None
        pad_id, factors = self._tokenizer.pad_token_id, adapter.factors(self._model)
        leaves = STRATEGIES[self._spec.get("leaves", self._strategy.name)]
        state = leaves.consolidate(self._model, factors, before, learned, pad_id, self._settings, kept)
        self._report({"phase": "measuring the candidate"})
        compared = self._comparison.after(self._model, json.loads((self._folder / "compared.json").read_text()))
        warnings = afterwards.warnings(json.loads((self._folder / "trained" / "metrics.json").read_text()))
        beside = {**compared, "looks": self._spec.get("looks", {}), "warnings": warnings}
        _finish(self._folder, self._spec, self._base, self._model, self._tokenizer, self._data, state, beside)
        self._report({"phase": "done"})

    def _imitate(self) -> Json:
        """Learn to give the replies of the examples, by the strategy."""
        strategy, settings, data = self._strategy, self._settings, self._data
        is_fresh, is_stacked = self._parent is None or strategy.is_from_base, strategy.is_stacked and self._parent is not None
        if strategy.is_from_base:
            adapter.renew(self._model, settings["seed"], self._shape["init"])
        if is_stacked:
            adapter.stack(self._model, settings["seed"])
        training, options = data.of("train"), {**settings, **self._spec.get("trainer", {})}
        remembered = data.of("train", "remembered")
        rehearsed = data.rehearsed(None if strategy.is_from_base else settings.get("replay_ratio"))
        surplus = 1 - rehearsed / len(remembered) if remembered else 0.0
        penalty = self._penalty(_reply_tokens(training) - round(surplus * _reply_tokens(remembered)))
        distillation = strategy.distillation(remembered, artifact.consolidation(self._parent), settings)
        metrics = fit(
            self._model, self._tokenizer, training, data.validation(), options, self._kind, self._folder / "checkpoints",
            lambda told: self._report({"phase": "training", **told}), penalty, distillation, rehearsed,
        )  # fmt: skip
        if self._is_sharded and self._is_main:
            base = adapter.load_base(self._base.path, self._kind)[0]
            self._model = adapter.attach(base, self._folder / "checkpoints" / GATHERED, **self._shape)
        if is_stacked:
            metrics["compression_error"] = adapter.compress(self._model, settings["rank"])
        if is_fresh and self._shape["init"] in MIRRORED:
            adapter.settle(self._model)
        return metrics

    def _penalty(self, items: int) -> Beside | None:
        """The strategy's penalty beside a loss that is a mean over so many items, anchored where the adapter is now."""
        factors, left = adapter.factors(self._model), artifact.consolidation(self._parent)
        return self._strategy.penalty(factors, left, items, self._settings)

    def _keep(self, metrics: Json, place: Path) -> None:
        if self._is_main:
            _keep(self._model, self._base, metrics, place)


def _reply_tokens(examples: Sequence[Encoded]) -> int:
    return sum(example.reply_length for example in examples)


def _shape(settings: Mapping[str, Any]) -> Json:
    """What an adapter is attached by; a job's folder from before there were variants names none."""
    plain = {name: settings[name] for name in ("rank", "alpha", "dropout", "seed")}
    return {**plain, "init": settings.get("init", "default"), "rslora": settings.get("rslora", False)}


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
                kept.append({**row, "encoded": replace(encoded, key=key_of(row["id"]), source=row["source"])})
        return kept

    def of(self, split: str, source: str = "") -> list[Encoded]:
        """The examples of one split, or of one source of it, in the plan's order."""
        return [row["encoded"] for row in self.rows if row["split"] == split and source in ("", row["source"])]

    def rehearsed(self, ratio: float | None) -> int:
        """Remembered examples of an epoch, so many for each fresh one (None: all); the plan may hold others for the next one."""
        there = len(self.of("train", "remembered"))
        return there if ratio is None else min(there, round(ratio * len(self.of("train", "fresh"))))

    def validation(self) -> list[Encoded]:
        """What decides which checkpoint is kept: of what is new, and of other slices, lest it be one that forgot."""
        return [row["encoded"] for row in (*self.rows, *self.older) if row["split"] == "validation"]

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
    """Write the adapter as trained so far, whole or not at all; a job that dies after this does not do that part again."""
    aside = trained.with_name(f".{trained.name}")
    shutil.rmtree(aside, ignore_errors=True)
    adapter.write(model, aside, base.name)
    _write(aside / "metrics.json", metrics)
    artifact.flush(*aside.iterdir(), aside)
    aside.rename(trained)


def _finish(
    folder: Path, spec: Json, base: BaseModel, model: Any, tokenizer: Any, data: _Data, state: artifact.State, beside: Json
) -> None:
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
    for name in (servable.WEIGHTS, servable.CONFIG):
        shutil.copyfile(folder / "trained" / name, aside / name)
    artifact.seal(aside, _manifest(folder, spec, base, data), _fingerprint(model, tokenizer, data.of("train")[:4]), state)
    shutil.rmtree(folder / "artifact", ignore_errors=True)
    aside.rename(folder / "artifact")
    _write(folder / "evaluation.json", {"slices": slices, **beside})
    for name in (NEUTRAL_FILE, "compared.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", afterwards.FOLDER, "trained"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _manifest(folder: Path, spec: Json, base: BaseModel, data: _Data) -> Json:
    learned = [{name: row[name] for name in ("id", "weight", "source", "split")} for row in data.rows]
    return {
        **{name: spec[name] for name in ("line", "learning", "parent")},
        "job": spec["id"],
        "base": base.digests,
        "examples": learned,
        "skipped": data.skipped,
        "suites": spec.get("suites", {}),
        "general": spec.get("general"),
        **afterwards.manifest(folder),
        "metrics": json.loads((folder / "trained" / "metrics.json").read_text()),
    }


def _fingerprint(model: Any, tokenizer: Any, learned: Sequence[Encoded]) -> Json:
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in artifact.PROBES] + [e.input_ids for e in learned]
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

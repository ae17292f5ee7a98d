"""What is remembered of each slice: a keyed weighted reservoir, which does not care in what order it was filled.

Efraimidis & Spirakis (2006): item i of weight w gets the key u^(1/w), u uniform in (0, 1), and the items with the
largest keys stay; the chance of a place is then proportional to w, at each draw without replacement. Here u is a hash
of the seed and the item's id, so the same items give the same sample in any order, on any machine, and two samples
merge into the sample of both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from replay.records import Example, Split


def key(seed: int, example_id: str, weight: float = 1.0) -> float:
    """Give ln(u)/w, which orders as u^(1/w) does and does not underflow; u has 52 bits and is never 0 or 1."""
    bits = int.from_bytes(hashlib.sha256(f"{seed}:{example_id}".encode()).digest()[:8], "big") >> 12
    return math.log((bits + 0.5) / 2**52) / weight


class Reservoir:
    """The `capacity` examples with the largest keys."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 0:
            msg = f"a reservoir's capacity cannot be {capacity}"
            raise ValueError(msg)
        self.capacity = capacity
        self.seed = seed
        self._kept: dict[str, Example] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, example_id: object) -> bool:
        return example_id in self._kept

    def examples(self) -> list[Example]:
        """Give what is kept, the largest key first."""
        return sorted(self._kept.values(), key=self._rank)

    def add(self, *examples: Example) -> None:
        """Offer examples; one of an id that is kept takes its place."""
        for example in examples:
            if not example.weight > 0:
                msg = f"example {example.id} has weight {example.weight}: it must be positive"
                raise ValueError(msg)
            self._kept[example.id] = example
        self.resize(self.capacity)

    def merge(self, other: Reservoir) -> None:
        """Become the sample of what both were offered; they must share a seed."""
        if other.seed != self.seed:
            msg = f"reservoirs of seeds {self.seed} and {other.seed} have unlike keys and cannot merge"
            raise ValueError(msg)
        self.add(*other.examples())

    def delete(self, example_id: str) -> bool:
        """Forget an example and say whether it was kept. The next best is in the log: `fill` anew to have it."""
        return self._kept.pop(example_id, None) is not None

    def resize(self, capacity: int) -> None:
        """Change the capacity; a smaller one keeps the largest keys."""
        self.capacity = capacity
        if len(self._kept) > capacity:
            self._kept = {e.id: e for e in self.examples()[:capacity]}

    def _rank(self, example: Example) -> tuple[float, str]:
        return (-key(self.seed, example.id, example.weight), example.id)


class Buffer:
    """One reservoir a slice; a slice that does not fill its equal share leaves the rest of it to the others."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.seed = seed
        self.slices: dict[str, Reservoir] = {}

    def __len__(self) -> int:
        return sum(map(len, self.slices.values()))

    def examples(self) -> list[Example]:
        """Give all that is remembered, slice by slice."""
        return [example for name in sorted(self.slices) for example in self.slices[name].examples()]

    def add(self, *examples: Example) -> None:
        """Offer examples, each to its slice; only those of the training split are ever remembered."""
        offered: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            if example.split is Split.TRAIN:
                offered[example.slice].append(replace(example, source="remembered"))
        for name, members in offered.items():
            reservoir = self.slices.setdefault(name, Reservoir(self.capacity, self.seed))
            reservoir.resize(self.capacity)
            reservoir.add(*members)
        self._rebalance()

    def merge(self, other: Buffer) -> None:
        """Become the buffer of what both were offered."""
        if other.seed != self.seed:
            msg = f"buffers of seeds {self.seed} and {other.seed} have unlike keys and cannot merge"
            raise ValueError(msg)
        self.add(*other.examples())

    def delete(self, *example_ids: str) -> int:
        """Forget examples wherever they are. Returns how many were remembered."""
        return sum(reservoir.delete(i) for reservoir in self.slices.values() for i in example_ids)

    def to_json(self) -> str:
        """Write the buffer as one JSON document."""
        return json.dumps({"capacity": self.capacity, "seed": self.seed, "examples": [asdict(e) for e in self.examples()]})

    @classmethod
    def from_json(cls, text: str) -> Buffer:
        """Read what `to_json` wrote."""
        document: dict[str, Any] = json.loads(text)
        buffer = cls(document["capacity"], document["seed"])
        buffer.add(*map(_example, document["examples"]))
        return buffer

    def _rebalance(self) -> None:
        for name, share in shares({n: len(r) for n, r in self.slices.items()}, self.capacity).items():
            self.slices[name].resize(share)


def shares(wanted: Mapping[str, int], capacity: int) -> dict[str, int]:
    """Split `capacity` among slices: none gets more than it wants, the rest share equally, a remainder goes by name.

    A slice that wants more can only shrink the others' shares, which is what makes a buffer free of order.
    """
    given: dict[str, int] = {}
    while hungry := sorted(wanted.keys() - given.keys()):
        share, remainder = divmod(capacity - sum(given.values()), len(hungry))
        if sated := [name for name in hungry if wanted[name] <= share]:
            given |= {name: wanted[name] for name in sated}
        else:
            given |= {name: share + (place < remainder) for place, name in enumerate(hungry)}
    return given


def fill(examples: Iterable[Example], capacity: int, seed: int = 0) -> Buffer:
    """Make the buffer of these examples: the same for the same log, however often it is made."""
    buffer = Buffer(capacity, seed)
    buffer.add(*examples)
    return buffer


def _example(fields: dict[str, Any]) -> Example:
    return Example(**{**fields, "messages": tuple(fields["messages"]), "split": Split(fields["split"])})

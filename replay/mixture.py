"""The plan of a job's data: fresh, remembered and general examples, evenly interleaved by a seed. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from replay.records import Example, Split, asked_digest


def drawn_in_all(replay_ratio: float, epochs: float) -> float:
    """Remembered examples that a job draws for each fresh one, so that each of its epochs rehearses others by `replay_ratio`."""
    return replay_ratio * max(1, math.ceil(epochs))


def mix(
    fresh: Sequence[Example],
    remembered: Sequence[Example],
    general: Sequence[Example],
    replay_ratio: float,
    seed: int,
) -> list[Example]:
    """Give the training examples in the order to learn them, tagged by `source`; fresh ones held out come last.

    For each fresh one that trains, `replay_ratio` remembered ones are drawn by hash, as far as there are any (`math.inf`: all,
    also beside no fresh one); all of `general` is taken.
    What was asked afresh is not remembered too: its old answer may be the one that was corrected.
    Raises `ValueError` when something remembered or general is not of the training split.
    """
    strays = [e.id for e in (*remembered, *general) if e.split is not Split.TRAIN]
    if strays:
        msg = f"{len(strays)} held-out examples among those to rehearse, {strays[0]!r} the first: they must never train"
        raise ValueError(msg)
    training = [e for e in fresh if e.split is Split.TRAIN]
    held_out = [replace(e, source="fresh") for e in fresh if e.split is not Split.TRAIN]
    asked = {asked_digest(e.line, e.messages) for e in training}
    old = [e for e in remembered if asked_digest(e.line, e.messages) not in asked]
    drawn = _shuffled(old, seed)[: None if math.isinf(replay_ratio) else round(replay_ratio * len(training))]
    plan = _spread(training, "fresh", seed) + _spread(drawn, "remembered", seed) + _spread(general, "general", seed)
    return [example for _, example in sorted(plan, key=lambda place: (place[0], place[1].id))] + held_out


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    return sorted(examples, key=lambda e: (_draw(seed, e.id), e.id))


def _spread(
    examples: Sequence[Example], source: Literal["fresh", "remembered", "general"], seed: int
) -> list[tuple[float, Example]]:
    """Shuffle, then give the i-th of n a random place in the i-th n-th of [0, 1): even all along, yet in no pattern."""
    shuffled = _shuffled(examples, seed)
    return [((i + _draw(seed, f"place:{e.id}")) / len(shuffled), replace(e, source=source)) for i, e in enumerate(shuffled)]


def _draw(seed: int, name: str) -> float:
    return int.from_bytes(hashlib.sha256(f"mixture:{seed}:{name}".encode()).digest()[:6], "big") / 2**48

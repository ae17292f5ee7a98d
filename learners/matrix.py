"""The matrix of forgetting and what is read from it. Pure.

`R[t][j]` is the score on task j after version t, both counted from 0; `b[j]` is the base's. Definitions: Lopez-Paz &
Ranzato 2017 (backward and forward transfer), Chaudhry et al. 2018 (forgetting). Public libraries differ in them: these
divide by T - 1, and forgetting looks at the best score *before* the last version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a sequence of versions gained and lost; `backward` and `forgetting` need two tasks, else they are 0."""

    average: float
    backward: float
    forward: float
    forgetting: float


def transfer(scores: Matrix, base: Sequence[float]) -> Transfer:
    """Read a square matrix, with the base's scores beside it; raises `ValueError` when it is not square."""
    count = len(scores)
    if not count or any(len(row) != count for row in scores) or len(base) != count:
        raise ValueError("the matrix must be square, with one base score for each task")
    last = scores[-1]
    pairs = max(count - 1, 1)
    return Transfer(
        average=sum(last) / count,
        backward=sum(last[j] - scores[j][j] for j in range(count - 1)) / pairs,
        forward=sum(scores[j - 1][j] - base[j] for j in range(1, count)) / pairs,
        forgetting=sum(max(scores[t][j] for t in range(j, count - 1)) - last[j] for j in range(count - 1)) / pairs,
    )

"""The matrix of learning and what is read from it. Pure.

`R[t][j]` is the score on slice j after version t, `b[j]` the base's, `a[j]` that of joint training, all counted from 0; slice j
is learned by version `learned[j]`, in a sequence of tasks by version j. Definitions: Lopez-Paz & Ranzato 2017 (backward and
forward transfer), Chaudhry et al. 2018 (forgetting, intransigence). Public libraries differ in them: these divide by the number
of slices in the sum, which is T - 1 for T tasks, and forgetting looks at the best score *before* the last version.

Beside the matrix stands what the stream itself says, the prequential score: how good the version that served was at each new
example before any version learned of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Matrix = Sequence[Sequence[float]]

FADING = 0.995
"""By which an example counts less with each one that comes after it: the last 200 make up most of the mean."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a sequence of versions gained and lost, in the score's unit; a mean over no slices is 0."""

    average: float
    """After the last version, over all slices."""
    backward: float
    """What slices gained since the version that learned them: below 0, they were forgotten."""
    forward: float
    """What slices had gained on the base just before they were learned."""
    forgetting: float
    """What slices lost since the version before the last that was best at them; below 0 when the last one is the best."""
    intransigence: float | None
    """By how much joint training is better at what the last version learned; None without joint training's scores."""


def transfer(
    scores: Matrix, base: Sequence[float], joint: Sequence[float] | None = None, learned: Sequence[int] | None = None
) -> Transfer:
    """Read a matrix of versions by slices; without `learned` it must be square. Raises `ValueError` when shapes differ."""
    since = range(len(scores)) if learned is None else learned
    beside = [base, since] if joint is None else [base, since, joint]
    if not scores or any(len(row) != len(since) for row in [*scores, *beside]):
        raise ValueError(
            "the matrix must have a column for each slice, with one score beside it each, and be square without `learned`"
        )
    last, final = len(scores) - 1, scores[-1]
    old = [(j, t) for j, t in enumerate(since) if t < last]
    return Transfer(
        average=_mean(final),
        backward=_mean([final[j] - scores[t][j] for j, t in old]),
        forward=_mean([scores[t - 1][j] - base[j] for j, t in enumerate(since) if t > 0]),
        forgetting=_mean([max(row[j] for row in scores[t:last]) - final[j] for j, t in old]),
        intransigence=None if joint is None else _mean([joint[j] - final[j] for j, t in enumerate(since) if t == last]),
    )


@dataclass(frozen=True, slots=True)
class Prequential:
    """Test, then train (Dawid 1984; Gama, Sebastião & Rodrigues 2013): the mean of a stream's scores e_1 … e_n, and a faded one.

        mean = Σ e_i / n        faded = S_n / N_n,    S_n = e_n + α S_(n-1),    N_n = 1 + α N_(n-1)

    Each is scored by the version that serves before any version learns of it, in the score's unit.
    """

    items: int = 0
    mean: float = 0.0
    faded: float = 0.0
    """How it is lately: Σ α^(n-i) e_i / Σ α^(n-i)."""
    weight: float = 0.0
    """N_n, which the recursion needs; below 1 / (1 - α)."""

    def extended(self, scores: Iterable[float], fading: float = FADING) -> Prequential:
        """More of the stream, in the order in which it came; `fading` is α."""
        items, mean, total, weight = self.items, self.mean, self.faded * self.weight, self.weight
        for score in scores:
            items += 1
            mean += (score - mean) / items
            total, weight = score + fading * total, 1 + fading * weight
        return Prequential(items, mean, total / weight, weight) if items else self

    def as_json(self) -> dict[str, Any]:
        """As stored and shown: no number where there is no example."""
        return asdict(self) if self.items else {**asdict(self), "mean": None, "faded": None}

    @classmethod
    def from_json(cls, body: Mapping[str, Any] | None) -> Prequential:
        """The inverse; a version from before this was measured has none."""
        return cls(**body) if body and body["items"] else cls()


@dataclass(frozen=True, slots=True)
class History:
    """The matrix of a line's versions as they were made, one from the other: what each was measured on, and no more.

    Held-out sets grow and rotate, so a row's scores are of its own time's examples.
    """

    versions: tuple[str, ...] = ()
    """Rows."""
    slices: tuple[str, ...] = ()
    """Columns, in the order in which they were learned."""
    learned: tuple[int, ...] = ()
    """By column: the row that learned it."""
    base: tuple[float, ...] = ()
    """By column, as measured when it was learned."""
    scores: tuple[tuple[float | None, ...], ...] = ()
    """None where that version was not measured on that slice."""

    def extended(
        self, version: str, before: Mapping[str, float], after: Mapping[str, float], base: Mapping[str, float]
    ) -> History:
        """One version more; `before` is its parent's score by slice, as the same job measured it.

        `before` fills in what the parent had on slices that are new (its score just before they are learned), and nothing
        that the parent's own row already has.
        """
        new = [name for name in sorted(after) if name not in self.slices]
        slices, row = (*self.slices, *new), len(self.scores)
        known = [[*scores, *(None for _ in new)] for scores in self.scores]
        if known:
            known[-1] = [before.get(name) if score is None else score for name, score in zip(slices, known[-1], strict=True)]
        return History(
            versions=(*self.versions, version),
            slices=slices,
            learned=(*self.learned, *(row for _ in new)),
            base=(*self.base, *(base[name] for name in new)),
            scores=(*map(tuple, known), tuple(after.get(name) for name in slices)),
        )

    def transfer(self, joint: Mapping[str, float] | None = None) -> Transfer | None:
        """What is read from it, over the slices that were measured at each point where it counts; None over no slices.

        `joint` are joint training's scores by slice: they count where it has learned all that the last version did first.
        """
        last = len(self.scores) - 1
        kept = [
            place
            for place, since in enumerate(self.learned)
            if all(row[place] is not None for row in self.scores[max(0, since - 1) : last + 1])
        ]
        if not kept:
            return None
        picked = [[row[place] or 0.0 for place in kept] for row in self.scores]
        new = [self.slices[place] for place in kept if self.learned[place] == last]
        is_known = joint is not None and new and all(name in joint for name in new)
        bound = [joint.get(self.slices[place], 0.0) for place in kept] if joint is not None and is_known else None
        return transfer(picked, [self.base[place] for place in kept], bound, [self.learned[place] for place in kept])

    def last(self) -> dict[str, float]:
        """The last version's scores by slice."""
        row = self.scores[-1] if self.scores else ()
        return {name: score for name, score in zip(self.slices, row, strict=True) if score is not None}

    def as_json(self) -> dict[str, Any]:
        """As stored and shown: the matrix, and what is read from it."""
        read = self.transfer()
        return {**asdict(self), "transfer": asdict(read) if read else None}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> History:
        """The inverse of `as_json`; a line without a history has an empty body."""
        if not body:
            return cls()
        plain = {name: tuple(body[name]) for name in ("versions", "slices", "learned", "base")}
        return cls(**plain, scores=tuple(map(tuple, body["scores"])))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)

"""Which of the new examples made a candidate lose a slice? Delta debugging: train on halves, keep the half that loses. Pure.

All of the examples together have lost the slice. Each step trains on one half of those that are suspected: when that half loses
the slice as well, the harmful ones are sought there, and when neither half does, it takes more of them than a half has, and the
search ends. So whatever is named was itself seen to lose the slice, and at most two jobs are spent on each halving. (The simple
case of Zeller & Hildebrandt 2002: it follows one half. Where both are harmful the other is found by the next search.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Outcome = Literal["loses", "keeps", "unknown"]
"""What training on some examples did to the slice; `unknown`: the job said nothing of it."""


@dataclass(frozen=True, slots=True)
class Search:
    """How far it has come."""

    suspects: tuple[str, ...]
    """Ids of the fewest examples known to lose the slice together."""
    asked: int
    """How many there were at first."""
    jobs_left: int
    is_second: bool = False
    """The first half of them keeps the slice: it is the second one's turn."""

    @property
    def half(self) -> tuple[str, ...]:
        """The examples that are tried next."""
        middle = len(self.suspects) // 2
        return self.suspects[middle:] if self.is_second else self.suspects[:middle]

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {**asdict(self), "suspects": list(self.suspects)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Search:
        """The inverse of `to_json`."""
        return cls(**{**body, "suspects": tuple(body["suspects"])})


@dataclass(frozen=True, slots=True)
class End:
    """What a search has come to."""

    outcome: Literal["found", "not_found"]
    named: tuple[str, ...]
    """The examples that are to be held; none when not found."""
    reason: str


def begin(suspects: Sequence[str], jobs: int) -> Search:
    """A search over the ids of what was trained on, with at most so many jobs."""
    return Search(tuple(suspects), len(suspects), jobs)


def proceed(search: Search, outcome: Outcome) -> Search | End:
    """Go on from what the half has shown: the next half to try, or the end."""
    left = replace(search, jobs_left=search.jobs_left - 1)
    if outcome == "unknown":
        return _end(left, "a job came to no verdict")
    if outcome == "loses":
        return check(replace(left, suspects=search.half, is_second=False))
    if search.is_second:
        return _end(left, "neither half of them does it alone")
    return check(replace(left, is_second=True))


def check(search: Search) -> Search | End:
    """The search itself when it can go on, else its end."""
    if len(search.suspects) <= 1:
        return _end(search, "it does it alone")
    return search if search.jobs_left > 0 else _end(search, "out of jobs")


def lost(verdict: Mapping[str, Any] | None) -> str | None:
    """The slice that a verdict of the gate says was lost, the worst when there are several; None: no slice was."""
    failed = [one for one in (verdict or {}).get("findings", ()) if one["must"] == "not_lose" and one["outcome"] == "fail"]
    return min(failed, key=lambda one: one["low"])["name"] if failed else None


def outcome_of(verdict: Mapping[str, Any] | None, name: str) -> Outcome:
    """What a verdict says of the slice `name`."""
    if verdict is None:
        return "unknown"
    found = [one for one in verdict["findings"] if one["must"] == "not_lose" and one["name"] == name]
    return "loses" if any(one["outcome"] == "fail" for one in found) else "keeps"


NARROW = 4
"""What is named is held when it is at most this part of all: a search that ended early accuses too many."""


def _end(search: Search, why: str) -> End:
    count, asked = len(search.suspects), search.asked
    told = f"{count} of {asked} examples lose the slice: {why}"
    return End("found", search.suspects, told) if count * NARROW <= asked else End("not_found", (), told)

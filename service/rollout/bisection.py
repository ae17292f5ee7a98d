"""Which of the new examples made a candidate lose a slice? Delta debugging: train on halves, keep the half that loses. Pure.

All of the examples together have lost the slice. Each step trains on one half of those that are suspected: when that half loses
the slice as well, the harmful ones are sought there, and when neither half does, it takes more of them than a half has, and the
search ends. So whatever is named was itself seen to lose the slice, and at most two jobs are spent on each halving. (The simple
case of Zeller & Hildebrandt 2002: it follows one half. Where both are harmful the other is found by the next search.)

A job on a handful of examples may lose a slice whichever they are. So before anybody is named as many of the others are tried,
at most twice, those first that were seen to keep the slice: only where some of them keep it, it is those named that lose it.
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
    others: tuple[str, ...] = ()
    """Those no longer suspected, first the ones that were seen to keep the slice."""
    control: int = 0
    """Which control is tried, counted from 1; 0: none yet, the suspects are halved."""

    @property
    def half(self) -> tuple[str, ...]:
        """The examples that are tried next."""
        if self.control:
            count = len(self.suspects)
            return self.others[:count] if self.control == 1 else self.others[-count:]
        middle = len(self.suspects) // 2
        return self.suspects[middle:] if self.is_second else self.suspects[:middle]

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {**asdict(self), "suspects": list(self.suspects)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Search:
        """The inverse of `to_json`."""
        return cls(**{**body, "suspects": tuple(body["suspects"]), "others": tuple(body.get("others", ()))})


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
    """Go on from what the examples tried have shown: the next ones to try, or the end."""
    left = replace(search, jobs_left=search.jobs_left - 1)
    if search.control:
        return _compared(left, outcome)
    if outcome == "unknown":
        return _end(left, "a job came to no verdict")
    if outcome == "loses":
        half = search.half
        rest = tuple(one for one in search.suspects if one not in half)
        others = rest + search.others if search.is_second else search.others + rest
        return check(replace(left, suspects=half, is_second=False, others=others))
    if search.is_second:
        return _end(left, "neither half of them does it alone")
    return check(replace(left, is_second=True))


def check(search: Search) -> Search | End:
    """The search itself when it can go on, else its end; the last job is kept for the control."""
    if len(search.suspects) <= 1:
        return _end(search, "it does it alone")
    return search if search.jobs_left > 1 else _end(search, "out of jobs")


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
CONTROLS = 2
"""Of as many others each: in one of them there may be harmful ones too."""


def _end(search: Search, why: str) -> Search | End:
    if len(search.suspects) * NARROW > search.asked or len(search.others) < len(search.suspects) or search.jobs_left < 1:
        return End("not_found", (), f"{_lose(search)}: {why}")
    return replace(search, control=1)


def _compared(search: Search, outcome: Outcome) -> Search | End:
    if outcome == "keeps":
        return End("found", search.suspects, f"{_lose(search)}, as many others keep it")
    if outcome == "unknown":
        return End("not_found", (), f"{_lose(search)}: a job came to no verdict")
    if search.control < CONTROLS and search.jobs_left > 0:
        return replace(search, control=search.control + 1)
    return End("not_found", (), f"{_lose(search)}, and as many others lose it too: so few may lose it whichever they are")


def _lose(search: Search) -> str:
    return f"{len(search.suspects)} of {search.asked} examples lose the slice"

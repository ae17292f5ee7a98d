"""Which of the new examples made a candidate lose a slice? Delta debugging: train on halves, keep the half that loses. Pure.

All of the examples together have lost the slice. Each step trains on both halves of those that are suspected, one after another:
the harmful ones are sought in the half that loses the slice as well, and where both do, in the one that loses more of it, since a
lesson in something else may cost the slice a little by mere forgetting. When neither half does, it takes more of them than a half
has, and the search ends. So whatever is named was itself seen to lose the slice, and two jobs are spent on each halving. (The
simple case of Zeller & Hildebrandt 2002: it follows one half. Where both are harmful the other is found by the next search.)

The first cut is between two slices, where the examples are of several: a group is named as a whole, and right lessons of another
skill are not to go with it.

A job on a handful of examples may lose a slice whichever they are. So each rehearses as much as the one that lost the slice, and
none is on fewer than the batch of an optimiser step: a half that has fewer is filled up with others that were seen to keep the
slice. And before anybody is named as many of the others are tried, at most twice, those first that keep it: only where some of
them do, it is those named that lose it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Outcome = Literal["loses", "keeps", "unknown"]
"""What training on some examples did to the slice; `unknown`: the job said nothing of it."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a job on some examples has shown."""

    outcome: Outcome
    loss: float = 0.0
    """How far the candidate's mean score on the slice is below the champion's."""


@dataclass(frozen=True, slots=True)
class Search:
    """How far it has come."""

    suspects: tuple[str, ...]
    """Ids of the fewest examples known to lose the slice together."""
    asked: int
    """How many there were at first."""
    jobs_left: int
    is_second: bool = False
    """The first half of them has been tried: it is the second one's turn."""
    first: float | None = None
    """What the first half has lost of the slice; None: it keeps it."""
    others: tuple[str, ...] = ()
    """Those no longer suspected, first the ones that were seen to keep the slice…"""
    keepers: int = 0
    """…which are so many."""
    smallest: int = 1
    """Fewer are not tried."""
    seam: int = 0
    """Where the suspects are cut instead of in the middle; 0: nowhere."""
    control: int = 0
    """Which control is tried, counted from 1; 0: none yet, the suspects are halved."""

    @property
    def half(self) -> tuple[str, ...]:
        """The examples that are tried next, those among them that fill it up."""
        if self.control:
            count = max(len(self.suspects), self.smallest)
            return self.others[:count] if self.control == 1 else self.others[-count:]
        half = self.suspects[self.middle :] if self.is_second else self.suspects[: self.middle]
        return half + self.others[: min(max(self.smallest - len(half), 0), self.keepers)]

    @property
    def middle(self) -> int:
        """How many of the suspects are in their first half."""
        return self.seam or len(self.suspects) // 2

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


def begin(suspects: Sequence[str], jobs: int, smallest: int = 1, slices: Sequence[str] = ()) -> Search:
    """A search over the ids of what was trained on, with at most so many jobs, each on `smallest` of them at least.

    `slices` are those that the suspects are of, each slice's together.
    """
    return Search(tuple(suspects), len(suspects), jobs, smallest=smallest, seam=_seam(slices, smallest))


def proceed(search: Search, said: Said) -> Search | End:
    """Go on from what the examples tried have shown: the next ones to try, or the end."""
    left = replace(search, jobs_left=search.jobs_left - 1)
    loss = said.loss if said.outcome == "loses" else None
    if search.control:
        return _compared(left, said.outcome)
    if said.outcome == "unknown":
        return _end(left, "a job came to no verdict")
    if not search.is_second:
        return check(replace(left, is_second=True, first=loss))
    if loss is None and search.first is None:
        return _end(left, "neither half of them does it alone", HALF)
    return check(_halved(left, loss))


def _halved(search: Search, second: float | None) -> Search:
    """The half that loses more, with the rest among the others: in front where it keeps the slice."""
    half, rest, left = search.suspects[: search.middle], search.suspects[search.middle :], second
    if search.first is None or (second is not None and second > search.first):
        half, rest, left = rest, half, search.first
    others, more = (rest + search.others, len(rest)) if left is None else (search.others + rest, 0)
    keepers = search.keepers + more
    return replace(search, suspects=half, is_second=False, first=None, others=others, keepers=keepers, seam=0)


def _seam(slices: Sequence[str], smallest: int) -> int:
    """The place nearest to the middle where one slice ends and another begins, with enough on both sides; 0: nowhere."""
    seams = [at for at in range(smallest, len(slices) - smallest + 1) if slices[at - 1] != slices[at]]
    return min(seams, key=lambda at: abs(2 * at - len(slices)), default=0)


def check(search: Search) -> Search | End:
    """The search itself when it can go on, else its end; the last job is kept for the control."""
    if len(search.suspects) == 1:
        return _end(search, "it does it alone", HALF)
    if len(search.suspects) // 2 + search.keepers < search.smallest:
        return _end(search, f"no job is on fewer than {search.smallest}", HALF)
    return search if search.jobs_left > 1 else _end(search, "out of jobs")


def lost(verdict: Mapping[str, Any] | None) -> str | None:
    """The slice that a verdict of the gate says was lost, the worst when there are several; None: no slice was."""
    failed = [one for one in (verdict or {}).get("findings", ()) if one["must"] == "not_lose" and one["outcome"] == "fail"]
    return min(failed, key=lambda one: one["low"])["name"] if failed else None


def said_of(verdict: Mapping[str, Any] | None, name: str) -> Said:
    """What a verdict says of the slice `name`."""
    if verdict is None:
        return Said("unknown")
    found = [one for one in verdict["findings"] if one["must"] == "not_lose" and one["name"] == name]
    failed = [one for one in found if one["outcome"] == "fail"]
    return Said("loses", max(one["champion"] - one["candidate"] for one in failed)) if failed else Said("keeps")


NARROW, HALF = 4, 2
"""What is named is held when it is at most this part of all, rounded up: a quarter where the search ended early, since it accuses
too many then, and a half where it takes all of them or fewer cannot be told apart."""
CONTROLS = 2
"""Of as many others each: in one of them there may be harmful ones too."""


def _end(search: Search, why: str, part: int = NARROW) -> Search | End:
    if (
        len(search.suspects) > math.ceil(search.asked / part)
        or len(search.others) < len(search.suspects) - 1
        or search.jobs_left < 1
    ):
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

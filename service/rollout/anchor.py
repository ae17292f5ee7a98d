"""Has the line become worse, step by step, than a version that somebody trusts? An e-detector that never ends. Pure.

A margin lets each candidate be a little worse, and ten of them may be worse by ten times that. So the anchor answers a small
share of the units for ever, and the champion, whichever it is, is compared with it: by `service.rollout.detector`, on blocks of
one unit of the anchor less the mean of the champion's units since the one before. As long as no block's expectation is over 0,
the mean number of blocks to an alarm at the threshold A is at least A.

The bets go on over all champions since the anchor was set. Units are dealt anew in rounds, by another salt: at each change of the
champion, and after so many units, since the same users, who come again and again, are one sample of users. Within a round a unit
counts once, and what it says is read from the ledger as a trial's units are; only what earlier rounds came to is carried along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from replay.outcomes import Arms, UnitOutcome
from replay.records import Arm
from service.rollout.detector import START, Walk, log_cusum, mixed, peak
from service.rollout.evidence import WHOLE, Interval, confidence_sequence
from service.settings import Anchor

ARMS: Arms = (Arm.ANCHOR, Arm.CHAMPION)
ALPHA = 0.05
"""Of the interval that is shown."""


class Standing(StrEnum):
    """What is known of the line against its anchor."""

    OK = "ok"
    ALARM = "alarm"
    """It is worse; no trial of the line goes forward by itself until a person has named an anchor again."""
    REVERTED = "reverted"
    """It was worse still, and the anchor is the champion."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the comparison."""

    blocks: int = 0
    """Since the anchor was set."""
    log: float = 0.0
    """Of the detector, now."""
    peak: float = 0.0
    """The highest that it has been after a block of this round."""
    walk: Walk = START
    difference: Interval = WHOLE
    """Champion - anchor on the reward's scale, in this round, at each look with probability .95."""
    units: tuple[int, int] = (0, 0)
    """Matured units of anchor and champion in this round."""


@dataclass(frozen=True, slots=True)
class Watch:
    """A line and its anchor, as stored."""

    line: str
    anchor: str | None = None
    """None: the base."""
    since: float = 0.0
    """When a person last named it; 0: nobody has."""
    round: int = 0
    """Counts for ever: a salt is never used again."""
    opened_at: float | None = None
    """When the round began; None: nothing is held back now."""
    champion: str | None = None
    """Who is compared in the round."""
    walk: Walk = START
    """Where the detector stood when the round began."""
    blocks: int = 0
    """In earlier rounds."""
    standing: Standing = Standing.OK
    reason: str = ""
    seen: Seen = field(default_factory=Seen)
    """The last look that was kept."""

    @property
    def name(self) -> str:
        """The round's: under which its units are recorded, and the salt that deals them."""
        return f"{self.line}-anchor{self.round}"

    @property
    def is_open(self) -> bool:
        """Whether the anchor answers its share."""
        return self.opened_at is not None


@dataclass(frozen=True, slots=True)
class Sample:
    """What the matured units of a round come to."""

    differences: tuple[float, ...] = ()
    """Anchor - champion, a block each, oldest first: the detector depends on their order."""
    units: tuple[int, int] = (0, 0)
    """Matured units of anchor and champion."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What there is to see when a watch is judged, reduced to what decides: what is recorded of it."""

    champion: str | None
    """The line's, now."""
    is_held: bool
    """Each live replica has proven the anchor, and there is one; true of the base as soon as there is one."""
    is_refused: bool
    """A replica cannot serve it."""
    sample: Sample | None = None
    """Of the round; None: it is not time to look."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is due."""

    line: str
    does: Literal["open", "close", "alarm", "revert", "note"]
    """Begin a round, end it, tell of harm, go back to the anchor, or keep what was seen."""
    reason: str
    seen: Seen
    """Where the detector stands."""
    champion: str | None = None


def judge(watch: Watch, sight: Sight, policy: Anchor) -> Step | None:
    """Say what is due on a line that has an anchor: the same whenever it is asked again."""
    seen = watch.seen if sight.sample is None else look(watch, sight.sample)
    if not watch.is_open:
        can_open = sight.is_held and sight.champion != watch.anchor and watch.standing is not Standing.REVERTED
        return Step(watch.line, "open", "a round begins", seen, sight.champion) if can_open else None
    if sight.sample is not None and (due := _alarm(watch, sight, seen, policy)) is not None:
        return due
    if why := _ends(watch, sight, seen, policy):
        is_condemned = watch.standing is Standing.ALARM or seen.peak >= np.log(policy.alarm)
        is_begun_anew = sight.champion != watch.champion and is_condemned  # that was the one before: not its successor
        return Step(watch.line, "close", why, replace(seen, walk=START, log=0.0) if is_begun_anew else seen)
    is_news = sight.sample is not None and (seen.blocks, seen.units) != (watch.seen.blocks, watch.seen.units)
    return Step(watch.line, "note", "", seen) if is_news else None


def look(watch: Watch, sample: Sample) -> Seen:
    """Say where the detector stands after the round's units."""
    found = np.asarray(sample.differences, dtype=np.float64)
    path = log_cusum(found, watch.walk)
    walk = tuple(path[-1].tolist()) if len(found) else watch.walk
    return Seen(
        blocks=watch.blocks + len(found),
        log=float(mixed(np.array(walk))),
        peak=peak(path),
        walk=walk,
        difference=confidence_sequence(-found, ALPHA),
        units=sample.units,
    )


def sample(outcomes: Sequence[UnitOutcome]) -> Sample:
    """Reduce a round's units to what decides."""
    matured = [unit.arm for unit in outcomes if unit.is_matured]
    units = (matured.count(Arm.ANCHOR), matured.count(Arm.CHAMPION))
    return Sample(tuple(blocks(outcomes).tolist()), units)


def blocks(outcomes: Sequence[UnitOutcome]) -> NDArray[np.float64]:
    """Anchor - champion: each unit of the anchor less the mean of the champion's units between it and the one before.

    A unit of the anchor that comes while there is none of the champion's is left out, for when it came, not for what it said.
    Units mature in the order of their first answer, so blocks are only ever added.
    """
    found, champion = [], list[float]()
    for unit in sorted(outcomes, key=lambda u: (u.first_at, u.unit)):
        if not unit.is_matured or unit.reward is None:
            continue
        if unit.arm is Arm.CHAMPION:
            champion.append(unit.reward)
        elif champion:
            found.append(unit.reward - sum(champion) / len(champion))
            champion = []
    return np.asarray(found, dtype=np.float64)


def as_json(watch: Watch, policy: Anchor) -> dict[str, Any]:
    """A watch as status and API show it."""
    seen = watch.seen
    return {
        "version": watch.anchor,
        "champion": watch.champion,
        "standing": watch.standing.value,
        "reason": watch.reason,
        "since": watch.since or None,
        "holdback": policy.holdback if watch.is_open else 0.0,
        "blocks": seen.blocks,
        "units": {"anchor": seen.units[0], "champion": seen.units[1]},
        "log_evidence": seen.log,
        "alarm_at": float(np.log(policy.alarm)),
        "revert_at": float(np.log(policy.revert)) if policy.reverts else None,
        "difference": list(seen.difference),
    }


def _alarm(watch: Watch, sight: Sight, seen: Seen, policy: Anchor) -> Step | None:
    if sight.champion != watch.champion:
        return None  # these units speak of another champion; what they say is carried along
    low, high = seen.difference
    told = f"e = {np.exp(seen.peak):.3g} after {seen.blocks} units of the anchor, difference in [{low:+.3f}, {high:+.3f}]"
    if policy.reverts and sight.is_held and seen.peak >= np.log(policy.revert):
        return Step(watch.line, "revert", f"worse_than_anchor: {told}", seen, sight.champion)
    if watch.standing is Standing.OK and seen.peak >= np.log(policy.alarm):
        return Step(watch.line, "alarm", f"worse_than_anchor: {told}", seen, sight.champion)
    return None


def _ends(watch: Watch, sight: Sight, seen: Seen, policy: Anchor) -> str:
    if sight.champion != watch.champion:
        return "the champion changed"
    if sight.is_refused:
        return "a replica cannot serve the anchor"
    return "its units are dealt anew" if seen.units[0] >= policy.round_units else ""

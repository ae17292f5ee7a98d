"""Who meets the candidate: a stable, sticky split of units by hash, pure and without state.

A key (a session, a user, a request) falls on one place in [0, 1). The candidate takes the places under its weight, the
control group as many at the other end, so raising the weight only adds units to both and moves none between them.
"""

from __future__ import annotations

import hashlib

from replay.records import NOBODY, Arm


def place_of(salt: str, key: str) -> float:
    """Where `key` falls in [0, 1]; another `salt` (one for each trial) deals the keys anew."""
    return int(hashlib.sha256(f"{salt}|{key}".encode()).hexdigest()[:16], 16) / 2**64


def arm_at(place: float, weight: float) -> Arm:
    """The side of a trial that answers the unit at `place`: candidate, control, or the champion outside of both."""
    if place < weight:
        return Arm.CANDIDATE
    return Arm.CONTROL if place >= 1 - weight else Arm.CHAMPION


REFERENCES = 9
"""Units of the champion for each of the anchor: nearly all the power that any number of them would have."""


def is_reference(place: float, holdback: float) -> bool:
    """Whether the champion's unit at `place`, dealt by the anchor's salt, is compared with the anchor's, below `holdback`."""
    return place >= max(holdback, 1 - REFERENCES * holdback)


def unit_of(key: str) -> str:
    """The unit of analysis behind a key: 16 hexadecimal characters, the same in every trial, not the key itself.

    That of a request which named nobody says so before them.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{NOBODY}{digest}" if key.startswith(NOBODY) else digest

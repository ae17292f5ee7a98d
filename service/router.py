"""Which version answers: names to versions, pure and sticky.

The registry builds `Desired`, a replica's residency narrows it to what it holds, the gateway asks `resolve` for each
request. Nothing here does I/O or remembers anything.

Names: `support` is the line's champion, split with a candidate while a trial runs · `support@v7` is pinned ·
`support@champion|candidate|previous|anchor|base` by alias · the base's own name is the base. The base stands in for the
champion of a line that has none yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from replay.records import Arm
from service.errors import NotFound
from service.rollout.assignment import arm_at, is_reference, place_of, unit_of
from service.rollout.probe import ProbeResult
from service.settings import Shadow

ALIASES = ("champion", "candidate", "previous", "anchor", "base")


@dataclass(frozen=True, slots=True)
class Resident:
    """A version that replicas must hold in memory."""

    name: str
    """`support@v7`: never re-used for other weights."""
    path: str
    """The version's folder."""
    int_id: int
    """Unique over all lines and for ever: engines cache by it."""


@dataclass(frozen=True, slots=True)
class Shadowing:
    """A candidate that answers a sample of a line's prompts once more, for nobody to read."""

    version: str
    trial: str
    spec: Shadow
    """The share and its limits."""


@dataclass(frozen=True, slots=True)
class Route:
    """How one line's traffic is shared among its versions."""

    line: str
    champion: str | None = None
    """None: the base answers."""
    candidate: str | None = None
    previous: str | None = None
    weight: float = 0.0
    """Share of units that the candidate answers; a control group of the same size is marked."""
    salt: str = ""
    trial: str | None = None
    is_baking: bool = False
    """The candidate is the champion already: the control group stays on the one before."""
    shadow: Shadowing | None = None
    """Beside the traffic, which it changes nothing of."""
    anchor: str | None = None
    """Who answers the holdback; None: the base."""
    holdback: float = 0.0
    watch: str = ""
    """The round in which the anchor is compared, which is also its salt; empty: nothing is held back."""

    @property
    def needed(self) -> frozenset[str]:
        """The versions without which this route cannot answer."""
        names = {self.champion, self.candidate if self.weight > 0 else None, self.previous if self.is_baking else None}
        names |= {self.anchor if self.watch else None}
        return frozenset(name for name in names if name)


@dataclass(frozen=True, slots=True)
class Desired:
    """What should be: the versions to hold and the route table, under a number that only grows."""

    number: int = 0
    resident: tuple[Resident, ...] = ()
    routes: Mapping[str, Route] = field(default_factory=dict)
    versions: tuple[str, ...] = ()
    """Every version that is known, resident or not."""
    is_base_only: bool = False
    """The kill switch keeps every adapter from answering, also by its name."""

    @property
    def resident_names(self) -> frozenset[str]:
        """Names of the versions to hold."""
        return frozenset(version.name for version in self.resident)


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What one replica holds and serves, as it tells the keeper."""

    replica: str
    number: int
    """The `Desired` whose routes it serves in full; -1 before the first."""
    resident: Mapping[str, ProbeResult] = field(default_factory=dict)
    """The verdict on each version that it was asked to hold: only an `ok` one is live."""
    inflight: Mapping[str, int] = field(default_factory=dict)
    """Requests being answered now, by version."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers one request, and why."""

    version: str
    """A resident version's name, or the base's."""
    line: str
    """Empty when the base was asked by its own name."""
    arm: Arm
    unit: str
    trial: str | None = None
    """Set when the request is evidence in that trial, or in that round of the anchor's."""


@dataclass(frozen=True, slots=True)
class Model:
    """One name that clients may write in `model`."""

    id: str
    root: str
    """The version behind the name, or the base's name."""
    parent: str | None = None
    """The base's name, unless this is the base."""


def resolve(desired: Desired, base_name: str, model: str, key: str) -> Choice:
    """Choose who answers a request for `model` under the sticky `key`.

    Raises `NotFound`, naming what exists, for a name that is unknown or not resident.
    """
    unit = unit_of(key)
    if model == base_name:
        return Choice(base_name, "", Arm.BASE, unit)
    line, _, pin = model.partition("@")
    route = desired.routes.get(line)
    if route is None:
        raise _unknown(desired, base_name, f"no model {model!r}")
    if "@" not in model:
        return _split(route, base_name, key, unit)
    if pin == "base":
        return Choice(base_name, line, Arm.BASE, unit)
    if desired.is_base_only:
        raise NotFound(
            f"{model!r} does not answer now: the kill switch is on base_only; ask {line!r}, or the base", param="model"
        )
    version = _aliased(route, base_name, pin) if pin in ALIASES else model
    if version is None:
        raise _unknown(desired, base_name, f"line {line!r} has no {pin} now")
    if version != base_name and version not in desired.resident_names:
        reason = "is not held in memory now" if version in desired.versions else "does not exist"
        raise _unknown(desired, base_name, f"version {version!r} {reason}")
    return Choice(version, line, Arm.PINNED, unit)


def models(desired: Desired, base_name: str) -> Iterator[Model]:
    """Every name that can be asked now: the base, then each line, its aliases and its resident versions."""
    yield Model(base_name, base_name)
    for line, route in desired.routes.items():
        yield Model(line, route.champion or base_name, base_name)
        for alias in ALIASES:
            version = _aliased(route, base_name, alias)
            if version == base_name or version in desired.resident_names:
                yield Model(f"{line}@{alias}", version, base_name)
    for held in desired.resident:
        yield Model(held.name, held.name, base_name)


def _split(route: Route, base_name: str, key: str, unit: str) -> Choice:
    champion = route.champion or base_name
    place = place_of(route.watch, key) if route.watch else 0.0
    if route.watch and place < route.holdback:
        return Choice(route.anchor or base_name, route.line, Arm.ANCHOR, unit, route.watch)
    watch = route.watch if route.watch and is_reference(place, route.holdback) else None
    if route.candidate is None or route.weight <= 0:
        return Choice(champion, route.line, Arm.CHAMPION, unit, watch)
    arm = arm_at(place_of(route.salt, key), route.weight)
    before = route.previous or base_name
    version = {Arm.CANDIDATE: route.candidate, Arm.CONTROL: before if route.is_baking else champion}.get(arm, champion)
    return Choice(version, route.line, arm, unit, watch if arm is Arm.CHAMPION else route.trial)


def _aliased(route: Route, base_name: str, alias: str) -> str | None:
    names = {
        "champion": route.champion or base_name,
        "candidate": route.candidate,
        "previous": route.previous,
        "anchor": route.anchor or (base_name if route.watch else None),
        "base": base_name,
    }
    return names[alias]


def _unknown(desired: Desired, base_name: str, what: str) -> NotFound:
    known = ", ".join(model.id for model in models(desired, base_name))
    return NotFound(f"{what}; these exist: {known}", param="model")

"""Where a trial can stand, which moves are legal, and the trial itself as a record. Pure.

A trial is one candidate against one champion under one frozen policy:

    VERIFYING ─▶ CANARY(step) ─▶ [WAITING] ─▶ PROMOTING ─▶ LIVE
        │             │              │            │
        ▼             ├──────────────┴────────────┴──▶ ROLLING_BACK ─▶ ROLLED_BACK
     REJECTED         └──▶ EXPIRED
    any open stage ──▶ ABORTED (the champion changed under the trial)

`SHADOW`, `HOLD` and `BAKE` are named so that stored trials keep their meaning when those stages come; nothing enters
them yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from service.errors import Conflict
from service.settings import Rollout


class Stage(StrEnum):
    """Where a trial stands."""

    VERIFYING = "verifying"
    """Replicas load the candidate and prove it; it answers nobody."""
    SHADOW = "shadow"
    CANARY = "canary"
    """The candidate answers a share of the units, step by step."""
    HOLD = "hold"
    WAITING = "waiting"
    """It has passed and waits for `learnd promote`."""
    PROMOTING = "promoting"
    """Decided; the alias moves once every live replica holds the candidate."""
    BAKE = "bake"
    LIVE = "live"
    REJECTED = "rejected"
    """Never met traffic: a replica could not load or prove it."""
    ROLLING_BACK = "rolling_back"
    """Out of the route table; not yet seen to be out of every replica's."""
    ROLLED_BACK = "rolled_back"
    EXPIRED = "expired"
    """Out of time or units without a verdict: the champion stays."""
    ABORTED = "aborted"
    """The comparison lost its meaning: the champion changed."""

    @property
    def is_open(self) -> bool:
        """Whether the trial still goes on."""
        return bool(TRANSITIONS[self])

    @property
    def has_traffic(self) -> bool:
        """Whether the candidate stands in the route table."""
        return self in _ROUTED

    @property
    def is_resident(self) -> bool:
        """Whether replicas are to hold the candidate."""
        return self is Stage.VERIFYING or self in _ROUTED


_ROUTED = frozenset({Stage.CANARY, Stage.WAITING, Stage.PROMOTING})

_END: frozenset[Stage] = frozenset()
TRANSITIONS: Mapping[Stage, frozenset[Stage]] = {
    Stage.VERIFYING: frozenset({Stage.CANARY, Stage.PROMOTING, Stage.REJECTED, Stage.ABORTED}),
    Stage.CANARY: frozenset(
        {Stage.CANARY, Stage.WAITING, Stage.PROMOTING, Stage.ROLLING_BACK, Stage.EXPIRED, Stage.ABORTED},
    ),
    Stage.WAITING: frozenset({Stage.PROMOTING, Stage.ROLLING_BACK, Stage.ABORTED}),
    Stage.PROMOTING: frozenset({Stage.LIVE, Stage.ROLLING_BACK, Stage.ABORTED}),
    Stage.ROLLING_BACK: frozenset({Stage.ROLLED_BACK}),
    Stage.SHADOW: _END,
    Stage.HOLD: _END,
    Stage.BAKE: _END,
    Stage.LIVE: _END,
    Stage.REJECTED: _END,
    Stage.ROLLED_BACK: _END,
    Stage.EXPIRED: _END,
    Stage.ABORTED: _END,
}
"""From each stage, the stages that may follow; a stage that nothing follows is an end."""


def check(source: Stage, target: Stage) -> None:
    """Raise `Conflict` unless a trial may move from `source` to `target`."""
    if target not in TRANSITIONS[source]:
        raise Conflict(f"a trial cannot go from {source} to {target}")


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate against one champion, with the policy that was in force when it opened."""

    id: str
    """Also the salt of its assignment: each trial draws its units anew."""
    line: str
    candidate: str
    champion: str | None
    """None: the base itself answers for the line."""
    policy: Rollout
    opened_at: float
    stage: Stage = Stage.VERIFYING
    since: float = 0.0
    """When it entered its stage."""
    step: int = 0
    """Which of the policy's weights is in force."""
    steps: tuple[float, ...] = ()
    """When each weight step opened; units are only compared within one."""
    is_operator: bool = False
    """Opened by a person: it is verified and promoted without a canary."""
    job: str | None = None
    reason: str = ""
    """Why it stands where it stands: a code, and after a colon what it is about."""
    ended_at: float | None = None

    @property
    def weight(self) -> float:
        """The share of units that the candidate gets now."""
        return self.policy.weights[self.step] if self.stage.has_traffic and not self.is_operator else 0.0

"""Where a trial can stand, which moves are legal, and the trial itself as a record. Pure.

A trial is one candidate against one champion under one frozen policy:

    VERIFYING ─▶ [SHADOW] ─▶ CANARY(step) ─▶ [WAITING] ─▶ PROMOTING ─▶ [BAKE] ─▶ LIVE
        │           │         ▲  │              │            │           │
        ▼           ▼         ▼  ├──────────────┴────────────┴───────────┴──▶ ROLLING_BACK ─▶ ROLLED_BACK
     REJECTED ◀─────┘        HOLD┴──▶ EXPIRED
    any open stage ──▶ ABORTED (the champion changed under the trial)

The alias moves as `PROMOTING` ends. In `BAKE` the candidate is the champion, and a share stays on the one before, as a control.
By itself a trial in `HOLD` goes nowhere but out: only a person resumes or promotes it. In `SHADOW` the candidate answers nobody:
what it says to a sample of the prompts is compared, and rejects it or lets it go on (`service.rollout.shadow`).
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
    """The candidate answers a sample of live prompts too, and nobody reads it."""
    CANARY = "canary"
    """The candidate answers a share of the units, step by step."""
    HOLD = "hold"
    """A canary that cannot be trusted, that a person paused, or that replicas did not hold when it was to be promoted: the weight
    stays, nothing goes forward."""
    WAITING = "waiting"
    """It has passed and waits for `learnd promote`."""
    PROMOTING = "promoting"
    """Decided; the alias moves once every live replica holds the candidate."""
    BAKE = "bake"
    """It is the champion; the one before still answers a share, and is a flip of the alias away."""
    LIVE = "live"
    REJECTED = "rejected"
    """Never met traffic: a replica could not load or prove it, or its shadow showed harm."""
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
        return self in {Stage.VERIFYING, Stage.SHADOW} or self in _ROUTED


_ROUTED = frozenset({Stage.CANARY, Stage.HOLD, Stage.WAITING, Stage.PROMOTING, Stage.BAKE})

_END: frozenset[Stage] = frozenset()
TRANSITIONS: Mapping[Stage, frozenset[Stage]] = {
    Stage.VERIFYING: frozenset({Stage.SHADOW, Stage.CANARY, Stage.PROMOTING, Stage.REJECTED, Stage.ABORTED}),
    Stage.SHADOW: frozenset({Stage.CANARY, Stage.PROMOTING, Stage.REJECTED, Stage.ABORTED}),
    Stage.CANARY: frozenset(
        {Stage.CANARY, Stage.HOLD, Stage.WAITING, Stage.PROMOTING, Stage.ROLLING_BACK, Stage.EXPIRED, Stage.ABORTED},
    ),
    Stage.HOLD: frozenset({Stage.CANARY, Stage.PROMOTING, Stage.ROLLING_BACK, Stage.EXPIRED, Stage.ABORTED}),
    Stage.WAITING: frozenset({Stage.PROMOTING, Stage.ROLLING_BACK, Stage.ABORTED}),
    Stage.PROMOTING: frozenset({Stage.BAKE, Stage.LIVE, Stage.HOLD, Stage.ROLLING_BACK, Stage.ABORTED}),
    Stage.BAKE: frozenset({Stage.LIVE, Stage.ROLLING_BACK, Stage.ABORTED}),
    Stage.ROLLING_BACK: frozenset({Stage.ROLLED_BACK}),
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
    """When each weight step opened, or was resumed; units are only compared within one."""
    trusted_step: int = 0
    """From which of them on the split of the units is tested: a person who resumes has answered for what was before."""
    is_operator: bool = False
    """Opened by a person: it is verified and promoted without a canary."""
    fdr_index: int | None = None
    """The how many-th of its line's candidates that met traffic, from 1: see `service.rollout.fdr`."""
    has_passed: bool = False
    """Whether evidence, not a person, has found it good."""
    job: str | None = None
    reason: str = ""
    """Why it stands where it stands: a code, and after a colon what it is about."""
    ended_at: float | None = None

    @property
    def evidence_id(self) -> str:
        """Under which name its units are recorded now: those of the bake are compared anew."""
        return f"{self.id}-bake" if self.stage is Stage.BAKE else self.id

    @property
    def compared_since(self) -> tuple[float, ...]:
        """When the steps opened within which units are compared."""
        return (self.since,) if self.stage is Stage.BAKE else self.steps

    @property
    def trusted_from(self) -> int:
        """From which of those steps on the comparison itself is tested."""
        return 0 if self.stage is Stage.BAKE else self.trusted_step

    @property
    def resumed_at(self) -> float:
        """When a person last answered for what was before."""
        return self.steps[self.trusted_from - 1] if self.trusted_from else 0.0

    @property
    def stands_against(self) -> str | None:
        """Who is to be the line's champion as long as the trial means anything."""
        return self.candidate if self.stage is Stage.BAKE else self.champion

    @property
    def weight(self) -> float:
        """The share of units that the candidate gets now; in the bake, what is compared of it, and what is held back."""
        if self.stage is Stage.BAKE:
            return self.policy.bake.holdback
        return self.policy.weights[self.step] if self.stage.has_traffic and not self.is_operator else 0.0

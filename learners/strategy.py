"""What a strategy is, and the table of them.

A strategy says which examples a job learns from, what is added to the loss, and what a version leaves for the next job. Each
is one page and keeps no state: what it needs from earlier versions lies in the champion's folder and in the ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from learners.distill import DarkRehearsal
from learners.ewc import Ewc
from learners.joint import Joint
from learners.naive import Naive
from learners.orthogonal import Orthogonal
from learners.rehearsal import Rehearsal
from replay.records import Example

if TYPE_CHECKING:  # the service plans with these strategies, without torch
    from torch import Tensor

    from learners.dark import Distillation
    from learners.encode import Encoded


class Beside(Protocol):
    """What stands beside the mean loss of a batch, in nats per token."""

    def __call__(self) -> Tensor:
        """Its value, with its gradient."""
        ...

    def note(self, loss: Tensor, penalty: Tensor) -> None:
        """Be told of what stood in a batch's loss."""
        ...

    def outcome(self) -> dict[str, Any]:
        """What it came to in the end, for the version's metrics; raises `Inert` when it had no effect."""
        ...


class Strategy(Protocol):
    """How the next adapter learns."""

    name: str
    is_from_base: bool
    """Whether its adapter starts afresh instead of from the champion's."""
    is_stacked: bool
    """Whether it learns in an adapter of its own, beside the champion's, which is frozen; their sum is compressed."""

    def plan(
        self, fresh: Sequence[Example], remembered: Sequence[Example], general: Sequence[Example], ratio: float, seed: int
    ) -> list[Example]:
        """The examples of a job in their order, each tagged by its source; fresh ones that are held out come last."""
        ...

    def penalty(
        self, factors: Mapping[str, Tensor], state: Mapping[str, Tensor], tokens: int, settings: Mapping[str, Any]
    ) -> Beside | None:
        """What is added to the mean loss over `tokens` reply tokens, `factors` being the champion's; None: nothing.

        `state` is what the champion's job left by `consolidate`; empty when it left nothing, or there is no champion.
        """
        ...

    def distillation(
        self, remembered: Sequence[Encoded], state: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> Distillation | None:
        """What takes the place of remembered examples' losses; None: nothing."""
        ...

    def consolidate(
        self,
        model: Any,
        factors: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        fresh: Sequence[Encoded],
        pad_id: int,
        settings: Mapping[str, Any],
        kept: Collection[int] | None = None,
    ) -> dict[str, Tensor]:
        """What the trained version leaves for the next job, given what the champion left and what was learned afresh.

        `kept` are the keys of the examples that the line will remember if the version is promoted; None: all of them.
        """
        ...


_ALL: tuple[Strategy, ...] = (
    Naive(),
    Rehearsal(),
    DarkRehearsal(),
    Ewc(Naive()),
    Ewc(Rehearsal()),
    Ewc(DarkRehearsal()),
    Orthogonal(),
    Joint(),
)
STRATEGIES = {strategy.name: strategy for strategy in _ALL}

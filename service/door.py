"""What the daemon's processes may ask of the keeper: the one interface that crosses process borders.

`service.keeper.Keeper` is it; over Ray the same methods are called on its actor. Everything that goes in or comes out is
a plain record or JSON-like, so that it pickles. Errors are `service.errors.LearndError`, with their message and `param`
whole (a wrapper over Ray raises the cause, not Ray's envelope, and `NotReady` when the keeper is down).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from replay.records import Feedback, Interaction, Receipt
from replay.shadows import Gold
from service.comparing import ShadowReport
from service.errors import LearndError
from service.rollout.controller import Verb
from service.router import Desired, ReplicaReport
from service.settings import SwitchMode

Json = dict[str, Any]


class KeeperDoor(Protocol):
    """The keeper, from outside."""

    async def feedback(self, items: Sequence[Feedback]) -> list[Receipt | LearndError]:
        """Store feedback in one commit: a receipt, true once returned, or an error for each item, in order.

        Raises `StorageFailed` when the commit failed: then none of it was stored.
        """

    async def feedback_by_id(self, feedback_id: str) -> Json:
        """One piece of feedback with its `status` and `used_in`; raises `NotFound`."""

    async def record(self, interactions: Sequence[Interaction]) -> None:
        """Store interactions in one commit; idempotent by id. Raises `StorageFailed`."""

    async def desired(self, after: int, report: ReplicaReport, timeout_seconds: float) -> Desired:
        """A replica's report in, what should be out: as soon as its number is over `after`, or after the timeout."""

    async def shadow(self, said: ShadowReport) -> list[Gold]:
        """What a replica has answered and scored in the shadow in, what it is to score next out. Raises `StorageFailed`."""

    async def status(self) -> Json:
        """The whole state on one screen, as `GET /api/status` gives it."""

    async def readiness(self) -> Json:
        """`{"ready": bool, "reasons": [...]}`: each champion resident and proven on a live replica, the ledger writes."""

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the text form that `accept` asks for, with its content type."""

    async def lines(self) -> list[Json]:
        """Every line with its aliases and number of versions."""

    async def versions(self, line: str) -> list[Json]:
        """A line's versions, newest first, with their scores; raises `NotFound`."""

    async def examples(self, line: str) -> list[Json]:
        """What a line has to learn from; raises `NotFound`."""

    async def history(self, line: str) -> list[Json]:
        """Every change of the line's aliases, newest first, with reason and evidence; raises `NotFound`."""

    async def bisect(self, job_id: str) -> Json:
        """Search for the examples that made a job's candidate lose a slice; raises `NotFound` or `Conflict`."""

    async def train(self, line: str, strategy: str | None = None) -> Json:
        """Ask for a job now, whatever the triggers say, by a strategy (None: the line's own).

        Raises `NotFound`, `InvalidRequest`, or `Conflict` when one runs already.
        """

    async def promote(self, line: str, version: str | None) -> Json:
        """Make a version (None: the candidate) the champion by hand; raises `NotFound`, `Conflict`, `ArtifactInvalid`."""

    async def rollback(self, line: str, version: str | None) -> Json:
        """End the trial, or else go back to a version (None: the previous one); raises `NotFound`, `Conflict`."""

    async def anchor(self, line: str, version: str) -> Json:
        """Make a version the line's anchor: its name, `champion` or `base`. Raises `NotFound` or `Conflict`."""

    async def steer(self, line: str, verb: Verb) -> Json:
        """Pause, resume or abort the line's trial; raises `NotFound`, `Conflict`."""

    async def throw(self, mode: SwitchMode, reason: str) -> Json:
        """Put the kill switch somewhere, for all lines; returns where it stands then."""

    async def quarantine(self, line: str, which: Literal["held", "all"], reason: str | None) -> list[Json]:
        """What the line's guard stopped, newest first: what waits for a decision, or all of it; raises `NotFound`."""

    async def overrule(self, ids: Sequence[str], decision: Literal["release", "drop"], by: str) -> list[Json]:
        """Decide on feedback that a guard stopped, all of it or none; raises `Conflict`."""

    async def verdicts(self, line: str) -> list[Json]:
        """Every recorded verdict on a line's trials, newest first; raises `NotFound`."""

    async def jobs(self, line: str | None) -> list[Json]:
        """Jobs, newest first; raises `NotFound` for an unknown line."""

    async def job(self, job_id: str) -> Json:
        """One job with its progress and verdict; raises `NotFound`."""

    async def trials(self, line: str | None) -> list[Json]:
        """Trials, newest first; raises `NotFound` for an unknown line."""

    async def trial(self, trial_id: str) -> Json:
        """One trial with the `history` of its evidence; raises `NotFound`."""

    async def replay(self, what: str) -> list[Json]:
        """Each recorded verdict on a trial, job, version, round of an anchor, or line, decided again; raises `NotFound`."""

    async def audit(self) -> Json:
        """Whether the chained log is whole, and the first record that is not as it was written."""

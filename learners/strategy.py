"""What a strategy is, and the table of them.

A strategy says which examples a job learns from and what is added to the loss. Each is one page and keeps no state:
what it needs from earlier versions lies in their folders and in the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from learners.naive import Naive
from learners.rehearsal import Rehearsal
from replay.records import Example


class Strategy(Protocol):
    """How the next adapter learns."""

    name: str

    def plan(
        self, fresh: Sequence[Example], remembered: Sequence[Example], general: Sequence[Example], ratio: float, seed: int
    ) -> list[Example]:
        """The examples of a job in their order, each tagged by its source; fresh ones that are held out come last."""
        ...


STRATEGIES: dict[str, Strategy] = {"naive": Naive(), "replay": Rehearsal()}

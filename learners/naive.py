"""Fine-tuning on what is new and nothing else: forgets, and shows how much. The baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replay.mixture import mix
from replay.records import Example


class Naive:
    """Learn the fresh examples from the champion's weights."""

    name = "naive"
    is_from_base = False
    is_stacked = False

    def plan(
        self,
        fresh: Sequence[Example],
        remembered: Sequence[Example],  # noqa: ARG002 - the protocol's
        general: Sequence[Example],  # noqa: ARG002 - the protocol's
        ratio: float,  # noqa: ARG002 - the protocol's
        seed: int,
    ) -> list[Example]:
        """The fresh examples alone."""
        return mix(fresh, (), (), 0.0, seed)

    def penalty(self, *_: Any) -> None:
        """Nothing stands beside the loss."""

    def distillation(self, *_: Any) -> Any:
        """Remembered examples are learned as they are."""
        return None

    def consolidate(self, *_: Any) -> dict[str, Any]:
        """Nothing is left for the next job."""
        return {}

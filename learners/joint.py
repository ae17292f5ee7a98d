"""Joint training: everything retained and everything fresh, learned together from the base. The upper bound.

It costs the whole history at each job, and shows what learning in sequence can at best hope for. `replay_capacity` bounds what
is retained. Now and then as a line's job it also frees the line from what many small updates have left in its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from learners.naive import Naive
from replay.mixture import mix
from replay.records import Example


class Joint(Naive):
    """Learn all there is, from a fresh adapter."""

    name = "joint"
    is_from_base = True

    def plan(
        self,
        fresh: Sequence[Example],
        remembered: Sequence[Example],
        general: Sequence[Example],
        ratio: float,  # noqa: ARG002 - the protocol's
        seed: int,
    ) -> list[Example]:
        """All three, whatever the ratio."""
        return mix(fresh, remembered, general, math.inf, seed)

"""Experience replay (Ratcliff 1990; Chaudhry et al. 2019): remembered examples are learned again beside the fresh ones.

What is remembered comes from a keyed reservoir for each slice, filled at promotion only; `ratio` remembered examples are
drawn for each fresh one that trains, and each epoch rehearses others. The default: in every comparison on language models it
forgets least for its cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from learners.naive import Naive
from replay.mixture import mix
from replay.records import Example


class Rehearsal(Naive):
    """Learn fresh, remembered and general examples in one seeded plan."""

    name = "replay"

    def plan(
        self, fresh: Sequence[Example], remembered: Sequence[Example], general: Sequence[Example], ratio: float, seed: int
    ) -> list[Example]:
        """All three, evenly interleaved."""
        return mix(fresh, remembered, general, ratio, seed)

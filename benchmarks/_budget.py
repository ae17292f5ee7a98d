"""How long a bench may take, and each of its parts: pure but for its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping


class Budget:
    """Seconds for all parts together, shared out by what each of them needs; without an end nothing is ever cut short."""

    def __init__(
        self,
        needs: Mapping[str, float] | None = None,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        """`needs` has the parts in their order, with the seconds that each takes at the least; `began` is now by default."""
        self._clock, self._later = clock, dict(needs or {})
        self.began = clock() if began is None else began
        self._end = self._enough = self._deadline = self.began + seconds

    def begin(self, part: str) -> None:
        """Give a part its share of what is left, by its need beside those of later parts; `TimeoutError` when nothing is."""
        need, now = self._later.pop(part, 1.0), self._clock()
        if now >= self._end:
            raise TimeoutError("not begun: the time for all parts was over")
        if math.isinf(self._end):
            return
        share = (self._end - now) * need / (need + sum(self._later.values()))
        self._enough = now + share
        self._deadline = min(self._end, now + 2 * share)  # twice its share on a bad day: better one part late than one part lost

    @property
    def left(self) -> float:
        """Seconds until the present part is cut off; below 0 after that."""
        return self._deadline - self._clock()

    def has_room(self, seconds: float) -> bool:
        """Whether something more that takes so long fits into the present part's share."""
        return self._clock() + seconds <= self._enough

    @property
    def taken(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self.began

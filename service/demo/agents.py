"""The desk's agents: they read some answers and send what should have been said, late, until their time is used.

They know the right label only of taught texts. Customers hand replies over; nothing here asks the model.
"""

from __future__ import annotations

import random
from collections import Counter

from service.demo.plan import Plan
from service.demo.post import Post
from service.demo.tally import Reply


class Agents:
    """Correct the answers to taught texts."""

    def __init__(self, plan: Plan, post: Post, rng: random.Random) -> None:
        self.corrected: Counter[str] = Counter()
        """Corrections written for each skill."""
        self._plan = plan
        self._post = post
        self._rng = rng

    def have_time_for(self, skill: str) -> bool:
        """Whether they will look at more answers of this skill."""
        return self.corrected[skill] < self._plan.corrections

    def read(self, reply: Reply) -> None:
        """Look at an answer and perhaps correct it."""
        text = reply.text
        if not text.is_taught or not self.have_time_for(text.skill):
            return
        if self._rng.random() >= self._plan.correction_chance:
            return
        self.corrected[text.skill] += 1
        delay = self._rng.uniform(*self._plan.correction_delay_seconds)
        self._post.send(reply.id, "demonstration", text.label, "agent", delay)

"""The desk's customers: they ask through the `openai` client, one or two questions each, and some leave a thumb.

They come as fast as they are answered, or less often while the machine is busy training (`Pace`). What they ask
is dealt by a `Stage`. They know nothing of training, trials or versions but the `model` that each reply names.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import openai

from service.demo.agents import Agents
from service.demo.plan import BASE, LINE, Plan
from service.demo.post import Post
from service.demo.tally import Reply, Tally
from service.demo.texts import Deck, Text


@dataclass(frozen=True, slots=True)
class Stage:
    """What the desk is asked for a while."""

    title: str
    skills: tuple[str, ...]
    """Skills that customers ask for, evenly."""
    taught: str
    """The skill whose answers the agents correct."""


class Pace:
    """Lets requests go at once, or spaced so that answering them takes a share of the time: on a slow machine fewer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.load: float | None = None
        """The share of the time; None: requests go at once."""
        self.answer_seconds = 0.0
        """How long the last answer took."""
        self._clock = clock
        self._next = 0.0

    def seconds_to_wait(self) -> float:
        """Take the next place in the queue: how long until it is its turn."""
        if self.load is None:
            return 0.0
        now = self._clock()
        turn = max(now, self._next)
        self._next = turn + self.answer_seconds / self.load
        return turn - now


class Customers:
    """All customers of the desk."""

    def __init__(
        self,
        plan: Plan,
        client: openai.AsyncOpenAI,
        deck: Deck,
        tally: Tally,
        post: Post,
        agents: Agents,
        clock: Callable[[], float],
    ) -> None:
        self.pace = Pace(clock)
        self.stage: Stage | None = None
        self._plan = plan
        self._client = client
        self._deck = deck
        self._tally = tally
        self._post = post
        self._agents = agents
        self._clock = clock
        self._rng = random.Random(plan.seed)  # noqa: S311 - a simulation, no secret
        self._numbers = itertools.count(1)

    async def come(self) -> None:
        """One place at the counter: customer after customer, each until answered, as long as there is a stage."""
        while (stage := self.stage) is not None:
            customer = f"customer-{next(self._numbers)}"
            questions = 2 if self._rng.random() < self._plan.second_question else 1
            for _ in range(questions):
                await self._ask(customer, stage)

    def next_text(self, stage: Stage) -> Text:
        """A taught text while agents have time for it, at their share of the traffic; else a never-trained one."""
        has_time = self._agents.have_time_for(stage.taught)
        if has_time and self._rng.random() < self._plan.taught_share:
            return self._deck.deal(stage.taught, is_taught=True)
        return self._deck.deal(self._rng.choice(stage.skills), is_taught=False)

    async def _ask(self, customer: str, stage: Stage) -> None:
        text = self.next_text(stage)
        reply = await self._request(customer, text, LINE)
        if reply is None:
            return
        if text.is_taught:
            self._agents.read(reply)
        elif self._rng.random() < self._plan.thumb_chance:
            delay = self._rng.uniform(*self._plan.thumb_delay_seconds)
            self._post.send(reply.id, "thumb", reply.is_right, "customer", delay)
        if self._is_base_needed(stage, reply):
            await self._request(customer, text, BASE)

    def _is_base_needed(self, stage: Stage, reply: Reply) -> bool:
        """Whether to ask the base by its own name as well: the line has left it, and its accuracy is not known yet."""
        is_asked = reply.version != "base" and reply.text.skill == stage.taught and not reply.text.is_taught
        return is_asked and self._tally.score(stage.taught, "base").asked < self._plan.measured

    async def _request(self, customer: str, text: Text, model: str) -> Reply | None:
        await asyncio.sleep(self.pace.seconds_to_wait())
        began = self._clock()
        try:
            answer = await self._client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": text.prompt}],
                max_tokens=self._plan.max_tokens,
                temperature=0,
                extra_headers={"x-session-id": customer},
            )
        except openai.OpenAIError as error:
            self._tally.fail(f"{type(error).__name__}: {error}")
            await asyncio.sleep(self._plan.failed_pause_seconds)
            return None
        self.pace.answer_seconds = self._clock() - began
        content = answer.choices[0].message.content or ""
        reply = Reply(answer.id, text, content, answer.model, self._clock(), is_by_name=model == BASE)
        self._tally.add(reply)
        return reply

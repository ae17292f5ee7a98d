"""One line's desk, over HTTP: customers who ask all the while and leave thumbs, agents who correct, and what the daemon tells."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

CLIENTS = 4
PATIENCE_SECONDS, PAUSE_SECONDS = 900.0, 0.5
ENDS = ("rejected", "rolling_back", "promoting", "expired", "aborted")


class Stuck(Exception):
    """The line did not come to what was waited for."""


@dataclass
class Reply:
    """One answer to a customer."""

    at: float
    """Unix seconds at its end."""
    version: str
    status: int
    said: str = ""


@dataclass
class Desk:
    """One line: its customers, who thumb up what has `wanted` in it, and its agents."""

    http: httpx.AsyncClient
    line: str
    thing: str
    wanted: str
    replies: list[Reply] = field(default_factory=list)
    pause: float = 0.0
    """Of each customer after an answer; while a job trains they come less often, so that it has the cores."""

    async def ask(self, thing: str, number: int, unit: str) -> tuple[str, Reply]:
        """Ask one question; returns the reply's id and what it was."""
        body = {"model": self.line, "messages": _question(thing, number), "max_tokens": 6, "temperature": 0}
        told = await self.http.post("/v1/chat/completions", json=body, headers={"x-session-id": unit})
        reply = Reply(time.time(), told.headers.get("x-model-version", ""), told.status_code)
        if not told.is_success:
            return "", reply
        said = told.json()
        reply.said = said["choices"][0]["message"]["content"]
        return said["id"], reply

    async def customers(self, done: asyncio.Event) -> None:
        """Ask until `done`, a new customer each time, and thumb what was answered."""
        numbers = iter(range(10**9))

        async def one() -> None:
            for number in numbers:
                if done.is_set():
                    return
                identity, reply = await self.ask(self.thing, number, f"{self.line}-{number}")
                self.replies.append(reply)
                if identity:
                    thumb = {"inference_id": identity, "metric_name": "thumb", "value": self.wanted in reply.said.lower()}
                    (await self.http.post("/feedback", json=thumb)).raise_for_status()
                await asyncio.sleep(self.pause)

        await asyncio.gather(*(one() for _ in range(CLIENTS)))

    async def teach(self, thing: str, says: Callable[[int], str], numbers: Iterable[int]) -> set[str]:
        """A correction for each number; their ids."""
        taught = set()
        for number in numbers:
            inference, reply = await self.ask(thing, number, f"agent-{number}")
            self.replies.append(reply)
            if not inference:  # a planted failure: the agent lets it be
                continue
            lesson = {"id": f"{self.line}-{number}", "inference_id": inference, "value": says(number)}
            (await self.http.post("/feedback", json={**lesson, "metric_name": "demonstration"})).raise_for_status()
            taught.add(lesson["id"])
        return taught

    async def hand(self, verb: str, **body: str) -> None:
        """What a person does to the line's rollout."""
        (await self.http.post(f"/api/rollouts/{self.line}/{verb}", json=body)).raise_for_status()

    async def held(self) -> set[str]:
        """Ids of the corrections that are held as harmful."""
        told = (await self.http.get(f"/api/quarantine/{self.line}", params={"reason": "harmful"})).json()["data"]
        return {one["feedback_id"] for one in told}

    async def crowned_at(self) -> float:
        """When the champion changed last: Unix seconds."""
        told = (await self.http.get(f"/api/lines/{self.line}/history")).json()["data"]
        return next(float(one["at"]) for one in told if one["alias"] == "champion")

    async def told(self) -> dict[str, Any]:
        """The line as the daemon's status has it."""
        line = dict((await self.http.get("/api/status")).json()["lines"][self.line])
        self.pause = PAUSE_SECONDS if line["job"] else 0.0
        return line

    async def trials(self) -> list[dict[str, Any]]:
        """The line's trials, newest first."""
        return list((await self.http.get("/api/trials", params={"line": self.line})).json()["data"])

    async def decided_at(self, candidate: str) -> float:
        """When the last verdict on a candidate was given that ends its answering, or else its trial: Unix seconds."""
        told = (await self.http.get(f"/api/rollouts/{self.line}/history")).json()["data"]
        return next(float(one["at"]) for one in told if one["candidate"] == candidate and one["to"] in ENDS)

    async def until(self, has_come: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for the line's status to be so; raises `Stuck` out of patience."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not has_come(told := await self.told()):
            if time.monotonic() > deadline:
                where = {name: told[name] for name in ("champion", "trial", "job", "jobs", "last_verdict")}
                raise Stuck(f"not there after {PATIENCE_SECONDS:.0f} s: {json.dumps(where)}")
            await asyncio.sleep(0.2)
        return told

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Customers come while inside; each is answered before it ends."""
        done = asyncio.Event()
        coming = asyncio.create_task(self.customers(done))
        try:
            yield
        finally:
            done.set()
            await coming


def _question(thing: str, number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is the {thing} of item {number}?"}]

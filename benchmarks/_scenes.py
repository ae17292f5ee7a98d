"""What is done to a line in the bench of the live rollout, scene by scene, and what must become of the candidate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
from _desk import CLIENTS, Desk, Reply

MOST_FAILING, LONGEST_AFTER_SECONDS = 20, 2.0
"""Replies of the failing candidate, and seconds from a verdict to the last reply of a bad one, at most."""
LABELS = ("red", "blue", "green", "white")
LESSONS = 48
RIGHT = range(10_000, 10_000 + LESSONS)
"""Numbers of what is taught first."""
SHUFFLED = random.Random(0).sample(range(10_000, 10_000 + 2 * LESSONS), 2 * LESSONS)
"""The same and others, half for right lessons and half for wrong ones that nothing tells from them."""
ELSEWHERE = range(40_000, 40_000 + LESSONS)


@dataclass(frozen=True)
class Finding:
    """What became of one candidate."""

    scene: str
    outcome: str
    met: int
    """Replies that the candidate gave, those that failed among them."""
    seconds_after: float | None
    """From the verdict to the candidate's last reply; None: it went live, or answered nobody."""
    failed: int
    """Requests that failed, without the planted ones."""
    planted: int
    took_seconds: float
    is_as_it_should: bool


async def good(desk: Desk, numbers: Sequence[int] = RIGHT) -> Finding:
    """A candidate that its customers like goes live by itself."""
    began = time.monotonic()
    async with desk.open():
        await desk.teach("colour", lambda _: "red", numbers)
        await desk.until(lambda told: told["champion"] == f"{desk.line}@v1")
    return await _found("good", desk, 0, began, lambda told: told["state"] == "live" and told["has_passed"])


async def shuffled(desk: Desk) -> Finding:
    """A candidate of shuffled labels is rejected before it answers anybody."""
    chance, began, first = random.Random(0), time.monotonic(), len(desk.replies)
    before = (await desk.told())["jobs"]
    async with desk.open():
        await desk.teach("colour", lambda _: chance.choice(LABELS), range(20_000, 20_000 + LESSONS))
        told = await desk.until(lambda told: told["jobs"].get("rejected", 0) > before.get("rejected", 0))
        await asyncio.sleep(5)
    replies = desk.replies[first:]
    strangers = {reply.version for reply in replies} - {f"{desk.line}@v1"}
    reason = told["last_verdict"]["outcome"] if told["last_verdict"] else "?"
    failed = _failed(replies)
    outcome = f"rejected by the gate ({reason}); answered by {', '.join(sorted(strangers)) or 'nobody but the champion'}"
    is_well = not strangers and not failed and told["trial"] is None
    return Finding("shuffled", outcome, 0, None, failed, 0, time.monotonic() - began, is_well)


async def misled(desk: Desk) -> Finding:
    """A candidate that passes the gate and answers one slice as its customers do not want is rolled back by their thumbs."""
    return await _stopped("misled", desk, "rolled_back")


async def shadowed(desk: Desk) -> Finding:
    """The same one is rejected before it answers anybody, where it answers in the shadow first."""
    found, shadow = await _stopped("shadowed", desk, "rejected"), (await desk.trials())[0]["shadow"]
    told = f"{found.outcome}; {shadow['pairs']} comparisons; the judge: {shadow['judge'] or 'has judged nothing'}"
    return replace(found, outcome=told, is_as_it_should=found.is_as_it_should and not found.met)


async def poisoned(desk: Desk) -> Finding:
    """A candidate that lost a slice is rejected by the gate, and the examples that did it are named and held."""
    await good(desk, SHUFFLED[:LESSONS])
    began, first = time.monotonic(), len(desk.replies)
    async with desk.open():
        wrong = await _mislead(desk, SHUFFLED[LESSONS:])  # so that the gate sees what they cost
        await desk.until(lambda told: bool(told["bisection"] and told["bisection"]["outcome"]))
    named, replies = await desk.held(), desk.replies[first:]
    failed = _failed(replies)
    met = sum(reply.version != f"{desk.line}@v1" for reply in replies)
    outcome = (
        f"rejected by the gate; held: {len(named & wrong)} of the {len(wrong)} wrong lessons, {len(named - wrong)} right ones"
    )
    is_well = bool(named) and named <= wrong and not failed and not met
    return Finding("poisoned", outcome, met, None, failed, 0, time.monotonic() - began, is_well)


async def decayed(desk: Desk) -> Finding:
    """The same one, promoted by hand, is found to be worse than the anchor, which takes its place."""
    await good(desk)
    await desk.hand("anchor", version="v1")
    began, first = time.monotonic(), len(desk.replies)
    async with desk.open():
        await _mislead(desk)
        await desk.until(lambda told: bool(told["trial"] and told["trial"]["state"] == "canary"))
        await desk.hand("promote")
        await desk.until(lambda told: told["champion"] == f"{desk.line}@v2")
        told = await desk.until(lambda told: told["champion"] == f"{desk.line}@v1")
        await asyncio.sleep(10)
    replies, failed = desk.replies[first:], _failed(desk.replies[first:])
    met = [reply for reply in replies if reply.version == f"{desk.line}@v2"]
    after = max(reply.at for reply in met) - await desk.crowned_at()
    stands = told["anchor"]
    outcome = f"promoted by hand, then {stands['standing']}: {stands['reason']}"
    is_well = stands["standing"] == "reverted" and not failed and after <= LONGEST_AFTER_SECONDS
    return Finding("decayed", outcome, len(met), after, failed, 0, time.monotonic() - began, is_well)


async def failing(desk: Desk) -> Finding:
    """A candidate of whose requests every other fails is rolled back at once."""
    found = await _broken("failing", desk, lambda told: told["state"] == "rolled_back")
    return found if found.met <= MOST_FAILING else replace(found, is_as_it_should=False)


async def deadly(desk: Desk) -> Finding:
    """A candidate under whose replies a replica's engine dies is rolled back at once; who asks later is answered by the other."""
    found = await _broken("deadly", desk, lambda told: told["reason"].startswith("engine_crash"))
    return found if found.planted <= CLIENTS else replace(found, is_as_it_should=False)


SCENES: dict[str, tuple[str, Callable[[Desk], Awaitable[Finding]]]] = {
    "good": ("desk", good),
    "shuffled": ("desk", shuffled),
    "misled": ("care", misled),
    "shadowed": ("shade", shadowed),
    "poisoned": ("ward", poisoned),
    "decayed": ("firm", decayed),
    "failing": ("help", failing),
    "deadly": ("risk", deadly),
}
"""Each with its line."""


async def _mislead(desk: Desk, numbers: Sequence[int] = ELSEWHERE) -> set[str]:
    """Teach a new thing rightly and a known one wrongly: customers want red. The wrong lessons' ids."""
    await desk.teach("size", lambda _: "big", range(30_000, 30_000 + LESSONS // 2))
    return await desk.teach("colour", lambda _: "blue", numbers)


async def _broken(scene: str, desk: Desk, is_well: Callable[[dict[str, Any]], bool]) -> Finding:
    """Teach a line of whose first candidate something is broken (`_faults.py`); it must be rolled back."""
    began = time.monotonic()
    async with desk.open():
        await desk.teach("colour", lambda _: "red", RIGHT)
        await desk.until(lambda told: told["trials"].get("rolled_back", 0) > 0)
        await asyncio.sleep(10)
    return await _found(scene, desk, 0, began, is_well)


async def _stopped(scene: str, desk: Desk, state: str) -> Finding:
    """Mislead a line that has a champion; its candidate must come to that state, by harm."""
    await good(desk)
    began, first = time.monotonic(), len(desk.replies)
    async with desk.open():
        await _mislead(desk)
        await desk.until(lambda told: told["trials"].get(state, 0) > 0)
        await asyncio.sleep(10)
    return await _found(scene, desk, first, began, lambda told: told["state"] == state and "harm" in told["reason"])


def _failed(replies: Sequence[Reply]) -> int:
    return sum(reply.status != httpx.codes.OK for reply in replies)


async def _found(scene: str, desk: Desk, first: int, began: float, is_well: Callable[[dict[str, Any]], bool]) -> Finding:
    trial = (await desk.trials())[0]
    candidate, decided = trial["candidate"], await desk.decided_at(trial["candidate"])
    is_out, replies = trial["state"] in {"rolled_back", "rejected"}, desk.replies[first:]
    met = [reply for reply in replies if reply.version == candidate and (is_out or reply.at <= decided)]
    after = max(reply.at - decided for reply in met) if is_out and met else None
    hit = {"failing": met, "deadly": replies}.get(scene, [])  # an engine's death takes the champion's replies with it
    planted = sum(reply.status == httpx.codes.INTERNAL_SERVER_ERROR for reply in hit)
    failed = _failed(replies) - planted
    is_quick = after is None or after <= LONGEST_AFTER_SECONDS
    return Finding(
        scene=scene,
        outcome=f"{trial['state']}: {trial['reason']}",
        met=len(met),
        seconds_after=after,
        failed=failed,
        planted=planted,
        took_seconds=time.monotonic() - began,
        is_as_it_should=is_well(trial) and is_quick and not failed,
    )

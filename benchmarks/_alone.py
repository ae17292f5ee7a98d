"""What the bench of serving asks of learnd alone: a version switched under load, and a client beside a job."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from _cells import Bench, milliseconds, ttft
from _load import REPLY_TOKENS, Reply, Turn, ask, driven, keep_asking, prompts, quantile
from _servers import LINES, Server
from _site import CHAMPION

SWAP_CLIENTS = 4
WORDS = 24
"""Tokens of a reply by which versions are told apart."""


@dataclass(frozen=True)
class Pace:
    """How much is asked."""

    steady_seconds: float
    """Under load before a version is promoted."""
    after_seconds: float
    idle_replies: int
    """Before a job."""
    lessons: int
    reply_tokens: int
    start_seconds: float
    """Until a job trains, at most."""
    beside_seconds: float
    """Beside it, at most."""


FULL = Pace(20, 10, 16, 96, REPLY_TOKENS, 900, 600)
QUICK = Pace(5, 3, 6, 48, 16, 60, 12)
_OPEN = frozenset({"queued", "running"})


async def swapped(bench: Bench, ours: Server) -> dict[str, Any]:
    """Promote a version that no replica holds under load: pauses, failures, and whether each reply is by whom it names."""
    async with asyncio.timeout(bench.budget.left):
        seen = await _swap(ours, QUICK if bench.quick else FULL)
    return _told_of(bench, seen)


@dataclass(frozen=True)
class Swap:
    """What was seen of one."""

    replies: Sequence[Reply]
    own: dict[str, list[Reply]]
    """What each version says when it is asked by its name."""
    asked: float
    """When the promotion was asked for, as `Reply.at`; so are the next two."""
    decided: float
    settled: float
    seconds: float
    """From the verdict to every replica."""


async def _swap(ours: Server, pace: Pace) -> Swap:
    line, texts = LINES[0], [f"{number} Tell me about {what}." for number, what in enumerate(["rain", "Rome", "bread", "iron"])]
    own = {name: await _own_words(ours.port, name, texts) for name in (f"{line}@v1", CHAMPION)}
    done = asyncio.Event()
    load = asyncio.create_task(keep_asking(ours.port, line, SWAP_CLIENTS, texts, done, WORDS))
    await asyncio.sleep(pace.steady_seconds)
    async with httpx.AsyncClient(base_url=ours.url, timeout=60) as client:
        at, asked = time.time() - time.perf_counter(), time.perf_counter()
        (await client.post(f"/api/lines/{line}/promote", json={"version": f"{line}@v3"})).raise_for_status()
        change = await _until_swapped(client, line, f"{line}@v3")
        settled = time.perf_counter()
        await asyncio.sleep(pace.after_seconds)
        done.set()
        replies = await load
        own[f"{line}@v3"] = await _own_words(ours.port, f"{line}@v3", texts)
    return Swap(replies, own, asked, change["at"] - at, settled, change["swap_seconds"])


def _told_of(bench: Bench, seen: Swap) -> dict[str, Any]:
    replies, new = seen.replies, f"{LINES[0]}@v3"
    gaps = [gap for reply in replies for gap in reply.gaps]
    steady = quantile([gap for when, gap in gaps if when < seen.asked], 0.99)
    stall = quantile([gap for when, gap in gaps if seen.asked <= when <= seen.settled], 0.99)
    firsts = [reply.at[0] - seen.decided for reply in replies if reply.named == new and reply.at]
    failed, wrong = sum(bool(r.error) for r in replies), sum(_is_by_another(r, seen.own) for r in replies if not r.error)
    times = stall / steady if steady > 0 else math.nan
    compared = f"{milliseconds(steady)} ms steady, {milliseconds(stall)} ms while loaded and proven: {times:.2f}×"
    bench.note("swap: pause p99", f"{compared} ({len(gaps)} pauses in all)")
    bench.note("swap: from request to routed", f"{seen.settled - seen.asked:.2f} s")
    bench.note("swap: from the verdict to every replica", f"{seen.seconds:.2f} s")
    bench.note("swap: from the verdict to the new version's first token", f"{min(firsts):.2f} s" if firsts else "never")
    bench.note("swap: requests, failed, by another version", f"{len(replies)}, {failed}, {wrong}")
    was, now = ({told.text[:12] for told in seen.own[name]} for name in (CHAMPION, new))
    bench.note("swap: beginnings that only one of the two versions gives", f"{len(was ^ now)} of {len(was) + len(now)}")
    return {
        "stall_ms_p99": round(1000 * stall, 1),
        "stall_vs_steady": round(times, 2),
        "verdict_to_first_token_seconds": round(min(firsts), 2) if firsts else None,
        "failed": failed,
        "wrong_version": wrong,
    }


async def _own_words(port: int, name: str, texts: Sequence[str]) -> list[Reply]:
    """What a version says when it is asked by its name, one text at a time and all at once, whose sums are rounded otherwise."""
    alone = [await ask(port, name, text, WORDS) for text in texts]
    return alone + await asyncio.gather(*(ask(port, name, text, WORDS) for text in texts))


async def _until_swapped(client: httpx.AsyncClient, line: str, version: str) -> dict[str, Any]:
    for _ in range(600):
        history = (await client.get(f"/api/lines/{line}/history")).json()["data"]
        for change in history:
            if change["alias"] == "champion" and change["to"] == version and change["swap_seconds"] is not None:
                return dict(change)
        await asyncio.sleep(0.2)
    raise TimeoutError(f"{version} was not promoted within two minutes")


def _is_by_another(reply: Reply, own: dict[str, list[Reply]]) -> bool:
    """Whether a reply begins as another version's does, and not as that of the version which it names.

    The first words only: a batch's bf16 sums may turn a later greedy choice.
    """
    if reply.named != reply.header or reply.named not in own:
        return True
    begins = {name: {told.text[:12] for told in said} for name, said in own.items()}
    mine = reply.text[:12]
    others = {text for name, said in begins.items() if name != reply.named for text in said}
    return mine not in begins[reply.named] and mine in others


async def beside_a_job(bench: Bench, ours: Server) -> dict[str, Any]:
    """TTFT at one client, before and while a job trains on the same cores; in full also how much longer the job takes."""
    pace, line = QUICK if bench.quick else FULL, LINES[1]
    async with asyncio.timeout(bench.budget.left), httpx.AsyncClient(base_url=ours.url, timeout=120) as client:
        alone = None
        if not bench.quick:
            alone = await _timed_job(client, line, pace.lessons, 0)
            await client.post(f"/api/rollouts/{line}/abort")  # what it learned may be on trial, and a line tries one at a time
        idle = await driven(ours.port, [line], 1, pace.idle_replies, prompts(70_001), tokens=pace.reply_tokens)
        await _teach(client, line, pace.lessons, 10_000)
        job = await _train(client, line)
        await _until(client, job, pace.start_seconds, lambda told: told.get("phase") == "training" or told["state"] not in _OPEN)
        busy, told = await _asked_beside(client, ours, line, job, pace)
    bench.note("learnd: memory of the whole tree with a job", f"{ours.weigh() / 2**30:.2f} GiB (PSS)")
    return _told_beside(bench, idle, busy, told, alone)


async def _asked_beside(
    client: httpx.AsyncClient, ours: Server, line: str, job: str, pace: Pace
) -> tuple[Turn | None, dict[str, Any]]:
    """The client's turn while the job is open, None when it was over before one reply; and what is told of the job then."""
    replies: list[Reply] = []
    began = time.monotonic()
    while True:
        told = (await client.get(f"/api/jobs/{job}")).raise_for_status().json()
        if told["state"] not in _OPEN or time.monotonic() - began >= pace.beside_seconds:
            return (Turn(replies, time.monotonic() - began) if replies else None), told
        asked = prompts(80_001 + len(replies))
        replies += (await driven(ours.port, [line], 1, 2, asked, tokens=pace.reply_tokens)).replies


def _told_beside(bench: Bench, idle: Turn, busy: Turn | None, job: dict[str, Any], alone: float | None) -> dict[str, Any]:
    state = f"{job['state']} {job.get('phase')} {job.get('step')}/{job.get('steps')}"
    bench.note("training: state of the job at the end", state)
    figures: dict[str, Any] = {"ttft_p50": None}
    if alone is not None:  # in full
        took = job["ended_at"] - job["started_at"] if job.get("ended_at") else None
        figures["job_time"] = round(took / alone, 2) if took is not None else None
        told = "was not over" if took is None else f"took {took:.0f} s beside one client: {took / alone:.2f}×"
        bench.note("training: the job's time", f"{alone:.0f} s alone; it {told}")
    if busy is None:
        bench.note("training: TTFT p50, one client", "not measured: the job was over before one reply")
        return figures
    figures["ttft_p50"] = round(ttft(busy) / ttft(idle), 2) if idle.ttfts and busy.ttfts else None
    bench.note(
        "training: TTFT p50, one client",
        f"{milliseconds(ttft(idle))} ms idle ({len(idle.replies)} replies), {milliseconds(ttft(busy))} ms beside a job "
        f"({len(busy.replies)}): {figures['ttft_p50']}×; {idle.tokens_per_second:.1f} and {busy.tokens_per_second:.1f} tokens/s; "
        f"{busy.failed} failed",
    )
    return figures


async def _timed_job(client: httpx.AsyncClient, line: str, lessons: int, start: int) -> float:
    await _teach(client, line, lessons, start)
    job = await _train(client, line)
    told = await _until(client, job, 900, lambda told: told["state"] not in _OPEN)
    return float(told["ended_at"] - told["started_at"])


async def _train(client: httpx.AsyncClient, line: str) -> str:
    """The id of a job that is asked for now."""
    told = await client.post(f"/api/lines/{line}/train")
    if told.is_error:
        raise RuntimeError(f"{line} does not train: {told.text}")
    return str(told.json()["id"])


async def _teach(client: httpx.AsyncClient, line: str, number: int, start: int) -> None:
    """So many questions and their corrections."""
    places = asyncio.Semaphore(8)

    async def one(i: int) -> None:
        question = {"model": line, "max_tokens": 1, "messages": [{"role": "user", "content": f"{i} What is item {i}? " * 6}]}
        async with places:
            told = (await client.post("/v1/chat/completions", json=question)).raise_for_status().json()
            lesson = {"inference_id": told["id"], "metric_name": "demonstration", "value": f"Item {i} is a thing of value. " * 4}
            (await client.post("/feedback", json=lesson)).raise_for_status()

    await asyncio.gather(*(one(start + i) for i in range(number)))


async def _until(
    client: httpx.AsyncClient, job: str, seconds: float, has_come: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        told = (await client.get(f"/api/jobs/{job}")).raise_for_status().json()
        if has_come(told):
            return dict(told)
        await asyncio.sleep(0.5)
    raise TimeoutError(f"job {job} did not get there within {seconds:.0f} s")

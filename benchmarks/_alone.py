"""What the bench of serving asks of learnd alone: a version switched under load, and a client beside a job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from _cells import Bench, ttft
from _load import Reply, Turn, ask, drive, keep_asking, prompts, quantile
from _servers import LINES, Server

QUICK_LESSONS, LESSONS = 48, 96
SWAP_CLIENTS = 4
CHAMPION = f"{LINES[0]}@v2"
"""Of the first line, at the start."""
_OPEN = frozenset({"queued", "running"})


async def swapped(bench: Bench, ours: Server) -> dict[str, Any]:
    """Promote a version that no replica holds under load: pauses, failures, and whether each reply is by whom it names."""
    line, texts = LINES[0], [f"{number} Tell me about {what}." for number, what in enumerate(["rain", "Rome", "bread", "iron"])]
    own = {name: await _own_words(ours.port, name, texts) for name in (f"{line}@v1", CHAMPION)}
    done = asyncio.Event()
    load = asyncio.create_task(keep_asking(ours.port, line, SWAP_CLIENTS, texts, done, 24))
    await asyncio.sleep(6 if bench.quick else 20)
    async with httpx.AsyncClient(base_url=ours.url, timeout=60) as client:
        at, asked = time.time() - time.perf_counter(), time.perf_counter()
        (await client.post(f"/api/lines/{line}/promote", json={"version": f"{line}@v3"})).raise_for_status()
        change = await _until_swapped(client, line, f"{line}@v3")
        settled = time.perf_counter()
        await asyncio.sleep(4 if bench.quick else 10)
        done.set()
        replies = await load
        own[f"{line}@v3"] = await _own_words(ours.port, f"{line}@v3", texts)
    decided = change["at"] - at
    firsts = [r.at[0] - decided for r in replies if r.named == f"{line}@v3" and r.at]
    gaps = [gap for reply in replies for gap in reply.gaps]
    steady = [gap for when, gap in gaps if when < asked]
    during = [gap for when, gap in gaps if asked <= when <= settled]
    wrong = sum(_is_by_another(reply, own) for reply in replies if not reply.error)
    told = {
        "stall_ms_p99": round(1000 * quantile(during, 0.99), 1),
        "failed": sum(bool(reply.error) for reply in replies),
        "wrong_version": wrong,
    }
    p99 = quantile(steady, 0.99)
    stall = told["stall_ms_p99"]
    compared = f"{1000 * p99:.0f} ms steady, {stall:.0f} ms while loaded and proven: {stall / p99 / 1000:.2f}×"
    bench.note("swap: pause p99", f"{compared} ({len(steady)} and {len(during)} pauses)")
    bench.note("swap: from request to routed", f"{settled - asked:.2f} s")
    bench.note("swap: from the verdict to every replica", f"{change['swap_seconds']:.2f} s")
    bench.note("swap: from the verdict to the new version's first token", f"{min(firsts):.2f} s" if firsts else "never")
    old, new = ({told.text[:12] for told in own[name]} for name in (CHAMPION, f"{line}@v3"))
    bench.note("swap: requests, failed, by another version", f"{len(replies)}, {told['failed']}, {wrong}")
    bench.note("swap: beginnings that only one of the two versions gives", f"{len(old ^ new)} of {len(old) + len(new)}")
    return told


async def _own_words(port: int, name: str, texts: Sequence[str]) -> list[Reply]:
    """What a version says when it is asked by its name, one text at a time and all at once, whose sums are rounded otherwise."""
    alone = [await ask(port, name, text, 24) for text in texts]
    return alone + await asyncio.gather(*(ask(port, name, text, 24) for text in texts))


async def _until_swapped(client: httpx.AsyncClient, line: str, version: str) -> dict[str, Any]:
    for _ in range(600):
        history = (await client.get(f"/api/lines/{line}/history")).json()["data"]
        for change in history:
            if change["alias"] == "champion" and change["to"] == version and change["swap_seconds"] is not None:
                return dict(change)
        await asyncio.sleep(0.2)
    raise SystemExit(f"{version} was not promoted within two minutes")


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
    line = LINES[1]
    async with httpx.AsyncClient(base_url=ours.url, timeout=120) as client:
        alone = None
        if not bench.quick:
            alone = await _timed_job(client, line, LESSONS, 0)
            await client.post(f"/api/rollouts/{line}/abort")  # what it learned may be on trial, and a line tries one at a time
        idle = await asyncio.to_thread(drive, ours.port, [line], 1, 6 if bench.quick else 16, prompts(70_001))
        await _teach(client, line, QUICK_LESSONS if bench.quick else LESSONS, 10_000)
        job = await _train(client, line)
        patience = 60 if bench.quick else 900
        await _until(client, job, patience, lambda told: told.get("phase") == "training" or told["state"] not in _OPEN)
        replies, began = [], time.monotonic()
        while time.monotonic() - began < (25 if bench.quick else 600):
            told = (await client.get(f"/api/jobs/{job}")).json()
            if told["state"] not in _OPEN:
                break
            replies += (await asyncio.to_thread(drive, ours.port, [line], 1, 2, prompts(80_001 + 2 * len(replies)))).replies
        busy = Turn(replies, time.monotonic() - began)
        if alone is not None:
            took = told["ended_at"] - told["started_at"] if told.get("ended_at") else float("nan")
            bench.note("training: the job's time", f"{alone:.0f} s alone, {took:.0f} s beside one client: {took / alone:.2f}×")
    ratio = ttft(busy) / ttft(idle) if busy.ttfts else float("nan")
    bench.note(
        "training: state of the job at the end", f"{told['state']} {told.get('phase')} {told.get('step')}/{told.get('steps')}"
    )
    bench.note(
        "training: TTFT p50, one client",
        f"{1000 * ttft(idle):.0f} ms idle, {1000 * ttft(busy):.0f} ms beside a job: {ratio:.2f}×; "
        f"{idle.tokens_per_second:.1f} and {busy.tokens_per_second:.1f} tokens/s; {busy.failed} failed",
    )
    return {"ttft_p50": round(ratio, 2)}


async def _timed_job(client: httpx.AsyncClient, line: str, lessons: int, start: int) -> float:
    await _teach(client, line, lessons, start)
    job = await _train(client, line)
    told = await _until(client, job, 900, lambda told: told["state"] not in _OPEN)
    return float(told["ended_at"] - told["started_at"])


async def _train(client: httpx.AsyncClient, line: str) -> str:
    """The id of a job that is asked for now."""
    told = await client.post(f"/api/lines/{line}/train")
    if told.is_error:
        raise SystemExit(f"{line} does not train: {told.text}")
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

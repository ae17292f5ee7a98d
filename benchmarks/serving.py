"""Serving, side by side: bare vLLM, learnd, its engine alone, Transformers with PEFT; adapters, fewer bits, a swap, a job.

The servers run on this machine at once and are asked in turns, A B A B, each while the other's processes are stopped (SIGSTOP),
since an idle server polls. Figures are ratios of neighbouring turns: their median, with the lowest and the highest. `--quick` has
two turns of one wave each and no quantized bases, without it there are four of three, and its first run quantizes for minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from _cells import Bench, ttft
from _load import Reply, Turn, ask, drive, keep_asking, prompts, quantile
from _report import figures_of, findings, plot, table
from _servers import LINES, Server, bare, engine, learnd, make_versions, naive, settings_of, tiny_base
from rich.console import Console

from learners.base import prepare

SOURCE = "builtin:smollm2-135m"
BASE = "base"
MIXED = (*(f"{line}@v{number}" for line in LINES for number in (1, 2)), BASE)
"""Four adapters and the base."""
ONE = f"{LINES[0]}@v2"
QUICK_LESSONS, LESSONS = 48, 96
SWAP_CLIENTS = 4
PARTS = ("gateway", "adapters", "naive", "quantized", "swap", "training")
QUANTIZATIONS = ("int8", "int4")
_OPEN = frozenset({"queued", "running"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under six minutes on two cores")
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="where the plots go")
    parser.add_argument("--dtype", default="bfloat16", help="of all vLLM servers; on a CPU without AVX-512 try float32")
    parser.add_argument("--base", default=SOURCE, help="as base.source; `tiny`: two random layers, to try the bench itself")
    parser.add_argument("--only", default="", help=f"parts, of {','.join(PARTS)}")
    said = parser.parse_args()
    console = Console(stderr=True, highlight=False, width=130)
    parts = said.only.split(",") if said.only else [part for part in PARTS if not (said.quick and part == "quantized")]
    bench = Bench(said.quick, console)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives the bench, what was seen is shown
    is_whole = True
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as folder:
        try:
            run(bench, Path(folder), parts, said.base, said.dtype)
        except KeyboardInterrupt:
            is_whole = False
    bench.note(
        "run", f"{time.monotonic() - bench.began:.0f} s" if is_whole else "cut off: what is below is what was measured by then"
    )
    console.print(table(bench), findings(bench))
    plot(bench, said.out)
    if said.json:
        print(json.dumps(figures_of(bench)))
    return int(not is_whole or any(turn.failed for cell in bench.cells.values() for turn in cell.turns))


def run(bench: Bench, folder: Path, parts: Sequence[str], source: str, dtype: str) -> None:
    """Start everything, measure, stop everything."""
    if source == "tiny":
        source = str(folder / "tiny")
        tiny_base(Path(source))
    base, data = prepare(source), folder / "data"
    data.mkdir()
    settings = settings_of(data, source, dtype)
    adapters = make_versions(data, base)
    four = {name: path for name, path in adapters.items() if name in MIXED}
    with contextlib.ExitStack() as running:
        ours = running.enter_context(learnd(folder, data, source, dtype=dtype, epochs=2 if bench.quick else 4))
        bench.note("learnd: ready in", f"{ours.start_seconds:.1f} s; memory {ours.peak_bytes / 2**30:.2f} GiB before any request")
        if {"gateway", "adapters"} & set(parts):
            with bare(folder, settings, base, four) as stock:
                bench.note("bare vLLM: ready in", f"{stock.start_seconds:.1f} s; memory {stock.peak_bytes / 2**30:.2f} GiB")
                warm(ours)
                warm(stock)
                if "gateway" in parts:
                    with contextlib.nullcontext() if bench.quick else engine(folder, data, source, dtype, four) as own:
                        gateway(bench, ours, [stock, own] if own else [stock])
                if "adapters" in parts:
                    of_adapters(bench, ours, stock)
        if "naive" in parts and bench.has_time("Transformers"):
            with naive(folder, base, four) as other:
                of_naive(bench, ours, other)
        if "quantized" in parts:
            for quantization in QUANTIZATIONS:
                of_quantized(bench, Path(folder), ours, source, dtype, quantization)
        alone(bench, ours, parts)
        ours.weigh()
        bench.note("learnd: peak memory of the whole tree", f"{ours.peak_bytes / 2**30:.2f} GiB (PSS)")


def warm(server: Server) -> None:
    """Lazy imports, first kernels."""
    drive(server.port, [*MIXED], 4, 2, prompts(50_000), tokens=8)


def of_naive(bench: Bench, ours: Server, other: Server) -> None:
    """One adapter at eight clients, the base at one."""
    turns = 1 if bench.quick else 2
    bench.turns([(ours, "one", [ONE]), (other, "one", [ONE])], 8, waves=1, turns=turns)
    bench.turns([(ours, "base", [BASE]), (other, "base", [BASE])], 1, waves=2, turns=turns)
    bench.note("Transformers fp32: memory", f"{other.peak_bytes / 2**30:.2f} GiB")


def alone(bench: Bench, ours: Server, parts: Sequence[str]) -> None:
    """What is asked of learnd alone."""
    if "swap" in parts and bench.has_time("swap"):
        bench.swap = asyncio.run(swapped(bench, ours))
    if "training" in parts and bench.has_time("training"):
        try:
            bench.training = asyncio.run(beside_a_job(bench, ours))
        except TimeoutError as error:
            bench.note("training", f"not measured: {error}")


def gateway(bench: Bench, ours: Server, others: Sequence[Server]) -> None:
    """Learnd and the others on the base, and who uses the processor while."""
    for other in others:
        warm(other)
        other.pause()
    idle_before, began = ours.cpu_seconds(), time.monotonic()
    time.sleep(3)
    spent = sum(ours.cpu_seconds().values()) - sum(idle_before.values())
    idle = spent / (time.monotonic() - began)
    bench.note("learnd: idle, cores used", f"{idle:.2f} of {os.cpu_count()}")
    for clients in (8, 16, 1):
        before = {server.name: server.cpu_seconds() for server in (ours, *others)}
        bench.turns([(server, "base", [BASE]) for server in (*others, ours)], clients, waves=2 if clients == 1 else 0)
        for server in (ours, *others):
            if (server.name, "base", clients) not in bench.cells:
                continue
            tokens = sum(r.tokens for turn in bench.cells[server.name, "base", clients].turns for r in turn.good)
            spent = {name: seconds - before[server.name].get(name, 0.0) for name, seconds in server.cpu_seconds().items()}
            told = ", ".join(f"{n} {1000 * s / tokens:.2f}" for n, s in sorted(spent.items(), key=lambda x: -x[1]) if s > 0.05)
            bench.note(f"{server.name} c{clients}: CPU ms per token", told)


def of_adapters(bench: Bench, ours: Server, stock: Server) -> None:
    """One adapter, and four mixed with the base, beside the base; and vLLM's own kernels."""
    stock.pause()
    bench.turns([(ours, "base+", [BASE]), (ours, "one", [ONE])], 1, waves=2)
    bench.turns([(ours, "base+", [BASE]), (ours, "one", [ONE]), (ours, "mixed4", MIXED)], 8)
    bench.turns([(ours, "one+", [ONE]), (stock, "one", [ONE])], 8, waves=1, turns=1 if bench.quick else 2)


def of_quantized(bench: Bench, folder: Path, ours: Server, source: str, dtype: str, quantization: str) -> None:
    """A second learnd on the quantized base, beside the first: the base alone, and one adapter."""
    plain, base = prepare(source), prepare(source, say=bench.console.print, quantization=quantization)
    bench.bytes[quantization] = weights_bytes(base.path) / weights_bytes(plain.path)
    apart = folder / quantization
    (apart / "data").mkdir(parents=True)
    make_versions(apart / "data", base)
    with learnd(apart, apart / "data", source, dtype=dtype, quantization=quantization) as other:
        bench.note(f"{other.name}: ready in", f"{other.start_seconds:.1f} s; memory {other.peak_bytes / 2**30:.2f} GiB")
        drive(other.port, [BASE, ONE], 4, 2, prompts(50_000), tokens=8)
        for clients in (8, 1):
            waves = 2 if clients == 1 else 0
            bench.turns([(ours, f"base|{quantization}", [BASE]), (other, "base", [BASE])], clients, waves=waves)
            bench.turns([(ours, f"one|{quantization}", [ONE]), (other, "one", [ONE])], clients, waves=waves)


def weights_bytes(folder: Path) -> int:
    """Of all weights in a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


async def swapped(bench: Bench, ours: Server) -> dict[str, Any]:
    """Promote a version that no replica holds under load: pauses, failures, and whether each reply is by whom it names."""
    line, texts = LINES[0], [f"{number} Tell me about {what}." for number, what in enumerate(["rain", "Rome", "bread", "iron"])]
    own = {name: await _own_words(ours.port, name, texts) for name in (f"{line}@v1", ONE)}
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
    old, new = ({told.text[:12] for told in own[name]} for name in (ONE, f"{line}@v3"))
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


if __name__ == "__main__":
    raise SystemExit(main())

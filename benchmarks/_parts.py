"""The parts of the bench of serving: which servers each asks for what, and how long it takes at the least."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from _alone import beside_a_job, swapped
from _cells import Bench
from _house import House
from _load import REPLY_TOKENS, drive, prompts
from _servers import Server
from _site import BASE, CHAMPION, MIXED, QUANTIZATIONS

FEW_TOKENS = 16
"""Of a reply with `--quick` where a server takes a minute for whole ones."""
START_NEEDS = 25
"""Seconds of a start on two cores, several at once."""


def gateway(bench: Bench, house: House) -> None:
    """Learnd and the others on the base, and who uses the processor while."""
    ours, stock = house["learnd"], house["bare"]
    servers = [stock, *house.those("gateway", ("engine", "ray-serve-llm")), ours]
    for server in servers:
        warm(bench, server, MIXED if server in {ours, stock} else [BASE])
    bench.floor.give(ours)
    before, began = sum(ours.cpu_seconds().values()), time.monotonic()
    time.sleep(2 if bench.quick else 5)
    idle = (sum(ours.cpu_seconds().values()) - before) / (time.monotonic() - began)
    bench.note("learnd: idle, cores used", f"{idle:.2f} of {os.cpu_count()}")
    for clients in (8, 16) if bench.quick else (8, 16, 1):
        spent = {server.name: server.cpu_seconds() for server in servers}
        bench.turns([(server, "base", [BASE]) for server in servers], clients, waves=2 if clients == 1 else 0)
        for server in servers:
            _note_processors(bench, server, clients, spent[server.name])


def _note_processors(bench: Bench, server: Server, clients: int, before: dict[str, float]) -> None:
    tokens = sum(r.tokens for turn in bench.cells[server.name, "base", clients].turns for r in turn.good)
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in server.cpu_seconds().items()}
    if tokens:
        told = ", ".join(f"{n} {1000 * s / tokens:.2f}" for n, s in sorted(spent.items(), key=lambda x: -x[1]) if s > 0.05)
        bench.note(f"{server.name} c{clients}: CPU ms per token", told)


def adapters(bench: Bench, house: House) -> None:
    """One adapter, and four mixed with the base, beside the base; and vLLM's own kernels."""
    ours = house["learnd"]
    warm(bench, ours)
    base, one, mixed = (ours, "base+", [BASE]), (ours, "one", [CHAMPION]), (ours, "mixed4", MIXED)
    bench.turns([base, one, mixed], 8)
    if bench.quick:
        bench.turns([base, one], 1, waves=2)
    else:
        bench.turns([base, one, mixed], 1, waves=10, turns=3)  # ten: each of the five models a long prompt and a short one
        bench.turns([base, one, mixed], 16, waves=2)
    stock = house["bare"]
    warm(bench, stock, [CHAMPION])
    arms = [(ours, "one+", [CHAMPION]), (stock, "one", [CHAMPION])]
    bench.turns(arms, 8, waves=1, turns=1 if bench.quick else 2, tokens=_few(bench))


def naive(bench: Bench, house: House) -> None:
    """Transformers in fp32: the base and one adapter at one client, one adapter at eight; int8 beside it, where there is one."""
    ours, other = house["learnd"], house["transformers"]
    eighth = house.those("naive", ["int8"])
    for server in (ours, other, *eighth):
        warm(bench, server, [BASE, CHAMPION], few=True)
    turns = 1 if bench.quick else 2
    for load, model, clients in (("base", BASE, 1), ("one", CHAMPION, 1), ("one", CHAMPION, 8)):
        servers = (ours, other) if clients > 1 else (ours, *eighth, other)
        arms = [(server, f"{load}|naive", [model]) for server in servers]
        bench.turns(arms, clients, waves=2 if clients == 1 else 1, turns=turns, tokens=_few(bench))


def quantized(bench: Bench, house: House) -> None:
    """Daemons on the quantized base, one after the other, beside the first: the base alone, and one adapter."""
    for quantization in QUANTIZATIONS:
        if quantization not in house:
            bench.note(quantization, "not measured: --quick takes int8 alone, and that if its checkpoint is there")
            continue
        for other in house.those("quantized", [quantization]):
            _beside_plain(bench, house["learnd"], other, quantization)
        if not bench.quick:
            house.retire([quantization])


def _beside_plain(bench: Bench, ours: Server, other: Server, quantization: str) -> None:
    warm(bench, ours, [BASE, CHAMPION])
    warm(bench, other, [BASE, CHAMPION])
    for clients in (8,) if bench.quick else (8, 1):
        waves = 2 if clients == 1 else 0
        for load, model in (("base", BASE), ("one", CHAMPION)):
            arms = [(ours, f"{load}|{quantization}", [model]), (other, load, [model])]
            bench.turns(arms, clients, waves=waves, turns=1 if bench.quick else 0)


def swap(bench: Bench, house: House) -> None:
    """A version is loaded, proven and switched to under load."""
    ours = house["learnd"]
    bench.floor.give(ours)
    bench.swap = asyncio.run(swapped(bench, ours))
    bench.weigh(ours)


def training(bench: Bench, house: House) -> None:
    """A client beside a job."""
    ours = house["learnd"]
    bench.floor.give(ours)
    bench.training = asyncio.run(beside_a_job(bench, ours))


def warm(bench: Bench, server: Server, models: Sequence[str] = MIXED, *, few: bool = False) -> None:
    """Lazy imports, first kernels."""
    bench.floor.give(server)
    clients, waves = (2, 1) if few else (4, 2)
    drive(server.port, models, clients, waves, prompts(50_000), tokens=8, within=bench.budget.left)


def _few(bench: Bench) -> int:
    return FEW_TOKENS if bench.quick else REPLY_TOKENS


@dataclass(frozen=True)
class Part:
    """What is done, by which servers, and for how many seconds with `--quick` on two cores, at the least."""

    run: Callable[[Bench, House], None]
    servers: tuple[str, ...]
    needs: float


PARTS = {
    "gateway": Part(gateway, ("learnd", "bare", "engine", "ray-serve-llm"), 38),
    "adapters": Part(adapters, ("learnd", "bare"), 40),
    "naive": Part(naive, ("learnd", "transformers", "int8"), 30),
    "quantized": Part(quantized, ("learnd", *QUANTIZATIONS), 22),
    "swap": Part(swap, ("learnd",), 25),
    "training": Part(training, ("learnd",), 45),
}
"""In their order; a job may outlive the last one."""

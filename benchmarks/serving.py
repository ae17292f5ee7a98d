"""Serving, side by side: bare vLLM, learnd, its engine alone, Ray Serve LLM, Transformers; adapters, fewer bits, a swap, a job.

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
from collections.abc import Sequence
from pathlib import Path

from _alone import CHAMPION, beside_a_job, swapped
from _cells import Bench
from _load import drive, prompts
from _report import figures_of, findings, plot, table
from _servers import LINES, Server, bare, engine, learnd, make_versions, naive, ray_serve_llm, settings_of, tiny_base
from rich.console import Console

from learners.base import prepare

SOURCE = "builtin:smollm2-135m"
BASE = "base"
MIXED = (*(f"{line}@v{number}" for line in LINES for number in (1, 2)), BASE)
"""Four adapters and the base."""
PARTS = ("gateway", "adapters", "naive", "quantized", "swap", "training")
QUANTIZATIONS = ("int8", "int4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under six minutes on two cores")
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="where the plots go")
    parser.add_argument("--dtype", default="bfloat16", help="of all vLLM servers; on a CPU without AVX-512 try float32")
    parser.add_argument("--base", default=SOURCE, help="as base.source; `tiny`: two random layers, to try the bench itself")
    parser.add_argument(
        "--ray-serve-llm", type=Path, help="an environment that benchmarks/ray-serve-llm.sh has made: compare it too"
    )
    parser.add_argument("--only", default="", help=f"parts, of {','.join(PARTS)}")
    said = parser.parse_args()
    if said.ray_serve_llm and not (said.ray_serve_llm / "bin/python").exists():
        parser.error(f"{said.ray_serve_llm} is no environment: make it by `benchmarks/ray-serve-llm.sh {said.ray_serve_llm}`")
    console = Console(stderr=True, highlight=False, width=130)
    parts = said.only.split(",") if said.only else [part for part in PARTS if not (said.quick and part == "quantized")]
    bench = Bench(said.quick, console)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives the bench, what was seen is shown
    is_whole = True
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as folder:
        try:
            run(bench, Path(folder), parts, said.base, said.dtype, said.ray_serve_llm)
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


def run(bench: Bench, folder: Path, parts: Sequence[str], source: str, dtype: str, ray: Path | None) -> None:
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
                    others = [] if bench.quick else [engine(folder, data, source, dtype, four)]
                    others += [ray_serve_llm(folder, ray, settings, base)] if ray else []
                    with contextlib.ExitStack() as asked:
                        gateway(bench, ours, [stock, *(asked.enter_context(other) for other in others)])
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


def warm(server: Server, models: Sequence[str] = MIXED) -> None:
    """Lazy imports, first kernels."""
    drive(server.port, models, 4, 2, prompts(50_000), tokens=8)


def of_naive(bench: Bench, ours: Server, other: Server) -> None:
    """One adapter at eight clients, the base at one."""
    turns = 1 if bench.quick else 2
    bench.turns([(ours, "one", [CHAMPION]), (other, "one", [CHAMPION])], 8, waves=1, turns=turns)
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
        warm(other, [BASE])
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
    bench.turns([(ours, "base+", [BASE]), (ours, "one", [CHAMPION])], 1, waves=2)
    bench.turns([(ours, "base+", [BASE]), (ours, "one", [CHAMPION]), (ours, "mixed4", MIXED)], 8)
    bench.turns([(ours, "one+", [CHAMPION]), (stock, "one", [CHAMPION])], 8, waves=1, turns=1 if bench.quick else 2)


def of_quantized(bench: Bench, folder: Path, ours: Server, source: str, dtype: str, quantization: str) -> None:
    """A second learnd on the quantized base, beside the first: the base alone, and one adapter."""
    plain, base = prepare(source), prepare(source, say=bench.console.print, quantization=quantization)
    bench.bytes[quantization] = weights_bytes(base.path) / weights_bytes(plain.path)
    apart = folder / quantization
    (apart / "data").mkdir(parents=True)
    make_versions(apart / "data", base)
    with learnd(apart, apart / "data", source, dtype=dtype, quantization=quantization) as other:
        bench.note(f"{other.name}: ready in", f"{other.start_seconds:.1f} s; memory {other.peak_bytes / 2**30:.2f} GiB")
        drive(other.port, [BASE, CHAMPION], 4, 2, prompts(50_000), tokens=8)
        for clients in (8, 1):
            waves = 2 if clients == 1 else 0
            bench.turns([(ours, f"base|{quantization}", [BASE]), (other, "base", [BASE])], clients, waves=waves)
            bench.turns([(ours, f"one|{quantization}", [CHAMPION]), (other, "one", [CHAMPION])], clients, waves=waves)


def weights_bytes(folder: Path) -> int:
    """Of all weights in a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    raise SystemExit(main())

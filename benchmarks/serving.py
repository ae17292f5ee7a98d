"""Serving, side by side: bare vLLM, learnd, its engine alone, Ray Serve LLM, Transformers; adapters, fewer bits, a swap, a job.

The servers run on this machine at once and are asked in turns, A B A B, each while the other's processes are stopped (SIGSTOP),
since an idle server polls. Figures are ratios of neighbouring turns: their median, with the lowest and the highest. A part that
fails is said, its figures are null, and the others go on. `--quick` asks little of each and ends within six minutes; without it
there are four turns of three waves, and its first run quantizes for minutes.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from _budget import Budget
from _cells import Bench
from _floor import SETTLE_SECONDS, Floor
from _house import House
from _parts import PARTS, START_NEEDS
from _report import figures_of, findings, plot, table
from _site import Asked, Site
from rich.console import Console

from learners import cores
from learners.base import BaseMissing

SOURCE = "builtin:smollm2-135m"
QUICK_SECONDS = 320
"""For starts and parts with `--quick`; before them adapters are made, after them everything is stopped."""


def main() -> int:
    asked, said = parsed(sys.argv[1:])
    if cores.are_wanted():
        print(
            "a learning job of another daemon computes on this machine, and engines leave it cores: let it end, then begin again",
            file=sys.stderr,
        )
        return 1
    console = Console(stderr=True, highlight=False, width=150)
    floor = Floor(SETTLE_SECONDS / 2 if asked.quick else SETTLE_SECONDS)
    bench = Bench(asked.quick, console, floor=floor)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server outlives the bench, what was seen is shown
    is_whole = True
    with tempfile.TemporaryDirectory(prefix="learnd-bench-", ignore_cleanup_errors=True) as folder:
        try:
            run(bench, Path(folder), asked)
        except KeyboardInterrupt:
            is_whole = False
        except BaseMissing as error:
            raise SystemExit(str(error)) from None
    told = f"{bench.budget.taken:.0f} s" if is_whole else "cut off: what is below is what was measured by then"
    bench.note("run", told)
    return shown(bench, said) or int(not is_whole)


def parsed(words: list[str]) -> tuple[Asked, argparse.Namespace]:
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
    said = parser.parse_args(words)
    if said.ray_serve_llm and not (said.ray_serve_llm / "bin/python").exists():
        parser.error(f"{said.ray_serve_llm} is no environment: make it by `benchmarks/ray-serve-llm.sh {said.ray_serve_llm}`")
    only = said.only.split(",") if said.only else list(PARTS)
    if strangers := set(only) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(strangers))}; there are {','.join(PARTS)}")
    parts = tuple(part for part in PARTS if part in only)
    return Asked(parts, said.base, said.dtype, said.quick, said.ray_serve_llm), said


def run(bench: Bench, folder: Path, asked: Asked) -> None:
    """Start everything, measure, stop everything."""
    site = Site(folder, asked, lambda what: bench.console.print(f"  {what}", markup=False))
    bench.weights |= site.weights()
    house = House(bench, site.plans())
    if asked.quick:
        needs = {"start": START_NEEDS * len(list(house)), **{part: PARTS[part].needs for part in asked.parts}}
        bench.budget = Budget(needs, QUICK_SECONDS, began=bench.budget.began)
    measure(bench, house, asked.parts)
    bench.weights |= site.weights()  # some of them may have been made meanwhile


def measure(bench: Bench, house: House, parts: tuple[str, ...]) -> None:
    """Each part in its turn; all servers end with the last one, whatever comes."""
    try:
        if bench.quick:
            bench.attempt("start", lambda: house.start(list(house)))
        for number, part in enumerate(parts):
            if not bench.quick:
                house.retire_all_but(name for later in parts[number:] for name in PARTS[later].servers)
            bench.floor.open()
            bench.attempt(part, partial(PARTS[part].run, bench, house))
    finally:
        house.close()


def shown(bench: Bench, said: argparse.Namespace) -> int:
    """Print what was measured; the exit status: 1 when something is missing, or a request failed."""
    bench.console.print(table(bench), findings(bench))
    if said.json:
        print(json.dumps(figures_of(bench), allow_nan=False), flush=True)
    plot(bench, said.out)
    return int(bool(bench.failed) or any(turn.failed for cell in bench.cells.values() for turn in cell.turns))


if __name__ == "__main__":
    raise SystemExit(main())

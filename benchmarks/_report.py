"""What the bench of serving shows: the last line's figures, two tables, two plots."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _cells import Bench, Key, milliseconds, throughput, ttft
from _load import quantile
from rich.markup import escape
from rich.table import Table

_LOADS = {"base": "base", "adapter": "one"}
_NAIVE = (("base", "base", 1), ("adapter", "one", 1), ("adapter", "one", 8))
_STORED = {"bf16": "none", "int8": "int8", "int4": "int4"}
_BESIDE = {"bare": "bare vLLM", "engine": "its engine alone", "ray-serve-llm": "Ray Serve LLM"}
_SWAP = ("stall_ms_p99", "stall_vs_steady", "verdict_to_first_token_seconds", "failed", "wrong_version")


def figures_of(bench: Bench) -> dict[str, Any]:
    """The last line; null for what was not measured or is no number, `failed` says why."""

    def vs(server: str, clients: int) -> dict[str, float | None]:
        pair = _ours("base", clients), (server, "base", clients)
        return {"throughput": bench.ratio(*pair, throughput).middle, "ttft_p50": bench.ratio(*pair, ttft).middle}

    def speed(above: Key, below: Key) -> float | None:
        return bench.ratio(above, below, throughput).middle

    def vs_plain(quantization: str) -> dict[str, float | None]:
        pairs = {name: ((quantization, load, 8), _ours(f"{load}|{quantization}", 8)) for name, load in _LOADS.items()}
        return {**{name: speed(*pair) for name, pair in pairs.items()}, "bytes": _share(bench, quantization, "none")}

    more = () if bench.quick else (16,)
    naive = {name: speed(*pair) for name, pair in _beside_naive().items()}
    found = {
        "vs_bare_vllm": {f"c{clients}": vs("bare", clients) for clients in (8, 16)},
        "vs_own_engine": {f"c{clients}": vs("engine", clients) for clients in (8, 16)},
        "vs_ray_serve_llm": {f"c{clients}": vs("ray-serve-llm", clients) for clients in (8, 16)},
        "adapter_vs_base": {f"c{n}": speed(_ours("one", n), _ours("base+", n)) for n in (1, 8, *more)},
        "mixed4_vs_base": {f"c{n}": speed(_ours("mixed4", n), _ours("base+", n)) for n in ((8,) if bench.quick else (1, 8, 16))},
        "vs_stock_lora": {"c8": speed(_ours("one+", 8), ("bare", "one", 8))},
        "int8_vs_bf16": vs_plain("int8"),
        "int4_vs_bf16": vs_plain("int4"),
        "vs_transformers_fp32": {
            "c8": naive["adapter_c8"],
            **naive,
            **{f"bytes_{name}": _share(bench, stored, "fp32") for name, stored in _STORED.items()},
        },
        "swap": bench.swap or dict.fromkeys(_SWAP),
        "while_training": bench.training or {"ttft_p50": None},
        "peak_gib": {server: round(peak / 2**30, 2) for server, peak in bench.peaks.items()},
        "failed": bench.failed,
    }
    return _finite(found)


def _finite(value: Any) -> Any:
    """The same with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _ours(load: str, clients: int) -> Key:
    return ("learnd", load, clients)


def _share(bench: Bench, above: str, below: str) -> float | None:
    """Of the weights' bytes."""
    known = bench.weights
    return round(known[above] / known[below], 3) if above in known and below in known else None


def _beside_naive() -> dict[str, tuple[Key, Key]]:
    """What is compared with Transformers in fp32."""
    ours = {f"{name}_c{n}": (_ours(f"{load}|naive", n), f"{load}|naive", n) for name, load, n in _NAIVE}
    eighth = {f"int8_{name}_c1": (("int8", f"{load}|naive", 1), f"{load}|naive", 1) for name, load in _LOADS.items()}
    return {name: (above, ("transformers", load, n)) for name, (above, load, n) in {**ours, **eighth}.items()}


def table(bench: Bench) -> Table:
    """Every server under every load."""
    shown = Table(
        title=f"Serving on {os.cpu_count()} cores: medians over turns (lowest – highest)",
        caption="few: two turns at the most, or short replies; a first look, not a figure to quote",
    )
    for name in (
        "server",
        "load",
        "clients",
        "turns",
        "tokens/s",
        "requests/s",
        "TTFT p50 p95 p99, ms",
        "pause p50 p95 p99, ms",
        "failed",
    ):
        shown.add_column(name)
    for cell in bench.cells.values():
        speeds = cell.of(throughput)
        ttfts = [value for turn in cell.turns for value in turn.ttfts]
        pauses = [value for turn in cell.turns for value in turn.pauses]
        asked = f"{len(cell.turns)} of {len(cell.turns[0].replies)}, {cell.tokens} tokens"
        shown.add_row(
            cell.server, cell.load, str(cell.clients), f"{asked}{': few' if cell.is_few else ''}",
            f"{statistics.median(speeds):.1f} ({min(speeds):.1f} – {max(speeds):.1f})",
            f"{statistics.median(cell.of(lambda turn: turn.requests_per_second)):.2f}",
            _quantiles(ttfts), _quantiles(pauses), str(sum(turn.failed for turn in cell.turns)),
        )  # fmt: skip
    return shown


def findings(bench: Bench) -> Table:
    """Ratios, everything else that was seen, and what failed."""
    shown = Table("what", "figure")
    for what, told in [*_ratios(bench), *bench.notes, *(("failed", reason) for reason in bench.failed)]:
        shown.add_row(escape(what), escape(told))
    return shown


def _quantiles(values: Sequence[float]) -> str:
    return "  ".join(milliseconds(quantile(values, q)) for q in (0.5, 0.95, 0.99))


def _ratios(bench: Bench) -> Iterator[tuple[str, str]]:
    """Of what was asked; a pair with a side that was not has none."""
    for what, (above, below) in _pairs():
        if {above, below} <= bench.cells.keys():
            wait = f", TTFT p50 {bench.ratio(above, below, ttft)}" if below[0] in _BESIDE else ""
            yield what, f"tokens/s {bench.ratio(above, below, throughput)}{wait}"
    for name, stored in _STORED.items():
        shares = (_share(bench, stored, "none"), _share(bench, stored, "fp32"))
        if None not in shares:
            yield f"{name}: bytes of the weights / as they are, / fp32", f"{shares[0]:.3f}, {shares[1]:.3f}"


def _pairs() -> Iterator[tuple[str, tuple[Key, Key]]]:
    """Everything that is compared, with what it is called."""
    for server, told in _BESIDE.items():
        for clients in (1, 8, 16):
            yield f"learnd / {told}, c{clients}", (("learnd", "base", clients), (server, "base", clients))
    for load in ("one", "mixed4"):
        for clients in (1, 8, 16):
            yield f"{load} / base, c{clients}", (_ours(load, clients), _ours("base+", clients))
    yield "one adapter: learnd / stock kernels, c8", (_ours("one+", 8), ("bare", "one", 8))
    for name, pair in _beside_naive().items():
        yield f"{name}: {pair[0][0]} / Transformers fp32", pair
    for quantization in ("int8", "int4"):
        for load, clients in (("base", 8), ("one", 8), ("base", 1), ("one", 1)):
            pair = (quantization, load, clients), _ours(f"{load}|{quantization}", clients)
            yield f"{quantization} / bf16, {load}, c{clients}", pair


def plot(bench: Bench, out: Path) -> None:
    """Tokens/s and TTFT of each cell, every turn a dot."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    names = [f"{cell.server} {cell.load} c{cell.clients}" for cell in bench.cells.values()]
    for file, title, figure in (("throughput", "tokens/s", throughput), ("ttft", "TTFT p50, s", ttft)):
        drawn, axis = plt.subplots(figsize=(9, 0.35 * len(names) + 1.2), layout="constrained")
        for place, cell in enumerate(bench.cells.values()):
            values = cell.of(figure)
            axis.barh(place, statistics.median(values), color="#88a" if cell.server == "learnd" else "#ccc")
            axis.plot(values, [place] * len(values), "k.", markersize=4)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel(title)
        drawn.savefig(out / f"serving-{file}.png", dpi=120)
        plt.close(drawn)

"""What the bench of serving shows: the last line's figures, two tables, two plots."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _cells import Bench, throughput, ttft
from _load import quantile
from rich.table import Table


def figures_of(bench: Bench) -> dict[str, Any]:
    """The last line; null for what was not measured, which the table tells."""

    def ours(load: str, clients: int) -> tuple[str, str, int]:
        return ("learnd", load, clients)

    def vs(server: str, clients: int) -> dict[str, float | None]:
        pair = ours("base", clients), (server, "base", clients)
        return {"throughput": bench.ratio(*pair, throughput).middle, "ttft_p50": bench.ratio(*pair, ttft).middle}

    def vs_naive() -> float | None:
        return bench.ratio(ours("one", 8), ("transformers", "one", 8), throughput).middle

    def vs_plain(quantization: str) -> dict[str, float | None]:
        base, adapter = (
            bench.ratio((quantization, load, 8), ours(f"{load}|{quantization}", 8), throughput).middle for load in ("base", "one")
        )
        size = bench.bytes.get(quantization)
        return {"base": base, "adapter": adapter, "bytes": None if size is None else round(size, 3)}

    return {
        "vs_bare_vllm": {f"c{clients}": vs("bare", clients) for clients in (8, 16)},
        "vs_own_engine": {f"c{clients}": vs("engine", clients) for clients in (8, 16)},
        "vs_ray_serve_llm": {f"c{clients}": vs("ray-serve-llm", clients) for clients in (8, 16)},
        "adapter_vs_base": {f"c{n}": bench.ratio(ours("one", n), ours("base+", n), throughput).middle for n in (1, 8)},
        "mixed4_vs_base": {"c8": bench.ratio(ours("mixed4", 8), ours("base+", 8), throughput).middle},
        "vs_stock_lora": {"c8": bench.ratio(ours("one+", 8), ("bare", "one", 8), throughput).middle},
        "int8_vs_bf16": vs_plain("int8"),
        "int4_vs_bf16": vs_plain("int4"),
        "vs_transformers_fp32": {"c8": vs_naive()},
        "swap": bench.swap or {"stall_ms_p99": None, "failed": None, "wrong_version": None},
        "while_training": bench.training or {"ttft_p50": None},
    }


def table(bench: Bench) -> Table:
    """Every server under every load."""
    shown = Table(title=f"Serving on {os.cpu_count()} cores: medians over turns (lowest – highest)")
    for name in (
        "server",
        "load",
        "clients",
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
        shown.add_row(
            cell.server, cell.load, str(cell.clients),
            f"{statistics.median(speeds):.1f} ({min(speeds):.1f} – {max(speeds):.1f})",
            f"{statistics.median(cell.of(lambda turn: turn.requests_per_second)):.2f}",
            _quantiles(ttfts), _quantiles(pauses), str(sum(turn.failed for turn in cell.turns)),
        )  # fmt: skip
    return shown


def findings(bench: Bench) -> Table:
    """Ratios, and everything else that was seen."""
    shown = Table("what", "figure")
    for what, told in [*_ratios(bench), *bench.notes]:
        shown.add_row(what, told)
    return shown


def _quantiles(values: Sequence[float]) -> str:
    return "  ".join(f"{1000 * quantile(values, q):.0f}" for q in (0.5, 0.95, 0.99))


def _ratios(bench: Bench) -> Iterator[tuple[str, str]]:
    for server, told in (("bare", "bare vLLM"), ("engine", "its engine alone"), ("ray-serve-llm", "Ray Serve LLM")):
        for clients in (1, 8, 16):
            pair = ("learnd", "base", clients), (server, "base", clients)
            figures = f"tokens/s {bench.ratio(*pair, throughput)}, TTFT p50 {bench.ratio(*pair, ttft)}"
            yield f"learnd / {told}, c{clients}", figures
    for load, clients in (("one", 1), ("one", 8), ("mixed4", 8)):
        told = bench.ratio(("learnd", load, clients), ("learnd", "base+", clients), throughput)
        yield f"{load} / base, c{clients}", f"tokens/s {told}"
    yield "one adapter: learnd / stock kernels, c8", str(bench.ratio(("learnd", "one+", 8), ("bare", "one", 8), throughput))
    yield (
        "one adapter: learnd / Transformers fp32, c8",
        str(bench.ratio(("learnd", "one", 8), ("transformers", "one", 8), throughput)),
    )

    for quantization, size in bench.bytes.items():
        yield f"{quantization}: bytes of the weights / bf16's", f"{size:.3f}"
        for load, clients in (("base", 8), ("one", 8), ("base", 1), ("one", 1)):
            pair = (quantization, load, clients), ("learnd", f"{load}|{quantization}", clients)
            yield f"{quantization} / bf16, {load}, c{clients}", f"tokens/s {bench.ratio(*pair, throughput)}"


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

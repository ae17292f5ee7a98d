"""What the bench of learning shows: means over the runs, a table, heat maps and curves."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARES = (("aa", "average accuracy"), ("bwt", "backward transfer"), ("forgetting", "forgetting"))
KILO = 1e3


def summary(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Means over the runs, as the last line has them."""
    means: dict[str, Any] = {}
    for name in runs[0]["strategies"]:
        told = [run["strategies"][name] for run in runs]
        figures = [key for key, value in told[0].items() if isinstance(value, float | int)]
        means[name] = {key: round(statistics.fmean(one[key] for one in told), 4) for key in figures}
    joint = means.pop("joint", None)

    def by_task(key: str) -> dict[str, float]:
        found = {task: statistics.fmean(run[key][task] for run in runs) for task in runs[0]["order"]}
        return {"aa": round(statistics.fmean(found.values()), 4), **{task: round(value, 4) for task, value in found.items()}}

    return {
        "suite": options.suite,
        "tasks": options.tasks,
        "rows": options.rows,
        "tests": options.tests,
        "orders": options.orders,
        "seeds": options.seeds,
        "strategies": means,
        "joint": joint,
        "base": by_task("base"),
        f"lr{options.rows}": by_task("lr"),
        "runs": runs,
    }


def table(found: dict[str, Any], floor: str) -> Iterator[str]:
    """The figures as lines of text."""
    columns = [*(key for key, _ in SHARES), "kl_to_base", "tokens_per_second", "seconds", "bytes"]
    yield f"{'':12}" + "".join(f"{name:>18}" for name in columns)
    for name, told in {**found["strategies"], **({"joint": found["joint"]} if found["joint"] else {})}.items():
        cells = ["-" if name == "joint" and key in {"bwt", "forgetting"} else f"{told[key]:.3f}" for key in columns[:4]]
        cells += [f"{told['tokens_per_second']:.0f}", f"{told['seconds']:.0f}", f"{told['bytes'] / KILO:.0f} k"]
        yield f"{name:12}" + "".join(f"{cell:>18}" for cell in cells)
    for name in ("base", floor):
        yield f"{name:12}{found[name]['aa']:>18.3f}"


def draw(runs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """A heat map of each matrix of the first run, and the curves of all strategies over it."""
    from matplotlib.figure import Figure

    run, paths = runs[0], []
    sequences = {name: told["matrix"] for name, told in run["strategies"].items() if "bwt" in told}
    curves = Figure(figsize=(6, 4), layout="constrained")
    axes = curves.subplots()
    for name, matrix in sequences.items():
        places = range(1, len(matrix) + 1)
        axes.plot(places, [statistics.fmean(row[: t + 1]) for t, row in enumerate(matrix)], marker="o", label=name)
        heat = Figure(figsize=(1.1 * len(matrix) + 1.8, 0.6 * len(matrix) + 1.4), layout="constrained")
        plot = heat.subplots()
        plot.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        plot.set(title=name, xlabel="measured on", ylabel="after learning")
        plot.set_xticks(range(len(matrix)), run["order"], rotation=30)
        plot.set_yticks(range(len(matrix)), run["order"])
        for t, row in enumerate(matrix):
            for j, value in enumerate(row):
                plot.text(j, t, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        paths.append(folder / f"matrix-{name}.png")
        heat.savefig(paths[-1], dpi=120)
    axes.set(xlabel="tasks learned", ylabel="accuracy on them", ylim=(0, 1), xticks=list(range(1, len(run["order"]) + 1)))
    axes.legend()
    paths.append(folder / "curves.png")
    curves.savefig(paths[-1], dpi=120)
    return paths

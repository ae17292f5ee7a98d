"""The rollout's test plan, T0 to T15: error rates, power, times to a rollback, mutants, crashes, trials end to end."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rollout_plan import daemon, health, machine, mutants, single, stream
from benchmarks.rollout_plan.paths import Check, Scale

PLAN: Mapping[str, Callable[[Scale], Iterator[Check]]] = {
    "T0": single.t0,
    "T1": single.t1,
    "T2": single.t2,
    "T3": single.t3,
    "T4": single.t4,
    "T5": single.t5,
    "T6": stream.t6,
    "T7": mutants.t7,
    "T8": single.t8,
    "T9": health.t9,
    "T10": health.t10,
    "T11": stream.t11,
    "T12": health.t12,
    "T13": machine.t13,
    "T14": daemon.t14,
    "T15": daemon.t15,
}


def main() -> int:
    """Run the plan; 1 when a threshold is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="all runs, not a fifth of them")
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--only", default="", help="parts of the plan, as in T2,T4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for the power curves, as PNG and CSV, and every check as CSV")
    said = parser.parse_args()
    scale, names = Scale(said.full, said.seed), said.only.split(",") if said.only else list(PLAN)
    if unknown := set(names) - set(PLAN):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PLAN)}")
    began, checks = time.monotonic(), []
    for name in names:
        checks += show(name, PLAN[name], scale)
    if said.out:
        said.out.mkdir(parents=True, exist_ok=True)
        write(said.out, checks, single.power_curves(scale))
    missed = [check for check in checks if not check.passed]
    print(f"{len(checks) - len(missed)} of {len(checks)} within their thresholds, {time.monotonic() - began:.0f} s")
    for check in missed:
        print(f"MISSED {check.test} {check.what}: {check.found:g}, must be {check.limit}")
    if said.json:
        print(json.dumps(figures(checks, scale)))
    return int(bool(missed))


def show(name: str, part: Callable[[Scale], Iterator[Check]], scale: Scale) -> list[Check]:
    """Run one part, each check on a line as it comes."""
    print(f"{name}  {(part.__doc__ or '').splitlines()[0]}", flush=True)
    began, checks = time.monotonic(), []
    for check in part(scale):
        print(f"    {'ok    ' if check.passed else 'MISSED'} {check.what}: {check.found:.5g} ({check.limit})", flush=True)
        checks.append(check)
    print(f"    {time.monotonic() - began:.0f} s", flush=True)
    return checks


def figures(checks: Sequence[Check], scale: Scale) -> dict[str, Any]:
    """The last line: the worst of each kind; None for what was not run."""
    runs = scale.runs(2000)
    by = {(check.test, check.what): check.found for check in checks}

    def of(test: str, *words: str) -> list[float]:
        return [found for (part, what), found in by.items() if part == test and all(word in what for word in words)]

    pairs = {check.what.split(":")[0]: [] for check in checks if check.test == "T7"}
    for check in checks:
        if check.test == "T7":
            pairs[check.what.split(":")[0]].append(check.passed)
    medians = {f"{drop:.2f}": of("T4", f"{drop:+.2f}: median") for drop in single.DROPS}
    return {
        "false_promotion_rate": max((found / runs for found in of("T2", "false promotions")), default=None),
        "reference_alpha": single.ALPHA,
        "median_units_to_rollback": {drop: found[0] for drop, found in medians.items() if found},
        "fdr": max(of("T6", "false discovery"), default=None),
        "power": min((found for found in of("T6", "power") if found), default=None),
        "mutants_caught": f"{sum(map(all, pairs.values()))}/{len(pairs)}" if pairs else None,
        "crash_points": int(sum(of("T14", "crash points"))),
        "crash_mismatches": int(sum(of("T14", "other ends"))),
        "checks": len(checks),
        "missed": [f"{check.test} {check.what}" for check in checks if not check.passed],
    }


def write(folder: Path, checks: Sequence[Check], curves: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Every check, and the power curves as numbers and as a picture."""
    with (folder / "checks.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["test", "what", "found", "limit", "passed"])
        rows.writerows([check.test, check.what, check.found, check.limit, check.passed] for check in checks)
    with (folder / "power.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["test", "difference", *single.SIZES])
        rows.writerows([name, effect, *shares] for name, curve in curves.items() for effect, shares in curve.items())
    draw(folder / "power.png", curves)


def draw(path: Path, curves: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    """Share of candidates promoted, by pairs, for each true difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for effect, shares in curve.items():
            axes.plot(single.SIZES, shares, marker="o", label=f"{effect:+g}")
        axes.set(xscale="log", xlabel="pairs of units", title=f"{name}, α = {single.ALPHA:g}", ylim=(-0.02, 1.02))
        axes.set_xticks(single.SIZES, [str(size) for size in single.SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(title="true difference", fontsize="small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.axes[0].set_ylabel("share promoted by then")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())

"""The demo's end: a table, a picture (accuracies, evidence, the matrix) in PNG and HTML, and the last line of JSON."""

from __future__ import annotations

import base64
import html
import json
from collections import deque
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console

from service.demo.outcome import Outcome, broken_promises, summary
from service.demo.screen import cell, scores
from service.demo.watch import short

WINDOW = 60
"""Replies that a point of the accuracy curve is the mean of."""
COLOURS = {"airline": "#1f6feb", "headlines": "#d9822b"}
PROMOTE, ROLL_BACK, QUIET = "#2a9d4a", "#c0392b", "#888888"

PAGE = """<!doctype html><meta charset="utf-8"><title>learnd demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
img{{width:100%}}table{{border-collapse:collapse}}td,th{{padding:.3rem 1rem .3rem 0;text-align:left}}</style>
<h1>A care desk that learned while it worked</h1>
<p>{story}</p><table>{table}</table>
<img alt="Accuracies, evidence and the matrix of skills by versions" src="data:image/png;base64,{image}">
<h2>Measured</h2><pre>{numbers}</pre>"""


def tell(outcome: Outcome, folder: Path, console: Console) -> int:
    """Write the report, print the table and what went wrong, if anything did; returns the exit status."""
    image = folder / "report.png"
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        draw(outcome).savefig(image, dpi=150)
    page = folder / "report.html"
    page.write_text(_page(outcome, image.read_bytes()))
    console.print(scores(outcome.tally.matrix()))
    console.print(in_words(outcome))
    console.print(f"report: {page} and {image}")
    wrong = broken_promises(outcome)
    for one in wrong:
        console.print(f"broken promise: {one}", style="red")
    return 1 if wrong else 0


def last_line(outcome: Outcome) -> str:
    """The numbers as one line of JSON."""
    return json.dumps(summary(outcome))


def in_words(outcome: Outcome) -> str:
    """The numbers as a sentence."""
    said = summary(outcome)
    swaps, live = (", ".join(f"{s:.1f}" for s in said[key]) for key in ("swap_seconds", "feedback_to_live_seconds"))
    return (
        f"{said['promotions']} promotions in {said['seconds']:.0f} s; "
        f"{said['requests']} requests, {said['failed_requests']} failed; "
        f"{said['feedback_acknowledged']} pieces of feedback acknowledged, {said['feedback_stored']} stored, "
        f"{said['examples_trained']} examples trained; "
        f"swaps took {swaps or '–'} s, feedback was live after {live or '–'} s."
    )


def draw(outcome: Outcome) -> Figure:
    """Accuracies over time above; evidence and the matrix below."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    top = figure.add_subplot(grid[0, :])
    _accuracies(top, outcome)
    _evidence(figure.add_subplot(grid[1, 0], sharex=top), outcome)
    _matrix(figure.add_subplot(grid[1, 1]), outcome)
    return figure


def curve(outcome: Outcome, skill: str, window: int = WINDOW) -> tuple[list[float], list[float]]:
    """Times and running accuracies of the line's answers to never-trained texts of a skill."""
    last: deque[bool] = deque(maxlen=window)
    times, means = [], []
    for reply in sorted(outcome.tally.replies, key=lambda one: one.at):
        if reply.text.skill == skill and not reply.text.is_taught and not reply.is_by_name:
            last.append(reply.is_right)
            times.append(reply.at)
            means.append(sum(last) / len(last))
    return times, means


def _accuracies(axes: Any, outcome: Outcome) -> None:
    for skill in outcome.tally.matrix():
        axes.plot(*curve(outcome, skill), color=COLOURS.get(skill), label=skill)
    for promotion in outcome.promotions:
        at = float(promotion["at"]) - outcome.began_at
        axes.axvline(at, color=QUIET, linewidth=1, linestyle="--")
        axes.annotate(f" {short(promotion['to'])} promoted", (at, 1.04), color=QUIET, va="bottom")
    axes.set(ylim=(0, 1.12), ylabel="accuracy", xlabel="seconds")
    axes.set_title(f"Live answers to never-trained texts (mean of the last {WINDOW})", loc="left")
    axes.legend(frameon=False, loc="lower right")


def _evidence(axes: Any, outcome: Outcome) -> None:
    for number, (_, group) in enumerate(groupby(outcome.evidence, key=lambda one: one.trial)):
        points = list(group)
        times = [one.at for one in points]
        labels = ("to promote", "to roll back") if number == 0 else (None, None)
        axes.plot(times, [one.promote for one in points], color=PROMOTE, label=labels[0], marker=".")
        axes.plot(times, [one.rollback for one in points], color=ROLL_BACK, label=labels[1], marker=".")
        axes.hlines(points[0].promote_at, times[0], times[-1], color=PROMOTE, linestyle=":")
        axes.hlines(points[0].rollback_at, times[0], times[-1], color=ROLL_BACK, linestyle=":")
    axes.set(xlabel="seconds", ylabel="log evidence")
    axes.set_title("Trials: evidence over time, thresholds dotted", loc="left")
    if outcome.evidence:
        axes.legend(frameon=False, loc="center")


def _matrix(axes: Any, outcome: Outcome) -> None:
    matrix, versions = outcome.tally.matrix(), outcome.tally.versions()
    values = [[row[version].accuracy for version in versions] for row in matrix.values()]
    filled = [[float("nan") if value is None else value for value in row] for row in values]
    if filled:
        axes.imshow(filled, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if (value or 0) > 0.6 else "black"  # noqa: PLR2004 - readable on the map's darker half
            axes.text(x, y, "–" if value is None else f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(versions)), versions)
    axes.set_yticks(range(len(matrix)), list(matrix), rotation=90, va="center")
    axes.set_title("Skills by versions", loc="left")


def _page(outcome: Outcome, image: bytes) -> str:
    versions = outcome.tally.versions()
    rows = [["skill", *versions]]
    rows += [[skill, *(cell(row[version]) for version in versions)] for skill, row in outcome.tally.matrix().items()]
    return PAGE.format(
        story=html.escape(in_words(outcome)),
        table="".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows),
        image=base64.b64encode(image).decode(),
        numbers=html.escape(json.dumps(summary(outcome), indent=2)),
    )

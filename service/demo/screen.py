"""What the demo shows while it runs: one live panel on a terminal, a line now and then elsewhere. Drawing only."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.demo.tally import Score, Tally

HEARTBEAT_SECONDS = 15.0


class Screen:
    """Keeps the panel up to date and prints news above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._began = time.monotonic()
        self._spoke_at = float("-inf")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, news: str) -> None:
        """Print one event."""
        self.console.print(Text(f"{self._clock()}  ", "dim"), Text(news), sep="", soft_wrap=True)

    def show(self, title: str, line: dict[str, Any], tally: Tally, acknowledged: int) -> None:
        """Draw the present state."""
        if self._live:
            self._live.update(panel(f"{self._clock()}  {title}", line, tally, acknowledged), refresh=True)
        elif time.monotonic() - self._spoke_at >= HEARTBEAT_SECONDS:
            self._spoke_at = time.monotonic()
            self.say(f"{title}: {tally.requests} requests, {len(tally.failures)} failed; {activity(line)}")

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes:2d}:{seconds:02d}"


def panel(title: str, line: dict[str, Any], tally: Tally, acknowledged: int) -> Panel:
    """The whole state in one box."""
    traffic = (
        f"{tally.requests} requests, {len(tally.failures)} failed · {acknowledged} pieces of feedback acknowledged · "
        f"answered by {line.get('champion') or 'the base'}"
    )
    parts: list[RenderableType] = [Text(traffic), Text(activity(line), "cyan")]
    parts += [*_bars(line), scores(tally.matrix())]
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def activity(line: dict[str, Any]) -> str:
    """What the daemon is busy with, in words."""
    job, trial = line.get("job"), line.get("trial")
    if job:
        numbers = [
            f"step {job['step']} of {job['steps']}" if job.get("steps") else "",
            f"loss {job['loss']:.3f}" if job.get("loss") is not None else "",
            f"{job['tokens_per_second']:.0f} tokens/s" if job.get("tokens_per_second") else "",
            f"{job['eta_seconds']:.0f} s to go" if job.get("eta_seconds") is not None else "",
        ]
        return f"training, {job.get('phase') or job.get('state')}: " + ", ".join(n for n in numbers if n)
    if trial:
        units = trial.get("units") or {"candidate": 0, "control": 0}
        said = f"trial, {trial['state']}: {trial.get('weight') or 0:.0%} of the customers get {line.get('candidate')}"
        return f"{said}; units judged {units['candidate']} and {units['control']}"
    return f"{line.get('examples', {}).get('fresh', 0)} examples wait to be learned from"


def scores(matrix: dict[str, dict[str, Score]]) -> Table:
    """Accuracies of skills by versions."""
    versions = list(dict.fromkeys(version for row in matrix.values() for version in row))
    table = Table("never-trained texts", *versions, box=None, padding=(0, 3, 0, 0), header_style="bold")
    for skill, row in matrix.items():
        table.add_row(skill, *(cell(row.get(version, Score())) for version in versions))
    return table


def cell(score: Score) -> str:
    """An accuracy with the number of texts it rests on."""
    return "–" if score.accuracy is None else f"{score.accuracy:.2f} of {score.asked}"


def _bars(line: dict[str, Any]) -> list[RenderableType]:
    job, trial = line.get("job"), line.get("trial")
    if job and job.get("steps"):
        return [ProgressBar(total=job["steps"], completed=job.get("step") or 0, width=60)]
    if not trial or not trial.get("log_evidence"):
        return []
    grid = Table.grid(padding=(0, 2))
    for side in ("promote", "rollback"):
        value, limit = trial["log_evidence"][side], trial["thresholds"][side]
        bar = ProgressBar(total=limit, completed=min(max(value, 0.0), limit), width=50)
        grid.add_row(f"evidence to {side.replace('rollback', 'roll back')}", bar, f"{value:.1f} of {limit:.1f}")
    return [grid]

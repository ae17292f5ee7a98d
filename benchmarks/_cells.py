"""What a bench has measured: turns of a server under a load, and ratios of neighbouring turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from _load import Turn, drive, prompts, quantile
from _servers import Server
from rich.console import Console

QUICK_SECONDS = 270
"""With `--quick` nothing new is begun after this: what is left out is null, and the table says so."""


@dataclass
class Ratio:
    """A figure as the quotient of two neighbouring turns, once for each pair."""

    values: list[float]

    @property
    def middle(self) -> float | None:
        """The median; None when nothing was measured."""
        return round(statistics.median(self.values), 3) if self.values else None

    def __str__(self) -> str:
        if not self.values:
            return "–"
        return f"{self.middle:.2f} ({min(self.values):.2f} – {max(self.values):.2f})"


@dataclass
class Cell:
    """The turns of one server under one load."""

    server: str
    load: str
    clients: int
    turns: list[Turn] = field(default_factory=list)

    def of(self, figure: Callable[[Turn], float]) -> list[float]:
        return [figure(turn) for turn in self.turns]


def throughput(turn: Turn) -> float:
    return turn.tokens_per_second


def ttft(turn: Turn) -> float:
    return quantile(turn.ttfts, 0.5)


class Bench:
    """What was measured so far; cells by server, load and number of clients."""

    def __init__(self, quick: bool, console: Console) -> None:
        self.quick, self.console = quick, console
        self.cells: dict[tuple[str, str, int], Cell] = {}
        self.notes: list[tuple[str, str]] = []
        self.bytes: dict[str, float] = {}
        """Of a quantized base's weights, as a share of the plain one's."""
        self.swap: dict[str, Any] = {}
        self.training: dict[str, Any] = {}
        self.began = time.monotonic()
        self._asked = prompts(int(time.time()) % 10000)

    def turns(self, arms: Sequence[tuple[Server, str, Sequence[str]]], clients: int, *, waves: int = 0, turns: int = 0) -> None:
        """A B A B: each (server, load, models) in turn, the other servers stopped meanwhile."""
        if not self.has_time(f"{arms[-1][0].name} {arms[-1][1]} c{clients}"):
            return
        servers = {server.name: server for server, _, _ in arms}
        for _ in range(turns or (2 if self.quick else 4)):
            for server, load, models in arms:
                if len(servers) > 1:
                    for other in servers.values():
                        other.pause()
                    server.resume()
                turn = drive(server.port, models, clients, waves or (1 if self.quick else 3), self._asked)
                self.cells.setdefault((server.name, load, clients), Cell(server.name, load, clients)).turns.append(turn)
                server.weigh()
                told = f"{throughput(turn):7.1f} tokens/s  TTFT p50 {ttft(turn) * 1000:6.0f} ms  {turn.seconds:5.1f} s"
                wrong = (
                    f"  [red]{turn.failed} failed: {next(r.error for r in turn.replies if r.error)[:150]}" if turn.failed else ""
                )
                self.console.print(f"  {server.name:13}{load:10} c{clients:<3}{told}{wrong}")
        if len(servers) > 1:
            for server in servers.values():
                server.resume()

    def has_time(self, what: str) -> bool:
        """Whether another part may begin; if not, that is noted."""
        has_time = not self.quick or time.monotonic() - self.began < QUICK_SECONDS
        if not has_time:
            self.note(what, f"not measured: --quick begins nothing after {QUICK_SECONDS} s")
        return has_time

    def ratio(self, above: tuple[str, str, int], below: tuple[str, str, int], figure: Callable[[Turn], float]) -> Ratio:
        """`figure` of one cell over that of another, pair by pair."""
        if above not in self.cells or below not in self.cells:
            return Ratio([])
        pairs = zip(self.cells[above].of(figure), self.cells[below].of(figure), strict=False)
        return Ratio([a / b for a, b in pairs if a > 0 and b > 0])

    def note(self, what: str, told: str) -> None:
        self.notes.append((what, told))
        self.console.print(f"  {what}: {told}")

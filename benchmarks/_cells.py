"""What a bench has measured: turns of a server under a load, ratios of neighbouring turns, and which parts failed."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from _budget import Budget
from _floor import Floor
from _load import REPLY_TOKENS, Turn, drive, prompts, quantile
from _servers import Server
from rich.console import Console

Key = tuple[str, str, int]
"""Server, load, number of clients."""
FEW_TURNS = 2


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
    tokens: int = REPLY_TOKENS
    """Of each reply."""

    def of(self, figure: Callable[[Turn], float]) -> list[float]:
        return [figure(turn) for turn in self.turns]

    @property
    def is_few(self) -> bool:
        """Whether so little was asked that its figures are a first look."""
        return len(self.turns) <= FEW_TURNS or self.tokens < REPLY_TOKENS


def throughput(turn: Turn) -> float:
    return turn.tokens_per_second


def ttft(turn: Turn) -> float:
    return quantile(turn.ttfts, 0.5)


def milliseconds(seconds: float, digits: int = 0) -> str:
    """For people; a dash where there is none."""
    return "–" if math.isnan(seconds) else f"{1000 * seconds:.{digits}f}"


class Bench:
    """What was measured so far; cells by server, load and number of clients."""

    def __init__(self, quick: bool, console: Console, budget: Budget | None = None, floor: Floor | None = None) -> None:
        self.quick, self.console = quick, console
        self.budget, self.floor = budget or Budget(), floor or Floor()
        self.cells: dict[Key, Cell] = {}
        self.notes: list[tuple[str, str]] = []
        self.failed: list[str] = []
        """Parts that were not measured whole, each with its reason."""
        self.weights: dict[str, int] = {}
        """Bytes of the base's weights: `none`, the quantizations, and `fp32`, as Transformers holds them."""
        self.peaks: dict[str, int] = {}
        """Bytes of each server's process tree at most."""
        self.swap: dict[str, Any] = {}
        self.training: dict[str, Any] = {}
        self._asked = prompts(int(time.time()) % 10000)

    def attempt(self, part: str, work: Callable[[], None]) -> None:
        """A part that may fail: that is said, what it did not measure is null, and the next one is begun."""
        try:
            self.budget.begin(part)
            work()
        except TimeoutError as error:
            self.fail(part, str(error) or f"cut off after {self.budget.taken:.0f} s of the whole: its time was over")
        except SystemExit as error:
            self.fail(part, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is: hours of other turns are not thrown away for it
            self.console.print(traceback.format_exc(), markup=False)
            self.fail(part, f"{type(error).__name__}: {error}")

    def fail(self, part: str, reason: str) -> None:
        """Note that a part, or a server in it, is missing."""
        self.console.print(f"  {part} failed: {reason}", markup=False)
        self.failed.append(f"{part}: {' '.join(reason.split())[:300]}")

    def turns(
        self,
        arms: Sequence[tuple[Server, str, Sequence[str]]],
        clients: int,
        *,
        waves: int = 0,
        turns: int = 0,
        tokens: int = REPLY_TOKENS,
    ) -> None:
        """A B A B: each (server, load, models) in turn, every other server stopped meanwhile.

        At least once, and as often again as there is time; what is cut off in the middle does not count.
        """
        wanted, longest = turns or (2 if self.quick else 4), 0.0
        for number in range(wanted):
            if number and not self.budget.has_room(longest):
                told = f"{number} of {wanted}: its time was over"
                self.note(f"turns of {', '.join(f'{server.name} {load}' for server, load, _ in arms)}, c{clients}", told)
                return
            began = self.budget.taken
            told = [self._turn(arm, clients, waves or (1 if self.quick else 3), tokens) for arm in arms]
            for (server, load, _), turn in zip(arms, told, strict=True):  # pair by pair, or not at all
                key = (server.name, load, clients)
                self.cells.setdefault(key, Cell(*key, tokens=tokens)).turns.append(turn)
            longest = max(longest, self.budget.taken - began)

    def _turn(self, arm: tuple[Server, str, Sequence[str]], clients: int, waves: int, tokens: int) -> Turn:
        server, load, models = arm
        self.floor.give(server)
        turn = drive(server.port, models, clients, waves, self._asked, tokens=tokens, within=self.budget.left)
        self.weigh(server)
        told = f"{throughput(turn):7.1f} tokens/s  TTFT p50 {milliseconds(ttft(turn)):>6} ms  {turn.seconds:5.1f} s"
        wrong = f"  {turn.failed} failed: {next(r.error for r in turn.replies if r.error)[:150]}" if turn.failed else ""
        self.console.print(f"  {server.name:13}{load:12} c{clients:<3}{told}{wrong}", markup=False)
        return turn

    def weigh(self, server: Server) -> None:
        """Keep the most that it weighed so far."""
        self.peaks[server.name] = max(server.weigh(), self.peaks.get(server.name, server.ready_bytes))

    def ratio(self, above: Key, below: Key, figure: Callable[[Turn], float]) -> Ratio:
        """`figure` of one cell over that of another, pair by pair."""
        if above not in self.cells or below not in self.cells:
            return Ratio([])
        pairs = zip(self.cells[above].of(figure), self.cells[below].of(figure), strict=False)
        return Ratio([a / b for a, b in pairs if a > 0 and b > 0])

    def note(self, what: str, told: str) -> None:
        self.notes.append((what, told))
        self.console.print(f"  {what}: {told}", markup=False)

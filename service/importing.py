"""A file of feedback to the daemon, with a progress bar: sent in parts, so that a large file fits in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from service.client import Client, Json

LINES_AT_ONCE = 1000
REFUSALS_SHOWN = 10
CREATED, REPEATED, PENDING = 201, 200, 202


@dataclass(slots=True)
class Imported:
    """How many lines met which fate."""

    stored: int = 0
    repeated: int = 0
    pending: int = 0
    refused: int = 0

    def count(self, acknowledgement: Json) -> None:
        """Add one acknowledgement."""
        code = acknowledgement["status_code"]
        self.stored += code == CREATED
        self.repeated += code == REPEATED
        self.pending += code == PENDING
        self.refused += "error" in acknowledgement


def send(file: Path, client: Client, console: Console | None = None) -> Imported:
    """Send all lines and count what came of them; the first refusals are shown with their line numbers."""
    done = Imported()
    console = console or Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(str(file), total=file.stat().st_size)
        for first, lines in _parts(file):
            for acknowledgement in client.stream("/feedback/stream", lines):
                done.count(acknowledgement)
                if "error" in acknowledgement and done.refused <= REFUSALS_SHOWN:
                    number = first + acknowledgement["line"]
                    console.print(f"line {number}: {acknowledgement['error']['message']}", style="red", markup=False)
            progress.advance(task, sum(len(line) + 1 for line in lines))
    return done


def _parts(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Parts of the file, each with the number of lines before it."""
    before = 0
    with file.open("rb") as lines:
        while part := [line.rstrip(b"\r\n") for line in itertools.islice(lines, LINES_AT_ONCE)]:
            yield before, part
            before += len(part)

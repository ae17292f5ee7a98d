"""Whether what comes in has changed: ADWIN on thumbs down, on what the champion makes of corrections, and on prompts.

The detectors live in memory and read on from places that are stored: after a start they are warmed up on what they had read
before, and say nothing of it. A change is written down in the transaction that moves the place, so it is told once. Worse
replies ask for a job (`service.decisions`); other prompts are only told, in the status and as a metric. Source: Bifet and
Gavaldà 2007. The door to `river`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Boolean, Column, Connection, Float, Integer, String, Table, func, insert, select

from replay import cursors, signals
from replay.signals import DIRECTIONS, Signal
from service import audit, job_folder, jobs
from service.errors import ArtifactInvalid
from service.registry import metadata
from service.settings import Line, Settings

AT_ONCE = 500
"""Rows of one kind and line in one look: the writer has others to serve."""
WARM = 2000
"""Rows before its place that a detector reads again after a start."""

THUMBS, NLL = "thumbs_down", "correction_nll"
SIGNALS = (THUMBS, NLL, *(f"prompt_{i}" for i in range(DIRECTIONS)))
WORSE = (THUMBS, NLL)
"""Signals that rise when replies become worse."""

_change = Table(
    "drift",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("line", String, nullable=False, index=True),
    Column("signal", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("before", Float, nullable=False),
    Column("after", Float, nullable=False),
    Column("is_worse", Boolean, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Change:
    """One signal that is not as it was."""

    line: str
    signal: str
    at: float
    before: float
    """Its mean up to now, as the detector knew it."""
    after: float
    """Its mean since the change."""

    @property
    def is_worse(self) -> bool:
        """Whether replies have become worse by it."""
        return self.signal in WORSE and self.after > self.before


class Watch:
    """The detectors of every line; made anew when a look has failed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._detectors: dict[str, dict[str, Any]] = {}

    def look(self, conn: Connection, now: float) -> list[Change]:
        """Read on, and write down what has changed."""
        changes = [change for name, line in self._settings.lines.items() for change in self._line(conn, name, line, now)]
        for change in changes:
            told = {"signal": change.signal, "before": change.before, "after": change.after, "is_worse": change.is_worse}
            conn.execute(insert(_change).values(line=change.line, at=now, **told))
            audit.tell(conn, now, change.line, "drift", told)
        return changes

    def _line(self, conn: Connection, name: str, line: Line, now: float) -> Iterable[Change]:
        if not line.drift.is_watched:
            return
        is_cold = name not in self._detectors
        detectors = self._detectors.setdefault(name, _detectors(line.drift.delta))
        for kind, (names, read) in self._sources(conn, name, line).items():
            key = f"drift:{name}:{kind}"
            place = cursors.place(conn, key)
            for seq, values in read(max(0, place - WARM), WARM) if is_cold else ():
                if seq <= place:
                    _feed(detectors, names, values)
            news = read(place, AT_ONCE)
            for _, values in news:
                yield from (Change(name, signal, now, *means) for signal, *means in _feed(detectors, names, values))
            if news:
                cursors.move(conn, key, news[-1][0])

    def _sources(
        self, conn: Connection, name: str, line: Line
    ) -> dict[str, tuple[tuple[str, ...], Callable[[int, int], list[Signal]]]]:
        metric = line.rollout.metric
        folder = self._settings.data_dir / "jobs"
        is_good = self._settings.feedback.metrics[metric].optimize == "max"
        return {
            "thumbs": ((THUMBS,), lambda after, most: signals.thumbs(conn, name, metric, after, most, good=is_good)),
            "corrections": ((NLL,), lambda after, _: _corrections(conn, name, folder, after)),
            "prompts": (SIGNALS[2:], lambda after, most: signals.prompts(conn, name, after, most)),
        }


def prepare() -> None:
    """Import what the first look would otherwise wait for."""
    _detectors(1.0)


def last_worse(conn: Connection, line: str) -> float | None:
    """When replies of the line last became worse."""
    at: float | None = conn.scalar(select(func.max(_change.c.at)).where(_change.c.line == line, _change.c.is_worse))
    return at


def counts(conn: Connection, line: str) -> dict[str, int]:
    """How often each signal has changed."""
    found = select(_change.c.signal, func.count()).where(_change.c.line == line).group_by(_change.c.signal)
    return dict.fromkeys(SIGNALS, 0) | {signal: number for signal, number in conn.execute(found)}  # noqa: C416 - no pairs to mypy


def _detectors(delta: float) -> dict[str, Any]:
    from river.drift import ADWIN  # here: it brings scipy along, and only the keeper watches

    return {signal: ADWIN(delta=delta / len(SIGNALS)) for signal in SIGNALS}  # type: ignore[no-untyped-call]


def _feed(detectors: dict[str, Any], names: Iterable[str], values: Iterable[float]) -> list[tuple[str, float, float]]:
    """Let detectors see one value each; those that found a change, with the mean before and since."""
    found = []
    for name, value in zip(names, values, strict=True):
        detector = detectors[name]
        before = float(detector.estimation)
        detector.update(value)
        if detector.drift_detected:
            found.append((name, before, float(detector.estimation)))
    return found


def _corrections(conn: Connection, line: str, folder: Path, after: int) -> list[Signal]:
    """How unlikely the champion found each new held-out correction, in nats a token, by the number of its job."""
    ended = [(number, job) for number, job in enumerate(reversed(jobs.of(conn, line)), 1) if number > after and not job.is_open]
    return [(number, (value,)) for number, job in ended for value in _unlikely(folder / job.id)]


def _unlikely(folder: Path) -> list[float]:
    try:
        slices = job_folder.evaluation(folder)["slices"].values()
        pairs = [pair for one in slices if one["is_new"] for pair in zip(one["ids"], one["champion"]["loglik"], strict=True)]
    except (ArtifactInvalid, KeyError, TypeError, ValueError):
        return []  # it died before it had measured anything
    return [-float(value) for _, value in sorted(pairs)]

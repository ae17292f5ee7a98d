"""Who serves now: the engine replicas by what each said last. Held in memory, since a replica says it again within seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.router import ReplicaReport


@dataclass(frozen=True, slots=True)
class Seen:
    """A report and when it came."""

    report: ReplicaReport
    at: float

    @property
    def proven(self) -> frozenset[str]:
        """The versions that the replica holds and has proven."""
        return frozenset(name for name, probe in self.report.resident.items() if probe.ok)

    def as_json(self) -> dict[str, Any]:
        """As the status shows it."""
        return {
            "id": self.report.replica,
            "number": self.report.number,
            "resident": sorted(self.proven),
            "refused": {name: probe.in_words for name, probe in self.report.resident.items() if not probe.ok},
            "inflight": sum(self.report.inflight.values()),
            "last_seen": self.at,
        }


class Replicas:
    """The replicas that reported within the last `forget_seconds`; the others have gone."""

    def __init__(self, forget_seconds: float) -> None:
        self._forget_seconds = forget_seconds
        self._seen: dict[str, Seen] = {}

    def saw(self, report: ReplicaReport, now: float) -> bool:
        """Take a report; says whether anything but the traffic differs from that replica's last."""
        before = self._seen.get(report.replica)
        self._seen[report.replica] = Seen(report, now)
        return before is None or _holding(before.report) != _holding(report)

    def live(self, now: float) -> list[Seen]:
        """Those that are there, by name; those that are not are forgotten."""
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen.at <= self._forget_seconds}
        return [self._seen[name] for name in sorted(self._seen)]


def _holding(report: ReplicaReport) -> tuple[int, dict[str, bool]]:
    return report.number, {name: probe.ok for name, probe in report.resident.items()}

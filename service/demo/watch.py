"""What the daemon says of itself, watched over HTTP: its status, the news in it, the evidence of trials, and trouble.

`look` fetches; everything else is pure. Called by `story` each second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from service.demo.plan import LINE, DemoFailed

Json = dict[str, Any]

BAD_TRIALS = {"rejected", "rolling_back", "rolled_back", "expired", "aborted"}
BAD_JOBS = {"failed", "rejected"}
SILENCE_SECONDS = 60.0
"""A busy machine may keep the daemon from answering for a while; longer than this it is gone."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A trial at one moment: units in both arms, and the logarithms of the two e-values beside their thresholds."""

    at: float
    trial: str
    units: tuple[int, int]
    """Of the candidate, of the control."""
    promote: float
    promote_at: float
    rollback: float
    rollback_at: float


class Watch:
    """The latest status and what was seen so far."""

    def __init__(self, http: httpx.AsyncClient, clock: Callable[[], float], is_alive: Callable[[], bool]) -> None:
        self.status: Json = {}
        self.evidence: list[Evidence] = []
        self._http = http
        self._clock = clock
        self._is_alive = is_alive
        self._heard_at = clock()

    @property
    def line(self) -> Json:
        """The desk's part of the status."""
        line: Json = self.status.get("lines", {}).get(LINE, {})
        return line

    @property
    def is_ready(self) -> bool:
        """Whether the daemon serves."""
        return bool(self.status.get("ready"))

    @property
    def is_training(self) -> bool:
        """Whether a job runs."""
        return bool(self.line.get("job"))

    async def look(self) -> list[str]:
        """Fetch the status and return the news; raises `DemoFailed` when the daemon died, fell silent, or gave up."""
        if not self._is_alive():
            raise DemoFailed("the daemon's process has ended")
        status = await self.fetch("/api/status")
        if status is None:
            if self.status and self._clock() - self._heard_at > SILENCE_SECONDS:
                raise DemoFailed(f"the daemon has not answered for {SILENCE_SECONDS:.0f} s")
            return []
        self._heard_at = self._clock()
        before, self.status = self.line, status
        seen = {**self.line, **await self._ended(before)}
        if trial := seen.get("trial"):
            self._keep(trial)
        if why := trouble(seen):
            raise DemoFailed(why)
        return news(before, self.line)

    async def _ended(self, before: Json) -> Json:
        """How the job and the trial ended that were in the status before and are no longer."""
        ended = {}
        for kind, path in (("job", "/api/jobs/"), ("trial", "/api/trials/")):
            if (old := before.get(kind)) and not self.line.get(kind):
                ended[kind] = await self.fetch(path + old["id"])
        return ended

    async def fetch(self, path: str) -> Json | None:
        """A JSON object from the daemon, or None when it does not answer now."""
        try:
            response = await self._http.get(path)
            said: Json | None = response.json() if response.is_success else None
        except httpx.TransportError:
            return None
        return said

    def _keep(self, trial: Json) -> None:
        logs, limits, units = trial.get("log_evidence"), trial.get("thresholds"), trial.get("units")
        if not (logs and limits and units):
            return
        now = Evidence(
            at=self._clock(),
            trial=trial["id"],
            units=(units["candidate"], units["control"]),
            promote=logs["promote"],
            promote_at=limits["promote"],
            rollback=logs["rollback"],
            rollback_at=limits["rollback"],
        )
        last = self.evidence[-1] if self.evidence else None
        if last is None or (last.trial, last.units) != (now.trial, now.units):
            self.evidence.append(now)


def champion(line: Json) -> str:
    """The version that serves, `v1`, or `base` before the first promotion."""
    return short(line.get("champion")) or "base"


def trouble(line: Json) -> str | None:
    """Why the story cannot go on, in words; None when all is well."""
    job, trial, verdict = line.get("job") or {}, line.get("trial") or {}, line.get("last_verdict") or {}
    if job.get("state") in BAD_JOBS:
        return f"job {job.get('id')} {job['state']}: {job.get('reason') or 'see the log'}"
    if trial.get("state") in BAD_TRIALS:
        return f"trial {trial.get('id')} {trial['state']}: {trial.get('reason') or 'see the log'}"
    if verdict and outcome(verdict) != "pass":
        return f"the gate said {outcome(verdict)}: {reasons(verdict)}"
    return None


def news(before: Json, after: Json) -> list[str]:
    """What has changed from one status of the line to the next, in words."""
    said = []
    old, new = before.get("job") or {}, after.get("job") or {}
    if new and new.get("id") != old.get("id"):
        said.append(f"{before.get('examples', {}).get('fresh', 0)} new examples are enough: job {new['id']} trains")
    verdict = after.get("last_verdict")
    if verdict and verdict != before.get("last_verdict"):
        said.append(f"the gate says {outcome(verdict)}: {reasons(verdict)}")
    old, new = before.get("trial") or {}, after.get("trial") or {}
    if new and new.get("id") != old.get("id"):
        said.append(f"{after.get('candidate') or 'the candidate'} is on trial")
    if champion(before) != champion(after) and before:
        said.append(f"{after['champion']} is promoted: it answers from now on")
    return said


def outcome(verdict: Json) -> str:
    """`pass`, `fail` or `inconclusive`."""
    return str(verdict.get("outcome", verdict.get("gate", "?")))


def reasons(verdict: Json) -> str:
    """A verdict's reasons on one line."""
    said = verdict.get("reasons") or verdict.get("reason") or ""
    return said if isinstance(said, str) else "; ".join(str(one) for one in said)


def short(name: str | None) -> str:
    """`v1` of `desk@v1`."""
    return name.rpartition("@")[2] if name else ""

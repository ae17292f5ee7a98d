"""The part of the keeper that only reads what is stored: lines, versions, jobs, trials, the quarantine, the log of deeds."""

from __future__ import annotations

from service import audit, jobs, registry, status
from service.door import Json, KeeperDoor
from service.errors import NotFound
from service.quarantine import Which
from service.settings import Settings
from service.storage import Storage


class Shown(KeeperDoor):
    """What is asked of the storage alone; `Keeper` does the rest."""

    _settings: Settings
    _storage: Storage

    async def lines(self) -> list[Json]:
        """See `KeeperDoor.lines`."""
        return await self._storage.do(lambda conn: status.lines(conn, self._settings))

    async def versions(self, line: str) -> list[Json]:
        """See `KeeperDoor.versions`."""
        self._check(line)
        return await self._storage.do(lambda conn: status.versions(conn, line))

    async def examples(self, line: str) -> list[Json]:
        """See `KeeperDoor.examples`."""
        self._check(line)
        capacity = self._settings.lines[line].learning.replay_capacity
        return await self._storage.do(lambda conn: status.examples(conn, line, capacity))

    async def history(self, line: str) -> list[Json]:
        """See `KeeperDoor.history`."""
        self._check(line)
        return await self._storage.do(lambda conn: [change.as_json() for change in registry.history(conn, line)])

    async def jobs(self, line: str | None) -> list[Json]:
        """See `KeeperDoor.jobs`."""
        self._check(line)
        return await self._storage.do(lambda conn: [job.as_json() for job in jobs.of(conn, line)])

    async def trials(self, line: str | None) -> list[Json]:
        """See `KeeperDoor.trials`."""
        self._check(line)
        return await self._storage.do(lambda conn: status.trials_of(conn, line))

    async def trial(self, trial_id: str) -> Json:
        """See `KeeperDoor.trial`."""
        return await self._storage.do(lambda conn: status.trial(conn, trial_id))

    async def replay(self, what: str) -> list[Json]:
        """See `KeeperDoor.replay`."""
        return await self._storage.do(lambda conn: status.replay(conn, what))

    async def verdicts(self, line: str) -> list[Json]:
        """See `KeeperDoor.verdicts`."""
        self._check(line)
        return await self._storage.do(lambda conn: status.verdicts_on(conn, line))

    async def quarantine(self, line: str, which: Which, reason: str | None) -> list[Json]:
        """See `KeeperDoor.quarantine`."""
        return await self._storage.quarantine(line, which, reason)

    async def audit(self) -> Json:
        """See `KeeperDoor.audit`."""
        return (await self._storage.do(audit.verify)).as_json()

    def _check(self, line: str | None) -> None:
        if line is not None and line not in self._settings.lines:
            raise NotFound(f"no line {line!r}; there is {', '.join(self._settings.lines)}", param="line")

"""`/api/rollouts`: a line's trial, by hand; `/api/trials`: all of them with their evidence; `/api/audit`, `/api/switch`."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.answers import listing
from service.api.bodies import SwitchBody, anchor_of, parse, read, version_of
from service.door import Json, KeeperDoor


class RolloutsApi:
    """The routes of trials."""

    def __init__(self, keeper: KeeperDoor, max_body_bytes: int) -> None:
        self._keeper = keeper
        self._limit = max_body_bytes

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(prefix="/api", tags=["rollouts"])
        router.add_api_route("/rollouts/{line}", self.status, methods=["GET"])
        router.add_api_route("/rollouts/{line}/history", self.history, methods=["GET"])
        for verb in (self.pause, self.resume, self.abort, self.promote, self.rollback):
            router.add_api_route(f"/rollouts/{{line}}/{verb.__name__}", verb, methods=["POST"], status_code=202)
        router.add_api_route("/rollouts/{line}/anchor", self.anchor, methods=["POST"])
        router.add_api_route("/trials", self.trials, methods=["GET"])
        router.add_api_route("/trials/{trial}", self.trial, methods=["GET"])
        router.add_api_route("/trials/{what}/replay", self.replay, methods=["GET"])
        router.add_api_route("/replay/{what}", self.replay, methods=["GET"])
        router.add_api_route("/switch", self.switch, methods=["GET"])
        router.add_api_route("/switch", self.throw, methods=["POST"])
        router.add_api_route("/audit", self.audit, methods=["GET"])
        return router

    async def status(self, line: str) -> Json:
        """The line's last trial, open or not, with its last evidence, and its anchor; null where there is none."""
        trials = await self._keeper.trials(line)
        lines = (await self._keeper.status())["lines"]
        return {"line": line, "trial": trials[0] if trials else None, "anchor": lines[line]["anchor"]}

    async def history(self, line: str) -> Json:
        """Every verdict on the line's trials, newest first: what moved where, why, and by whom."""
        return listing(await self._keeper.verdicts(line))

    async def pause(self, line: str) -> Json:
        """Hold the trial: its weight stays, nothing goes forward, harm still rolls it back."""
        return await self._keeper.steer(line, "pause")

    async def resume(self, line: str) -> Json:
        """Let a held trial go on."""
        return await self._keeper.steer(line, "resume")

    async def abort(self, line: str) -> Json:
        """End the trial; the champion stays. Also one that is being promoted, until the alias has moved."""
        return await self._keeper.steer(line, "abort")

    async def promote(self, line: str, request: Request) -> Json:
        """As `/api/lines/{line}/promote`."""
        return await self._keeper.promote(line, await version_of(request, line, self._limit))

    async def rollback(self, line: str, request: Request) -> Json:
        """As `/api/lines/{line}/rollback`."""
        return await self._keeper.rollback(line, await version_of(request, line, self._limit))

    async def anchor(self, line: str, request: Request) -> Json:
        """Make a version the line's anchor, the champion unless another is named; what was known against it is forgotten."""
        return await self._keeper.anchor(line, await anchor_of(request, line, self._limit))

    async def trials(self, line: str | None = None) -> Json:
        """Trials, newest first."""
        return listing(await self._keeper.trials(line))

    async def trial(self, trial: str) -> Json:
        """One trial with the history of its evidence."""
        return await self._keeper.trial(trial)

    async def replay(self, what: str) -> Json:
        """Each verdict on a trial, job, version, round of an anchor, or line, as recorded, and as its facts give it now."""
        return listing(await self._keeper.replay(what))

    async def switch(self) -> Json:
        """Where the kill switch stands: what holds, what was thrown, what is set."""
        found: Json = (await self._keeper.status())["kill_switch"]
        return found

    async def throw(self, request: Request) -> Json:
        """Put the kill switch somewhere, for all lines."""
        body = parse(SwitchBody, await read(request, self._limit))
        return await self._keeper.throw(body.mode, body.reason)

    async def audit(self) -> Json:
        """Whether the log of what was done and why is as it was written."""
        return await self._keeper.audit()

"""`/api/jobs`: what was learned, what is being learned, and a job by hand."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.answers import listing
from service.api.bodies import strategy_of
from service.door import Json, KeeperDoor


class JobsApi:
    """The routes of learning jobs."""

    def __init__(self, keeper: KeeperDoor, limit: int) -> None:
        self._keeper = keeper
        self._limit = limit

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(prefix="/api", tags=["jobs"])
        router.add_api_route("/lines/{line}/train", self.train, methods=["POST"], status_code=202)
        router.add_api_route("/jobs", self.jobs, methods=["GET"])
        router.add_api_route("/jobs/{job}", self.job, methods=["GET"])
        router.add_api_route("/jobs/{job}/bisect", self.bisect, methods=["POST"], status_code=202)
        return router

    async def train(self, line: str, request: Request) -> Json:
        """Ask for a job now, whatever the triggers say, by the line's strategy or the one that the body names."""
        return await self._keeper.train(line, await strategy_of(request, self._limit))

    async def bisect(self, job: str) -> Json:
        """Search for the examples of a job whose candidate lost a slice that made it do so."""
        return await self._keeper.bisect(job)

    async def jobs(self, line: str | None = None) -> Json:
        """Jobs, newest first."""
        return listing(await self._keeper.jobs(line))

    async def job(self, job: str) -> Json:
        """One job with its progress and its gate's verdict."""
        return await self._keeper.job(job)

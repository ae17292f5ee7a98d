"""`/api/trials`: candidates on live traffic, with the evidence for and against them."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.answers import listing
from service.door import Json, KeeperDoor


class RolloutsApi:
    """The routes of trials."""

    def __init__(self, keeper: KeeperDoor) -> None:
        self._keeper = keeper

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(prefix="/api/trials", tags=["rollouts"])
        router.add_api_route("", self.trials, methods=["GET"])
        router.add_api_route("/{trial}", self.trial, methods=["GET"])
        return router

    async def trials(self, line: str | None = None) -> Json:
        """Trials, newest first."""
        return listing(await self._keeper.trials(line))

    async def trial(self, trial: str) -> Json:
        """One trial with the history of its evidence."""
        return await self._keeper.trial(trial)

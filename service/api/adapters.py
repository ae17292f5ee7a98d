"""`/api/lines`: the lines, their versions, every change of their aliases, and changes by hand."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.answers import listing
from service.api.bodies import version_of
from service.door import Json, KeeperDoor


class AdaptersApi:
    """The routes of lines and versions."""

    def __init__(self, keeper: KeeperDoor, max_body_bytes: int) -> None:
        self._keeper = keeper
        self._limit = max_body_bytes

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(prefix="/api/lines", tags=["adapters"])
        router.add_api_route("", self.lines, methods=["GET"])
        router.add_api_route("/{line}/versions", self.versions, methods=["GET"])
        router.add_api_route("/{line}/examples", self.examples, methods=["GET"])
        router.add_api_route("/{line}/history", self.history, methods=["GET"])
        router.add_api_route("/{line}/promote", self.promote, methods=["POST"], status_code=202)
        router.add_api_route("/{line}/rollback", self.rollback, methods=["POST"], status_code=202)
        return router

    async def lines(self) -> Json:
        """Every line with its aliases."""
        return listing(await self._keeper.lines())

    async def versions(self, line: str) -> Json:
        """A line's versions, newest first, with their scores."""
        return listing(await self._keeper.versions(line))

    async def examples(self, line: str) -> Json:
        """What the line has to learn from, prompts and replies included."""
        return listing(await self._keeper.examples(line))

    async def history(self, line: str) -> Json:
        """Every change of the line's aliases, newest first, with its reason and evidence."""
        return listing(await self._keeper.history(line))

    async def promote(self, line: str, request: Request) -> Json:
        """Make a version (by default the candidate) the champion, once every replica holds it."""
        return await self._keeper.promote(line, await version_of(request, line, self._limit))

    async def rollback(self, line: str, request: Request) -> Json:
        """End the trial, or else go back to a version (by default the previous one)."""
        return await self._keeper.rollback(line, await version_of(request, line, self._limit))

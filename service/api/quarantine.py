"""`/api/quarantine`: what the guard held or refused, with its reason, and a person's word on it."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request

from service.api.answers import listing
from service.api.auth import Keyring
from service.api.bodies import ids_of
from service.door import Json, KeeperDoor


class QuarantineApi:
    """The routes of the quarantine."""

    def __init__(self, keeper: KeeperDoor, keyring: Keyring, max_body_bytes: int) -> None:
        self._keeper = keeper
        self._keyring = keyring
        self._limit = max_body_bytes

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(prefix="/api/quarantine", tags=["quarantine"])
        router.add_api_route("/{line}", self.cases, methods=["GET"])
        router.add_api_route("/release", self.release, methods=["POST"])
        router.add_api_route("/drop", self.drop, methods=["POST"])
        return router

    async def cases(self, line: str, which: Literal["held", "all"] = "held", reason: str | None = None) -> Json:
        """What waits for a decision, newest first; with `which=all` also what was refused and decided."""
        return listing(await self._keeper.quarantine(line, which, reason))

    async def release(self, request: Request) -> Json:
        """Learn from it all the same."""
        return await self._overrule(request, "release")

    async def drop(self, request: Request) -> Json:
        """Never learn from it."""
        return await self._overrule(request, "drop")

    async def _overrule(self, request: Request, decision: Literal["release", "drop"]) -> Json:
        by = self._keyring.check(request.headers.get("authorization"), "admin")
        return listing(await self._keeper.overrule(await ids_of(request, self._limit), decision, by))

"""Is it alive, is it ready, how is it doing: `/health`, `/ready`, `/metrics`, `/api/status`.

The first two need no key, so that a load balancer can ask; `/metrics` takes any key.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from service.api.auth import Keyring
from service.door import Json, KeeperDoor


class HealthApi:
    """The routes of probes, scrapes and the status screen."""

    def __init__(self, keeper: KeeperDoor, keyring: Keyring) -> None:
        self._keeper = keeper
        self._keyring = keyring

    def router(self) -> APIRouter:
        """Each path with what answers it."""
        router = APIRouter(tags=["health"])
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"])
        router.add_api_route("/api/status", self.status, methods=["GET"])
        return router

    async def health(self) -> Json:
        """The process answers; nothing more is asked."""
        return {"status": "alive"}

    async def ready(self) -> Response:
        """200 when every champion is resident and proven and the ledger writes, else 503 with the reasons."""
        readiness = await self._keeper.readiness()
        return JSONResponse(readiness, 200 if readiness["ready"] else 503)

    async def metrics(self, request: Request) -> Response:
        """All of learnd's metrics, as Prometheus or OpenMetrics text."""
        self._keyring.check(request.headers.get("authorization"), None)
        text, content_type = await self._keeper.metrics(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def status(self, request: Request) -> Json:
        """The whole state on one screen."""
        self._keyring.check(request.headers.get("authorization"), "admin")
        return await self._keeper.status()

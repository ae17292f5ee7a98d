"""The control app: everything over HTTP that is not `/v1`. It knows the keeper's door and nothing behind it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI, Request

from service import logs
from service.api import errors
from service.api.adapters import AdaptersApi
from service.api.answers import FiniteJson
from service.api.auth import Keyring
from service.api.feedback import FeedbackApi
from service.api.health import HealthApi
from service.api.jobs import JobsApi
from service.api.quarantine import QuarantineApi
from service.api.rollouts import RolloutsApi
from service.door import KeeperDoor
from service.settings import Settings


def build(keeper: KeeperDoor, settings: Settings, clock: Callable[[], float] = time.time) -> FastAPI:
    """The app over `keeper`; `clock` gives Unix seconds."""
    keyring = Keyring(settings)
    app = FastAPI(title="learnd", version=version("learnd"), redirect_slashes=False, default_response_class=FiniteJson)
    errors.install(app)
    app.add_middleware(logs.RequestId)
    app.include_router(HealthApi(keeper, keyring).router())
    app.include_router(FeedbackApi(keeper, keyring, settings, clock).router())
    admin = APIRouter(dependencies=[Depends(_admin(keyring))])
    admin.include_router(AdaptersApi(keeper, settings.http.max_body_bytes).router())
    admin.include_router(JobsApi(keeper, settings.http.max_body_bytes).router())
    admin.include_router(QuarantineApi(keeper, keyring, settings.http.max_body_bytes).router())
    admin.include_router(RolloutsApi(keeper, settings.http.max_body_bytes).router())
    app.include_router(admin)
    return app


def _admin(keyring: Keyring) -> Callable[[Request], Awaitable[str]]:
    async def check(request: Request) -> str:
        return keyring.check(request.headers.get("authorization"), "admin")

    return check

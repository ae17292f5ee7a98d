"""Notices of what is done on the lines, POSTed to the addresses of `[webhooks.NAME]`, each at least once and in order.

What there is to tell is the audit log itself, read by a cursor that each address has in the ledger and that moves when the
address has answered 2xx. So nothing is lost when the daemon is killed or nobody answers; a notice may come twice, under the
same `webhook-id`. The headers are those of Standard Webhooks 1.0, the types Flagger's:
https://github.com/standard-webhooks/standard-webhooks, https://docs.flagger.app/usage/webhooks
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import httpx
import structlog
from sqlalchemy import Connection

from replay import cursors
from replay.writer import Work
from service import audit
from service.errors import WebhookFailed
from service.rollout import verdicts
from service.rollout.stages import Stage
from service.settings import Notice, Webhook

T = TypeVar("T")

POLL_SECONDS = 1.0
TIMEOUT_SECONDS = 10.0
BACKOFF_SECONDS = (1.0, 300.0)
"""Pause after a first failure, doubled with each further one up to the second."""
PER_READ = 100
OF_EACH = frozenset(verdicts.KINDS)
"""Kinds that stand beside another record of the same deed, which is told."""
BY_KIND: dict[str, Notice] = {"version_made": "pre-rollout", "rolled_back": "rollback", "rollback_blocked": "event"}
BY_STAGE: dict[Stage, Notice] = {
    **dict.fromkeys(Stage, "rollout"),
    Stage.ROLLING_BACK: "rollback",
    **{stage: "post-rollout" for stage in Stage if not stage.is_open},
}
"""By the stage that a trial has come to; of the records that name none, a kind that is not in the table above is an `event`."""

log = structlog.get_logger(__name__)


def test(hook: Webhook, name: str, now: float) -> None:
    """Send a notice of the kind `test` to one address; raises `WebhookFailed` unless it answers 2xx."""
    notice = {"name": name, "type": "event", "kind": "test", "phase": "", "at": now, "checksum": "", "metadata": {}}

    async def once() -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as http:
            await send(http, hook, f"test-{uuid.uuid4().hex}", notice, now)

    try:
        asyncio.run(once())
    except httpx.HTTPStatusError as error:
        raise WebhookFailed(f"webhook {name!r} answered {error.response.status_code}: 2xx is needed") from None
    except httpx.HTTPError as error:
        raise WebhookFailed(f"webhook {name!r} cannot be reached ({type(error).__name__}): check its url") from None


class Do(Protocol):
    """`Storage.do`."""

    def __call__(self, work: Work[T]) -> Awaitable[T]:
        """Do `work` on the connection; on disk when it returns."""
        ...


class Webhooks:
    """Tells each address of what was done; `run` until cancelled."""

    def __init__(self, hooks: dict[str, Webhook], do: Do, clock: Callable[[], float], failed: Callable[[str], None]) -> None:
        """`failed` is told, by the name of a loop, when a notice could not be given; it is tried again."""
        self._hooks, self._do, self._clock, self._failed = hooks, do, clock, failed

    async def run(self) -> None:
        """Go on telling, each address at its own pace."""
        async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as http, asyncio.TaskGroup() as group:
            for name in self._hooks:
                group.create_task(self._serve(name, http))

    async def _serve(self, name: str, http: httpx.AsyncClient) -> None:
        failures = 0
        while True:
            try:
                has_more = await self.deliver(name, http)
                failures = 0
            except Exception as error:  # noqa: BLE001 - the edge of a background loop: logged, counted, tried again
                first, longest = BACKOFF_SECONDS
                pause = min(first * 2 ** min(failures, 20), longest)
                failures += 1
                self._failed(f"webhook {name}")
                log.warning("webhook_failed", webhook=name, failures=failures, again_in_seconds=pause, error=_reason(error))
                await asyncio.sleep(pause)
                continue
            if not has_more:
                await asyncio.sleep(POLL_SECONDS)

    async def deliver(self, name: str, http: httpx.AsyncClient) -> bool:
        """Tell one address what it has not been told yet; says whether more may be there.

        An address that is new is told of what is done from now on. Raises `httpx.HTTPError` where it does not answer 2xx, and
        `StorageFailed`.
        """
        hook, read_as = self._hooks[name], f"webhook:{name}"
        records = await self._do(lambda conn: _unread(conn, read_as))
        for record in records:
            notice = notice_of(record)
            is_due = self._clock() - record["at"] <= hook.max_age_seconds
            if notice is not None and notice["type"] in hook.types and is_due:
                await send(http, hook, str(record["digest"]), notice, self._clock())
            await self._do(lambda conn, seq=record["seq"]: cursors.move(conn, read_as, seq))  # type: ignore[misc]
        return len(records) == PER_READ


async def send(http: httpx.AsyncClient, hook: Webhook, notice_id: str, notice: audit.Json, now: float) -> None:
    """POST one notice, signed when the hook has a secret; raises `httpx.HTTPError` unless the answer is 2xx."""
    body = audit.canonical(notice).encode()
    stamp = str(int(now))
    headers = {"content-type": "application/json", "webhook-id": notice_id, "webhook-timestamp": stamp}
    if secret := hook.secret.get_secret_value():
        headers["webhook-signature"] = signature(secret, notice_id, stamp, body)
    answer = await http.post(hook.url, content=body, headers=headers)
    answer.raise_for_status()


def notice_of(record: audit.Json) -> audit.Json | None:
    """What an address is told of a record of the audit log; None for one that stands beside another."""
    if record["kind"] in OF_EACH:
        return None
    body, kind = record["body"], record["kind"]
    phase = body.get("stage", "")
    told = {"name": record["line"], "phase": phase, "kind": kind, "at": record["at"], "checksum": record["digest"]}
    type_ = BY_KIND.get(kind) or (BY_STAGE[Stage(phase)] if phase else "event")
    return {**told, "type": type_, "metadata": body}


def signature(secret: str, notice_id: str, stamp: str, body: bytes) -> str:
    """`v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; a secret that begins with `whsec_` is base64 itself."""
    key = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    signed = hmac.new(key, f"{notice_id}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def _unread(conn: Connection, read_as: str) -> list[audit.Json]:
    if not cursors.is_known(conn, read_as):
        cursors.move(conn, read_as, audit.last(conn))
        return []
    return audit.since(conn, cursors.place(conn, read_as), PER_READ)


def _reason(error: Exception) -> str:
    """Without the address, which may carry a secret."""
    return str(error.response.status_code) if isinstance(error, httpx.HTTPStatusError) else type(error).__name__

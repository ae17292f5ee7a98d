"""Interactions on their way to the keeper: at once and waited for, or in the background, but always bounded and never dropped.

A keeper that is down or cannot write is asked again until it can. Called by the gateway, which knows nothing of failures here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import structlog

from replay.records import Interaction
from service.door import KeeperDoor
from service.errors import LearndError
from service.settings import Recording

PATIENCE_SECONDS = 10.0
"""A reply is held back no longer than this when the ledger cannot be written: the interaction follows when it can."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
"""Between two attempts; each pause is twice the last."""

log = structlog.get_logger(__name__)


class Recorder:
    """Hands interactions to the keeper; no more than `queue_size` are under way before callers have to wait."""

    def __init__(
        self,
        keeper: KeeperDoor,
        settings: Recording,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._keeper = keeper
        self._settings = settings
        self._patience_seconds = patience_seconds
        self._pause = pause
        self._writing: set[asyncio.Task[None]] = set()

    async def record(self, interaction: Interaction) -> None:
        """Return when it is on disk (`sync`), or on its way (`background`)."""
        task = self.record_later(interaction)
        if self._settings.mode == "sync":
            _, late = await asyncio.wait({task}, timeout=self._patience_seconds)
            if late:
                log.error("interaction_not_stored_yet", id=interaction.id, after_seconds=self._patience_seconds)
        while len(self._writing) > self._settings.queue_size:
            await asyncio.wait(self._writing, return_when=asyncio.FIRST_COMPLETED)

    def record_later(self, interaction: Interaction) -> asyncio.Task[None]:
        """Set it on its way; a caller who is being cancelled may use this and leave."""
        task = asyncio.create_task(self._insist([interaction]))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    async def close(self, timeout_seconds: float) -> None:
        """Wait for what is under way; what is not stored by then is lost, and said to be."""
        if not self._writing:
            return
        _, lost = await asyncio.wait(set(self._writing), timeout=timeout_seconds)
        for task in lost:
            task.cancel()
        if lost:
            log.error("interactions_lost", number=len(lost), reason="the keeper did not take them before the shutdown's deadline")

    async def _insist(self, interactions: Sequence[Interaction]) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._keeper.record(interactions)
            except LearndError as error:
                log.warning("recording_failed", reason=error.message, again_in_seconds=pause_seconds)
            except Exception:  # the task's outer edge: not a state of the keeper that passes, so asking again is no use
                log.exception("interactions_lost", number=len(interactions))
                return
            else:
                return
            await self._pause(pause_seconds)
            pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)

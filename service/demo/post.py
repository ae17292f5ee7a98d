"""Feedback on its way: posted late, again if the daemon did not answer, counted when acknowledged.

Customers and agents put letters in; only a 2xx counts, since only that says that the feedback is on disk.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

ATTEMPTS = 4
RETRY_SECONDS = 1.0


class Post:
    """Delivers feedback to `POST /feedback`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.acknowledged = 0
        self.refused: list[str] = []
        """What came of each letter that was not acknowledged, in words."""
        self._http = http
        self._on_the_way: set[asyncio.Task[None]] = set()

    def send(self, inference_id: str, metric: str, value: bool | str, sender: str, delay_seconds: float) -> None:
        """Post one piece of feedback after the delay; returns at once."""
        letter = {
            "id": f"{metric}-{inference_id}",
            "inference_id": inference_id,
            "metric_name": metric,
            "value": value,
            "source": "human",
            "tags": {"from": sender},
        }
        task = asyncio.create_task(self._deliver(letter, delay_seconds))
        self._on_the_way.add(task)
        task.add_done_callback(self._on_the_way.discard)

    async def drain(self) -> None:
        """Wait until every letter has been answered."""
        while self._on_the_way:
            await asyncio.gather(*self._on_the_way)

    async def close(self) -> None:
        """Give up what is still on the way."""
        for task in list(self._on_the_way):
            task.cancel()
        await asyncio.gather(*self._on_the_way, return_exceptions=True)

    async def _deliver(self, letter: dict[str, Any], delay_seconds: float) -> None:
        await asyncio.sleep(delay_seconds)
        outcome = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(RETRY_SECONDS)
            try:
                response = await self._http.post("/feedback", json=letter)
            except httpx.TransportError as error:
                outcome = repr(error)
                continue
            if response.is_success:
                self.acknowledged += 1
                return
            outcome = f"{response.status_code}: {response.text[:200]}"
            if response.is_client_error:
                break
        self.refused.append(f"feedback {letter['id']}: {outcome}")

"""What a replica answers with now: the route table in force, and how many requests each version is answering.

Shared by a replica's gateway, which asks, and its residency, which changes the table and waits for versions to drain. Both
live in one event loop and nothing here awaits between looking up a version and counting the request, so a version that
has left the table and has no requests can get none any more.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from service.router import Choice, Desired, Model, models, resolve


class Traffic:
    """The table in force and the requests in flight."""

    def __init__(self, base_name: str) -> None:
        self.base_name = base_name
        self.table = Desired(number=-1)
        """Narrowed to the versions that are live here; its number is the last one that was reached in full."""
        self._inflight: Counter[str] = Counter()
        self._waiting: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)

    @property
    def inflight(self) -> Mapping[str, int]:
        """Requests being answered now, by version."""
        return dict(self._inflight)

    def models(self) -> Iterator[Model]:
        """The names that can be asked now."""
        return models(self.table, self.base_name)

    def enter(self, model: str, key: str) -> Choice:
        """Choose who answers a request and count it in; each needs its `leave`. Raises `NotFound`."""
        choice = resolve(self.table, self.base_name, model, key)
        self._inflight[choice.version] += 1
        return choice

    def leave(self, choice: Choice) -> None:
        """Count a request out."""
        self._inflight[choice.version] -= 1
        if not self._inflight[choice.version]:
            del self._inflight[choice.version]
            for waiter in self._waiting.pop(choice.version, ()):
                if not waiter.done():
                    waiter.set_result(None)

    async def drained(self, version: str) -> None:
        """Return when no request is being answered by `version`."""
        while self._inflight.get(version):
            waiter = asyncio.get_running_loop().create_future()
            self._waiting[version].append(waiter)
            await waiter

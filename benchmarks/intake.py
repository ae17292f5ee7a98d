"""What feedback costs on its way to the disk: processor time of each piece, without a network, HTTP or Ray.

In one process, over a true ledger: lines are read, pickled to the keeper and back as Ray does, stored with an fsync for each
commit, and acknowledged; then single requests, `CLIENTS` at once. Processor time and the middle of `--turns`, so that a busy
machine counts for little.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pickle
import pstats
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

from starlette.requests import Request
from starlette.types import Message

from replay.records import Feedback, Receipt
from service.api.auth import Keyring
from service.api.feedback import FeedbackApi
from service.door import KeeperDoor
from service.errors import LearndError
from service.metrics import Metrics
from service.settings import Settings
from service.storage import Storage

CLIENTS, CHUNK, SINGLES = 32, 16_384, 2000
"""Requests at once; bytes that a stream's body comes in; single requests in a turn."""


class Pickling:
    """The storage behind pickles, as the keeper is behind Ray."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def feedback(self, items: Sequence[Feedback]) -> list[Receipt | LearndError]:
        """See `KeeperDoor.feedback`."""
        stored = await self._storage.feedback(_sent(items))
        return cast("list[Receipt | LearndError]", _sent(stored))


class Body:
    """A request with a body in parts, and no more than the API asks of one."""

    def __init__(self, *parts: bytes) -> None:
        self.headers: dict[str, str] = {}
        self._parts = parts

    async def stream(self) -> AsyncIterator[bytes]:
        """The parts, one after the other."""
        for part in self._parts:
            yield part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000, help="lines in a stream")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--profile", action="store_true", help="print where the event loop's time went")
    said = parser.parse_args()
    profile = cProfile.Profile() if said.profile else None
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as folder:
        found = asyncio.run(measured(Path(folder), said.events, said.turns, profile))
    for name, figure in found.items():
        print(f"{name:36} {figure}")
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    if said.json:
        print(json.dumps(found))
    return 0


async def measured(folder: Path, events: int, turns: int, profile: cProfile.Profile | None) -> dict[str, int]:
    """Events for a second of processor time, by stream and one by one."""
    settings = Settings(data_dir=folder)
    storage = Storage(settings, Metrics("bench", "base"), time.time)
    await storage.open()
    api = FeedbackApi(cast("KeeperDoor", Pickling(storage)), Keyring(settings), settings, time.time)
    streamed = [await _timed(events, lambda turn=turn: stream(api, events, turn), profile) for turn in range(turns)]
    single = [await _timed(SINGLES, lambda turn=turn: one_by_one(api, turn), profile) for turn in range(turns)]
    await storage.close()
    return {
        "stream_events_per_cpu_second": round(statistics.median(streamed)),
        "single_events_per_cpu_second": round(statistics.median(single)),
    }


async def stream(api: FeedbackApi, events: int, turn: int) -> None:
    """Send lines and have each acknowledged."""
    whole, told = b"".join(_line("s", turn, i) for i in range(events)), []

    async def send(message: Message) -> None:
        told.append(message.get("body", b""))

    request = Body(*(whole[i : i + CHUNK] for i in range(0, len(whole), CHUNK)))
    response = await api.give_stream(cast("Request", request))
    await response({}, cast("Any", None), send)
    codes = [json.loads(line)["status_code"] for line in b"".join(told).splitlines()]
    if codes != [202] * events:
        raise SystemExit(f"{events} lines were sent; of the acknowledgements {codes.count(202)} are as they should be")


async def one_by_one(api: FeedbackApi, turn: int) -> None:
    """Send requests, each waited for by its client."""
    work = iter(range(SINGLES))

    async def client() -> None:
        for i in work:
            response = await api.give(cast("Request", Body(_line("o", turn, i))))
            if response.status_code != 202:
                raise SystemExit(f"feedback was answered with {response.status_code}")

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def _timed(number: int, work: Callable[[], Awaitable[None]], profile: cProfile.Profile | None) -> float:
    """Events for a second of this process, the writer's thread among it."""
    if profile is not None:
        profile.enable()
    began = time.process_time()
    await work()
    seconds = time.process_time() - began
    if profile is not None:
        profile.disable()
    return number / seconds


def _line(kind: str, turn: int, number: int) -> bytes:
    said = {"id": f"{kind}-{turn}-{number}", "inference_id": f"chatcmpl-{turn}-{number}", "metric_name": "thumb", "value": True}
    return json.dumps(said).encode() + b"\n"


def _sent(what: Sequence[Any]) -> Any:
    return pickle.loads(pickle.dumps(list(what), protocol=5))


if __name__ == "__main__":
    raise SystemExit(main())

"""Feedback and growth: durable events a second, by stream and one by one, and what a large log costs.

A whole `learnd serve` takes the feedback, over HTTP and through HAProxy; its base is two small random layers, since no model
answers. Growth is measured on the ledger itself: recording after ever more interactions, and drawing a job's rehearsal from ever
more learned examples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _load import quantile
from _servers import Server, learnd
from _versions import tiny_base
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert

from replay import ledger, memory
from replay.buffer import key
from replay.records import Arm, Interaction
from replay.tables import feedback
from replay.writer import Writer

CONNECTIONS, SINGLES, STREAMED, BLOCK = 32, 6000, 60_000, 10_000
BATCH = 200
"""Interactions in one commit, when growth is measured."""
ROWS = 50_000
"""Rows written at once to make a log grow."""
SLICES, DRAWS, MEMORY = 4, 7, 5000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer events, and a log of 10⁵ interactions: a minute and a half")
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="where the plot goes")
    parser.add_argument("--examples", type=int, default=0, help="learned examples in the largest log (10⁷; quick: 10⁶)")
    parser.add_argument("--without-daemon", action="store_true", help="growth alone")
    said = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemon is stopped on the way out
    console, largest = Console(stderr=True, highlight=False), said.examples or (10**6 if said.quick else 10**7)
    figures: dict[str, float | None] = {"stream_events_per_second": None, "single_events_per_second": None, "single_p99_ms": None}
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as folder:
        if not said.without_daemon:
            figures |= of_daemon(Path(folder), said.quick, rows)
        recorded = recording(Path(folder) / "record.db", 10**5 if said.quick else 10**6, rows)
        drawn, growth = drawing(Path(folder), largest, rows)
    figures["sample_growth"] = round(growth, 2)
    rows.append(("sample_growth", f"{figures['sample_growth']}", f"from 10⁴ to {max(drawn):.0e} learned examples"))
    shown = Table("what", "figure", "how", title="Feedback and growth")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    plot(recorded, drawn, said.out)
    if said.json:
        print(json.dumps(figures))
    return 0


# The daemon.


def of_daemon(folder: Path, quick: bool, rows: list[tuple[str, str, str]]) -> dict[str, float]:
    """Events a second that were acknowledged, by stream and one by one."""
    tiny_base(folder / "tiny")
    part = 3 if quick else 1
    with learnd(folder, folder / "data", str(folder / "tiny")) as server:
        streams = [asyncio.run(stream(server, STREAMED // part, turn)) for turn in range(2 if quick else 3)]
        singles = [asyncio.run(one_by_one(server, SINGLES // part, turn)) for turn in range(2 if quick else 3)]
    streamed = [events for events, _ in streams]
    speeds, waits = [events for events, _ in singles], [quantile(wait, 0.99) * 1000 for _, wait in singles]
    told = f"{statistics.median(streamed):.0f} ({min(streamed):.0f} – {max(streamed):.0f})"
    rows.append(("stream, events/s", told, f"{STREAMED // part} a turn, {BLOCK} at a time over one connection"))
    told = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} – {max(speeds):.0f})"
    rows.append(("one by one, events/s", told, f"{SINGLES // part} a turn, {CONNECTIONS} connections kept alive"))
    rows.append(
        ("one by one, p99", f"{statistics.median(waits):.0f} ms ({min(waits):.0f} – {max(waits):.0f})", "from sent to 2xx")
    )
    refused = sum(count for _, count in streams)
    rows.append(("stream, not acknowledged", str(refused), "lines whose status was not 2xx"))
    return {
        "stream_events_per_second": round(statistics.median(streamed)),
        "single_events_per_second": round(statistics.median(speeds)),
        "single_p99_ms": round(statistics.median(waits), 1),
    }


def _event(kind: str, turn: int, number: int) -> dict[str, Any]:
    return {"id": f"{kind}-{turn}-{number}", "inference_id": f"chatcmpl-{turn}-{number}", "metric_name": "thumb", "value": True}


async def stream(server: Server, number: int, turn: int) -> tuple[float, int]:
    """(Events a second, how many were refused) over `/feedback/stream`: written and read at once, as the endpoint asks."""
    lines = [json.dumps(_event("s", turn, i)).encode() + b"\n" for i in range(number)]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /feedback/stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
    writer.write(b"content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")

    async def send() -> None:
        for start in range(0, number, 500):
            chunk = b"".join(lines[start : start + 500])
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    began = time.perf_counter()
    _, answer = await asyncio.gather(send(), reader.read())
    seconds = time.perf_counter() - began
    writer.close()
    good = answer.count(b'"status_code":20')
    return good / seconds, number - good


async def one_by_one(server: Server, number: int, turn: int) -> tuple[float, list[float]]:
    """(Events a second, seconds of each) by POST, each waited for, over connections that are kept."""
    work, waits = iter(range(number)), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for i in work:
            body = json.dumps(_event("o", turn, i)).encode()
            began = time.perf_counter()
            head = f"POST /feedback HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            told = await reader.readuntil(b"\r\n\r\n")
            if told.split()[1] not in {b"200", b"201", b"202"}:
                raise SystemExit(f"feedback was refused: {told!r}")
            size = int(next(line for line in told.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
            await reader.readexactly(size)
            waits.append(time.perf_counter() - began)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return number / (time.perf_counter() - began), waits


# Growth.


def recording(path: Path, largest: int, rows: list[tuple[str, str, str]]) -> dict[int, float]:
    """Microseconds to record one interaction, in commits of `BATCH`, once so many are stored and none is sealed."""
    found, stored = {}, 0
    writer = _opened(path)
    for size in (10**3, 10**4, 10**5, 10**6):
        if size > largest:
            break
        while stored < size:
            number = min(ROWS, size - stored)
            _do(writer, _record(stored, number))
            stored += number
        taken = []
        for _ in range(20):
            work = _record(stored, BATCH)
            began = time.perf_counter()
            _do(writer, work)
            taken.append((time.perf_counter() - began) / BATCH)
            stored += BATCH
        found[size] = 1e6 * statistics.median(taken)
        rows.append((f"recording after {size:.0e}", f"{found[size]:.0f} µs each", f"commits of {BATCH}; a median of 20"))
    writer.close()
    return found


def _record(start: int, number: int) -> Callable[[Any], Any]:
    said = ({"role": "user", "content": "Where is my bag, and who has it?"},)
    made = [
        Interaction(
            id=f"chatcmpl-{start + i:032d}", line="desk", version="desk@v1", arm=Arm.CHAMPION, unit=f"{i:064d}", slice="default",
            messages=said, reply="It is on its way to you.", at=time.time(),
        )
        for i in range(number)
    ]  # fmt: skip
    return lambda conn: ledger.record(conn, made)


def drawing(folder: Path, largest: int, rows: list[tuple[str, str, str]]) -> tuple[dict[int, float], float]:
    """Milliseconds to draw a job's rehearsal, as the daemon does, from so many learned examples; the most beside the fewest.

    In turns with a log of 10⁴, since a machine's speed changes too; the least of each, since a busy one only ever adds.
    """
    small, large, stored = _opened(folder / "small.db"), _opened(folder / "large.db"), 0
    _do(small, _learned(0, 10**4))
    found: dict[int, float] = {10**4: math.inf}
    growths: dict[int, float] = {}
    for size in (10**5, 10**6, 10**7):
        if size > largest:
            break
        for start in range(stored, size, ROWS):
            _do(large, _learned(start, ROWS))
        stored = size
        turns = [(_draw(small), _draw(large)) for _ in range(DRAWS)]
        beside, found[size] = (min(times) for times in zip(*turns, strict=True))
        found[10**4], growths[size] = min(found[10**4], beside), found[size] / beside
    small.close()
    large.close()
    for size, took in found.items():
        told = f", {growths[size]:.2f} of what 10⁴ took in the same turns" if size in growths else ""
        rows.append((f"a job's rehearsal from {size:.0e}", f"{took:.0f} ms", f"{MEMORY} examples, the least{told}"))
    return found, growths[max(growths)] if growths else 1.0


def _draw(writer: Writer) -> float:
    began = time.perf_counter()
    drawn = _do(writer, lambda conn: memory.remembered(conn, "desk", MEMORY))
    if len(drawn) != MEMORY:
        raise SystemExit(f"{len(drawn)} examples were drawn, not {MEMORY}")
    return 1000 * (time.perf_counter() - began)


def _learned(start: int, number: int) -> Callable[[Any], Any]:
    """Write rows as `memory.keep` leaves them, past SQLAlchemy: a large log is made in seconds."""
    now = time.time()
    body = json.dumps({"messages": [{"role": "user", "content": "Where is my bag?"}], "reply": "On its way."})
    same = {"feedback_id": "f", "line": "desk", "split": "train", "weight": 1.0, "body": body, "admitted_at": now}
    same |= {"state": "trained", "attempts": 0}
    names = ["id", "interaction_id", "slice", "key", *same]
    query = f"INSERT INTO example ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    numbers = range(start, start + number)
    made = [(f"e-{i}", f"i-{i}", f"slice-{i % SLICES}", key(memory.SEED, f"e-{i}"), *same.values()) for i in numbers]

    def work(conn: Any) -> None:
        if start == 0:
            conn.execute(insert(feedback), [_feedback_row(now)])
        conn.exec_driver_sql(query, made)

    return work


def _feedback_row(now: float) -> dict[str, Any]:
    plain = {"id": "f", "inference_id": "i-0", "metric_name": "demonstration", "value": "On its way.", "source": "human"}
    return {**plain, "occurred_at": now, "received_at": now, "status": "matched", "digest": "", "principal": "bench", "tags": {}}


def _opened(path: Path) -> Writer:
    writer = Writer(path, 0.0)
    _do(writer, ledger.create)
    return writer


def _do(writer: Writer, work: Callable[[Any], Any]) -> Any:
    return writer.submit(work).result()


def plot(recorded: dict[int, float], drawn: dict[int, float], out: Path) -> None:
    """Both growths on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.loglog(recorded.keys(), recorded.values(), "o-")
    left.set(xlabel="interactions stored", ylabel="µs to record one", ylim=(1, None))
    right.loglog(drawn.keys(), drawn.values(), "o-")
    right.set(xlabel="learned examples", ylabel="ms to draw a job's rehearsal")
    figure.savefig(out / "feedback-growth.png", dpi=120)


if __name__ == "__main__":
    raise SystemExit(main())

"""SIGKILL, twenty times, to the keeper and the control app in a process of their own: all that acknowledges, over real HTTP.

Ray and the engine are left out, so that a life takes a second; tests/end_to_end/test_kill.py kills the daemon with them.
"""

import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from world import BASE, FakeLauncher

from service.api import build
from service.keeper import Keeper
from service.settings import Settings

LIVES = 20
CLIENTS = 4
BATCH = 3


async def live(folder, listening):
    """Serve until killed."""
    settings = Settings(data_dir=folder, feedback={"metrics": {"thumb": {"type": "boolean"}}})
    keeper = Keeper(settings, BASE, FakeLauncher())
    await keeper.start()
    server = uvicorn.Server(uvicorn.Config(build(keeper, settings), log_level="error", lifespan="off"))
    await server.serve(sockets=[listening])


def born(folder, listening):
    """A process that lives; its id."""
    child = os.fork()
    if child:
        return child
    import asyncio

    try:
        asyncio.run(live(folder, listening))
    finally:
        os._exit(1)


def thumb(identity):
    return {"id": identity, "inference_id": f"chatcmpl-{identity}", "metric_name": "thumb", "value": True}


def feed(url, life, client, acknowledged, stop):
    """Send feedback, alone and in batches, and keep what was acknowledged."""
    with httpx.Client(timeout=10) as http:
        for number in range(10**9):
            if stop.is_set():
                return
            names = [f"{life}-{client}-{number}-{i}" for i in range(BATCH if number % 2 else 1)]
            try:
                if len(names) == 1:
                    answer = http.post(f"{url}/feedback", json=thumb(names[0]))
                else:
                    answer = http.post(f"{url}/feedback/batch", json=[thumb(name) for name in names])
                if answer.status_code in {200, 201, 202}:
                    acknowledged.extend(names)
            except httpx.TransportError:
                time.sleep(0.01)


def act(folder):
    """Twenty lives and a last one that is asked what it knows: (acknowledged, those not found, the number stored)."""
    chance, acknowledged = random.Random(7), []
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    for life in range(LIVES):
        child, stop, before = born(folder, listening), threading.Event(), len(acknowledged)
        feeders = [threading.Thread(target=feed, args=(url, life, c, acknowledged, stop)) for c in range(CLIENTS)]
        for feeder in feeders:
            feeder.start()
        deadline = time.monotonic() + 120
        while len(acknowledged) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        stop.set()
        os.waitpid(child, 0)
        for feeder in feeders:
            feeder.join()
    child = born(folder, listening)
    with httpx.Client(base_url=url, timeout=60) as http:
        missing = [name for name in acknowledged if http.get(f"/feedback/{name}").status_code != httpx.codes.OK]
        stored = http.get("/api/status").json()["feedback"]["stored"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"acknowledged": acknowledged, "missing": missing, "stored": stored}


def test_nothing_acknowledged_is_lost_when_the_keeper_is_killed(tmp_path):
    """In a process that has no threads of pytest's, torch's or Ray's, so that it may fork."""
    import subprocess
    import sys

    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    told_at = tmp_path / "told.json"
    subprocess.run([sys.executable, __file__, tmp_path / "data", told_at], check=True, env=environment, timeout=800)
    told = json.loads(told_at.read_text())
    names = told["acknowledged"]
    assert told["missing"] == []
    assert len(names) == len(set(names)) >= LIVES
    assert (
        len(names) <= told["stored"] <= len(names) + LIVES * CLIENTS * BATCH
    )  # what was in flight may be stored, unacknowledged


if __name__ == "__main__":
    import sys

    Path(sys.argv[2]).write_text(json.dumps(act(Path(sys.argv[1]))))

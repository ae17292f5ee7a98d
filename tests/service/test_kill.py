"""SIGKILL, twenty times, to the keeper and the control app in a process of their own: all that acknowledges, over real HTTP.

Ray and the engine are left out, so that a life takes seconds; tests/end_to_end/test_kill.py kills the daemon with them.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from world import BASE, FakeLauncher

from service.api import build
from service.ingress import free_port
from service.keeper import Keeper
from service.settings import Settings

LIVES = 20
CLIENTS = 4
BATCH = 3


async def live(folder, port):
    """Serve until killed."""
    settings = Settings(data_dir=folder, feedback={"metrics": {"thumb": {"type": "boolean"}}})
    keeper = Keeper(settings, BASE, FakeLauncher())
    await keeper.start()
    await uvicorn.Server(uvicorn.Config(build(keeper, settings), port=port, log_level="error", lifespan="off")).serve()


def born(folder, port):
    """A process that lives; its id."""
    child = os.fork()
    if child:
        return child
    try:
        asyncio.run(live(folder, port))
    finally:
        os._exit(1)


def killed(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


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
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    for life in range(LIVES):
        child, stop, before = born(folder, port), threading.Event(), len(acknowledged)
        feeders = [threading.Thread(target=feed, args=(url, life, c, acknowledged, stop)) for c in range(CLIENTS)]
        for feeder in feeders:
            feeder.start()
        deadline = time.monotonic() + 120
        while len(acknowledged) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        killed(child)
        stop.set()
        for feeder in feeders:
            feeder.join()
        if len(acknowledged) == before:
            raise AssertionError(f"life {life} acknowledged nothing within two minutes")
    child = born(folder, port)
    transport = httpx.HTTPTransport(retries=12)  # it takes a moment to listen
    with httpx.Client(base_url=url, timeout=60, transport=transport) as http:
        missing = [name for name in acknowledged if http.get(f"/feedback/{name}").status_code != httpx.codes.OK]
        stored = http.get("/api/status").json()["feedback"]["stored"]
    killed(child)
    return {"acknowledged": acknowledged, "missing": missing, "stored": stored}


def test_nothing_acknowledged_is_lost_when_the_keeper_is_killed(tmp_path):
    """In a process that has no threads of pytest's, torch's or Ray's, so that it may fork."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    told_at = tmp_path / "told.json"
    subprocess.run([sys.executable, __file__, tmp_path / "data", told_at], check=True, env=environment, timeout=800)
    told = json.loads(told_at.read_text())
    names = told["acknowledged"]
    assert told["missing"] == []
    assert len(names) == len(set(names)) >= LIVES
    in_flight = LIVES * CLIENTS * BATCH  # may be stored, unacknowledged
    assert len(names) <= told["stored"] <= len(names) + in_flight


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(act(Path(sys.argv[1]))))

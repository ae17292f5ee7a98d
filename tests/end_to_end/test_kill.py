"""SIGKILL to the daemon, again and again, under feedback: what was acknowledged is there, exactly once.

To all its processes, or to `learnd serve` alone, as `kill -9` or the kernel does it: then the next daemon follows at once, while
what the killed one has left still holds the port for a moment.
"""

import random
import signal
import threading
import time

import httpx

from tests.end_to_end.daemon import Daemon
from tests.end_to_end.desk import wait_for

KILLS = 4


def feed(url, acknowledged, numbers, stop):
    """Send feedback one by one, note each that was acknowledged, until the daemon is gone or `stop` is set."""
    with httpx.Client(timeout=5) as http:
        while not stop.is_set():
            identity = f"fb-{next(numbers)}"
            body = {"id": identity, "inference_id": f"chatcmpl-{identity}", "metric_name": "thumb", "value": True}
            try:
                reply = http.post(f"{url}/feedback", json=body)
            except httpx.TransportError:
                continue
            if reply.status_code in {200, 201, 202}:
                acknowledged.append(identity)


def start(daemon, number):
    """Start it for the so manieth time; returns when it answers itself, and not what the killed one has left."""
    daemon.start(wait="/health", seconds=120)
    wait_for(lambda: daemon.log.read_text().count("weights") == number, 120, daemon.tail)
    daemon.wait("/health", 60)


def test_nothing_acknowledged_is_lost(tmp_path):
    chance = random.Random(7)
    numbers, acknowledged = iter(range(10**9)), []
    daemon = Daemon(tmp_path)
    for number in range(KILLS):
        start(daemon, number + 1)
        before, stop = len(acknowledged), threading.Event()
        feeder = threading.Thread(target=feed, args=(daemon.url, acknowledged, numbers, stop))
        feeder.start()
        deadline = time.monotonic() + 60
        while len(acknowledged) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1.5))
        end = daemon.process if number % 2 else daemon
        end.kill()
        daemon.process.wait(20)
        stop.set()
        feeder.join()
        assert len(acknowledged) > before, daemon.tail()
    start(daemon, KILLS + 1)
    try:
        with httpx.Client(base_url=daemon.url, timeout=30) as http:
            wait_for(lambda: http.get("/api/status").status_code == 200, 120, daemon.tail)  # /health is there before the keeper
            missing = [identity for identity in acknowledged if http.get(f"/feedback/{identity}").status_code != 200]
        assert missing == []
        assert len(set(acknowledged)) == len(acknowledged)
        stored = httpx.get(f"{daemon.url}/api/status").json()["feedback"]["stored"]
        assert (
            len(acknowledged) <= stored <= len(acknowledged) + KILLS
        )  # one in flight at each kill may be stored, unacknowledged
        assert daemon.stop(signal.SIGTERM) == 0, daemon.tail()
        assert daemon.tail().endswith("stopped\n")
        assert daemon.left() == []
    finally:
        daemon.kill()

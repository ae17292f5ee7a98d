"""Two daemons on one machine: each stores what it was given, never what its neighbour was."""

import time

import httpx

from tests.end_to_end.daemon import Daemon
from tests.end_to_end.desk import wait_for

EVENTS = 60


def give(daemon, name):
    """Send feedback over a connection each, since a connection may stay with one process."""
    for number in range(EVENTS):
        body = {"id": f"{name}-{number}", "inference_id": f"chatcmpl-{name}-{number}", "metric_name": "thumb", "value": True}
        while not httpx.post(f"{daemon.url}/feedback", json=body, timeout=30).is_success:
            time.sleep(0.05)  # its keeper is starting


def stored(daemon):
    return httpx.get(f"{daemon.url}/api/status", timeout=30).json()["feedback"]["stored"]


def test_feedback_stays_with_the_daemon_that_was_given_it(daemon, tmp_path):
    """The second is spoken to from the first moment that its port answers, while the first one runs."""
    before = stored(daemon)
    second = Daemon(tmp_path)
    try:
        second.start(wait="/health", seconds=120)
        give(second, "second")
        wait_for(lambda: httpx.get(f"{second.url}/api/status", timeout=30).is_success, 120, second.tail)
        assert (stored(daemon), stored(second)) == (before, EVENTS), daemon.tail()
    finally:
        second.kill()

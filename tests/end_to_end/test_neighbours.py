"""Two daemons on one machine: each answers and stores what it was asked, never what its neighbour was."""

import time

import httpx

from tests.end_to_end.daemon import Daemon

EVENTS = 60


def give(daemon, name):
    """Send feedback over a connection each, since a connection may stay with one process."""
    for number in range(EVENTS):
        body = {"id": f"{name}-{number}", "inference_id": f"chatcmpl-{name}-{number}", "metric_name": "thumb", "value": True}
        while not httpx.post(f"{daemon.url}/feedback", json=body, timeout=30).is_success:
            time.sleep(0.05)  # its keeper is starting


def stored(daemon):
    return httpx.get(f"{daemon.url}/api/status", timeout=30).json()["feedback"]["stored"]


def test_feedback_stays_with_the_daemon_that_was_given_it(tmp_path):
    """The second is spoken to from the first moment that its port answers, while the first one runs."""
    first, second = (Daemon(tmp_path / name) for name in ("first", "second"))
    for daemon in (first, second):
        daemon.folder.mkdir()
    try:
        first.start()
        second.start(wait="/health", seconds=120)
        give(second, "second")
        second.wait("/ready", 300)
        assert (stored(first), stored(second)) == (0, EVENTS)
    finally:
        for daemon in (first, second):
            daemon.kill()

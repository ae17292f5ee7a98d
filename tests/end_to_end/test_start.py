"""Starts that are refused, each with what to do; nothing of the daemon is left running."""

import json
import signal
import socket

import pytest

from tests.end_to_end.daemon import Daemon
from tests.end_to_end.desk import wait_for


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("[base]\nsource = '/nowhere'", "there is no folder /nowhere: check base.source"),
        ("[base]\nsource = 'builtin:smollm2-135m'", "v1 was made for another base: its weights, tokenizer, template differ"),
        ("[engine]\nreplica = 2", "engine.replica"),
    ],
)
def test_a_start_that_cannot_be(tmp_path, settings, said):
    version = tmp_path / "data" / "versions" / "desk" / "v1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(json.dumps({"base": {}}))
    daemon = Daemon(tmp_path, settings)
    with pytest.raises(AssertionError, match="the daemon ended with 1"):
        daemon.start()
    assert said in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()
    assert daemon.left() == []


def test_a_port_of_somebody_else_is_refused_after_a_while(tmp_path):
    daemon = Daemon(tmp_path)
    with socket.create_server(("127.0.0.1", daemon.port)), pytest.raises(AssertionError, match=r"choose another http\.port"):
        daemon.start()
    assert "waiting up to" in daemon.log.read_text()


def test_a_daemon_killed_alone_is_followed_at_once(tmp_path):
    """SIGKILL to `learnd serve` only, as `kill -9` or the kernel does it: its children still hold the port for a moment."""
    daemon = Daemon(tmp_path)
    daemon.start(wait="/health", seconds=120)
    daemon.process.kill()
    daemon.process.wait(20)
    daemon.start(wait="/health", seconds=120)  # the killed one's children answer this, as long as they live
    wait_for(lambda: daemon.log.read_text().count("weights") == 2, 120, daemon.tail)
    daemon.wait("/health", 60)
    assert daemon.stop(signal.SIGTERM) == 0

"""Starts that are refused, each with what to do; nothing of the daemon is left running."""

import json
import socket

import pytest

from tests.end_to_end.daemon import Daemon


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

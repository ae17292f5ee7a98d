import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service import ingress
from service.errors import SettingsError


def test_two_daemons_have_ports_of_their_own():
    with ingress.own_ports() as one, ingress.own_ports() as two:
        assert abs(one - two) >= ingress.BLOCK


def test_a_block_comes_back_when_its_holder_is_killed():
    hold = "import os, time\nfrom service import ingress\nwith ingress.own_ports() as p: print(p, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, env={**os.environ})
    held = int(holder.stdout.readline())
    with ingress.own_ports() as other:
        assert other != held
    holder.kill()
    holder.communicate()
    with ingress.own_ports() as again:
        assert again <= held


def test_where_somebody_still_listens_is_not_taken():
    """As a replica that outlives its daemon does, on a port that two processes may share."""
    with ingress.own_ports() as first:
        pass
    with socket.socket() as left:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        left.bind(("127.0.0.1", first + 3))
        left.listen()
        with ingress.own_ports() as other:
            assert other != first


def test_no_room_is_told(monkeypatch):
    monkeypatch.setattr(ingress, "PORTS", range(20_000, 20_000))
    with pytest.raises(SettingsError, match="free ports in a row"), ingress.own_ports():
        pass


@pytest.fixture
def seen_by_haproxy(tmp_path, monkeypatch):
    """What HAProxy reads when it is given a file."""
    binary, config = tmp_path / "binary", tmp_path / "config"
    binary.write_text('#!/bin/sh\nwhile [ "$1" != -f ]; do shift; done\ncat "$2"\n')
    binary.chmod(0o700)
    monkeypatch.setattr(ingress, "_binary", lambda: binary)
    wrapper = ingress.environment(tmp_path, 20_000)["RAY_SERVE_HAPROXY_BINARY_PATH"]

    def read(text):
        config.write_text(text)
        return subprocess.run([wrapper, "-db", "-f", config], capture_output=True, text=True, check=True).stdout

    return read


def test_only_the_public_port_is_public(seen_by_haproxy):
    binds = "    bind :9101\n    bind *:8404\n    bind 0.0.0.0:8000\n"
    assert seen_by_haproxy(binds) == "    bind 127.0.0.1:9101\n    bind 127.0.0.1:8404\n    bind 0.0.0.0:8000\n"


def test_rays_own_template_shares_no_connections_after_the_wrapper(seen_by_haproxy):
    """A request that meets a shared connection of a killed replica is cut without an answer; a new connection is retried."""
    template = Path(importlib.util.find_spec("ray").origin).parent / "serve/_private/haproxy_templates.py"
    assert "http-reuse always" in template.read_text()
    assert "http-reuse" not in seen_by_haproxy(template.read_text())


def test_a_question_may_be_asked_again_and_feedback_not(seen_by_haproxy):
    backends = "backend http-control\n    log global\nbackend http-engine\n    log global\nbackend default_backend\n"
    before, engine = seen_by_haproxy(backends).split("backend http-engine")
    assert "retry-on" not in before
    assert "option http-buffer-request" in engine
    assert "retry-on conn-failure empty-response 503" in engine.split("backend default_backend")[0]
    assert engine.count("retry-on") == 1

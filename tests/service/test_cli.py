import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from service import cli
from service.settings_file import load

HEAVY = {"torch", "ray", "vllm", "pandas", "matplotlib", "openai", "transformers", "sqlalchemy", "pyarrow", "pydantic", "httpx"}

STATUS = {
    "ready": True,
    "base": {"name": "smollm2-135m"},
    "lines": {
        "desk": {
            "champion": "desk@v1",
            "candidate": "desk@v2",
            "previous": None,
            "versions": 2,
            "examples": {"fresh": 12, "trained": 220},
            "job": {"id": "j", "state": "running", "phase": "train", "step": 3, "steps": 9, "loss": 0.25, "eta_seconds": 40.0},
            "trial": {
                "id": "t",
                "state": "canary",
                "weight": 0.5,
                "units": {"candidate": 31, "control": 30},
                "log_evidence": {"promote": 1.5, "rollback": -0.2},
                "thresholds": {"promote": 3.0, "rollback": 4.6},
            },
        }
    },
    "replicas": [{"id": "r1", "number": 7, "resident": ["desk@v1"], "inflight": {"desk@v1": 2}, "last_seen": 0.0}],
    "feedback": {"stored": 300, "pending": 4},
    "desired": 7,
}
VERSION = {
    "name": "desk@v1",
    "state": "live",
    "parent": None,
    "created_at": 1.0,
    "slices": {"airline": {"exact": 0.81, "loglik": -0.2, "n": 44}},
    "gate": {"outcome": "pass"},
    "aliases": ["champion"],
}


class Handler(BaseHTTPRequestHandler):
    """As much of a daemon as the commands talk to."""

    def do_GET(self):
        answers = {"/api/status": STATUS, "/api/lines/desk/versions": {"data": [VERSION]}}
        if self.path in answers:
            self._say(200, answers[self.path])
        else:
            self._say(404, {"error": {"message": "no line 'nobody': lines are desk", "type": "x", "param": None, "code": "x"}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        self.server.seen.append((self.path, body, self.headers["authorization"]))
        if self.path == "/feedback/stream":
            lines = [self._acknowledge(n, line) for n, line in enumerate(body.splitlines(), 1) if line]
            self._send(200, "".join(json.dumps(one) + "\n" for one in lines).encode())
        else:
            self._say(202, {"ok": True})

    def _acknowledge(self, number, line):
        if line.startswith(b"{"):
            return {"line": number, "status_code": json.loads(line)["code"], "id": "f"}
        return {"line": number, "status_code": 400, "error": {"message": "not JSON"}}

    def _say(self, status, value):
        self._send(status, json.dumps(value).encode())

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def daemon(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("LEARND_URL", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code or 0


def test_importing_the_commands_pulls_in_nothing_heavy():
    script = "import sys, service.cli; print(*{name.split('.')[0] for name in sys.modules})"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(said.stdout.split())


def test_every_command_has_help(capsys):
    for command in ("serve", "status", "train", "versions", "promote", "rollback", "doctor", "demo", "feedback", "base", "key"):
        assert run(command, "--help") == 0
    assert "Ctrl-C stops it in order" in capsys.readouterr().out


def test_status_fits_on_one_screen(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("status") == 0
    said = capsys.readouterr().out
    for part in ("ready", "smollm2-135m", "desk@v1", "desk@v2", "train 3/9, loss 0.250, 40 s left", "canary at 50%", "31/30"):
        assert part in said
    assert len(said.splitlines()) < 24


def test_status_as_json_is_the_daemon_s_own(daemon, capsys):
    assert run("status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_versions_show_their_scores(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("versions", "desk") == 0
    said = capsys.readouterr().out
    assert "airline 0.81" in said
    assert "champion" in said


def test_the_daemon_s_refusal_is_told_in_its_words(daemon, capsys):
    assert run("versions", "nobody") == 1
    assert capsys.readouterr().err == "learnd: no line 'nobody': lines are desk\n"


def test_changes_by_hand_are_posted_with_the_key(daemon):
    assert run("train", "desk", "--key", "secret") == 0
    assert run("promote", "desk", "v2") == 0
    assert run("rollback", "desk") == 0
    paths = [(path, json.loads(body) if body else None) for path, body, _ in daemon.seen]
    assert paths == [
        ("/api/lines/desk/train", None),
        ("/api/lines/desk/promote", {"version": "v2"}),
        ("/api/lines/desk/rollback", {"version": None}),
    ]
    assert daemon.seen[0][2] == "Bearer secret"


def test_nobody_there_is_told_with_what_to_do(capsys):
    assert run("status", "--url", "http://127.0.0.1:9") == 1
    assert "start one with `learnd serve`" in capsys.readouterr().err


def test_a_file_of_feedback_is_sent_in_parts_and_counted(daemon, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("service.importing.LINES_AT_ONCE", 3)
    file = tmp_path / "feedback.ndjson"
    file.write_text('{"code": 201}\n{"code": 200}\n\n{"code": 202}\nnonsense\n{"code": 201}')
    assert run("feedback", "import", str(file)) == 1
    said = capsys.readouterr()
    assert said.out == "2 stored, 1 known before, 1 wait, 1 refused\n"
    assert "line 5: not JSON" in said.err
    assert [path for path, _, _ in daemon.seen] == ["/feedback/stream"] * 2


def test_a_good_file_ends_well(daemon, tmp_path, capsys):
    file = tmp_path / "feedback.ndjson"
    file.write_text('{"code": 201}\n')
    assert run("feedback", "import", str(file)) == 0


def test_a_new_key_s_settings_let_it_in(tmp_path, capsys):
    assert run("key", "new", "shop", "--scope", "admin") == 0
    key, _, entry = capsys.readouterr().out.partition("\n")
    (tmp_path / "learnd.toml").write_text(entry)
    stored = load(tmp_path / "learnd.toml").keys["shop"]
    assert stored.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert stored.scopes == ("admin",)


def test_a_key_s_name_is_checked(capsys):
    assert run("key", "new", "Two Words") == 2


def test_a_misspelt_setting_is_told(tmp_path, capsys):
    (tmp_path / "learnd.toml").write_text("[htpp]\nport = 1\n")
    assert run("doctor", "--config", str(tmp_path / "learnd.toml")) == 1
    assert "did you mean 'http'" in capsys.readouterr().err


def test_flags_are_merged_over_the_file(tmp_path):
    (tmp_path / "learnd.toml").write_text('data_dir = "a"\n[http]\nport = 8001\nhost = "127.0.0.2"\n')
    flags = cli._given(host=None, port=8002, data_dir=None, address="auto")
    settings = load(tmp_path / "learnd.toml", flags)
    assert (settings.http.host, settings.http.port) == ("127.0.0.2", 8002)
    assert settings.cluster.address == "auto"
    assert str(settings.data_dir) == "a"


def test_the_doctor_speaks_json(tmp_path, capsys):
    (tmp_path / "learnd.toml").write_text(f'data_dir = "{tmp_path}"\n')
    run("doctor", "--json", "--config", str(tmp_path / "learnd.toml"))
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert all(set(one) == {"name", "level", "found", "advice"} for one in checks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_told_to_end_ends_in_order(number, monkeypatch):
    """Also in the background of a shell, which has SIGINT ignored there."""
    ended = []

    def run(_options):
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            ended.append("the daemon is stopped here")

    monkeypatch.setattr("service.demo.story.run", run)
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit, match="130"):
            cli.main(["demo"])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended

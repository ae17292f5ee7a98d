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
                "difference": [-0.021, 0.154],
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
        answers = {"/api/status": STATUS, "/api/lines/desk/versions": {"data": [VERSION]}, **self.server.answers}
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
        server.seen, server.answers = [], {}
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
    for command in (
        "serve",
        "status",
        "train",
        "versions",
        "examples",
        "promote",
        "rollback",
        "doctor",
        "demo",
        "feedback",
        "base",
        "key",
        "rollout",
        "quarantine",
        "audit",
    ):
        assert run(command, "--help") == 0
    assert "Ctrl-C stops it in order" in capsys.readouterr().out


CASE = {
    "feedback_id": "f-17",
    "kind": "demonstration",
    "reason": "contradicted",
    "state": "held",
    "principal": "shop/ab12",
    "at": 1.0,
    "decided_by": None,
}


def test_what_is_held_is_listed_and_decided(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    daemon.answers["/api/quarantine/desk?which=held"] = {"data": [CASE]}
    daemon.answers["/api/quarantine/desk?which=all&reason=echo"] = {"data": []}
    assert run("quarantine", "list", "desk") == 0
    said = capsys.readouterr().out
    for part in ("f-17", "demonstration", "contradicted", "held", "shop/ab12"):
        assert part in said
    assert run("quarantine", "list", "desk", "--all", "--reason", "echo", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"data": []}
    assert run("quarantine", "release", "f-17", "f-18") == 0
    assert run("quarantine", "drop", "f-17") == 0
    assert [(path, json.loads(body)) for path, body, _ in daemon.seen] == [
        ("/api/quarantine/release", {"ids": ["f-17", "f-18"]}),
        ("/api/quarantine/drop", {"ids": ["f-17"]}),
    ]


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


def test_versions_can_be_read_in_a_window_of_a_hundred_columns(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run("versions", "desk") == 0
    said = capsys.readouterr().out
    assert "…" not in said
    for heading in ("aliases", "gate", "accuracy", "forgetting", "intransigence", "prequential", "held-out exact matches"):
        assert heading in said


def test_a_version_s_verdict_and_matrix_are_shown_and_the_last_verdict_in_the_status(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    finding = {"name": "hotels", "must": "not_lose", "low": -0.15, "high": 0.0, "looks": 4}
    bound = {"told": "must pass: 1 of 2, not core/7", "outcome": "fail"}
    read = {"average": 0.77, "backward": -0.11, "forward": 0.09, "forgetting": 0.12, "intransigence": 0.14}
    matrix = {"exact": {"transfer": read, "prequential": {"faded": 0.63}}}
    gate = {"outcome": "fail", "worst": "hotels", "findings": [finding], "bounds": [bound], "matrix": matrix}
    gate["warnings"] = ["ewc_stiff: no room"]
    line = {**STATUS["lines"]["desk"], "last_verdict": gate}
    daemon.answers = {
        "/api/lines/desk/versions": {"data": [{**VERSION, "gate": gate}]},
        "/api/status": {**STATUS, "lines": {"desk": line}},
    }
    assert run("versions", "desk") == 0
    said = capsys.readouterr().out
    verdict = "fail, worst slice hotels [-0.150, +0.000], look 4; must pass: 1 of 2, not core/7; ewc_stiff: no room"
    assert verdict in said
    assert "0.77 -0.11 0.09 0.12 0.14 0.63" in " ".join(said.split())
    assert run("status") == 0
    assert f"desk: the gate says {verdict}" in capsys.readouterr().out


def test_an_anchor_and_a_search_are_told_in_a_line_each(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    held = {"version": None, "standing": "alarm", "difference": [-0.3, -0.1], "log_evidence": 7.5, "alarm_at": 6.9, "blocks": 80}
    search = {"job": "desk-job1", "slice": "old", "reason": "", "suspects": 6, "probe": "desk-job4"}
    line = {**STATUS["lines"]["desk"], "anchor": held, "bisection": search}
    daemon.answers["/api/status"] = {**STATUS, "lines": {"desk": line}}
    assert run("status") == 0
    said = capsys.readouterr().out
    told = "alarm, champion - anchor in [-0.300, -0.100] in this round, decay 7.5 of 6.9 after 80 units of the anchor"
    assert f"desk: anchor base: {told}" in said
    assert "desk: desk-job1 lost the slice old: 6 examples are suspected, desk-job4 tries a half" in said
    daemon.answers["/api/rollouts/desk"] = {"line": "desk", "trial": None, "anchor": held}
    assert run("rollout", "status", "desk") == 0
    assert capsys.readouterr().out == f"no trial yet\nanchor base: {told}\n"


def test_the_daemon_s_refusal_is_told_in_its_words(daemon, capsys):
    assert run("versions", "nobody") == 1
    assert capsys.readouterr().err == "learnd: no line 'nobody': lines are desk\n"


def test_changes_by_hand_are_posted_with_the_key(daemon):
    assert run("train", "desk", "--key", "secret") == 0
    assert run("promote", "desk", "v2") == 0
    assert run("rollback", "desk") == 0
    assert run("train", "desk", "--bisect", "desk-job1") == 0
    assert run("rollout", "anchor", "desk") == 0
    assert run("rollout", "anchor", "desk", "v3") == 0
    assert run("train", "desk", "--strategy", "joint") == 0
    paths = [(path, json.loads(body) if body else None) for path, body, _ in daemon.seen]
    assert paths == [
        ("/api/lines/desk/train", None),
        ("/api/rollouts/desk/promote", {"version": "v2"}),
        ("/api/rollouts/desk/rollback", {"version": None}),
        ("/api/jobs/desk-job1/bisect", None),
        ("/api/rollouts/desk/anchor", {"version": "champion"}),
        ("/api/rollouts/desk/anchor", {"version": "v3"}),
        ("/api/lines/desk/train", {"strategy": "joint"}),
    ]
    assert daemon.seen[0][2] == "Bearer secret"


def test_a_trial_is_steered_with_the_verbs_of_the_api(daemon):
    for verb in ("pause", "resume", "promote", "abort", "rollback"):
        assert run("rollout", verb, "desk") == 0
    assert run("rollout", "rollback", "desk", "v3") == 0
    assert [(path.removeprefix("/api/rollouts/desk/"), json.loads(body) if body else None) for path, body, _ in daemon.seen] == [
        ("pause", None),
        ("resume", None),
        ("promote", {"version": None}),
        ("abort", None),
        ("rollback", {"version": None}),
        ("rollback", {"version": "v3"}),
    ]


def test_the_kill_switch_is_shown_and_thrown_with_its_reason(daemon, capsys):
    daemon.answers["/api/switch"] = {"mode": "off"}
    assert run("switch") == 0
    assert json.loads(capsys.readouterr().out) == {"mode": "off"}
    assert daemon.seen == []
    assert run("switch", "base_only", "--reason", "a complaint") == 0
    ((path, body, _),) = daemon.seen
    assert (path, json.loads(body)) == ("/api/switch", {"mode": "base_only", "reason": "a complaint"})
    assert run("switch", "half") == 2


def test_a_line_s_trial_and_its_history_are_shown(daemon, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    daemon.answers["/api/rollouts/desk"] = {"line": "desk", "trial": None}
    assert run("rollout", "status", "desk") == 0
    assert capsys.readouterr().out == "no trial yet\n"
    trial = {**STATUS["lines"]["desk"]["trial"], "id": "desk-trial1", "candidate": "desk@v2", "reason": "verified"}
    daemon.answers["/api/rollouts/desk"] = {"line": "desk", "trial": trial}
    assert run("rollout", "status", "desk") == 0
    said = capsys.readouterr().out
    assert said.startswith("desk-trial1: desk@v2, canary at 50%, units 31/30")
    assert "difference in [-0.021, +0.154]" in said
    assert said.endswith("verified\n")
    known = {"promote": {"quality": 3.0, "refusal": 1.25}, "harm": {"refusal": -0.5}, "harm_at": 5.99}
    daemon.answers["/api/rollouts/desk"] = {"line": "desk", "trial": {**trial, **known}}
    assert run("rollout", "status", "desk") == 0
    needed = trial["thresholds"]["promote"]
    assert capsys.readouterr().out.endswith(f"guardrail refusal: not worse 1.2 of {needed:.1f}, worse -0.5 of 6.0\n")
    stood = {"trial": "desk-trial1", "candidate": "desk@v2", "from": "canary", "to": "hold"}
    why = {"by": "operator", "reason": "operator: pause"}
    daemon.answers["/api/rollouts/desk/history"] = {"data": [{"seq": 9, "at": 0.0, **stood, **why}]}
    assert run("rollout", "history", "desk") == 0
    assert "desk-trial1  desk@v2    canary  hold  operator  operator: pause" in capsys.readouterr().out
    assert run("rollout", "history", "desk", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["seq"] == 9


def verdict(**changes):
    return {"seq": 9, "recorded": "live: good", "replayed": "live: good", "is_same": True, "is_same_code": True, **changes}


def test_a_replay_tells_by_its_status_whether_each_verdict_is_the_same(daemon, capsys):
    daemon.answers["/api/replay/desk-trial1"] = {"data": [verdict(), verdict(replayed=None)]}
    assert run("rollout", "replay", "desk-trial1") == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("asked for by hand")
    differs = verdict(replayed="no move", is_same=False, is_same_code=False)
    daemon.answers["/api/replay/desk-trial1"] = {"data": [verdict(), differs]}
    assert run("rollout", "replay", "desk-trial1") == 1
    assert "no move, by other code" in capsys.readouterr().out
    assert run("rollout", "replay", "desk-trial1", "--json") == 1
    assert json.loads(capsys.readouterr().out)["data"] == [verdict(), differs]


def test_a_changed_record_is_named(daemon, capsys):
    daemon.answers["/api/audit"] = {"records": 7, "head": "abc", "is_whole": True, "broken": None, "reason": ""}
    assert run("audit", "verify") == 0
    assert "7 records" in capsys.readouterr().out
    daemon.answers["/api/audit"] |= {"is_whole": False, "broken": 8, "reason": "its digest is not that of its content"}
    assert run("audit", "verify") == 1
    assert "record 8 was changed: its digest" in capsys.readouterr().out


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

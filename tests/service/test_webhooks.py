"""Notices over real HTTP: in order, signed, again after a failure, across a death, and nothing that stands beside another."""

import asyncio
import contextlib
import http.server
import json
import threading

import httpx
import pytest
from fakes import settle
from pydantic import ValidationError
from typer.testing import CliRunner

from replay import ledger
from replay.writer import Writer
from service import audit, webhooks
from service import conductor as conducting
from service.cli import app
from service.errors import WebhookFailed
from service.settings import Settings, Webhook
from service.webhooks import Webhooks, notice_of, signature

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MOVED = {"trial": "t", "candidate": "desk@v1", "champion": None, "weight": 0.5, "reason": "because"}


class Listener:
    """An address that notes what it is told, and answers with the next of `answers`, then 204."""

    def __init__(self):
        self.told, self.answers = [], []
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                listener.told.append((dict(self.headers), body))
                self.send_response(listener.answers.pop(0) if listener.answers else 204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?token=hidden"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def notices(self):
        return [json.loads(body) for _, body in self.told]


@pytest.fixture
def listener():
    listener = Listener()
    yield listener
    listener.server.shutdown()
    listener.server.server_close()


class Daemon:
    """What of a daemon webhooks need: a ledger on disk, which `begin` opens as each life does."""

    def __init__(self, folder, listener):
        self.file, self.listener, self.failures, self.now = folder / "ledger.db", listener, [], 100.0
        self.begin()

    def begin(self):
        self.writer = Writer(self.file, 0.0)
        for create in (ledger.create, conducting.create):
            self.writer.submit(create).result()

    def tell(self, kind, **body):
        self.writer.submit(lambda conn: audit.tell(conn, self.now, "desk", kind, body)).result()

    def hooks(self, **fields):
        async def do(work):
            return await asyncio.wrap_future(self.writer.submit(work))

        hook = Webhook(url=self.listener.url, **fields)
        return Webhooks({"ops": hook}, do, lambda: self.now, self.failures.append)

    async def deliver(self, **fields):
        async with httpx.AsyncClient() as http:
            return await self.hooks(**fields).deliver("ops", http)


@pytest.fixture
def daemon(tmp_path, listener):
    daemon = Daemon(tmp_path, listener)
    yield daemon
    daemon.writer.close()


def test_a_signature_is_the_one_of_standard_webhooks():
    """The vector of its reference libraries."""
    told = signature(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert told == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert told != signature(SECRET.removeprefix("whsec_"), "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')


async def test_what_is_done_from_now_on_is_told_once_and_in_order(daemon, listener):
    daemon.tell("job_queued", job="before")
    await daemon.deliver()
    assert listener.told == []
    daemon.tell("version_made", version="desk@v1")
    daemon.tell("verdict", trial={"much": "detail"})
    for stage in ("canary", "bake", "live"):
        daemon.tell("trial_moved", **MOVED, stage=stage)
    await daemon.deliver()
    await daemon.deliver()
    assert [(said["type"], said["phase"]) for said in listener.notices] == [
        ("pre-rollout", ""),
        ("rollout", "canary"),
        ("rollout", "bake"),
        ("post-rollout", "live"),
    ]
    assert listener.notices[1]["name"] == "desk"
    assert listener.notices[1]["metadata"] == {**MOVED, "stage": "canary"}
    assert [headers["webhook-id"] for headers, _ in listener.told] == [said["checksum"] for said in listener.notices]


async def test_whoever_has_the_secret_can_verify_a_notice(daemon, listener):
    await daemon.deliver(secret=SECRET)
    daemon.tell("job_queued")
    await daemon.deliver(secret=SECRET)
    ((headers, body),) = listener.told
    assert headers["webhook-signature"] == signature(SECRET, headers["webhook-id"], headers["webhook-timestamp"], body)
    daemon.tell("job_queued")
    await daemon.deliver()
    assert "webhook-signature" not in listener.told[-1][0]


async def test_a_notice_that_was_not_taken_is_told_again_by_the_next_life_and_none_is_passed_over(daemon, listener):
    await daemon.deliver()
    daemon.tell("job_queued", job="one")
    daemon.tell("job_queued", job="two")
    listener.answers = [204, 503]
    with pytest.raises(httpx.HTTPStatusError):
        await daemon.deliver()
    daemon.writer.close()
    daemon.begin()
    await daemon.deliver()
    assert [said["metadata"]["job"] for said in listener.notices] == ["one", "two", "two"]
    assert listener.told[1][0]["webhook-id"] == listener.told[2][0]["webhook-id"]


async def test_only_the_types_asked_for_and_nothing_stale(daemon, listener):
    asked = {"types": ["rollback"], "max_age_seconds": 60}
    await daemon.deliver(**asked)
    daemon.tell("rolled_back", stale=True)
    daemon.now += 61
    daemon.tell("job_queued")
    daemon.tell("rolled_back", stale=False)
    daemon.tell("trial_moved", **MOVED, stage="rolling_back")
    await daemon.deliver(**asked)
    assert [said["metadata"].get("stale", said["phase"]) for said in listener.notices] == [False, "rolling_back"]


async def test_a_loop_tells_and_survives_an_address_that_fails(daemon, listener, monkeypatch, capsys):
    monkeypatch.setattr(webhooks, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(webhooks, "BACKOFF_SECONDS", (0.01, 0.02))
    running = asyncio.create_task(daemon.hooks().run())
    await asyncio.sleep(0.1)  # it has noted where it begins
    listener.answers = [500, 301, 204]
    daemon.tell("job_queued", job="one")
    await settle(lambda: len(listener.told) == 3)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert {said["metadata"]["job"] for said in listener.notices} == {"one"}
    assert daemon.failures == ["webhook ops", "webhook ops"]
    assert "hidden" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "stage", "type_"),
    [
        ("rolled_back", "rolling_back", "rollback"),
        ("trial_moved", "rolling_back", "rollback"),
        ("trial_moved", "rolled_back", "post-rollout"),
        ("promoted", "bake", "rollout"),
        ("promoted", "live", "post-rollout"),
    ],
)
def test_a_trial_is_told_in_flagger_s_words(kind, stage, type_):
    assert notice_of({"kind": kind, "line": "desk", "at": 1.0, "digest": "d", "body": {"stage": stage}})["type"] == type_


@pytest.mark.parametrize("kind", ["drift", "switch_thrown", "swapped", "job_ended", "overruled"])
def test_anything_else_is_an_event(kind):
    record = {"kind": kind, "line": "desk", "at": 1.0, "digest": "d", "body": {}}
    assert notice_of(record)["type"] == "event"


def test_a_test_notice_says_whether_it_was_taken(listener, tmp_path):
    config = tmp_path / "learnd.toml"
    config.write_text(f"[webhooks.ops]\nurl = '{listener.url}'\nsecret = '{SECRET}'\n")
    done = CliRunner().invoke(app, ["webhook", "ops", "--config", str(config)])
    assert (done.exit_code, done.output) == (0, "ops took the notice\n")
    assert listener.notices[0]["kind"] == "test"
    listener.answers = [401]
    with pytest.raises(WebhookFailed, match="answered 401"):
        webhooks.test(Webhook(url=listener.url), "ops", 1.0)
    with pytest.raises(WebhookFailed, match="cannot be reached"):
        webhooks.test(Webhook(url="http://127.0.0.1:9/"), "ops", 1.0)


def test_bad_settings_are_told():
    with pytest.raises(ValidationError, match="base64"):
        Webhook(url="https://x.example/", secret="whsec_?")
    with pytest.raises(ValidationError, match="url"):
        Webhook(url="ftp://x.example/")
    assert SECRET not in repr(Settings(webhooks={"ops": {"url": "https://x.example/", "secret": SECRET}}))

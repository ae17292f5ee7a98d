"""Lines, versions, jobs, trials, health and metrics over HTTP, on a true keeper."""

import asyncio
import hashlib
import shutil
import subprocess

import httpx
import pytest
from test_keeper import Replica, demonstrate, until
from world import LINE

from service.api import build
from service.settings import Key


def client_of(keeper, settings):
    transport = httpx.ASGITransport(build(keeper, settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://learnd")


@pytest.fixture
async def client(keeper, settings):
    async with client_of(keeper, settings) as client:
        yield client


async def read(client, path, status=200):
    response = await client.get(path)
    assert response.status_code == status, response.text
    return response.json()


async def test_it_is_alive_before_it_is_ready(client, keeper):
    assert await read(client, "/health") == {"status": "alive"}
    assert (await read(client, "/ready", 503))["reasons"] == ["no engine replica serves yet"]
    replica = Replica(keeper)
    await replica.turn()
    await replica.turn()
    assert await read(client, "/ready") == {"ready": True, "reasons": []}


async def test_the_status_has_what_the_screens_show(client, keeper):
    replica = Replica(keeper)
    await demonstrate(keeper, 60)
    await until(keeper, [replica], lambda line: line["trial"] and line["trial"]["state"] == "canary")
    said = await read(client, "/api/status")
    assert said.keys() >= {"ready", "base", "lines", "replicas", "feedback", "ledger", "desired"}
    assert said["feedback"]["stored"] == 60
    assert said["replicas"][0].keys() >= {"id", "number", "resident", "inflight", "last_seen"}
    line = said["lines"][LINE]
    assert line.keys() >= {"champion", "candidate", "previous", "versions", "examples", "job", "trial", "last_verdict"}
    assert line["trial"].keys() >= {
        "id",
        "state",
        "step",
        "weight",
        "units",
        "log_evidence",
        "thresholds",
        "difference",
        "reason",
    }


async def test_a_version_goes_live_and_back_by_hand(client, keeper):
    replica = Replica(keeper)
    await demonstrate(keeper, 60)
    job = (await client.post(f"/api/lines/{LINE}/train", json={"strategy": "naive"})).json()
    assert job["strategy"] == "naive"
    assert (await client.post(f"/api/lines/{LINE}/train")).status_code == 409
    assert (await read(client, f"/api/jobs/{job['id']}"))["line"] == LINE
    await until(keeper, [replica], lambda line: line["trial"] and line["trial"]["state"] == "canary")
    promoted = await client.post(f"/api/lines/{LINE}/promote", json={"version": "v1"})
    assert (promoted.status_code, promoted.json()["candidate"]) == (202, "desk@v1")
    await until(keeper, [replica], lambda line: line["champion"])
    (version,) = (await read(client, f"/api/lines/{LINE}/versions"))["data"]
    assert version.keys() >= {"name", "number", "state", "parent", "created_at", "slices", "gate", "aliases"}
    (trial,) = (await read(client, f"/api/trials?line={LINE}"))["data"]
    assert "history" in await read(client, f"/api/trials/{trial['id']}")
    again = (await read(client, f"/api/trials/{trial['id']}/replay"))["data"]
    assert [one["recorded"].split(":")[0] for one in again] == ["canary", "promoting", "live"]
    assert all(one["is_same"] and one["is_same_code"] for one in again)
    assert [one["replayed"] is None for one in again] == [False, True, False]
    (gate,) = (await read(client, f"/api/replay/{job['id']}"))["data"]
    assert gate["recorded"].startswith("gate_pass: ")
    assert (await read(client, "/api/replay/desk@v1"))["data"] == [gate, *again]
    assert (await read(client, "/api/audit")).items() >= {"is_whole": True, "broken": None}.items()
    assert (await client.post(f"/api/lines/{LINE}/rollback")).status_code == 202
    await until(keeper, [replica], lambda line: line["champion"] is None)
    moves = [
        (one["from"], one["to"])
        for one in (await read(client, f"/api/lines/{LINE}/history"))["data"]
        if one["alias"] == "champion"
    ]
    assert moves == [("desk@v1", None), (None, "desk@v1")]
    assert [one["name"] for one in (await read(client, "/api/lines"))["data"]] == [LINE]
    assert len((await read(client, "/api/jobs"))["data"]) == 1


async def test_what_a_line_learns_from_can_be_had_whole(client, keeper):
    replica = Replica(keeper)
    await demonstrate(keeper, 60)
    path = f"/api/lines/{LINE}/examples"
    fresh = (await read(client, path))["data"]
    assert len(fresh) == 60
    assert {one["source"] for one in fresh} == {"fresh"}
    assert {one["split"] for one in fresh} == {"train", "validation", "holdout"}
    assert fresh[0].keys() == {"id", "slice", "split", "source", "weight", "messages", "reply"}
    await client.post(f"/api/lines/{LINE}/train")
    await until(keeper, [replica], lambda line: line["trial"] and line["trial"]["state"] == "canary")
    assert (await read(client, path))["data"] == fresh  # which are held by the version on trial
    await client.post(f"/api/lines/{LINE}/promote")
    await until(keeper, [replica], lambda line: line["champion"])
    after = {one["id"]: one for one in (await read(client, path))["data"]}
    assert after.keys() == {one["id"] for one in fresh}
    assert all((one["source"] == "remembered") == (one["split"] == "train") for one in after.values())
    await read(client, "/api/lines/nobody/examples", 404)


async def test_a_trial_is_steered_by_hand_and_its_history_says_so(client, keeper):
    replica = Replica(keeper)
    path = f"/api/rollouts/{LINE}"
    assert await read(client, path) == {"line": LINE, "trial": None, "anchor": None}
    await demonstrate(keeper, 60)
    await until(keeper, [replica], lambda line: line["trial"] and line["trial"]["state"] == "canary")
    for verb, state in (("pause", "hold"), ("resume", "canary"), ("abort", "rolling_back")):
        done = await client.post(f"{path}/{verb}")
        assert (done.status_code, done.json()["state"]) == (202, state)
        assert (await read(client, path))["trial"]["state"] == state
    await until(keeper, [replica], lambda line: line["trial"] is None)
    assert (await read(client, path))["trial"]["state"] == "rolled_back"
    told = [(one["from"], one["to"], one["by"]) for one in reversed((await read(client, f"{path}/history"))["data"])]
    assert told == [
        ("verifying", "canary", "auto"),
        ("canary", "hold", "operator"),
        ("hold", "canary", "operator"),
        ("canary", "rolling_back", "operator"),
        ("rolling_back", "rolled_back", "auto"),
    ]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "says"),
    [
        ("GET", "/api/lines/desc/versions", b"", 404, "no line 'desc'"),
        ("POST", "/api/lines/desc/train", b"", 404, "no line 'desc'"),
        ("GET", "/api/jobs?line=desc", b"", 404, "no line 'desc'"),
        ("GET", "/api/jobs/nope", b"", 404, "no job 'nope'"),
        ("GET", "/api/trials/nope", b"", 404, "no trial 'nope'"),
        ("GET", "/api/trials/nope/replay", b"", 404, "no trial 'nope'"),
        ("POST", "/api/lines/desk/train", b"", 409, "nothing new to learn"),
        ("POST", "/api/lines/desk/train", b'{"strategy": "joint"}', 409, "nothing new to learn"),
        ("POST", "/api/lines/desk/train", b'{"strategy": "ewk"}', 400, "strategy 'ewk'"),
        ("POST", "/api/lines/desk/train", b'{"stategy": "joint"}', 400, "stategy"),
        ("POST", "/api/lines/desk/promote", b"", 409, "no candidate"),
        ("POST", "/api/lines/desk/promote", b'{"version": "v9"}', 404, "desk@v9"),
        ("POST", "/api/lines/desk/promote", b'{"versoin": "v9"}', 400, "did you mean 'version'"),
        ("POST", "/api/lines/desk/rollback", b'{"version": "other@v1"}', 400, "not a version of 'desk'"),
        ("GET", "/api/rollouts/desc", b"", 404, "no line 'desc'"),
        ("GET", "/api/rollouts/desc/history", b"", 404, "no line 'desc'"),
        ("POST", "/api/rollouts/desc/pause", b"", 404, "no line 'desc'"),
        ("POST", "/api/rollouts/desk/abort", b"", 409, "no trial to abort"),
        ("POST", "/api/rollouts/desk/promote", b'{"version": "v9"}', 404, "desk@v9"),
        ("POST", "/api/rollouts/desk/rollback", b'{"version": "x"}', 400, "not a version"),
        ("POST", "/api/rollouts/desk/anchor", b"", 409, "holds nothing back"),
        ("POST", "/api/rollouts/desk/anchor", b'{"version": "v1"}', 409, "holds nothing back"),
        ("POST", "/api/rollouts/desk/anchor", b'{"version": "desk@v1"}', 409, "holds nothing back"),
        ("POST", "/api/rollouts/desk/anchor", b'{"version": "best"}', 400, "not a version"),
        ("POST", "/api/rollouts/desk/anchor", b'{"version": "other@v1"}', 400, "not a version of 'desk'"),
        ("POST", "/api/rollouts/desc/anchor", b"", 404, "no line 'desc'"),
        ("POST", "/api/jobs/nope/bisect", b"", 404, "no job 'nope'"),
        ("POST", "/api/rollouts/desk/explode", b"", 404, "Not Found"),
        ("GET", "/api/nothing", b"", 404, "Not Found"),
        ("DELETE", "/api/status", b"", 405, "Method Not Allowed"),
    ],
)
async def test_what_is_wrong_is_said_in_openais_form(client, method, path, content, status, says):
    response = await client.request(method, path, content=content)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


async def test_administration_needs_the_scope_and_metrics_any_key(keeper, settings):
    keys = {
        "ops": Key(sha256=hashlib.sha256(b"boss").hexdigest(), scopes=("admin",)),
        "app": Key(sha256=hashlib.sha256(b"s3cret").hexdigest(), scopes=("infer", "feedback")),
    }
    admin = [
        "/api/status",
        "/api/lines",
        f"/api/lines/{LINE}/versions",
        "/api/jobs",
        "/api/trials",
        "/api/audit",
        f"/api/rollouts/{LINE}",
        f"/api/quarantine/{LINE}",
    ]
    async with client_of(keeper, settings.model_copy(update={"keys": keys})) as client:
        for path in (*admin, "/metrics"):
            await read(client, path, 401)
        assert (await client.post(f"/api/lines/{LINE}/train")).status_code == 401
        assert (await client.post(f"/api/rollouts/{LINE}/abort")).status_code == 401
        assert (await client.post("/api/quarantine/release", json={"ids": ["f"]})).status_code == 401
        await read(client, "/health")
        client.headers["authorization"] = "Bearer s3cret"
        for path in admin:
            await read(client, path, 403)
        assert (await client.get("/metrics")).status_code == 200
        client.headers["authorization"] = "Bearer boss"
        for path in admin:
            await read(client, path)


async def test_an_unforeseen_error_is_500_and_keeps_its_secret(settings):
    class Broken:
        async def lines(self):
            raise RuntimeError("hunter2")

    async with client_of(Broken(), settings) as client:
        response = await client.get("/api/lines")
    assert response.status_code == 500
    assert "hunter2" not in response.text


async def test_a_number_that_json_lacks_becomes_null(settings):
    class Unbounded:
        async def lines(self):
            return [{"bounds": (float("-inf"), 1.0), "mean": float("nan"), "n": 3}]

    async with client_of(Unbounded(), settings) as client:
        assert (await client.get("/api/lines")).json()["data"] == [{"bounds": [None, 1.0], "mean": None, "n": 3}]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Debian's prometheus package; CI installs it")
async def test_promtool_likes_the_metrics_of_a_daemon_at_work(client, keeper):
    await demonstrate(keeper, 60)
    await until(keeper, [Replica(keeper)], lambda line: line["trial"] and line["trial"]["state"] == "canary")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    checked = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=response.content, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


async def test_the_kill_switch(client):
    assert (await read(client, "/api/switch"))["mode"] == "off"
    thrown = await client.post("/api/switch", json={"mode": "base_only", "reason": "a complaint"})
    assert (thrown.status_code, thrown.json()["mode"], thrown.json()["reason"]) == (200, "base_only", "a complaint")
    assert (await read(client, "/api/status"))["kill_switch"]["thrown"] == "base_only"
    assert (await client.post("/api/switch", json={"mode": "half"})).status_code == 400
    await client.post("/api/switch", json={"mode": "off"})
    assert (await read(client, "/api/switch"))["mode"] == "off"

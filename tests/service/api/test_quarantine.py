"""The quarantine over HTTP, on a true keeper: seen, overruled, written down."""

import hashlib

import pytest
from test_admin import client_of
from world import BASE, LINE, FakeLauncher, validate

from replay import opinions
from replay.records import Arm, Feedback, Interaction, Wanted
from service import audit
from service.keeper import Keeper
from service.settings import Key

KEYS = {
    "boss": Key(sha256=hashlib.sha256(b"b").hexdigest(), scopes=("admin",)),
    **{name: Key(sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=("feedback",)) for name in ("shop", "web")},
}


async def correct(keeper, name, prompt, reply, by):
    asked = Interaction(name, LINE, "base", Arm.CHAMPION, "u", "all", ({"role": "user", "content": prompt},), "Hm.", at=100.0)
    await keeper.record([asked])
    await keeper.feedback([Feedback(f"f-{name}", name, "demonstration", reply, 100.0, 100.0, principal=by)])


@pytest.fixture
async def client(keeper, settings):
    async with client_of(keeper, settings.model_copy(update={"keys": KEYS})) as client:
        client.headers["authorization"] = "Bearer b"
        yield client


async def shown(client, query=""):
    return (await client.get(f"/api/quarantine/{LINE}{query}")).json()["data"]


async def test_what_is_held_is_shown_and_released_by_name(client, keeper):
    await correct(keeper, "a", "Is it good?", "yes", "shop")
    await correct(keeper, "b", "Is it good?", "no", "web")
    held = await shown(client)
    assert {case["feedback_id"] for case in held} == {"f-a", "f-b"}
    assert {case["reason"] for case in held} == {"contradicted"}
    line = (await client.get("/api/status")).json()["lines"][LINE]
    assert line["quarantine"] == {"held": {"contradicted": 2}}
    assert 'learnd_quarantine{line="desk",reason="contradicted",state="held"} 2.0' in (await client.get("/metrics")).text
    released = await client.post("/api/quarantine/release", json={"ids": ["f-b"]})
    assert released.json()["data"][0].items() >= {"state": "released", "decided_by": "boss"}.items()
    await client.post("/api/quarantine/drop", json={"ids": ["f-a"]})
    again = await client.post("/api/quarantine/drop", json={"ids": ["f-a"]})
    assert again.status_code == 200
    assert await shown(client) == []
    assert [case["state"] for case in await shown(client, "?which=all&reason=contradicted")] == ["released", "dropped"][::-1]
    assert (await client.get("/api/status")).json()["lines"][LINE]["examples"]["fresh"] == 1
    told = await keeper._storage.do(lambda conn: audit.events(conn, LINE, "overruled"))
    assert [(event["body"]["feedback_id"], event["body"]["decision"], event["body"]["by"]) for event in told] == [
        ("f-b", "release", "boss"),
        ("f-a", "drop", "boss"),
    ]


async def test_what_was_decided_survives_a_restart(client, keeper, settings, clock):
    await correct(keeper, "a", "Is it good?", "yes", "shop")
    await correct(keeper, "b", "Is it good?", "no", "web")
    await client.post("/api/quarantine/release", json={"ids": ["f-a"]})
    await keeper.close()
    again = Keeper(settings, BASE, FakeLauncher(), clock, validate)
    await again.start()
    (held,) = await again.quarantine(LINE, "held", None)
    assert held["feedback_id"] == "f-b"
    assert (await again.status())["lines"][LINE]["examples"]["fresh"] == 1
    await again.close()


async def test_all_of_it_or_none_is_decided(client, keeper):
    await correct(keeper, "a", "Is it good?", "yes", "shop")
    await correct(keeper, "b", "Is it good?", "no", "web")
    refused = await client.post("/api/quarantine/release", json={"ids": ["f-a", "nope"]})
    assert refused.status_code == 409
    assert "has not looked at any feedback 'nope'" in refused.json()["error"]["message"]
    assert {case["state"] for case in await shown(client)} == {"held"}


@pytest.mark.parametrize("body", [{}, {"ids": []}, {"ids": ["f"], "x": 1}])
async def test_a_body_names_ids(client, body):
    assert (await client.post("/api/quarantine/drop", json=body)).status_code == 400


async def test_an_unknown_line_is_not_found(client):
    assert (await client.get("/api/quarantine/nobody")).status_code == 404


async def correct_all(keeper, people):
    """One correction each, at once: no job takes some of them before the others are there."""
    asked = [
        Interaction(
            f"i{n}", LINE, "base", Arm.CHAMPION, unit, "all", ({"role": "user", "content": f"tweet {n}"},), "Hm.", at=100.0
        )
        for n, (_, unit) in enumerate(people)
    ]
    await keeper.record(asked)
    said = [
        Feedback(f"f{n}", f"i{n}", "demonstration", "negative", 100.0, 100.0, principal=key) for n, (key, _) in enumerate(people)
    ]
    await keeper.feedback(said)
    await keeper.tick()
    (job,) = await keeper.jobs(LINE)
    return job


async def test_caps_hold_when_a_job_takes_what_waits(client, keeper):
    job = await correct_all(keeper, [("loud", "one") if n % 2 else (f"k{n}", f"u{n}") for n in range(120)])
    assert job["examples"] == 65
    held = await shown(client, "?reason=over_principal_cap")
    assert len(held) == 55
    assert {case["principal"] for case in held} == {"loud/one"}
    (queued,) = await keeper._storage.do(lambda conn: audit.events(conn, LINE, "job_queued"))
    assert queued["body"]["held"] == {"over_principal_cap": 55}


async def test_an_opinion_that_no_job_can_take_is_seen_and_released(client, keeper):
    prompt = ({"role": "user", "content": "Is it good?"},)
    asked = Interaction("a", LINE, "base", Arm.CHAMPION, "u", "all", prompt, "Hm", at=100.0, finish_reason="length")
    await keeper.record([asked])
    await keeper.feedback([Feedback("t-a", "a", "thumb", True, 100.0, 100.0, principal="web")])
    await keeper._storage.review()
    wanted = Wanted(thumbs={"thumb": True}, min_items=1, min_minority=0)
    await keeper._storage.do(lambda conn: opinions.reserve(conn, LINE, "j1", wanted, keeper._storage.guard(LINE)))
    (case,) = await shown(client, "?which=all")
    assert case.items() >= {"feedback_id": "t-a", "kind": "thumb", "reason": "cut_off", "state": "refused"}.items()
    assert (await keeper.feedback_by_id("t-a"))["refusal"] == "cut_off"
    assert 'learnd_quarantine{line="desk",reason="cut_off",state="refused"} 1.0' in (await client.get("/metrics")).text
    await client.post("/api/quarantine/release", json={"ids": ["t-a"]})
    assert (await keeper.feedback_by_id("t-a"))["refusal"] is None
    assert (await client.get("/api/status")).json()["lines"][LINE]["quarantine"] == {}
    taken = await keeper._storage.do(lambda conn: opinions.reserve(conn, LINE, "j2", wanted, keeper._storage.guard(LINE)))
    assert taken == {"thumb": 1}


@pytest.mark.parametrize("key", ["anonymous", "shop"])
async def test_one_alone_teaches_all_of_it(client, keeper, key):
    job = await correct_all(keeper, [(key, "one")] * 60)
    assert job["examples"] == 60
    assert await shown(client, "?which=all") == []

"""Feedback over HTTP, from the bytes of a request to the rows of a true ledger."""

import asyncio
import hashlib
import json

import httpx
import pytest
from starlette.requests import ClientDisconnect

from replay.records import Arm, FeedbackStatus, Interaction, Receipt
from service.api import build
from service.api.auth import Keyring
from service.api.feedback import AHEAD, FeedbackApi, Intake
from service.errors import NotFound, StorageFailed
from service.settings import Feedback as FeedbackSettings
from service.settings import Http, Key, Metric, Settings


@pytest.fixture
def settings(tmp_path):
    metrics = {"thumb": Metric(type="boolean"), "stars": Metric(type="float", minimum=1, maximum=5)}
    return Settings(
        data_dir=tmp_path, http=Http(max_body_bytes=2048), feedback=FeedbackSettings(metrics=metrics), lines={"desk": {}}
    )


def client_of(keeper, settings, **options):
    transport = httpx.ASGITransport(build(keeper, settings, lambda: 100.0))
    return httpx.AsyncClient(transport=transport, base_url="http://learnd", **options)


@pytest.fixture
async def client(keeper, settings):
    async with client_of(keeper, settings) as client:
        yield client


@pytest.fixture
async def answered(keeper):
    """An interaction that the ledger knows."""
    await keeper.record([answer_to("chatcmpl-1")])


def answer_to(identity):
    messages = ({"role": "user", "content": f"How is {identity}?"},)
    return Interaction(identity, "desk", "desk@v3", Arm.CHAMPION, "u", "all", messages, "Fine.", at=90.0)


def say(value=True, inference_id="chatcmpl-1", **more):
    return {"inference_id": inference_id, "metric_name": "thumb", "value": value, **more}


def ndjson(*bodies):
    return b"".join(json.dumps(body).encode() + b"\n" for body in bodies)


def acknowledgements(response):
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.usefixtures("answered")
async def test_new_feedback_is_201_and_says_what_it_is_about(client):
    response = await client.post("/feedback", json=say(id="mine"))
    assert response.status_code == 201
    assert response.json() == {
        "id": "mine",
        "object": "feedback",
        "status": "matched",
        "inference_id": "chatcmpl-1",
        "served_by": "desk@v3",
    }


@pytest.mark.usefixtures("answered")
async def test_a_repeat_is_200_and_another_body_409(client):
    await client.post("/feedback", json=say(id="mine"))
    assert (await client.post("/feedback", json=say(id="mine"))).status_code == 200
    conflict = await client.post("/feedback", json=say(False, id="mine"))
    assert conflict.status_code == 409
    assert conflict.json()["error"]["param"] == "id"
    assert (await client.get("/feedback/mine")).json()["value"] is True


async def test_feedback_before_its_interaction_waits_and_is_joined(client, keeper):
    early = await client.post("/feedback", json=say(id="early"))
    assert (early.status_code, early.json()["status"], early.json()["served_by"]) == (202, "pending", None)
    await keeper.record([answer_to("chatcmpl-1")])
    view = (await client.get("/feedback/early")).json()
    assert (view["status"], view["served_by"], view["used_in"]) == ("matched", "desk@v3", [])


async def test_unknown_feedback_is_404(client):
    response = await client.get("/feedback/nope")
    assert response.status_code == 404
    assert "'nope'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status", "param", "says"),
    [
        (b"{nope", 400, None, "not JSON"),
        (b"", 400, None, "not JSON"),
        (ndjson(say(1)), 400, "value", "takes true or false"),
        (ndjson(say(metric_name="thumbs")), 400, "metric_name", "did you mean 'thumb'"),
        (ndjson(say(comment="x" * 3000)), 413, None, "2048"),
    ],
)
async def test_what_is_wrong_is_said_in_openais_form(client, content, status, param, says):
    response = await client.post("/feedback", content=content)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.usefixtures("answered")
async def test_a_batch_answers_each_item_and_207_when_they_differ(client):
    batch = [say(id="a"), say("yes"), say(inference_id="later"), say(False, id="a"), say(id="a")]
    response = await client.post("/feedback/batch", json=batch)
    assert response.status_code == 207
    data = response.json()["data"]
    assert [(item["index"], item["status_code"]) for item in data] == [(0, 201), (1, 400), (2, 202), (3, 409), (4, 200)]
    assert data[1]["error"]["param"] == "value"


@pytest.mark.usefixtures("answered")
async def test_a_batch_of_one_mind_has_its_status(client):
    assert (await client.post("/feedback/batch", json=[say(), say(False)])).status_code == 201
    assert (await client.post("/feedback/batch", json=[say(2), say(3)])).status_code == 400


@pytest.mark.parametrize("content", [b"{}", b"[]", b"[" + b"0," * 1000 + b"0]"])
async def test_what_is_no_batch_is_refused_whole(client, content):
    response = await client.post("/feedback/batch", content=content)
    assert response.status_code == 400


@pytest.mark.usefixtures("answered")
async def test_a_stream_acknowledges_each_line_by_its_number(client):
    content = ndjson(say(id="a")) + b"\n  \n{nope\n" + ndjson(say(id="a"), say(7)) + json.dumps(say(id="b")).encode()
    response = await client.post("/feedback/stream", content=content)
    said = acknowledgements(response)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [(line["line"], line["status_code"]) for line in said] == [(1, 201), (4, 400), (5, 200), (6, 400), (7, 201)]
    assert said[3]["error"]["param"] == "value"


async def test_a_stream_may_be_cut_anywhere(client):
    whole = ndjson(*(say(id=f"f{i}", comment="ünd") for i in range(7)))

    async def pieces():
        for i in range(0, len(whole), 37):
            yield whole[i : i + 37]

    said = acknowledgements(await client.post("/feedback/stream", content=pieces()))
    assert [line["line"] for line in said] == list(range(1, 8))
    assert {line["status_code"] for line in said} == {202}


async def test_a_stream_answers_while_it_is_sent(keeper, settings):
    """The first acknowledgement comes before the second line is sent: nobody waits for the end of the body."""
    app, sent, bodies = build(keeper, settings, lambda: 100.0), asyncio.Queue(), asyncio.Queue()

    async def send(message):
        await sent.put(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/feedback/stream",
        "headers": [],
        "query_string": b"",
        "asgi": {"version": "3.0"},
    }
    task = asyncio.create_task(app(scope, bodies.get, send))
    for number, is_last in ((1, False), (2, True)):
        await bodies.put({"type": "http.request", "body": ndjson(say(id=f"f{number}")), "more_body": not is_last})
        while not (message := await sent.get()).get("body"):
            pass
        assert json.loads(message["body"])["id"] == f"f{number}"
    await task


async def test_a_client_that_hangs_up_in_a_stream_ends_it_quietly(keeper, settings):
    app, bodies = build(keeper, settings, lambda: 100.0), asyncio.Queue()

    async def send(message):
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/feedback/stream",
        "headers": [],
        "query_string": b"",
        "asgi": {"version": "3.0"},
    }
    await bodies.put({"type": "http.request", "body": ndjson(say(id="whole")) + b'{"infer', "more_body": True})
    await bodies.put({"type": "http.disconnect"})
    await app(scope, bodies.get, send)
    assert (await keeper.feedback_by_id("whole"))["status"] == "pending"


async def test_a_line_over_the_limit_ends_the_stream(client):
    content = ndjson(say(id="a")) + b"x" * 3000
    said = acknowledgements(await client.post("/feedback/stream", content=content))
    assert [(line["line"], line["status_code"]) for line in said] == [(1, 202), (2, 413)]


async def test_keys_with_the_scope_may_speak_and_are_remembered(keeper, settings):
    keys = {
        "app": Key(sha256=hashlib.sha256(b"s3cret").hexdigest(), scopes=("feedback",)),
        "chat": Key(sha256=hashlib.sha256(b"chatty").hexdigest(), scopes=("infer",)),
    }
    async with client_of(keeper, settings.model_copy(update={"keys": keys})) as client:
        for path in ("/feedback", "/feedback/batch", "/feedback/stream"):
            assert (await client.post(path, json=say())).status_code == 401
            refused = await client.post(path, json=say(), headers={"authorization": "Bearer chatty"})
            assert refused.status_code == 403
        client.headers["authorization"] = "Bearer s3cret"
        await client.post("/feedback", json=say(id="mine"))
        assert (await client.get("/feedback/mine")).json()["principal"] == "app"


@pytest.mark.parametrize("path", ["/feedback", "/feedback/batch", "/feedback/stream"])
async def test_a_full_disk_is_503_and_nothing_is_acknowledged(keeper, client, path):
    """The disk is SQLite's own: its pages are limited to those it has, so the next write fails as on a full disk."""
    await limit_pages(keeper)
    big = "x" * 1500
    body = say(id="lost", comment=big)
    content = json.dumps([body] if path.endswith("batch") else body)
    statuses = {(await client.post(path, content=content.replace("lost", f"lost{i}"))).status_code for i in range(20)}
    assert 503 in statuses
    response = await client.post(path, content=content)
    assert response.status_code == 503
    assert "full" in response.json()["error"]["message"]
    assert (await client.get("/feedback/lost")).status_code == 404
    await limit_pages(keeper, 2**30)
    assert (await client.post(path, content=content)).status_code in {200, 202}
    assert (await client.get("/feedback/lost")).status_code == 200


async def limit_pages(keeper, pages=1):
    await asyncio.wrap_future(keeper._storage.writer.submit(lambda conn: conn.exec_driver_sql(f"PRAGMA max_page_count={pages}")))


class Gate:
    """A keeper that answers when it is let: what it was asked is `calls`."""

    def __init__(self):
        self.calls = []
        self.answers = asyncio.Queue()

    async def feedback(self, items):
        self.calls.append(list(items))
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def until(condition):
    while not condition():  # noqa: ASYNC110 - a turn of the loop, not a wait
        await asyncio.sleep(0)


async def test_what_arrives_meanwhile_shares_the_next_call():
    gate = Gate()
    intake = Intake(gate)
    asked = [asyncio.create_task(intake.put(name)) for name in "abcd"]
    await until(lambda: gate.calls)
    later = [asyncio.create_task(intake.put(name)) for name in "ef"]
    await asyncio.sleep(0)
    await gate.answers.put([name.upper() for name in gate.calls[0]])
    await gate.answers.put([NotFound("e"), "F"])
    assert await asyncio.gather(*asked) == ["A", "B", "C", "D"]
    with pytest.raises(NotFound):
        await later[0]
    assert await later[1] == "F"
    assert gate.calls == [["a", "b", "c", "d"], ["e", "f"]]


async def test_a_failed_call_fails_its_own_and_the_next_goes_on():
    gate = Gate()
    intake = Intake(gate)
    await gate.answers.put(StorageFailed("full"))
    with pytest.raises(StorageFailed):
        await intake.put("a")
    await gate.answers.put(["B"])
    assert await intake.put("b") == "B"


async def test_who_hangs_up_while_waiting_is_left_out():
    gate = Gate()
    intake = Intake(gate)
    first = asyncio.create_task(intake.put("a"))
    await until(lambda: gate.calls)
    gone, stays = asyncio.create_task(intake.put("gone")), asyncio.create_task(intake.put("stays"))
    await asyncio.sleep(0)
    gone.cancel()
    await gate.answers.put(["A"])
    await gate.answers.put(["S"])
    assert (await first, await stays) == ("A", "S")
    assert gate.calls[1:] == [["stays"]]


class Body:
    """A request that gives a stream's body line by line and counts what was taken of it."""

    def __init__(self, lines, error=None):
        self.lines, self.taken, self.error, self.headers = lines, 0, error, {}

    async def stream(self):
        for line in self.lines:
            self.taken += 1
            yield line
        if self.error is not None:
            raise self.error


def receipts(items):
    return [Receipt(item.id, FeedbackStatus.PENDING, item.inference_id) for item in items]


async def stream_into(gate, settings, body):
    """Answer a stream through a gate; what was sent, once it is whole."""
    sent = []

    async def send(message):
        sent.append(message.get("body", b""))

    api = FeedbackApi(gate, Keyring(settings), settings, lambda: 100.0)
    await (await api.give_stream(body))({}, None, send)
    return [json.loads(line) for line in b"".join(sent).splitlines()]


async def test_a_stream_is_read_on_while_it_is_stored_but_not_for_ever(settings):
    gate, lines = Gate(), [ndjson(say(id=f"f{i}")) for i in range(100)]
    body = Body(lines)
    streaming = asyncio.create_task(stream_into(gate, settings, body))
    await until(lambda: gate.calls)
    for _ in range(500):
        await asyncio.sleep(0)
    assert AHEAD < body.taken <= 2 * AHEAD + 1  # what is being stored, what waits, and one part in hand
    answered = 0
    while sum(map(len, gate.calls[:answered])) < len(lines):
        await until(lambda: gate.calls[answered:])  # noqa: B023 - asked at once
        await gate.answers.put(receipts(gate.calls[answered]))
        answered += 1
    said = await streaming
    assert [one["line"] for one in said] == list(range(1, 101))
    assert [one["id"] for one in said] == [f"f{i}" for i in range(100)]
    assert len(gate.calls) < 30


async def test_what_was_read_before_a_hang_up_is_stored(settings):
    gate = Gate()
    streaming = asyncio.create_task(
        stream_into(gate, settings, Body([ndjson(say(id="a")), ndjson(say(id="b"))], ClientDisconnect()))
    )
    await until(lambda: gate.calls)
    for _ in range(20):
        await asyncio.sleep(0)
    await gate.answers.put(receipts(gate.calls[0]))
    if len(gate.calls[0]) == 1:
        await until(lambda: gate.calls[1:])
        await gate.answers.put(receipts(gate.calls[1]))
    await streaming
    assert [item.id for call in gate.calls for item in call] == ["a", "b"]


async def test_an_acknowledgement_is_one_line_to_any_reader(client):
    (said,) = acknowledgements(await client.post("/feedback/stream", content=ndjson(say(id="a\u2028b"))))
    assert said["id"] == "a\u2028b"

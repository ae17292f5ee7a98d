"""The gateway in front of a true residency, over an engine whose answer depends on the adapter."""

import asyncio
import contextlib
import hashlib
import itertools

import pytest
from fakes import BASE, Client, FakeEngine, FakeKeeper, settle, state, write_version
from starlette.responses import StreamingResponse
from structlog.testing import CapturingLogger

from replay import admission
from replay.outcomes import is_failure
from replay.records import Arm
from service import exchange
from service.errors import NotReady
from service.exchange import Clock
from service.gateway import Gateway
from service.load_notes import LoadNotes
from service.residency import Residency
from service.rollout.assignment import unit_of
from service.settings import Settings

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
SETTINGS = {"lines": {"support": {"slices": {"flights": "flight"}}}}


class Hand:
    """A clock that the test turns, and what is due by it."""

    def __init__(self):
        self.at = 0.0
        self.timers = []

    def later(self, seconds, deed):
        timer = Timer(self.at + seconds, deed)
        self.timers.append(timer)
        return timer

    def turn(self, seconds):
        self.at += seconds
        for timer in [timer for timer in self.timers if timer.due <= self.at]:
            self.timers.remove(timer)
            if not timer.is_cancelled:
                timer.deed()

    @property
    def clock(self):
        return Clock(lambda: self.at, lambda: self.at, self.later)


class Timer:
    def __init__(self, due, deed):
        self.due, self.deed, self.is_cancelled = due, deed, False

    def cancel(self):
        self.is_cancelled = True


class Replica:
    def __init__(self, tmp_path, clock=None, **settings):
        versions = [write_version(tmp_path, f"support@v{n}", n, shift=n / 10) for n in (1, 2)]
        trial = {"champion": "support@v1", "candidate": "support@v2", "weight": 0.5, "salt": "s", "trial": "trial-1"}
        self.engine = FakeEngine()
        self.keeper = FakeKeeper(state(*versions, support=trial))
        held = {"base_name": BASE, "validate": lambda folder: None, "notes": LoadNotes(tmp_path / "loading")}
        self.residency = Residency(self.engine, self.keeper, "r1", **held)
        ticks = itertools.count(100)
        clock = clock or Clock(lambda: float(next(ticks)), lambda: float(next(ticks)))
        settings = Settings(data_dir=tmp_path, **(SETTINGS | settings))
        self.gateway = Gateway(self.engine, self.residency, self.keeper, settings, clock=clock)

    def client(self, body, path=CHAT, method="POST", **headers):
        return Client(self.gateway, method, path, body, **headers)

    async def ask(self, model="support@v1", text="my flight", **extra):
        return await self.client(chat(model, text, **extra)).ask()

    async def stored(self):
        await self.gateway.close()
        return self.keeper.recorded


def chat(model="support@v1", text="my flight", **extra):
    return {"model": model, "messages": [{"role": "user", "content": text}]} | extra


@pytest.fixture
async def replica(tmp_path):
    replica = Replica(tmp_path)
    await replica.residency.start()
    return replica


async def test_a_reply_is_the_engine_s_and_is_recorded(replica):
    reply = await replica.ask(user="u1", store=True)
    assert reply.status == 200
    assert (reply.json()["model"], reply.json()["choices"][0]["message"]["content"]) == ("support@v1", "support@v1 says 0.1")
    assert reply.headers["x-model-version"] == "support@v1"
    assert reply.headers["x-rollout-arm"] == "pinned"
    (said,) = await replica.stored()
    assert (said.id, said.line, said.version, said.arm) == (reply.json()["id"], "support", "support@v1", Arm.PINNED)
    assert (said.slice, said.unit, said.principal) == ("flights", unit_of("u1"), "anonymous")
    assert said.messages == ({"role": "user", "content": "my flight"},)
    assert (said.reply, said.finish_reason, said.error) == ("support@v1 says 0.1", "stop", None)
    assert (said.prompt_tokens, said.reply_tokens, said.is_trainable, said.trial) == (9, 3, True, None)
    assert (said.at, said.latency_seconds, said.ttft_seconds) == (101, 1, None)  # the gateway itself looked at 100


async def test_each_reply_in_a_trial_is_made_by_the_version_that_it_names(replica):
    for n in range(40):
        reply = await replica.client(chat("support"), x_session_id=f"s{n}").ask()
        version = reply.headers["x-model-version"]
        assert reply.json()["model"] == version
        assert reply.json()["choices"][0]["message"]["content"] == f"{version} says 0.{version[-1]}"
    stored = await replica.stored()
    assert {(said.arm, said.version, said.trial) for said in stored} == {
        (Arm.CANDIDATE, "support@v2", "trial-1"),
        (Arm.CONTROL, "support@v1", "trial-1"),
    }
    assert len({said.unit for said in stored}) == 40


async def test_requests_that_name_nobody_are_units_of_their_own_and_say_so(replica):
    for _ in range(2):
        await replica.client(chat("support")).ask()
    units = {said.unit for said in await replica.stored()}
    assert len(units) == 2
    assert all(unit.startswith("nobody-") for unit in units)


async def test_a_stream_is_tapped_and_its_usage_hidden(replica):
    reply = await replica.ask(stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert b"usage" not in reply.body
    assert reply.body.endswith(b"data: [DONE]\n\n")
    (said,) = await replica.stored()
    assert (said.reply, said.reply_tokens, said.finish_reason) == ("support@v1 says 0.1", 3, "stop")
    assert said.ttft_seconds is not None
    assert said.ttft_seconds < said.latency_seconds
    assert b"usage" in (await replica.ask(stream=True, stream_options={"include_usage": True})).body


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_reply_was_is_found_when_it_is_recorded(tmp_path, stream):
    guardrail = {"kind": "refusal", "margin": 0.1, "phrases": ["V1 says"]}
    replica = Replica(tmp_path, lines={"support": {"rollout": {"guardrails": {"refusal": guardrail}}}})
    await replica.residency.start()
    asked = {"structured_outputs": {"choice": ["support@v1 says 0.1"]}, "stream": stream}
    await replica.ask(**asked)
    await replica.ask("support@v2", **asked)
    await replica.ask(stream=stream)
    await replica.ask(BASE, stream=stream)  # no line's phrases
    await replica.ask(temperature=-1, stream=stream, response_format={"type": "json_object"})
    found = [(said.is_refusal, said.has_form) for said in await replica.stored()]
    assert found == [(True, True), (False, False), (True, None), (False, None), (None, None)]


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_are_read_and_recorded_as_chat_is(replica, stream):
    blocks = [{"type": "text", "text": "my"}, {"type": "text", "text": "flight", "cache_control": {"type": "ephemeral"}}]
    turns = [{"role": "user", "content": blocks}]
    asked = {"model": "support@v1", "max_tokens": 9, "messages": turns, "system": "be kind", "stream": stream}
    tools = {"tools": [{"name": "find", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"}}
    reply = await replica.client(asked | tools | {"metadata": {"user_id": "u1"}}, MESSAGES).ask()
    assert reply.status == 200
    assert replica.engine.bodies == [asked | tools]
    (said,) = await replica.stored()
    assert said.id.encode() in reply.body
    assert said.messages == ({"role": "system", "content": "be kind"}, *turns)
    assert (said.reply, said.finish_reason, said.error) == ("support@v1 says 0.1", "end_turn", None)
    assert (said.slice, said.unit, said.version) == ("flights", unit_of("u1"), "support@v1")
    assert (said.prompt_tokens, said.reply_tokens, said.is_refusal, said.has_form) == (len(str(blocks)), 3, False, False)
    assert (said.ttft_seconds is not None) == stream
    assert admission.refusal(said, said.reply) is None


async def test_counting_tokens_is_no_reply(replica):
    asked = {"model": "support", "messages": [{"role": "user", "content": "my flight"}]}
    reply = await replica.client(asked, f"{MESSAGES}/count_tokens").ask()
    assert (reply.status, reply.json()) == (200, {"input_tokens": 9})
    assert replica.engine.bodies[0]["model"] in {"support@v1", "support@v2"}
    assert await replica.stored() == []
    assert replica.residency.report().inflight == {}


async def test_what_a_tool_has_said_to_messages_is_recorded_and_not_learned_from(replica):
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "17:40"}]}
    await replica.client(chat() | {"messages": [result]}, MESSAGES).ask()
    (said,) = await replica.stored()
    assert (said.messages, said.reply) == ((result,), "support@v1 says 0.1")
    assert admission.refusal(said, said.reply) == "not_text"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "end"), [(CHAT, b"[DONE]"), (MESSAGES, b"message_stop")])
async def test_the_end_of_a_reply_waits_for_the_record(replica, stream, path, end):
    replica.keeper.can_write.clear()
    client = replica.client(chat(stream=stream), path)
    asking = asyncio.create_task(client.ask())
    await settle(lambda: replica.gateway._recorder._writing)
    assert end not in client.reply.body
    assert not asking.done()
    assert (b"says" in client.reply.body) == (client.reply.status == 200) == stream  # nothing is out before the first word
    replica.keeper.can_write.set()
    assert (await asking).is_whole
    assert (end in client.reply.body) == stream
    assert len(replica.keeper.recorded) == 1


async def test_in_the_background_the_record_follows(tmp_path):
    replica = Replica(tmp_path, recording={"mode": "background"})
    await replica.residency.start()
    replica.keeper.can_write.clear()
    assert (await replica.ask()).status == 200
    assert replica.keeper.recorded == []
    replica.keeper.can_write.set()
    assert len(await replica.stored()) == 1


async def test_a_client_that_hangs_up_in_a_stream_is_recorded_with_what_it_got(replica):
    client = replica.client(chat(text="wait between", stream=True))
    asking = asyncio.create_task(client.ask())
    await client.until_chunks(1)
    assert replica.residency.report().inflight == {"support@v1": 1}
    client.leave()
    await asking
    (said,) = await replica.stored()
    assert (said.error, said.reply, said.id) == ("client_disconnected", "support@v1 ", client.reply.events()[0]["id"])
    assert replica.residency.report().inflight == {}


async def test_a_request_that_the_server_cancels_is_recorded_as_left(replica):
    client = replica.client(chat(text="wait between", stream=True))
    asking = asyncio.create_task(client.ask())
    await client.until_chunks(1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert [said.error for said in await replica.stored()] == ["client_disconnected"]


async def test_what_the_engine_refuses_comes_back_as_it_says(replica):
    reply = await replica.ask(temperature=-1)
    assert (reply.status, reply.json()["error"]["message"]) == (400, "temperature")
    assert [said.error for said in await replica.stored()] == ["http_400"]


async def test_an_engine_that_fails_within_a_stream_is_recorded(replica):
    reply = await replica.ask(text="say error", stream=True)
    assert b"out of memory" in reply.body
    assert b"[DONE]" in reply.body
    assert [said.error for said in await replica.stored()] == ["engine_error"]


async def test_an_engine_that_fails_within_a_stream_of_messages_is_recorded_before_it_says_so(replica):
    replica.keeper.can_write.clear()
    client = replica.client(chat(text="say error", stream=True), MESSAGES)
    asking = asyncio.create_task(client.ask())
    await settle(lambda: replica.gateway._recorder._writing)
    assert b"out of memory" not in client.reply.body
    replica.keeper.can_write.set()
    assert b"out of memory" in (await asking).body
    assert [(said.error, said.reply) for said in replica.keeper.recorded] == [("engine_error", "support@v1 ")]


async def test_half_a_reply_of_an_engine_that_breaks_off_is_no_whole_one(replica):
    with pytest.raises(RuntimeError, match="broken off"):
        await replica.ask(text="break", stream=True)
    assert [said.error for said in await replica.stored()] == ["engine_error"]
    assert replica.residency.report().inflight == {}


async def test_an_engine_that_raises_is_answered_for(replica):
    reply = await replica.ask(text="explode")
    assert reply.status == 500
    assert [said.error for said in await replica.stored()] == ["http_500"]


async def test_replies_that_were_under_way_when_the_engine_died_say_so_and_what_comes_later_is_nobody_s_failure(replica):
    under_way = asyncio.create_task(replica.ask("support@v2", "wait between", stream=True))
    await settle(lambda: replica.engine.bodies)
    failed = await replica.ask("support@v1", "explode")
    killed = await replica.ask("support@v1", "kill")
    replica.engine.go.set()
    assert (await under_way).is_whole, "what was complete is no failure"
    late = await replica.ask("support@v2")
    assert (failed.status, killed.status, late.status) == (500, 500, 503)
    assert late.headers["retry-after"] == "1"
    assert "being replaced" in late.json()["error"]["message"]
    stored = [(said.version, said.error) for said in await replica.stored()]
    assert stored == [("support@v1", "http_500"), ("support@v1", "engine_dead"), ("support@v2", None)]
    assert is_failure("engine_dead")


async def test_half_a_reply_of_an_engine_that_dies_is_known_as_such(replica):
    with pytest.raises(RuntimeError, match="has ended"):
        await replica.ask(text="kill between", stream=True)
    assert [said.error for said in await replica.stored()] == ["engine_dead"]


async def test_who_left_before_the_engine_died_is_no_evidence(replica):
    client = replica.client(chat(text="wait"))
    asking = asyncio.create_task(client.ask())
    await settle(lambda: replica.engine.bodies)
    client.leave()
    await settle(asking.done)
    replica.engine.is_dead = True
    assert [said.error for said in await replica.stored()] == ["client_disconnected"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"[1]", 400, None),
        ({"messages": []}, 400, "model"),
        (chat("nobody"), 404, "model"),
        (chat("support@v9"), 404, "model"),
        (chat("support@v1", metadata={"slice": "not a name"}), 400, "metadata.slice"),
    ],
)
async def test_bad_requests_are_told_in_openai_s_form_and_reach_no_engine(replica, body, status, param):
    reply = await replica.client(body).ask()
    assert (reply.status, reply.json()["error"]["param"]) == (status, param)
    assert replica.engine.bodies == []
    assert await replica.stored() == []
    assert replica.residency.report().inflight == {}


async def test_an_unknown_model_is_answered_with_the_names_that_exist(replica):
    reply = await replica.ask("nobody")
    listed = await replica.client(None, "/v1/models", "GET").ask()
    names = [model["id"] for model in listed.json()["data"]]
    assert names[0] == BASE
    assert {"support", "support@champion", "support@candidate", "support@v2"} < set(names)
    assert ", ".join(names) in reply.json()["error"]["message"]
    one = await replica.client(None, "/v1/models/support", "GET").ask()
    assert (one.json()["root"], one.json()["parent"]) == ("support@v1", BASE)
    assert (await replica.client(None, "/v1/models/nobody", "GET").ask()).status == 404


async def test_a_large_body_is_refused_before_it_is_read_whole(tmp_path):
    replica = Replica(tmp_path, http={"max_body_bytes": 1024})
    await replica.residency.start()
    assert (await replica.ask(text="x" * 2000)).status == 413
    liar = await replica.client(chat(text="x" * 2000), content_length="5").ask()
    assert liar.status == 413


async def test_keys_are_asked_for(tmp_path):
    keys = {"app": {"sha256": hashlib.sha256(b"k1").hexdigest(), "scopes": ["infer"]}}
    keys["ops"] = {"sha256": hashlib.sha256(b"k2").hexdigest(), "scopes": ["admin"]}
    replica = Replica(tmp_path, keys=keys)
    await replica.residency.start()
    assert (await replica.ask()).status == 401
    assert (await replica.client(chat(), authorization="Bearer k2").ask()).status == 403
    assert (await replica.client(chat(), authorization="Bearer k1").ask()).status == 200
    assert [said.principal for said in await replica.stored()] == ["app"]


async def test_a_key_may_come_as_anthropic_s_clients_send_it_and_is_told_to_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "log", logged := CapturingLogger())
    keys = {"app": {"sha256": hashlib.sha256(b"s3cret").hexdigest(), "scopes": ["infer"]}}
    replica = Replica(tmp_path, keys=keys)
    await replica.residency.start()
    wrong = await replica.client(chat(), MESSAGES, x_api_key="s3cret2").ask()
    failed = await replica.client(chat(text="explode"), MESSAGES, x_api_key="s3cret").ask()
    right = await replica.client(chat(), MESSAGES, x_api_key="s3cret").ask()
    assert (wrong.status, failed.status, right.status) == (401, 500, 200)
    assert (wrong.json()["type"], wrong.json()["error"]["type"]) == ("error", "authentication_error")
    assert [call.args for call in logged.calls] == [("engine_failed",)]
    assert "s3cret" not in f"{logged.calls} {wrong.body} {failed.body} {right.body}"
    assert [said.principal for said in await replica.stored()] == ["app", "app"]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter/", "/pause", "/v1"])
async def test_nothing_of_the_engine_s_is_reachable_that_changes_it(replica, path):
    reply = await replica.client({"model": BASE, "lora_name": "x", "lora_path": "/"}, path).ask()
    assert reply.status == 404
    assert replica.engine.bodies == []


async def test_a_client_cannot_choose_a_reply_s_id(replica):
    replies = [await replica.client(chat(request_id="mine"), x_request_id="mine").ask() for _ in range(2)]
    assert len({reply.json()["id"] for reply in replies}) == 2
    assert len({said.id for said in await replica.stored()}) == 2


async def test_our_extras_do_not_reach_the_engine(replica):
    reply = await replica.client(chat(metadata={"slice": "vip"}, store=False, seed=3), x_request_id="mine").ask()
    assert reply.status == 200
    assert replica.engine.bodies == [chat(seed=3)]
    assert "x-request-id" not in replica.engine.headers[0]
    (said,) = await replica.stored()
    assert (said.slice, said.is_trainable) == ("vip", False)


async def test_text_completions_are_recorded_as_messages(replica):
    reply = await replica.client({"model": BASE, "prompt": "once upon"}, "/v1/completions").ask()
    assert reply.json()["model"] == BASE
    (said,) = await replica.stored()
    assert (said.line, said.version, said.arm, said.reply) == ("", BASE, Arm.BASE, f"{BASE} says 0")
    assert said.messages == ({"role": "user", "content": "once upon"},)


async def test_a_keeper_that_starts_again_costs_no_reply(tmp_path):
    replica = Replica(tmp_path)
    await replica.residency.start()
    replica.gateway._recorder._pause = lambda _: asyncio.sleep(0)
    replica.keeper.troubles = [NotReady("the keeper is starting"), NotReady("the keeper is starting")]
    assert (await replica.ask()).status == 200
    assert len(replica.keeper.recorded) == 1


async def test_a_websocket_is_closed(replica):
    sent = []

    async def send(message):
        sent.append(message)

    await replica.gateway({"type": "websocket", "path": "/v1/realtime"}, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.fixture
def hand():
    return Hand()


@pytest.fixture
async def waiting(tmp_path, hand):
    """A replica by a clock that the test turns."""
    replica = Replica(tmp_path, hand.clock)
    await replica.residency.start()
    return replica


@contextlib.asynccontextmanager
async def asked(replica, text="wait", **extra):
    """A client, while its question is at the engine."""
    client = replica.client(chat(text=text, **extra))
    asking = asyncio.create_task(client.ask())
    await settle(lambda: replica.engine.bodies)
    yield client
    await asking


@pytest.mark.parametrize(("stream", "seconds", "name"), [(True, 60, "first_token_seconds"), (False, 600, "whole_reply_seconds")])
async def test_a_reply_that_does_not_come_is_ended_and_counts_as_failed(waiting, hand, stream, seconds, name):
    async with asked(waiting, stream=stream) as client:
        hand.turn(seconds - 1)
        hand.turn(1)
    assert (client.reply.status, client.reply.json()["error"]["code"]) == (504, "reply_timeout")
    assert f"engine.{name}, {seconds} s" in client.reply.json()["error"]["message"]
    assert waiting.residency.report().inflight == {}
    (said,) = await waiting.stored()
    assert (said.error, said.reply, said.latency_seconds) == ("timeout", "", seconds)
    assert is_failure(said.error)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_so_is_a_stream_that_hangs_before_its_first_word_as_vllm_s_do(waiting, hand, spec_version):
    is_asked = asyncio.Event()

    async def hangs(scope, receive, send):
        async def words():
            is_asked.set()
            await asyncio.Event().wait()
            yield b""

        await StreamingResponse(words(), media_type="text/event-stream")(scope, receive, send)

    waiting.gateway._app = hangs
    client = waiting.client(chat(stream=True))
    client._scope["asgi"]["spec_version"] = spec_version
    asking = asyncio.create_task(client.ask())
    await is_asked.wait()
    hand.turn(60)
    assert (await asking).status == 504
    assert [said.error for said in await waiting.stored()] == ["timeout"]


async def test_a_stream_that_has_begun_may_take_its_time(waiting, hand):
    async with asked(waiting, "wait between", stream=True) as client:
        await client.until_chunks(1)
        hand.turn(1000)
        waiting.engine.go.set()
    assert client.reply.is_whole
    assert [said.error for said in await waiting.stored()] == [None]


async def test_zero_is_no_deadline(tmp_path, hand):
    replica = Replica(tmp_path, hand.clock, engine={"first_token_seconds": 0, "whole_reply_seconds": 0})
    await replica.residency.start()
    for stream in (True, False):
        async with asked(replica, stream=stream) as client:
            hand.turn(1e6)
            replica.engine.go.set()
        assert client.reply.status == 200
    assert hand.timers == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("seconds", "error"), [(9.9, "client_disconnected"), (10, "timeout")])
async def test_a_client_that_leaves_without_a_token_was_failed_if_it_was_patient(waiting, hand, stream, seconds, error):
    async with asked(waiting, stream=stream) as client:
        hand.turn(seconds)
        client.leave()
    (said,) = await waiting.stored()
    assert (said.error, is_failure(said.error)) == (error, error == "timeout")


async def test_so_it_is_when_the_server_cancels_for_it(waiting, hand):
    client = waiting.client(chat(text="wait"))
    asking = asyncio.create_task(client.ask())
    await settle(lambda: waiting.engine.bodies)
    hand.turn(10)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert [said.error for said in await waiting.stored()] == ["timeout"]


async def test_a_client_that_leaves_while_tokens_flow_was_not_failed(waiting, hand):
    async with asked(waiting, "wait between", stream=True) as client:
        await client.until_chunks(1)
        hand.turn(100)
        client.leave()
    assert [said.error for said in await waiting.stored()] == ["client_disconnected"]


async def test_without_patience_a_client_that_leaves_never_counts(tmp_path, hand):
    replica = Replica(tmp_path, hand.clock, engine={"patience_seconds": 0})
    await replica.residency.start()
    async with asked(replica) as client:
        hand.turn(500)
        client.leave()
    assert [said.error for said in await replica.stored()] == ["client_disconnected"]


async def test_a_reply_that_announced_itself_and_does_not_come_is_broken_off(waiting, hand):
    async def announces(_, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        created = b'data: {"type": "response.created", "response": {"object": "response", "status": "in_progress"}}\n\n'
        await send({"type": "http.response.body", "body": created, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting.gateway._app = announces
    client = waiting.client({"model": "support@v1", "input": "hi", "stream": True}, "/v1/responses")
    asking = asyncio.create_task(client.ask())
    await client.until_chunks(1)
    hand.turn(60)
    with pytest.raises(TimeoutError, match="first_token_seconds"):
        await asking
    assert not client.reply.is_whole
    assert [said.error for said in await waiting.stored()] == ["timeout"]

"""What vLLM makes of a chat's reply for Anthropic's clients, as the tap reads it; no engine is started."""

import json

import pytest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

from service.form import Call
from service.tap import Tap

BEGUN = {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}
ENDED = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}}
CALL = {"id": "call-1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Oslo"}'}}


def chunk(*choices, usage=BEGUN):
    said = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "support@v1"}
    return f"data: {json.dumps(said | {'choices': list(choices), 'usage': usage})}\n\n"


def said(finish=None, **delta):
    return chunk({"index": 0, "delta": delta, "finish_reason": finish})


async def streamed(*chunks):
    """The tap when each event has come, one after the other."""

    async def chat():
        for one in (said(role="assistant", content=""), *chunks):
            yield one

    tap = Tap()
    tap.start(200, "text/event-stream; charset=utf-8")
    async for event in AnthropicServingMessages.message_stream_converter(None, chat()):
        assert not tap.is_over
        assert tap.feed(event.encode(), is_last=False) == event.encode()
        yield tap


def whole(finish, **message):
    reply = {"id": "chatcmpl-1", "created": 1, "model": "support@v1", "usage": ENDED}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    told = ChatCompletionResponse.model_validate(reply | {"choices": [choice]})
    made = AnthropicServingMessages.messages_full_converter(None, told)
    tap = Tap()
    tap.start(200, "application/json")
    tap.feed(json.dumps(made.model_dump(exclude_none=True)).encode(), is_last=True)
    return tap


@pytest.mark.parametrize(("finish", "told"), [("stop", "end_turn"), ("length", "max_tokens")])
async def test_text(finish, told):
    chunks = (said(reasoning="hm"), said(content="héllo"), said(finish, content=" there"))
    *_, pieces = [tap async for tap in streamed(*chunks, chunk(usage=ENDED), "data: [DONE]\n\n")]
    for tap in (pieces, whole(finish, reasoning="hm", content="héllo there")):
        assert (tap.id, tap.text, tap.calls, tap.finish_reason, tap.error) == ("chatcmpl-1", "héllo there", [], told, None)
        assert (tap.prompt_tokens, tap.reply_tokens, tap.is_over) == (9, 3, True)


async def test_tool_calls():
    start = {"index": 0, **CALL, "function": {"name": "find", "arguments": '{"city"'}}
    rest = {"index": 0, "function": {"arguments": ': "Oslo"}'}}
    chunks = (said(content="Wait."), said(tool_calls=[start]), said("tool_calls", tool_calls=[rest]))
    *_, pieces = [tap async for tap in streamed(*chunks, chunk(usage=ENDED), "data: [DONE]\n\n")]
    for tap in (pieces, whole("tool_calls", content="Wait.", tool_calls=[CALL])):
        assert (tap.words, tap.calls, tap.finish_reason) == ("Wait.", [Call("find", '{"city": "Oslo"}')], "tool_use")


async def test_a_stream_begins_with_a_token_and_ends_with_an_error():
    found = [(tap.has_token, tap.text, tap.error) async for tap in streamed(said(content="a"), 'data: {"error": {}}\n\n')]
    assert found == [(True, "", None), (True, "", None), (True, "a", None), (True, "a", "engine_error")]

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.form import Call
from service.tap import Tap


def sse(*said):
    return b"".join(b"data: " + (one.encode() if isinstance(one, str) else json.dumps(one).encode()) + b"\n\n" for one in said)


def chunk(finish=None, **delta):
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
STREAM = sse(chunk(role="assistant"), chunk(content="héllo"), chunk(content=" there", finish="stop"), USAGE, "[DONE]")


def stream(data, cuts=(), *, hides_usage=True):
    tap = Tap(hides_usage=hides_usage)
    tap.start(200, "text/event-stream; charset=utf-8")
    edges = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    passed = [tap.feed(data[a:b], is_last=False) for a, b in itertools.pairwise(edges)]
    return tap, b"".join(passed)


@given(st.lists(st.integers(0, 10_000), max_size=8), st.booleans())
def test_a_stream_reads_the_same_wherever_it_is_cut(cuts, hides_usage):
    tap, passed = stream(STREAM, cuts, hides_usage=hides_usage)
    assert (tap.id, tap.text, tap.finish_reason, tap.error) == ("chatcmpl-1", "héllo there", "stop", None)
    assert (tap.prompt_tokens, tap.reply_tokens, tap.is_over) == (5, 2, True)
    assert passed == (STREAM.replace(sse(USAGE), b"") if hides_usage else STREAM)


def test_a_stream_is_over_only_at_its_end():
    tap, _ = stream(sse(chunk(role="assistant")))
    assert not tap.has_streamed_text
    assert tap.feed(sse(chunk(content="a", finish="stop")), is_last=False)
    assert tap.has_streamed_text
    assert not tap.is_over
    tap.feed(sse("[DONE]"), is_last=False)
    assert tap.is_over


def test_usage_beside_text_is_not_hidden():
    both = chunk(content="a") | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert stream(sse(both))[1] == sse(both)


def test_what_breaks_off_passes_and_is_an_error():
    data = sse(chunk(content="a"), {"error": {"message": "out of memory"}}, "[DONE]")
    tap, passed = stream(data)
    assert (tap.text, tap.error, passed) == ("a", "engine_error", data)


def test_other_choices_and_what_is_no_json_pass_unread():
    data = b": alive\n\n" + sse({"choices": [{"index": 1, "delta": {"content": "b"}}]}, "nonsense", "[]", chunk(content="a"))
    tap, passed = stream(data)
    assert (tap.text, passed) == ("a", data)


def test_half_an_event_at_the_end_is_passed_on():
    tap, passed = stream(sse(chunk(content="a")) + b"data: {")
    assert passed + tap.feed(b"", is_last=True) == sse(chunk(content="a")) + b"data: {"
    assert tap.is_over


def whole(said, status=200):
    tap = Tap()
    tap.start(status, "application/json")
    body = json.dumps(said).encode()
    assert tap.feed(body[:7], is_last=False) + tap.feed(body[7:], is_last=True) == body
    assert tap.is_over
    assert not tap.has_streamed_text
    return tap


def test_a_whole_chat_reply():
    message = {"role": "assistant", "content": "a"}
    choices = [{"index": 0, "message": message, "finish_reason": "length"}, {"index": 1, "message": message}]
    tap = whole({"id": "chatcmpl-2", "choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    assert (tap.id, tap.text, tap.finish_reason) == ("chatcmpl-2", "a", "length")
    assert (tap.prompt_tokens, tap.reply_tokens) == (3, 1)


def test_a_whole_completion():
    assert whole({"id": "cmpl-1", "choices": [{"index": 0, "text": "abc", "finish_reason": "stop"}]}).text == "abc"


def test_a_refusal():
    assert whole({"error": {"message": "no"}}, status=400).error == "http_400"


def test_tool_calls_are_kept_whole_and_in_pieces():
    calls = [{"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    once = whole({"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
    pieces, _ = stream(
        sse(
            chunk(tool_calls=[{"index": 0, "id": "1", "function": {"name": "find", "arguments": ""}}]),
            chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}]),
            chunk(tool_calls=[{"index": 0, "function": {"arguments": " 1}"}}], finish="tool_calls"),
        )
    )
    assert once.text == pieces.text == json.dumps([{"name": "find", "arguments": '{"a": 1}'}])
    assert pieces.has_streamed_text


@pytest.mark.parametrize(("kind", "finish"), [("completed", "completed"), ("incomplete", "incomplete")])
def test_responses_are_read_whole_and_in_pieces(kind, finish):
    output = [{"type": "reasoning", "content": None}, {"type": "message", "content": [{"type": "output_text", "text": "abc"}]}]
    usage = {"input_tokens": 4, "output_tokens": 3}
    response = {"id": "resp_1", "object": "response", "status": kind, "output": output, "usage": usage}
    begun = response | {"status": "in_progress", "output": [], "usage": None}
    pieces, passed = stream(
        data := sse(
            {"type": "response.created", "response": begun},
            {"type": "response.output_text.delta", "delta": "ab"},
            {"type": "response.output_text.delta", "delta": "c"},
            {"type": f"response.{kind}", "response": response},
        )
    )
    assert passed == data
    assert pieces.is_over
    assert pieces.has_streamed_text
    for tap in (pieces, whole(response)):
        assert (tap.id, tap.text, tap.finish_reason, tap.error) == ("resp_1", "abc", finish, None)
        assert (tap.prompt_tokens, tap.reply_tokens) == (4, 3)


def test_the_tool_calls_of_responses_are_read_whole_and_in_pieces():
    call = {"type": "function_call", "name": "find", "arguments": '{"a": 1}'}
    response = {"id": "resp_1", "object": "response", "status": "completed", "output": [{"type": "reasoning"}, call]}
    pieces, _ = stream(
        sse(
            {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": '{"a"'},
            {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": ": 1}"},
            {"type": "response.completed", "response": response},
        )
    )
    assert pieces.has_streamed_text
    for tap in (pieces, whole(response)):
        assert tap.calls == [Call("find", '{"a": 1}')]
        assert (tap.words, tap.text) == ("", json.dumps([{"name": "find", "arguments": '{"a": 1}'}]))
        assert tap.finish_reason == "tool_calls", "completed, but no words to learn from"


def events(*said):
    """As vLLM has them on `/v1/messages`."""
    return b"".join(f"event: {one['type']}\ndata: {json.dumps(one, ensure_ascii=False)}\n\n".encode() for one in said)


def started(place, **block):
    return {"type": "content_block_start", "content_block": block, "index": place}


def piece(place, **delta):
    return {"type": "content_block_delta", "delta": delta, "index": place}


def stopped(place):
    return {"type": "content_block_stop", "index": place}


def ending(reason="end_turn", **usage):
    told = {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}}
    return told | {"usage": {"input_tokens": 9, "output_tokens": 3} | usage}


MESSAGE = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "model": "support@v1"}
START = {
    "type": "message_start",
    "message": MESSAGE
    | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 0}},
}
MESSAGES = events(
    START,
    started(0, type="thinking", thinking=""),
    piece(0, type="thinking_delta", thinking="hm"),
    piece(0, type="signature_delta", signature="4847bf13"),
    stopped(0),
    {"type": "ping"},
    started(1, type="text", text=""),
    piece(1, type="text_delta", text="héllo"),
    piece(1, type="text_delta", text=" there"),
    stopped(1),
    ending(input_tokens=5, cache_read_input_tokens=4),
    {"type": "message_stop"},
)


@given(st.lists(st.integers(0, 10_000), max_size=8))
def test_a_stream_of_messages_reads_the_same_wherever_it_is_cut(cuts):
    tap, passed = stream(MESSAGES, cuts, hides_usage=False)
    assert (tap.id, tap.text, tap.finish_reason, tap.error) == ("chatcmpl-1", "héllo there", "end_turn", None)
    assert (tap.prompt_tokens, tap.reply_tokens, tap.is_over, passed) == (9, 3, True, MESSAGES)


def test_a_stream_of_messages_is_over_at_its_stop():
    head, stop = events(START, started(0, type="text", text="")), events({"type": "message_stop"})
    tap, _ = stream(head)
    assert (tap.has_token, tap.has_streamed_text, tap.prompt_tokens) == (True, False, 9)
    tap.feed(events(piece(0, type="text_delta", text="a"), stopped(0), ending("max_tokens")), is_last=False)
    assert (tap.has_streamed_text, tap.finish_reason, tap.is_over) == (True, "max_tokens", False)
    assert tap.feed(stop, is_last=False) == stop
    assert tap.is_over


def test_a_whole_message():
    content = [{"type": "thinking", "thinking": "hm", "signature": "71ab"}, *({"type": "text", "text": one} for one in "ab")]
    usage = {"input_tokens": 5, "output_tokens": 3, "cache_read_input_tokens": 4, "cache_creation_input_tokens": None}
    tap = whole(MESSAGE | {"content": content, "stop_reason": "stop_sequence", "stop_sequence": "\n", "usage": usage})
    assert (tap.id, tap.text, tap.finish_reason, tap.error) == ("chatcmpl-1", "ab", "stop_sequence", None)
    assert (tap.prompt_tokens, tap.reply_tokens, tap.calls) == (9, 3, [])
    assert whole(MESSAGE | {"content": [{"type": "text", "text": ""}], "stop_reason": "max_tokens"}).text == ""


@pytest.mark.parametrize("words", ["", "Wait."])
def test_the_tool_calls_of_messages_are_read_whole_and_in_pieces(words):
    find = {"type": "tool_use", "id": "call-1", "name": "find"}
    now = {"type": "tool_use", "id": "call-2", "name": "now", "input": {}}
    content = [{"type": "text", "text": words}, find | {"input": {"city": "Tromsø"}}, now]
    pieces, _ = stream(
        events(
            START,
            started(0, type="text", text=""),
            piece(0, type="text_delta", text=words),
            stopped(0),
            started(1, **find, input={}),
            piece(1, type="input_json_delta", partial_json='{"city"'),
            piece(1, type="input_json_delta", partial_json=': "Tromsø"}'),
            stopped(1),
            started(2, **now),
            stopped(2),
            ending("tool_use"),
            {"type": "message_stop"},
        )
    )
    assert pieces.has_streamed_text
    for tap in (pieces, whole(MESSAGE | {"content": content, "stop_reason": "tool_use"})):
        assert tap.calls == [Call("find", '{"city": "Tromsø"}'), Call("now", "{}")]
        assert (tap.words, tap.finish_reason) == (words, "tool_use")
        assert tap.text == words or json.loads(tap.text)[0] == {"name": "find", "arguments": '{"city": "Tromsø"}'}


def test_a_stream_of_messages_that_fails_ends_with_its_error():
    data = events(
        START,
        started(0, type="text", text=""),
        piece(0, type="text_delta", text="a"),
        {"type": "error", "error": {"type": "internal_error", "message": "out of memory"}},
    )
    tap, passed = stream(data)
    assert (tap.text, tap.error, tap.is_over, passed) == ("a", "engine_error", True, data)


def test_an_error_event_that_is_told_flat_is_an_error_too():
    tap, _ = stream(sse({"type": "error", "code": "server_error", "message": "out of memory"}))
    assert (tap.error, tap.is_over) == ("engine_error", True)


def test_what_messages_refuse():
    assert whole({"type": "error", "error": {"type": "BadRequestError", "message": "no"}}, status=400).error == "http_400"


@pytest.mark.parametrize("refusal", ["I can't.", None])
def test_the_engine_s_own_word_for_a_refusal_is_heard(refusal):
    message = {"role": "assistant", "content": None, "refusal": refusal}
    once = whole({"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    pieces, _ = stream(sse(chunk(refusal=refusal), chunk(finish="stop"), "[DONE]"))
    part = {"type": "refusal", "refusal": refusal}
    output = [{"type": "message", "content": [part]}]
    response = whole({"id": "resp_1", "object": "response", "status": "completed", "output": output})
    assert once.has_declined is pieces.has_declined is response.has_declined is (refusal is not None)


def test_a_failed_response_is_an_error():
    assert whole({"id": "resp_1", "object": "response", "status": "failed", "output": []}).error == "engine_error"


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices": [{"index": 0, "delta": {"content": "word"}}]}',
        b'data:{"choices": [{"index": 0, "delta": {"content": "word"}}]}',
        b'data: {"choices":\r\ndata: [{"index": 0, "delta": {"content": "word"}}]}',
        b'id: 7\ndata: {"choices": [{"index": 0, "delta": {"content": "word"}}]}\r',
    ],
)
def test_events_are_read_in_every_form_that_they_may_have(event):
    tap, passed = stream(event + b"\n\n")
    assert (tap.text, passed) == ("word", event + b"\n\n")


def test_half_a_surrogate_pair_is_no_reason_to_lose_a_piece():
    tap, _ = stream(b'data: {"choices": [{"index": 0, "delta": {"content": "a\\ud800b"}}]}\n\n' + sse("[DONE]"))
    assert tap.text == "a\ud800b"


@pytest.mark.parametrize(
    ("said", "has_begun"),
    [
        (b": keep-alive\n\n", False),
        (sse({"type": "response.created", "response": {"object": "response", "status": "in_progress", "output": []}}), False),
        (sse({"type": "response.in_progress", "response": {"object": "response", "status": "in_progress"}}), False),
        (sse({"type": "response.output_item.added", "item": {"type": "reasoning"}}), True),
        (sse(chunk(role="assistant", content="")), True),  # vLLM says it with the first token
        (sse(chunk(reasoning_content="hm")), True),  # which need not be text
        (sse({"error": {"message": "out of memory"}}), False),
        (events({"type": "ping"}), False),
        (events({"type": "error", "error": {"type": "internal_error", "message": "out of memory"}}), False),
        (events(START), True),  # made of chat's first piece
        (events(started(0, type="thinking", thinking="")), True),
    ],
)
def test_it_knows_when_the_engine_has_begun(said, has_begun):
    tap, _ = stream(said)
    assert (tap.has_token, tap.text) == (has_begun, "")

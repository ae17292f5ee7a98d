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
    ],
)
def test_it_knows_when_the_engine_has_begun(said, has_begun):
    tap, _ = stream(said)
    assert (tap.has_token, tap.text) == (has_begun, "")

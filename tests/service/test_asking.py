import json
import re

import pytest

from service.asking import messages_of, parse, rewritten, slice_of, sticky_key
from service.errors import InvalidRequest

CHAT = "/v1/chat/completions"
BLOCKS = [
    {"type": "text", "text": "x-anthropic-billing-header: cch=1f3a;"},
    {"type": "text", "text": "be kind. ", "cache_control": {"type": "ephemeral"}},
    {"type": "text", "text": "be short."},
]


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[]", b"1", b'{"model": 3}', b"{}", b"[" * 100_000])
def test_what_is_not_an_object_with_a_model_is_refused(raw):
    with pytest.raises(InvalidRequest):
        parse(raw)


def test_only_what_is_ours_is_taken_out():
    body = {
        "model": "support",
        "messages": [user("a")],
        "store": False,
        "metadata": {"slice": "x"},
        "request_id": "mine",
        "seed": 1,
    }
    passed, hides_usage = rewritten(body, CHAT, "support@v2")
    assert json.loads(passed) == {"model": "support@v2", "messages": [user("a")], "seed": 1}
    assert not hides_usage


@pytest.mark.parametrize(
    ("path", "extra", "hides", "options"),
    [
        (CHAT, {"stream": True}, True, {"include_usage": True}),
        (CHAT, {"stream": True, "stream_options": None}, True, {"include_usage": True}),
        (CHAT, {"stream": True, "stream_options": {"a": 1}}, True, {"a": 1, "include_usage": True}),
        (CHAT, {"stream": True, "stream_options": {"include_usage": True}}, False, {"include_usage": True}),
        (CHAT, {"stream": True, "stream_options": "wrong"}, False, "wrong"),
        (CHAT, {"stream": "yes"}, False, None),
        ("/v1/responses", {"stream": True}, False, None),
    ],
)
def test_a_stream_s_usage_is_asked_for(path, extra, hides, options):
    passed, hides_usage = rewritten({"model": "support"} | extra, path, "v")
    assert (hides_usage, json.loads(passed).get("stream_options")) == (hides, options)


def test_half_a_character_is_passed_on_as_it_came():
    raw = b'{"model": "support", "prompt": "\\ud800"}'
    assert json.loads(rewritten(parse(raw), "/v1/completions", "v")[0])["prompt"] == "\ud800"


def test_the_key_is_the_session_else_the_user_else_the_request():
    assert sticky_key({"user": "u"}, "s", "r") == "s"
    assert sticky_key({"user": "u"}, None, "r") == "u"
    assert sticky_key({"user": 5}, None, "r") == sticky_key({}, "", "r") == "nobody-r"
    sticky_key({"user": "\ud800"}, None, "r").encode()


def test_anthropic_s_clients_name_the_user_in_the_metadata():
    named = {"metadata": {"user_id": "m", "slice": "vip"}}
    assert sticky_key(named, None, "r") == "m"
    assert sticky_key(named | {"user": "u"}, None, "r") == "u"
    assert sticky_key(named, "s", "r") == "s"
    assert {sticky_key({"metadata": told}, None, "r") for told in ("m", None, {}, {"user_id": 5})} == {"nobody-r"}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"messages": [user("a"), user("b")]}, (user("a"), user("b"))),
        ({"messages": "a"}, (user("a"),)),
        ({"messages": ["a"]}, ()),
        ({"messages": None}, ()),
        ({"prompt": "a"}, (user("a"),)),
        ({"prompt": ["a"]}, (user("a"),)),
        ({"prompt": [1, 2]}, ()),
        ({"input": "a", "instructions": "be kind"}, ({"role": "system", "content": "be kind"}, user("a"))),
        ({"input": [user("a")]}, (user("a"),)),
        ({"input": [1, 2], "instructions": "be kind"}, ()),
        ({"messages": [user("a")], "system": "be kind"}, ({"role": "system", "content": "be kind"}, user("a"))),
        ({"messages": [user("a")], "system": ""}, (user("a"),)),
        ({"messages": [user("a")], "system": BLOCKS}, ({"role": "system", "content": "be kind. be short."}, user("a"))),
        ({"messages": [user("a")], "system": BLOCKS[:1]}, (user("a"),)),
        ({"messages": [user("a")], "system": 5}, (user("a"),)),
        ({"messages": ["a"], "system": "be kind"}, ()),
        ({"messages": [user(BLOCKS[1:])]}, (user(BLOCKS[1:]),)),
    ],
)
def test_every_prompt_is_messages(body, messages):
    assert messages_of(body) == messages


def test_a_slice_is_named_or_found():
    patterns = {"flights": re.compile("(?i)flight"), "rest": re.compile(".")}
    body = {
        "messages": [user("my flight"), {"role": "assistant", "content": "?"}, user([{"type": "text", "text": "the FLIGHT"}])]
    }
    assert slice_of(body, None, patterns) == "flights"
    assert slice_of(body | {"metadata": {"slice": "vip"}}, None, patterns) == "vip"
    assert slice_of(body | {"metadata": {"slice": "vip"}}, "header", patterns) == "header"
    assert slice_of({"messages": [user("hello")]}, None, patterns) == "rest"
    assert slice_of({"messages": [user("")]}, None, patterns) == "default"
    result = user([{"type": "tool_result", "tool_use_id": "1", "content": "17:40"}])
    assert slice_of({"messages": [*body["messages"], result]}, None, patterns) == "flights"
    assert slice_of(body, None, {}) == "default"


@pytest.mark.parametrize("named", ["", "a b", 5, "x" * 65, "ü"])
def test_a_slice_has_a_plain_name(named):
    with pytest.raises(InvalidRequest) as caught:
        slice_of({"metadata": {"slice": named}}, None, {})
    assert caught.value.param == "metadata.slice"

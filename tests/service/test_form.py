"""Which form is asked for, and whether the reply has it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from service.form import Call, asked, fits, has

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
BY_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}}
AN_OBJECT = {"response_format": {"type": "json_object"}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": CITY}}, {"type": "web_search"}, None]
ANTHROPIC_S = [{"name": "find", "input_schema": CITY}, {"type": "web_search_20250305", "name": "web_search"}, None]


def found(body, text="", calls=(), finish="stop", path=CHAT):
    return has(asked(body, path), text, calls, finish)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"tools": []},
        {"text": {}},
        {"output_config": {"effort": "low"}},
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
def test_who_asks_for_no_form_loses_nothing(body, path):
    assert found(body, "no JSON {", finish="length", path=path) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"a": 1}', True),
        (' {"a": 1}\n', True),
        ("[1]", False),
        ('{"a": 1', False),
        ('```json\n{"a": 1}\n```', False),
        ("", False),
        ('{"a": NaN}', False),
        ("Sorry", False),
    ],
)
def test_a_json_object(text, kept):
    assert found(AN_OBJECT, text) is found(AN_OBJECT, text, path=COMPLETIONS) is kept
    assert found({"structured_outputs": {"json_object": True}}, text) is kept
    assert found({"text": {"format": {"type": "json_object"}}}, text, path=RESPONSES) is kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [('{"city": "Oslo"}', True), ('{"city": 3}', False), ("{}", False), ('{"city": "Oslo", "sea": 1}', False), ("3", False)],
)
def test_a_schema_on_each_surface(text, kept):
    assert found(BY_SCHEMA, text) is found(BY_SCHEMA, text, path=COMPLETIONS) is kept
    assert found({"structured_outputs": {"json": CITY}}, text) is kept
    assert found({"structured_outputs": {"json": json.dumps(CITY)}}, text) is kept
    assert found({"text": {"format": {"type": "json_schema", "name": "city", "schema": CITY}}}, text, path=RESPONSES) is kept
    assert found({"output_config": {"format": {"type": "json_schema", "schema": CITY}}}, text, path=MESSAGES) is kept


@pytest.mark.parametrize("finish", ["length", "incomplete", "max_tokens"])
def test_what_is_cut_off_has_no_form_even_where_it_happens_to_be_json(finish):
    assert found(AN_OBJECT, "{}", finish=finish) is False
    assert found({"structured_outputs": {"regex": "a+"}}, "aaa", finish=finish) is False
    assert found({"structured_outputs": {"regex": "a+"}}, "aaa") is True


def test_choices():
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert found(body, "yes") is True
    assert found(body, "yes!") is False


@pytest.mark.parametrize(("arguments", "kept"), [('{"city": "Oslo"}', True), ('{"city": ', False), ("{}", False), ("", False)])
def test_the_arguments_of_tool_calls(arguments, kept):
    calls = [Call("find", '{"city": "Rome"}'), Call("find", arguments)]
    assert found({"tools": TOOLS}, calls=calls) is kept
    flat = [{"type": "function", "name": "find", "parameters": CITY}]
    assert found({"tools": flat}, calls=calls, path=RESPONSES) is kept
    assert found({"tools": ANTHROPIC_S}, calls=calls, path=MESSAGES) is kept
    assert found({"tools": TOOLS}, calls=[Call("unknown", '{"x": 1}')]) is True


def test_a_tool_that_need_not_be_called_and_one_that_must():
    assert found({"tools": TOOLS}, "It rains.") is None
    assert found({"tools": TOOLS, "tool_choice": "required"}, "It rains.") is False
    named = {"type": "function", "function": {"name": "find"}}
    assert found({"tools": TOOLS, "tool_choice": named}, "It rains.") is False
    assert found({"tools": TOOLS, "tool_choice": "none"}, "It rains.") is None
    assert found({"tools": TOOLS, **AN_OBJECT}, "{}") is True


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (None, None),
        ({"type": "auto"}, None),
        ({"type": "none"}, None),
        ({"type": "any"}, False),
        ({"type": "tool", "name": "find"}, False),
    ],
)
def test_a_tool_that_must_be_called_as_messages_say_it(choice, kept):
    body = {"tools": ANTHROPIC_S, "tool_choice": choice}
    assert found(body, "It rains.", finish="end_turn", path=MESSAGES) is kept
    assert found(body, calls=[Call("find", '{"city": "Oslo"}')], finish="max_tokens", path=MESSAGES) is not True


def test_other_surfaces_are_not_read():
    assert found(AN_OBJECT, "no JSON", path=MESSAGES) is None
    assert found(AN_OBJECT, "no JSON", path="/v1/embeddings") is None
    assert found(AN_OBJECT, "{}", path=f"{CHAT}/") is True


class Bag(BaseModel):
    tag: str
    kilos: int | None = None


class Trip(BaseModel):
    bags: list[Bag]
    first: Bag


def test_references_within_a_schema_are_followed():
    schema = Trip.model_json_schema()
    assert "$defs" in schema
    assert fits({"bags": [{"tag": "a"}], "first": {"tag": "b", "kilos": 3}}, schema)
    assert not fits({"bags": [{"tag": 3}], "first": {"tag": "b"}}, schema)
    assert not fits({"bags": [], "first": {}}, schema)


@pytest.mark.parametrize(
    ("value", "schema", "kept"),
    [
        (1, {"type": "integer"}, True),
        (1.0, {"type": "integer"}, True),
        (1.5, {"type": "integer"}, False),
        (True, {"type": "integer"}, False),
        (True, {"type": "number"}, False),
        (True, {"type": "boolean"}, True),
        (None, {"type": ["string", "null"]}, True),
        (1, {"type": ["string", "null"]}, False),
        ("a", {"enum": ["a", "b"]}, True),
        ("c", {"enum": ["a", "b"]}, False),
        ("c", {"const": "a"}, False),
        ([1, "a"], {"items": {"type": "integer"}}, False),
        ([1, "a"], {"prefixItems": [{}, {}], "items": False}, True),
        ({"x1": 1}, {"patternProperties": {"^x": {}}, "additionalProperties": False}, True),
        (1, {"$ref": "https://example.com/schema.json"}, True),  # nothing is fetched
        (1, {"$ref": "#/$defs/nobody"}, True),
        (1, False, False),
    ],
)
def test_what_of_a_schema_is_compared(value, schema, kept):
    assert fits(value, schema) is kept


def test_a_schema_that_never_ends_or_would_take_for_ever_ends():
    assert fits([[[1]]], {"type": "array", "items": {"$ref": "#"}}) is False
    assert fits(1, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})
    doubling = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(64)}
    assert fits(1, {"$ref": "#/$defs/a0", "$defs": doubling})


WORDS = [
    "type",
    "json_schema",
    "schema",
    "format",
    "function",
    "name",
    "parameters",
    "input_schema",
    "any",
    "none",
    "json",
    "choice",
    "$ref",
    "enum",
    "const",
    "properties",
    "required",
    "items",
    "json_object",
    "object",
    "array",
    "f",
    "#",
    "#/properties",
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["response_format", "structured_outputs", "tools", "tool_choice", "text", "output_config"])


@given(st.dictionaries(KEYS, ANYTHING), st.sampled_from([CHAT, RESPONSES, MESSAGES]), ANYTHING.map(json.dumps), st.booleans())
def test_whatever_is_asked_nothing_is_raised(body, path, text, calls):
    assert found(body, text, [Call("f", text)] if calls else (), path=path) in {True, False, None}

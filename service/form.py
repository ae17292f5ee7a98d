"""Which form a request asks for, and whether the reply has it: found once, when the reply is recorded. Pure.

A form is JSON (an object, or what a schema says), one of some choices, a pattern or a grammar, or a tool call whose arguments are
JSON as the tool says. Of a schema its types, enumerations and required parts are compared, which takes time in proportion to the
reply: all that a schema may say (patterns, references to anywhere, alternatives of alternatives) would let who asks keep the
replica busy for as long as they like. A pattern or a grammar is the engine's to keep; of those it is only seen when
the reply was cut off. Called by the gateway and `service/exchange.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from pydantic_core import from_json

Json = dict[str, Any]

_CUT = frozenset({"length", "incomplete", "max_tokens"})
"""How a reply ends that was cut off by its length, as chat and completions, responses, and messages say it."""
_MUST = ("required", "function", "any", "tool")
"""`tool_choice`, or its type, where a tool must be called."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (NoneType,),
    "number": (int, float),
    "integer": (int, float),
}
_OBJECT: Json = {"type": "object"}
_MOST = 1000
"""Entries of an enumeration, or names of what is required, that are compared; of a longer list nothing is."""
_DEPTH = 64
"""How deep a value and its schema's references are followed; what lies deeper passes."""


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call of a reply: the tool and its arguments as they were said."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Form:
    """What a request asks of its reply's form."""

    is_asked: bool = False
    """Of the text; else only of the tool calls, if the reply makes any."""
    schema: Any = None
    """What the text must be as JSON: a JSON schema, as an object or as text; `True` for any JSON, None: it need not be JSON."""
    choices: tuple[str, ...] = ()
    """Where there are any, the text is one of them."""
    tools: Mapping[str, Any] = field(default_factory=dict)
    """The schemas of the tools' arguments, by name."""
    must_call: bool = False


def asked(body: Json, path: str) -> Form | None:
    """The form that a request asks for; None when it asks for none, or in a way that is not read here. Never raises."""
    reader = _READERS.get(path.rstrip("/"))
    found = reader(body) if reader else None
    tools, choice = body.get("tools"), body.get("tool_choice")
    choice = choice.get("type") if isinstance(choice, dict) else choice
    if reader is None or not isinstance(tools, list) or choice == "none":
        return found
    named = dict(one for tool in tools if (one := _tool(tool)))
    found = found or Form()
    return Form(found.is_asked, found.schema, found.choices, named, must_call=choice in _MUST)


def has(form: Form | None, text: str, calls: Sequence[Call], finish_reason: str | None) -> bool | None:
    """Whether a reply has the form that was asked for; None when none was, or when it calls no tool that it need not call."""
    if form is None or not (calls or form.must_call or form.is_asked):
        return None
    if finish_reason in _CUT or (form.must_call and not calls):
        return False
    if calls:
        return all(_is_json(call.arguments, form.tools.get(call.name, True)) for call in calls)
    if form.choices:
        return text in form.choices
    return form.schema is None or _is_json(text, form.schema)


def fits(value: object, schema: object, root: object = None, depth: int = 0) -> bool:
    """Whether a JSON value has the types, enumerations and required parts of a schema; what else it says is not compared."""
    root = schema if depth == 0 else root
    if not isinstance(schema, dict) or depth > _DEPTH:
        return schema is not False
    if isinstance(reference := schema.get("$ref"), str):
        return fits(value, _referred(root, reference), root, depth + 1)
    if not _is_of(value, schema.get("type")) or not _is_among(value, schema):
        return False
    if isinstance(value, dict):
        return _fits_object(value, schema, root, depth)
    parts = None if "prefixItems" in schema else schema.get("items")
    return not isinstance(value, list) or parts is None or all(fits(one, parts, root, depth + 1) for one in value)


def _fits_object(value: Json, schema: Json, root: object, depth: int) -> bool:
    needed, known = schema.get("required"), schema.get("properties")
    parts = known if isinstance(known, dict) else {}
    if isinstance(needed, list) and len(needed) <= _MOST and not all(name in value for name in needed if isinstance(name, str)):
        return False
    is_closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
    if is_closed and not value.keys() <= parts.keys():
        return False
    return all(fits(one, parts[name], root, depth + 1) for name, one in value.items() if name in parts)


def _is_of(value: object, kind: object) -> bool:
    if isinstance(kind, list):
        return any(_is_of(value, one) for one in kind[: len(_TYPES)])
    if not isinstance(kind, str) or kind not in _TYPES:
        return True
    is_whole = kind != "integer" or not isinstance(value, float) or value.is_integer()
    return isinstance(value, _TYPES[kind]) and is_whole and (kind == "boolean" or not isinstance(value, bool))


def _is_among(value: object, schema: Json) -> bool:
    listed = schema.get("enum")
    if isinstance(listed, list) and len(listed) <= _MOST and value not in listed:
        return False
    return "const" not in schema or value == schema["const"]


def _referred(root: object, reference: str) -> object:
    """What a reference within the schema means; True, which everything fits, for one that leads elsewhere."""
    if not reference.startswith("#"):
        return True
    found: Any = root
    for step in reference.split("/")[1:]:
        if not isinstance(found, dict) or step not in found:
            return True
        found = found[step]
    return found


def _is_json(text: str, schema: object) -> bool:
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError:
        return False
    try:
        said = from_json(schema) if isinstance(schema, str) else schema
    except ValueError:
        return True  # a schema that is no JSON: the engine will have said so
    return fits(value, said)


def _of_text(body: Json) -> Form | None:
    """`response_format` of chat and completions, or vLLM's own `structured_outputs`."""
    kind = body.get("response_format")
    if isinstance(kind, dict) and kind.get("type") not in (None, "text"):
        told = kind.get("json_schema")
        return _typed(kind["type"], told.get("schema") if isinstance(told, dict) else None)
    return _structured(body.get("structured_outputs"))


def _of_responses(body: Json) -> Form | None:
    """`text.format` of responses, or vLLM's own `structured_outputs`."""
    return _formatted(body.get("text")) or _structured(body.get("structured_outputs"))


def _of_messages(body: Json) -> Form | None:
    """`output_config.format` of messages."""
    return _formatted(body.get("output_config"))


def _formatted(told: object) -> Form | None:
    kind = told.get("format") if isinstance(told, dict) else None
    if isinstance(kind, dict) and kind.get("type") not in (None, "text"):
        return _typed(kind["type"], kind.get("schema"))
    return None


def _typed(kind: object, schema: object) -> Form:
    if kind == "json_object":
        return Form(is_asked=True, schema=_OBJECT)
    return Form(is_asked=True, schema=True if schema is None else schema) if kind == "json_schema" else Form(is_asked=True)


def _structured(told: object) -> Form | None:
    if not isinstance(told, dict) or not told:
        return None
    if told.get("json") is not None or told.get("json_object"):
        return Form(is_asked=True, schema=told.get("json") or _OBJECT)
    choices = told.get("choice")
    return Form(is_asked=True, choices=tuple(choices) if isinstance(choices, list) else ())


def _tool(tool: object) -> tuple[str, Any] | None:
    """A tool's name and what its arguments must be, as chat, responses or messages write it."""
    if not isinstance(tool, dict) or not (tool.get("type") == "function" or "input_schema" in tool):
        return None
    told = tool.get("function", tool)
    is_named = isinstance(told, dict) and isinstance(told.get("name"), str)
    return (told["name"], told.get("parameters") or told.get("input_schema") or _OBJECT) if is_named else None


_READERS = {
    "/v1/chat/completions": _of_text,
    "/v1/completions": _of_text,
    "/v1/responses": _of_responses,
    "/v1/messages": _of_messages,
}
"""By path; the replies of others are not read, so nothing is known of them."""

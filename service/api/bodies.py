"""What clients may send, and how it becomes records: closed bodies, typed values, errors that name the field.

Pure but for `version_of`, `strategy_of`, `ids_of` and `read`, which take a request's body up to a limit.
"""

from __future__ import annotations

import difflib
import re
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from replay.records import Feedback, FeedbackValue
from service.errors import InvalidRequest, TooLarge
from service.settings import Metric, SwitchMode

RESERVED = ("demonstration", "preference", "comment")
"""Kinds of feedback that need no declaration."""

Body = TypeVar("Body", bound=BaseModel)
ShortText = Annotated[str, Field(min_length=1, max_length=256)]


class Closed(BaseModel):
    """A body that refuses unknown fields and does not turn one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True)


class FeedbackBody(Closed):
    """What somebody says of a reply. The first four fields are TensorZero's."""

    inference_id: ShortText
    """The reply's `id`."""
    metric_name: ShortText
    """A metric declared in the settings, or `demonstration`, `preference`, `comment`."""
    value: Any
    """By metric: a boolean, a number, the corrected reply (text or message), `{"preferred": id, "other": id}`, a text."""
    tags: dict[ShortText, str] = Field(default_factory=dict)
    id: ShortText | None = None
    """Chosen by the client so that a repeat is known as one; made by the server when absent."""
    comment: str | None = None
    source: Literal["human", "model", "code"] = "human"
    occurred_at: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Unix seconds; when it was said, if not now."""


class Preference(Closed):
    """Which of two replies was better."""

    preferred: ShortText
    other: ShortText
    tied: Literal["good", "bad"] | None = None


def _version(said: object) -> object:
    """`7`, `"7"`, `"v7"` and `"support@v7"` are the same version."""
    found = re.fullmatch(r"(?:(?P<line>[a-z0-9][a-z0-9_-]*)@)?v?(?P<number>\d{1,9})", str(said))
    if isinstance(said, bool) or found is None:
        raise ValueError("not a version: write it as 7, 'v7' or 'line@v7'")
    return f"{found['line'] or ''}@v{int(found['number'])}"


def _of_line(version: str, line: str) -> str:
    """The full name on `line` of what `_version` has read; raises `InvalidRequest` when it names another line."""
    owner, _, number = version.partition("@")
    if owner not in {"", line}:
        raise InvalidRequest(f"{version} is not a version of {line!r}", param="version")
    return f"{line}@{number}"


class VersionBody(Closed):
    """Which version to change to; nothing: the obvious one."""

    version: Annotated[str, BeforeValidator(_version)] | None = None

    def name(self, line: str) -> str | None:
        """The version's full name on `line`; raises `InvalidRequest` when it names another line."""
        return None if self.version is None else _of_line(self.version, line)


_BY_ALIAS = ("champion", "base")


def _anchor(said: object) -> object:
    return said if said in _BY_ALIAS else _version(said)


class AnchorBody(Closed):
    """Which version is to be the line's anchor."""

    version: Annotated[str, BeforeValidator(_anchor)] = "champion"
    """Its name, `champion` (the one of now) or `base`."""


async def anchor_of(request: Request, line: str, limit: int) -> str:
    """What a request's body names: a version's full name, `champion` or `base`; raises `InvalidRequest`."""
    said = parse(AnchorBody, await read(request, limit) or b"{}").version
    return said if said in _BY_ALIAS else _of_line(said, line)


class SwitchBody(BaseModel):
    """Where the kill switch is to stand, and why."""

    model_config = ConfigDict(extra="forbid")

    mode: SwitchMode
    reason: str = ""


async def version_of(request: Request, line: str, limit: int) -> str | None:
    """The full name of the version that a request's body names, if any; raises `InvalidRequest`."""
    raw = await read(request, limit)
    return parse(VersionBody, raw).name(line) if raw.strip() else None


class TrainBody(Closed):
    """How a job by hand is to learn; nothing: as its line does."""

    strategy: ShortText | None = None


async def strategy_of(request: Request, limit: int) -> str | None:
    """The strategy that a request's body names, if any; raises `InvalidRequest`."""
    return parse(TrainBody, await read(request, limit) or b"{}").strategy


class IdsBody(BaseModel):
    """Which feedback is meant."""

    model_config = ConfigDict(extra="forbid")

    ids: list[str] = Field(min_length=1, max_length=1000)


async def ids_of(request: Request, limit: int) -> list[str]:
    """The ids that a request's body names; raises `InvalidRequest`."""
    return parse(IdsBody, await read(request, limit)).ids


async def read(request: Request, limit: int) -> bytes:
    """The whole body; raises `TooLarge` as soon as it is over `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"the body is over http.max_body_bytes ({limit}): send it in parts, or use /feedback/stream")
    return bytes(body)


def parse(kind: type[Body], raw: bytes) -> Body:
    """The body as `kind`; raises `InvalidRequest` that names the field."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _explain(kind, error) from None


class FeedbackReader:
    """Reads feedback against the metrics that the settings declare."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics

    def one(self, raw: bytes, principal: str, now: float) -> Feedback:
        """One JSON object; raises `InvalidRequest`."""
        return self._record(parse(FeedbackBody, raw), principal, now)

    def many(self, raw: bytes, principal: str, now: float) -> list[Feedback | InvalidRequest]:
        """A JSON array: a record or what is wrong with it for each item; raises when it is no array at all."""
        try:
            items = from_json(raw)
        except ValueError as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from None
        if not isinstance(items, list):
            raise InvalidRequest(f"the body must be an array of feedback, not {_kind(items)}")
        return [self._try(item, principal, now) for item in items]

    def _try(self, item: Any, principal: str, now: float) -> Feedback | InvalidRequest:
        try:
            return self._record(FeedbackBody.model_validate(item), principal, now)
        except ValidationError as error:
            return _explain(FeedbackBody, error)
        except InvalidRequest as error:
            return error

    def _record(self, body: FeedbackBody, principal: str, now: float) -> Feedback:
        return Feedback(
            id=body.id or f"fb_{uuid.uuid4().hex}",
            inference_id=body.inference_id,
            metric_name=body.metric_name,
            value=self._value(body.metric_name, body.value),
            occurred_at=now if body.occurred_at is None else body.occurred_at,
            received_at=now,
            comment=body.comment,
            source=body.source,
            tags=body.tags,
            principal=principal,
        )

    def _value(self, name: str, value: Any) -> FeedbackValue:
        if metric := self._metrics.get(name):
            return _boolean(name, value) if metric.type == "boolean" else _number(name, value, metric)
        if name == "demonstration":
            return _demonstration(value)
        if name == "preference":
            return _preference(value)
        if name == "comment":
            return _text(value, "a comment")
        known = [*sorted(self._metrics), *RESERVED]
        hint = _nearest(name, known)
        raise InvalidRequest(f"unknown metric {name!r}{hint}; known: {', '.join(known)}", param="metric_name")


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _mismatch(f"metric {name!r} takes true or false", value)
    return value


def _number(name: str, value: Any, metric: Metric) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mismatch(f"metric {name!r} takes a number", value)
    if not metric.minimum <= value <= metric.maximum:  # NaN is neither
        span = f"from {metric.minimum:g} to {metric.maximum:g}"
        raise InvalidRequest(f"metric {name!r} takes a number {span}, not {str(value)[:20]}", param="value")
    return float(value)


def _demonstration(value: Any) -> FeedbackValue:
    if isinstance(value, dict):
        if value.get("role", "assistant") != "assistant":
            raise InvalidRequest("a demonstration is what the assistant should have said", param="value.role")
        _text(value.get("content"), "a demonstration's content", "value.content")
        return value
    return _text(value, "a demonstration")


def _preference(value: Any) -> dict[str, Any]:
    try:
        return Preference.model_validate(value).model_dump(exclude_none=True)
    except ValidationError as error:
        raise _explain(Preference, error, "value") from None


def _text(value: Any, what: str, param: str = "value") -> str:
    if not isinstance(value, str) or not value.strip():
        raise _mismatch(f"{what} is a text that is not empty", value, param)
    return value


def _mismatch(rule: str, value: Any, param: str = "value") -> InvalidRequest:
    return InvalidRequest(f"{rule}, not {_kind(value)}", param=param)


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", dict: "an object", list: "an array"}
    return "null" if value is None else names[type(value)]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _explain(kind: type[BaseModel], error: ValidationError, inside: str = "") -> InvalidRequest:
    """The first thing wrong, in words, with its field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [inside, *(str(part) for part in first["loc"])]
    where = ".".join(part for part in path if part)
    if first["type"] == "json_invalid":
        return InvalidRequest(f"not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if first["type"] == "extra_forbidden":
        hint = _nearest(where.split(".")[-1], list(kind.model_fields))
        return InvalidRequest(f"unknown field {where!r}{hint}", param=where)
    if first["type"] == "missing":
        return InvalidRequest(f"the field {where!r} is missing", param=where)
    return InvalidRequest(f"{where or 'the body'}: {first['msg'].removeprefix('Value error, ')}", param=where or None)

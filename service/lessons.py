"""A file of examples, as `learnd examples LINE` prints them: read and checked line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from replay.records import Split
from service.errors import InvalidRequest


class Lesson(BaseModel):
    """One line of the file; what else stands there is not read."""

    slice: str
    split: Split
    messages: list[dict[str, Any]] = Field(min_length=1)
    reply: str
    weight: float = Field(1.0, gt=0)


def read(path: Path) -> list[dict[str, Any]]:
    """The examples in a file; raises `InvalidRequest` with the line and what is wrong with it."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(Lesson.model_validate_json(line).model_dump(mode="json"))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InvalidRequest(f"{path}:{number}: {field + ': ' if field else ''}{first['msg']}") from None
    return found

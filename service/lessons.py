"""A file of examples, as `learnd examples LINE` prints them: read and checked line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from replay.records import Split
from service import ndjson
from service.asking import DEFAULT_SLICE
from service.errors import InvalidRequest


class Lesson(BaseModel):
    """One line of the file, of which `messages` and `reply` are enough; what else stands there is not read."""

    slice: str = DEFAULT_SLICE
    split: Split = Split.TRAIN
    messages: list[dict[str, Any]] = Field(min_length=1)
    reply: str
    weight: float = Field(1.0, gt=0)


def read(path: Path) -> list[dict[str, Any]]:
    """The examples in a file; raises `InvalidRequest` with the line and what is wrong with it."""
    return [row.model_dump(mode="json") for _, row in ndjson.rows(path.read_bytes(), path, Lesson, InvalidRequest)]

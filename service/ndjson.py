"""Files of one JSON object a line: read, and what is wrong is said with its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import LearndError

if TYPE_CHECKING:
    from pathlib import Path

Row = TypeVar("Row", bound=BaseModel)


def rows(raw: bytes, path: Path, kind: type[Row], error: type[LearndError]) -> Iterator[tuple[int, Row]]:
    """The number of each line of a file that is not blank, and what stands there; raises `error` with the place and the field."""
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            try:
                yield number, kind.model_validate_json(line)
            except ValidationError as found:
                first = found.errors()[0]
                field = ".".join(map(str, first["loc"]))
                raise error(f"{path}:{number}: {f'{field}: ' if field else ''}{first['msg']}") from None

"""The conductor's way to the database: do something, write down in the same transaction that it was done, then tell of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection

from replay.writer import Work, WriteFailed, Writer
from service import audit
from service.errors import StorageFailed

T = TypeVar("T")
Json = dict[str, Any]
Deed = Callable[[Connection, float], tuple[T, Json]]
"""Work that is given the time, and returns its value with what to write down of it."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something was done on a line, and is on disk; `kind` is `failed` for what will be tried again."""

    kind: str
    line: str
    at: float
    body: Mapping[str, Any]


class Journal:
    """Waits for the writer; `listen` is told of each event, in the thread of whoever caused it."""

    def __init__(self, writer: Writer, clock: Callable[[], float], listen: Callable[[Event], None]) -> None:
        self._writer = writer
        self._clock = clock
        self._listen = listen

    def do(self, work: Work[T]) -> T:
        """Do `work`; it is on disk when this returns. Raises `StorageFailed`, or what the work raised."""
        try:
            return self._writer.submit(work).result()
        except WriteFailed as error:
            raise StorageFailed(str(error)) from error

    def record(self, kind: str, line: str, deed: Deed[T]) -> T:
        """Do a deed and write it down as one."""
        now = self._clock()

        def whole(conn: Connection) -> tuple[T, Json]:
            value, body = deed(conn, now)
            audit.tell(conn, now, line, kind, body)
            return value, body

        value, body = self.do(whole)
        log.info(kind, line=line, **body)
        self._listen(Event(kind, line, now, body))
        return value

    def failed(self, line: str, error: Exception) -> None:
        """Log a failure with its traceback and tell of it; it is not written down, since writing may be what failed."""
        log.error("conductor_failed", line=line, exc_info=error)
        self._listen(Event("failed", line, self._clock(), {"error": repr(error)}))

"""What a line has learned is what its champion's lineage learned: said to the ledger whenever the champion moves.

Functions on a connection, in the transaction that moves the alias; idempotent. The rest is `replay.resting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import Connection

from replay import resting
from replay.resting import Lesson
from service import jobs, registry
from service.registry import CHAMPION, Version


def follow(conn: Connection, line: str) -> None:
    """Put to rest what versions beside the champion's lineage learned, and wake what those in it did."""
    known = {one.name: one for one in registry.versions(conn, line)}
    lineage = of(known, registry.aliases(conn, line)[CHAMPION])
    resting.rest(conn, [one.job for name, one in known.items() if name not in lineage])
    resting.wake(conn, line, (Lesson(name, one.job, jobs.held(conn, one.job)) for name, one in lineage.items()))


def follow_all(conn: Connection, lines: Iterable[str]) -> None:
    """The same of these lines, at the start: a folder may have been written by a learnd that did not do it."""
    for line in lines:
        follow(conn, line)


def of(known: Mapping[str, Version], name: str | None) -> dict[str, Version]:
    """A version and those that it descends from, the newest first; nothing of the base. Pure."""
    found: dict[str, Version] = {}
    while name is not None:
        found[name] = known[name]
        name = known[name].parent
    return found

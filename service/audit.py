"""The log of what was done and why, hash-chained: each record carries the digest of the one before it.

Functions on a connection. A record is written in the transaction of what it tells of, so there is never one without the
other. Its digest is the SHA-256 of its canonical JSON (keys sorted, no blanks), the digest before it included: whoever
changes, adds or takes out a record must write all later ones anew, and the digest of the last one, kept elsewhere, tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Column, Connection, Float, Integer, RowMapping, String, Table, Text, func, insert, select

from service.registry import metadata

Json = dict[str, Any]

GENESIS = "0" * 64
"""What the first record has in place of a digest before it."""

_event = Table(
    "event",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("line", String, nullable=False, index=True),
    Column("kind", String, nullable=False),
    Column("body", Text, nullable=False),  # canonical JSON, as it was digested
    Column("previous", String, nullable=False),
    Column("digest", String, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Chain:
    """What a check of the whole log found."""

    records: int
    """That are whole, from the first on."""
    head: str
    """Digest of the last of them: keep it elsewhere to notice later that records were taken off the end."""
    broken: int | None = None
    """The first record that is not as it was written."""
    reason: str = ""

    def as_json(self) -> Json:
        """As the API shows it."""
        return {**asdict(self), "is_whole": self.broken is None}


def canonical(value: Any) -> str:
    """The one way of writing a value as JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def tell(conn: Connection, at: float, line: str, kind: str, body: Mapping[str, Any]) -> None:
    """Append to the log of what was done and why."""
    last = conn.execute(select(_event.c.seq, _event.c.digest).order_by(_event.c.seq.desc()).limit(1)).one_or_none()
    seq, previous = (last.seq + 1, last.digest) if last else (1, GENESIS)
    plain = json.loads(json.dumps(body))  # keys as they are read back
    told = {"seq": seq, "at": float(at), "line": line, "kind": kind, "body": plain, "previous": previous}
    conn.execute(insert(_event).values({**told, "body": canonical(plain), "digest": digest_of(told)}))


def events(conn: Connection, line: str, kind: str | None = None) -> list[Json]:
    """What was done on a line, oldest first; of one kind, when it is given."""
    query = select(_event).where(_event.c.line == line).order_by(_event.c.seq)
    rows = conn.execute(query if kind is None else query.where(_event.c.kind == kind)).mappings()
    return [{**row, "body": json.loads(row["body"])} for row in rows]


def of_kinds(conn: Connection, kinds: Iterable[str]) -> list[Json]:
    """What was done on all lines, oldest first, of these kinds."""
    rows = conn.execute(select(_event).where(_event.c.kind.in_(kinds)).order_by(_event.c.seq)).mappings()
    return [{**row, "body": json.loads(row["body"])} for row in rows]


def last(conn: Connection) -> int:
    """Number of the latest record; 0 when there is none."""
    return conn.scalar(select(func.max(_event.c.seq))) or 0


def since(conn: Connection, seq: int, limit: int) -> list[Json]:
    """What was done on all lines after record `seq`, oldest first, at most `limit` of it."""
    rows = conn.execute(select(_event).where(_event.c.seq > seq).order_by(_event.c.seq).limit(limit)).mappings()
    return [{**row, "body": json.loads(row["body"])} for row in rows]


def verify(conn: Connection) -> Chain:
    """Go through the whole log and name the first record that is not as it was written."""
    head, whole = GENESIS, 0
    for row in conn.execute(select(_event).order_by(_event.c.seq)).mappings():
        if reason := _fault(row, whole + 1, head):
            return Chain(whole, head, row["seq"], reason)
        head, whole = row["digest"], whole + 1
    return Chain(whole, head)


def _fault(row: RowMapping, seq: int, previous: str) -> str:
    if row["seq"] != seq:
        return f"record {seq} is missing"
    if row["previous"] != previous:
        return "it does not carry the digest of the record before it"
    try:
        body = json.loads(row["body"])
    except ValueError:
        return "its body is not JSON any more"
    told = {**{name: row[name] for name in ("seq", "at", "line", "kind", "previous")}, "body": body}
    if canonical(body) != row["body"] or digest_of(told) != row["digest"]:
        return "its digest is not that of its content"
    return ""

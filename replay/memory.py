"""What a line remembers, as it is kept: each learned example has its reservoir key in a column, and an index in that order.

A function of what the versions in the champion's lineage learned: exactly the examples that `replay.buffer.fill` keeps of
`replay.examples.trained`, read in time that does not grow with them. What other versions learned rests, without a key
(`replay.resting`). Functions on a connection. The key is a function of the example alone (`SEED` is ours and no setting), so
a line that is given another seed or capacity keeps its memory; what a job draws from it is seeded by `replay.mixture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection, and_, bindparam, func, select, update

from replay.buffer import key, shares
from replay.records import Example, Split
from replay.tables import REMEMBERED, example, example_of

SEED = 0

_IS_KEPT = example.c.key.is_not(None)
_OF_SLICE = and_(example.c.line == bindparam("line"), example.c.slice == bindparam("slice"), _IS_KEPT)
_KEYED = update(example).where(example.c.seq == bindparam("seq_")).values(key=bindparam("key_"))
_of = example.alias()
_LAST = select(func.max(_of.c.seq)).where(_of.c.interaction_id == bindparam("about"), _of.c.key.is_not(None)).scalar_subquery()
_REPLACED = (
    update(example)
    .where(example.c.interaction_id == bindparam("about"), _IS_KEPT, example.c.seq < _LAST)
    .values(key=None)
    .execution_options(synchronize_session=False)
)
_NEXT_SLICE = (
    select(example.c.slice)
    .where(example.c.line == bindparam("line"), example.c.slice > bindparam("after"), _IS_KEPT)
    .order_by(example.c.slice)
    .limit(1)
)
_SIZE = select(func.count()).select_from(select(example.c.seq).where(_OF_SLICE).limit(bindparam("most")).subquery())
_READ = (example.c[name] for name in ("seq", "line", "slice", *REMEMBERED))
_LARGEST = select(*_READ).where(_OF_SLICE).order_by(example.c.key.desc(), example.c.id).limit(bindparam("most"))
"""The statements, made once; each reads the index `example_remembered` alone, and no more of it than it gives."""


def keep(conn: Connection, learned: Sequence[Example]) -> None:
    """Give what was learned its place in the memory of its line; of several for one interaction the last has one."""
    fit = [one for one in learned if one.split is Split.TRAIN]
    if fit:
        conn.execute(_KEYED, [{"seq_": one.seq, "key_": key(SEED, one.id, one.weight)} for one in fit])
        conn.execute(_REPLACED, [{"about": one.interaction_id} for one in fit])


def sizes(conn: Connection, line: str, capacity: int) -> dict[str, int]:
    """How many examples of each slice a line remembers, of `capacity` in all."""
    found = {name: _size(conn, line, name, capacity) for name in _slices(conn, line)}
    return shares(found, capacity)


def remembered(conn: Connection, line: str, capacity: int) -> list[Example]:
    """What a line remembers, slice by slice, the largest key first."""
    return [
        replace(example_of(row), source="remembered")
        for name, share in sorted(sizes(conn, line, capacity).items())
        for row in conn.execute(_LARGEST, {"line": line, "slice": name, "most": share}).mappings()
    ]


def _size(conn: Connection, line: str, name: str, most: int) -> int:
    return conn.scalar(_SIZE, {"line": line, "slice": name, "most": most}) or 0


def _slices(conn: Connection, line: str) -> list[str]:
    """The slices of which something was learned, none of an empty name: one look into the index for each."""
    found: list[str] = []
    after: str | None = ""
    while (after := conn.scalar(_NEXT_SLICE, {"line": line, "after": after})) is not None:
        found.append(after)
    return found

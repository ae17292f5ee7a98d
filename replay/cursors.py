"""How far a reader has come in what is stored, by its name: read and moved in the transaction of what it reads."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from replay.tables import cursor


def place(conn: Connection, name: str) -> int:
    """The last place that was read; 0 at first."""
    return conn.scalar(select(cursor.c.seq).where(cursor.c.name == name)) or 0


def is_known(conn: Connection, name: str) -> bool:
    """Whether this reader has been here before."""
    return conn.scalar(select(cursor.c.seq).where(cursor.c.name == name)) is not None


def move(conn: Connection, name: str, seq: int) -> None:
    """Note that everything up to this place was read."""
    conn.execute(delete(cursor).where(cursor.c.name == name))
    conn.execute(insert(cursor).values(name=name, seq=seq))

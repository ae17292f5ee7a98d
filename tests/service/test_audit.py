"""The chained log: whatever is changed in it is found and named."""

import hashlib
import json

import pytest
from sqlalchemy import create_engine, text

from service import audit, conductor
from service.audit import GENESIS

BODIES = [{"job": "j", "parent": None}, {"log_promote": 3.25, "names": ["ä", "b"]}, {}, {"low": float("-inf")}]
COLUMNS = {"at": "at + 0.001", "line": "'other'", "kind": "kind || 's'", "previous": "digest", "digest": "previous"}


@pytest.fixture
def conn():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        conductor.create(connection)
        for number, body in enumerate(BODIES):
            audit.tell(connection, number, "desk", "verdict" if number % 2 else "job_queued", body)
        yield connection
    engine.dispose()


def test_records_are_kept_in_order_and_by_kind(conn):
    assert [event["body"] for event in audit.events(conn, "desk")] == BODIES
    assert [event["body"] for event in audit.events(conn, "desk", "verdict")] == BODIES[1::2]
    assert audit.events(conn, "other") == []


def test_what_was_written_is_whole_and_anybody_can_check_it(conn):
    chain = audit.verify(conn)
    assert (chain.records, chain.broken) == (4, None)
    previous = GENESIS
    for event in audit.events(conn, "desk"):
        assert event["previous"] == previous
        plain = {name: value for name, value in event.items() if name != "digest"}
        previous = hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert event["digest"] == previous
    assert chain.head == previous


@pytest.mark.parametrize("seq", [1, 2, 3, 4])
def test_each_byte_of_each_body_is_under_the_seal(conn, seq):
    body = conn.scalar(text("select body from event where seq = :seq"), {"seq": seq})
    for place in range(len(body)):
        changed = body[:place] + chr(ord(body[place]) ^ 1) + body[place + 1 :]
        conn.execute(text("update event set body = :body where seq = :seq"), {"body": changed, "seq": seq})
        chain = audit.verify(conn)
        assert (chain.records, chain.broken) == (seq - 1, seq), changed
    conn.execute(text("update event set body = :body where seq = :seq"), {"body": body + " ", "seq": seq})
    assert audit.verify(conn).broken == seq  # the same JSON, in other bytes
    conn.execute(text("update event set body = :body where seq = :seq"), {"body": body, "seq": seq})
    assert audit.verify(conn).broken is None


@pytest.mark.parametrize("column", COLUMNS)
def test_so_is_each_other_column(conn, column):
    conn.execute(text(f"update event set {column} = {COLUMNS[column]} where seq = 2"))
    assert audit.verify(conn).broken == 2


@pytest.mark.parametrize("seq", [1, 2, 3])
def test_a_record_that_is_taken_out_leaves_a_gap(conn, seq):
    conn.execute(text(f"delete from event where seq = {seq}"))
    chain = audit.verify(conn)
    assert (chain.records, chain.reason) == (seq - 1, f"record {seq} is missing")


def test_a_record_forged_with_its_digest_breaks_the_next(conn):
    """Who rewrites one record, digest and all, must rewrite all after it; and then the head is another."""
    head = audit.verify(conn).head
    conn.execute(text("delete from event where seq > 1"))
    audit.tell(conn, 1, "desk", "verdict", {"log_promote": 99.0})
    forged = conn.execute(text("select * from event where seq = 2")).mappings().one()
    assert audit.verify(conn).broken is None
    assert audit.verify(conn).head != head
    audit.tell(conn, 2, "desk", "job_queued", {})
    conn.execute(text("update event set digest = :digest, body = '{}' where seq = 2"), {"digest": GENESIS})
    assert audit.verify(conn).broken == 2
    conn.execute(text("update event set digest = :digest, body = :body where seq = 2"), dict(forged))
    assert audit.verify(conn).broken is None

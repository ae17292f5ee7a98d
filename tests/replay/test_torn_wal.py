"""A machine that dies tears the write-ahead log anywhere: what is left of it is whole transactions, oldest first."""

import shutil

import pytest
from sqlalchemy import text

from replay import ledger
from replay.writer import Writer

SETTLED, OPEN = 5, 12
"""Transactions that were checkpointed into the database, and that stand in its -wal alone."""


@pytest.fixture
def killed(tmp_path, asked, said):
    """What SIGKILL leaves: a copy of both files, while the writer that holds them has not closed."""

    def both(number):
        """An interaction and the correction of it: one transaction, three tables."""

        def work(conn):
            ledger.record(conn, [asked(f"a{number}")])
            ledger.give(conn, said(f"a{number}"))

        return work

    path = tmp_path / "live" / "ledger.db"
    path.parent.mkdir()
    for numbers in (range(SETTLED), range(SETTLED, SETTLED + OPEN)):
        writer = Writer(path, 0.0)
        writer.submit(ledger.create).result()
        for number in numbers:
            writer.submit(both(number)).result()
        if numbers.start == 0:
            writer.close()  # which checkpoints
    copy = tmp_path / "killed"
    shutil.copytree(path.parent, copy)
    writer.close()
    return copy


def found(folder):
    """The transactions that a ledger opened on the folder has, of which each must be whole."""
    writer = Writer(folder / "ledger.db", 0.0)
    tables = ("SELECT id FROM interaction", "SELECT inference_id FROM feedback", "SELECT interaction_id FROM example")
    try:
        assert writer.submit(lambda conn: conn.scalar(text("PRAGMA integrity_check"))).result() == "ok"
        rows = [writer.submit(lambda conn, sql=sql: sorted(conn.scalars(text(sql)))).result() for sql in tables]
        writer.submit(ledger.create).result()  # and it writes
    finally:
        writer.close()
    assert rows[0] == rows[1] == rows[2], "half a transaction"
    return {int(name[1:]) for name in rows[0]}


def places(size, header=32, frame=4096 + 24):
    """Where to cut: nowhere, in the header, at and around frames, in the midst of one, just before the end."""
    frames = [header + frame * n for n in range((size - header) // frame + 1)]
    around = {place + off for place in frames[:: max(1, len(frames) // 8)] for off in (-1, 0, 1, 24, frame // 2)}
    return sorted({0, 1, header - 1, size - 1, size} | {place for place in around if 0 <= place <= size})


@pytest.mark.parametrize("how", ["cut off", "zeros"])
def test_a_torn_log_is_a_shorter_log(killed, tmp_path, how):
    size = (killed / "ledger.db-wal").stat().st_size
    assert size > 32, "nothing stands in the log: the test says nothing"
    counts = []
    for place in places(size):
        torn = tmp_path / f"torn-{place}"
        shutil.copytree(killed, torn)
        with (torn / "ledger.db-wal").open("r+b") as log:
            log.truncate(place)
            if how == "zeros":  # the file had its length already, its blocks were not written
                log.truncate(size)
        known = found(torn)
        assert known == set(range(len(known))), "a later transaction without an earlier one"
        counts.append(len(known))
        shutil.rmtree(torn)
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (SETTLED, SETTLED + OPEN)
    assert len(set(counts)) > 4

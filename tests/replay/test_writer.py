import os
import subprocess
import sys
import threading
from concurrent.futures import wait

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from replay.writer import MAX_GROUP, WriteFailed, Writer


@pytest.fixture
def commits():
    return []


@pytest.fixture
def writer(tmp_path, commits):
    writer = Writer(tmp_path / "ledger.db", observe=lambda size, seconds: commits.append((size, seconds)))
    writer.submit(lambda conn: conn.execute(text("CREATE TABLE word (id TEXT PRIMARY KEY)"))).result()
    commits.clear()
    yield writer
    writer.close()


def put(word):
    return lambda conn: conn.execute(text("INSERT INTO word VALUES (:word)"), {"word": word}).rowcount


def words(conn):
    return set(conn.scalars(text("SELECT id FROM word")))


def hold(writer):
    """Keep the writer busy until the event is set, so that what is submitted meanwhile becomes one group."""
    event = threading.Event()
    writer.submit(lambda conn: event.wait(30))
    return event


def test_what_arrives_together_is_committed_once(writer, commits):
    event = hold(writer)
    futures = [writer.submit(put(str(i))) for i in range(50)]
    event.set()
    assert [f.result() for f in futures] == [1] * 50
    writer.close()
    assert sum(size for size, _ in commits) == 51
    assert len(commits) <= 3
    assert all(seconds >= 0 for _, seconds in commits)


def test_work_that_raises_undoes_only_itself(writer):
    event = hold(writer)

    def half(conn):
        put("half")(conn)
        raise KeyError("mine")

    before, broken, twice, after = (writer.submit(work) for work in (put("a"), half, put("a"), put("b")))
    event.set()
    assert before.result() == after.result() == 1
    with pytest.raises(KeyError, match="mine"):
        broken.result()
    with pytest.raises(IntegrityError):
        twice.result()
    assert writer.submit(words).result() == {"a", "b"}


def test_a_commit_that_fails_fails_its_whole_group_and_the_next_goes_on(writer):
    writer.submit(
        lambda conn: conn.execute(text("CREATE TABLE child (id TEXT REFERENCES word DEFERRABLE INITIALLY DEFERRED)"))
    ).result()
    event = hold(writer)
    futures = [writer.submit(put("a")), writer.submit(lambda conn: conn.execute(text("INSERT INTO child VALUES ('x')")) and 1)]
    event.set()
    for future in futures:
        with pytest.raises(WriteFailed, match="send it again"):
            future.result()
    assert writer.submit(words).result() == set()
    assert writer.submit(put("b")).result() == 1


def test_a_full_disk_acknowledges_nothing_and_loses_nothing(writer):
    writer.submit(put("before")).result()
    pages = writer.submit(lambda conn: conn.scalar(text("PRAGMA page_count"))).result()
    writer.submit(lambda conn: conn.scalar(text(f"PRAGMA max_page_count={pages}"))).result()
    with pytest.raises(WriteFailed, match="full"):
        writer.submit(put("x" * 100_000)).result()
    assert writer.is_alive
    writer.submit(lambda conn: conn.scalar(text("PRAGMA max_page_count=1000000"))).result()
    writer.submit(put("after")).result()
    assert writer.submit(words).result() == {"before", "after"}


def test_a_cancelled_future_is_not_done(writer):
    event = hold(writer)
    first, second = writer.submit(put("a")), writer.submit(put("b"))
    writer.submit(put("c"))
    cancelled = {name for name, future in (("a", first), ("b", second)) if future.cancel()}
    event.set()
    assert writer.submit(words).result() == {"a", "b", "c"} - cancelled


def test_an_observer_that_fails_stops_nobody(tmp_path, caplog):
    writer = Writer(tmp_path / "ledger.db", observe=lambda size, seconds: size / 0)
    assert writer.submit(lambda conn: 1).result() == 1
    assert writer.submit(lambda conn: 2).result() == 2
    writer.close()
    assert "observing a commit failed" in caplog.text


def test_closing_finishes_what_was_submitted_and_refuses_the_rest(tmp_path):
    writer = Writer(tmp_path / "ledger.db")
    event = hold(writer)
    future = writer.submit(lambda conn: "done")
    event.set()
    writer.close()
    writer.close()
    assert future.result() == "done"
    assert not writer.is_alive
    with pytest.raises(WriteFailed, match="closed"):
        writer.submit(lambda conn: 1)


def test_many_threads_share_it(writer):
    futures = []
    threads = [
        threading.Thread(target=lambda t=t: futures.extend([writer.submit(put(f"{t}-{i}")) for i in range(50)])) for t in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait(futures)
    assert len(writer.submit(words).result()) == 400


def test_a_group_is_bounded(writer, commits):
    event = hold(writer)
    futures = [writer.submit(lambda conn: None) for _ in range(MAX_GROUP + 10)]
    event.set()
    wait(futures)
    writer.close()
    assert max(size for size, _ in commits) <= MAX_GROUP


def test_every_commit_is_an_fsync_of_a_write_ahead_log(writer):
    asked = ("journal_mode", "synchronous", "foreign_keys", "locking_mode")
    found = [writer.submit(lambda conn, name=name: conn.scalar(text(f"PRAGMA {name}"))).result() for name in asked]
    assert found == ["wal", 2, 1, "exclusive"]


def test_a_second_writer_is_refused(writer, tmp_path):
    with pytest.raises(WriteFailed, match="another daemon"):
        Writer(tmp_path / "ledger.db")


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "ledger.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(WriteFailed, match="not a database"):
        Writer(tmp_path / "ledger.db")


LIVES = """
import os, signal, sys
from pathlib import Path
from replay import ledger
from replay.records import Feedback
from replay.writer import Writer
def live(path, life, pipe):
    writer = Writer(path)
    writer.submit(ledger.create).result()
    for i in range(10**9):
        said = Feedback(f"{life}-{i}", f"a{i}", "thumb", True, occurred_at=1.0, received_at=1.0)
        done = writer.submit(lambda conn, said=said: ledger.give(conn, said))
        done.add_done_callback(lambda future: os.write(pipe, f"{future.result().id}\\n".encode()))
        if i % 20 == 19:
            done.result()
for life in range(20):
    read, write = os.pipe()
    child = os.fork() or live(Path(sys.argv[1]), life, write)
    os.close(write)
    with os.fdopen(read) as acknowledgements:
        for _ in range(7 * life + 1):
            sys.stdout.write(acknowledgements.readline())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sys.stdout.writelines(line for line in acknowledgements if line.endswith("\\n"))
"""


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path):
    """Twenty times: write as fast as it goes, kill without warning, open again; then count what was acknowledged."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    path = tmp_path / "ledger.db"
    command = [sys.executable, "-c", LIVES, str(path)]
    acknowledged = set(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.split())
    writer = Writer(path)
    stored = writer.submit(lambda conn: list(conn.scalars(text("SELECT id FROM feedback")))).result()
    health = writer.submit(lambda conn: conn.scalar(text("PRAGMA integrity_check"))).result()
    writer.close()
    assert health == "ok"
    assert len(stored) == len(set(stored))
    assert len(acknowledged) >= sum(7 * life + 1 for life in range(20))
    assert acknowledged <= set(stored)

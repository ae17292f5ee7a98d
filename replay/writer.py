"""The one thread that writes: it collects what arrives within milliseconds, commits once, then releases every waiter.

A future that resolves is on disk (WAL, `synchronous=FULL`). Work that raises undoes only itself; a commit that fails
fails its whole group. The file is locked for as long as the writer lives: the SQLite linked by many Pythons can
corrupt a WAL that two connections checkpoint, so there is one connection, and everybody else asks it. It knows no
table: `replay/ledger.py` does.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, NestedTransaction, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

T = TypeVar("T")
Work = Callable[[Connection], T]

MAX_GROUP = 4096
"""Pieces of work in one transaction: a flood must not keep its first waiter for ever."""

_log = logging.getLogger(__name__)


class WriteFailed(Exception):
    """The database could not be opened or written: nothing of this group was stored, nothing was acknowledged."""


class Writer:
    """Group commit over one connection; `submit` from any thread."""

    def __init__(
        self,
        url_or_path: str | Path,
        group_commit_seconds: float = 0.002,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        """Open and lock the database; `observe` is told (works in the group, seconds of the commit) before the waiters are."""
        self.observe = observe
        self._group_commit_seconds = group_commit_seconds
        self._queue: SimpleQueue[tuple[Work[Any], Future[Any]] | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._is_closed = False
        self._connection = _open(url_or_path)
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether work that is submitted now will be done."""
        return not self._is_closed and self._thread.is_alive()

    def submit(self, work: Work[T]) -> Future[T]:
        """Queue `work`; its future resolves to its value once that is on disk, or to the error that undid it.

        Raises `WriteFailed` at once when the writer is closed. A future that is cancelled before its turn is not done.
        """
        future: Future[T] = Future()
        with self._gate:
            if not self.is_alive:
                raise WriteFailed("the ledger is closed: the daemon is stopping")
            self._queue.put((work, future))
        return future

    def close(self) -> None:
        """Finish what was submitted, then release the file."""
        with self._gate:
            if not self._is_closed:
                self._is_closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (first := self._queue.get()) is not None:
                group, is_last = self._collect(first)
                self._commit([(work, future) for work, future in group if future.set_running_or_notify_cancel()])
                if is_last:
                    break
        finally:
            self._abandon()
            engine = self._connection.engine
            self._connection.close()
            engine.dispose()

    def _abandon(self) -> None:
        """Let nobody wait for a thread that is gone: after `close` nothing is left, after a crash all is refused."""
        with self._gate:
            self._is_closed = True
        while not self._queue.empty():
            if (item := self._queue.get()) is not None and item[1].set_running_or_notify_cancel():
                item[1].set_exception(WriteFailed("the ledger stopped: nothing of this was stored"))

    def _collect(self, first: tuple[Work[Any], Future[Any]]) -> tuple[list[tuple[Work[Any], Future[Any]]], bool]:
        """Gather the group that begins with `first`, and say whether the writer was closed behind it."""
        group = [first]
        deadline = time.monotonic() + self._group_commit_seconds
        while len(group) < MAX_GROUP:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                break
            if item is None:
                return group, True
            group.append(item)
        return group, False

    def _commit(self, group: list[tuple[Work[Any], Future[Any]]]) -> None:
        try:
            self._connection.begin()
            settle = [self._attempt(work, future) for work, future in group]
            began = time.perf_counter()
            self._connection.commit()
            seconds = time.perf_counter() - began
        except Exception as error:  # noqa: BLE001 - the group's edge: every waiter is told, and the thread lives on
            self._fail([future for _, future in group], error)
            return
        self._tell(len(group), seconds)
        for release in settle:
            release()

    def _attempt(self, work: Work[T], future: Future[T]) -> Callable[[], None]:
        """Do one work in its own savepoint; what comes back settles its future, to be called after the commit."""
        savepoint = self._connection.begin_nested()
        try:
            value = work(self._connection)
            savepoint.commit()
        except Exception as error:  # noqa: BLE001 - a stranger's work: its error belongs to its own waiter
            self._undo(savepoint, error)
            failure = _explained(error) if isinstance(error, OperationalError) else error
            return lambda: future.set_exception(failure)
        return lambda: future.set_result(value)

    def _undo(self, savepoint: NestedTransaction, error: Exception) -> None:
        """Go back to the savepoint; where the database has undone everything already (a full disk), fail the group."""
        try:
            savepoint.rollback()
        except DBAPIError:
            raise error from None

    def _fail(self, futures: list[Future[Any]], error: Exception) -> None:
        _log.error("a group of %d writes was not stored: %s", len(futures), error)
        try:
            self._connection.rollback()
            self._connection.connection.rollback()  # SQLAlchemy leaves a transaction open whose commit failed
        finally:
            for future in futures:
                future.set_exception(_explained(error))

    def _tell(self, size: int, seconds: float) -> None:
        if self.observe is None:
            return
        try:
            self.observe(size, seconds)
        except Exception:  # noqa: BLE001 - a stranger's callback must not stop the ledger
            _log.exception("observing a commit failed; the commit itself stands")


def _open(url_or_path: str | Path) -> Connection:
    text = str(url_or_path)
    url = text if "://" in text else f"sqlite:///{text}"
    engine = create_engine(url, poolclass=NullPool, hide_parameters=True)  # errors are logged, what was said is not
    if engine.dialect.name == "sqlite":
        _make_durable(engine)
    try:
        connection = engine.connect()
        with connection.begin():  # takes the lock now, not at the first feedback
            pass
    except DBAPIError as error:
        raise WriteFailed(f"cannot open the ledger {text}: {error.orig}; is another daemon using it?") from error
    return connection


def _make_durable(engine: Engine) -> None:
    """Make each commit of SQLite an fsync, the file ours alone, and savepoints real."""

    @event.listens_for(engine, "connect")
    def configure(raw: Any, _: object) -> None:
        raw.isolation_level = None  # the driver's own BEGINs would break savepoints
        for pragma in (
            "busy_timeout=1000",
            "locking_mode=EXCLUSIVE",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            raw.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _explained(error: Exception) -> WriteFailed:
    cause = error.orig if isinstance(error, DBAPIError) else error
    failure = WriteFailed(f"the ledger could not write: {cause}; nothing of this was stored, so send it again")
    failure.__cause__ = error
    return failure

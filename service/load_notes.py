"""Notes that a version is being loaded and proven: they outlive the replica that dies of it, and its successor reads them.

One file for each version, a line for each try. A try that is over takes the file away, however it ended, unless the engine died
of it. So what lies there while nobody holds the file's lock, which the kernel lets go of whatever kills a replica, are tries that
were their replicas' last. Replicas that load at the same time share one try: a power cut ends them all, and counts once.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

import structlog

from service.errors import EngineCrash, NotReady

FOLDER = "loading"
"""Below the data directory, which all replicas share."""

MOST_DEATHS = 2
"""In a row, and no replica tries again by itself. One may be anybody's: a kill, a power cut, memory that a job has taken."""

log = structlog.get_logger(__name__)


class LoadNotes:
    """The notes of all replicas, in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def noted(self, version: str, replica: str) -> Iterator[None]:
        """Inside, `replica` loads `version`; what raises `NotReady` there is the engine's death, and the note stays.

        Raises `EngineCrash` when that has been the end of replicas already, `MOST_DEATHS` times in a row. Where nothing can be
        noted, the version is loaded all the same.
        """
        note, is_over = self._begin(version, replica), True
        with note or nullcontext():
            try:
                yield
            except NotReady:
                is_over = False
                raise
            finally:
                if note is not None and is_over:
                    with suppress(OSError):
                        Path(note.name).unlink(missing_ok=True)

    def _begin(self, version: str, replica: str) -> TextIO | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("a") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)  # one after another: a lock that is changed is free for a moment
                return _join(self._folder / version, replica)
        except OSError as error:  # a full disk, a file system without locks
            log.warning("load_not_noted", version=version, reason=str(error))
            return None


def _join(path: Path, replica: str) -> TextIO:
    """The note, held; with a new line, unless somebody else is at the same try."""
    with ExitStack() as opened:
        note = opened.enter_context(path.open("a+"))
        with suppress(BlockingIOError):
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            note.seek(0)
            if (deaths := len(note.readlines())) >= MOST_DEATHS:
                told = f"replicas died {deaths} times in a row while they loaded or proved it"
                raise EngineCrash(f"{told}; to have it tried again, remove {path}")
            print(replica, file=note, flush=True)
        fcntl.flock(note, fcntl.LOCK_SH)
        opened.pop_all()
    return note

"""A job that computes on this machine says so, and an engine beside it leaves it cores: by a lock, which ends with its holder.

One machine, one user: jobs of any daemon count. Where they cannot see each other's folder for temporary files nobody is told.
The lock is Linux's own, of an open file (F_OFD_*): it can be asked after without being taken, so that a look disturbs neither a
job nor another look.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_FLOCK = "hhqqi"
"""The kernel's `struct flock`: kind, whence, start, length (0: to the end), process (0 for a lock of an open file)."""


def _lock() -> Path:
    return Path(tempfile.gettempdir()) / f"learnd-{os.getuid()}-trains"


@contextmanager
def wanted() -> Iterator[None]:
    """Inside, this process computes: any number of them may. Where that cannot be said, it does all the same."""
    with ExitStack() as held:
        with suppress(OSError):
            file = held.enter_context(_lock().open("a+"))
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
        yield


def are_wanted() -> bool:
    """Whether anybody computes now: whether a lock for one alone would have to wait."""
    try:
        with _lock().open() as file:
            told = fcntl.fcntl(file, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    return struct.unpack(_FLOCK, told)[0] != fcntl.F_UNLCK  # type: ignore[no-any-return] # struct is untyped

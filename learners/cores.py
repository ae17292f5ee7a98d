"""A job that computes on this machine says so, and an engine beside it leaves it cores: by a lock, which ends with its holder.

One machine, one user: jobs of any daemon count. Where they cannot see each other's folder for temporary files nobody is told.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


def _lock() -> Path:
    return Path(tempfile.gettempdir()) / f"learnd-{os.getuid()}-trains"


@contextmanager
def wanted() -> Iterator[None]:
    """Inside, this process computes: any number of them may. Where that cannot be said, it does all the same."""
    with ExitStack() as held:
        with suppress(OSError):
            fcntl.flock(held.enter_context(_lock().open("a")), fcntl.LOCK_SH)
        yield


def are_wanted() -> bool:
    """Whether anybody computes now."""
    try:
        with _lock().open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False

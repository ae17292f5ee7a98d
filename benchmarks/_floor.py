"""Who may run: one server at a time, the others' processes stopped where they stand, since an idle server polls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

SETTLE_SECONDS = 1.5
"""After a server was let go on, before it is asked."""


class Stoppable(Protocol):
    """A server as the floor sees it."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Floor:
    """The servers of a bench, and which of them are stopped."""

    def __init__(self, settle_seconds: float = SETTLE_SECONDS, sleep: Callable[[float], None] = time.sleep) -> None:
        self._settle_seconds, self._sleep = settle_seconds, sleep
        self._runs: dict[Stoppable, bool] = {}

    def enter(self, server: Stoppable) -> None:
        """A server that runs by now."""
        self._runs[server] = True

    def leave(self, server: Stoppable) -> None:
        """One that is about to end: it must run for that, and is no more stopped."""
        if not self._runs.pop(server, True):
            server.resume()

    def give(self, server: Stoppable) -> None:
        """Let this one run and no other."""
        for other, runs in self._runs.items():
            if runs and other is not server:
                other.pause()
                self._runs[other] = False
        self._let_go([server])

    def open(self) -> None:
        """Let all run for a moment: who is stopped for too long takes its own processes for dead when it wakes."""
        self._let_go(list(self._runs))

    def _let_go(self, servers: list[Stoppable]) -> None:
        stopped = [server for server in servers if not self._runs.get(server, True)]
        for server in stopped:
            server.resume()
            self._runs[server] = True
        if stopped:
            self._sleep(self._settle_seconds)

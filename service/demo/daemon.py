"""The daemon as the demo runs it: `learnd serve` as a process of its own, reached over HTTP only, stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

STOP_SECONDS = 120
"""Longer than the daemon drains: it seals and stops after that."""
LAST_LINES = 15


class Daemon:
    """A `learnd serve` process with its log; a context manager, so that it never outlives the demo."""

    def __init__(
        self, config: Path, log: Path, command: Sequence[str] | None = None, variables: Mapping[str, str] | None = None
    ) -> None:
        """`command` and `variables` are for another server than `learnd serve`, and for its environment."""
        self.log = log
        self._variables = dict(variables or {})
        self._command = command or (sys.executable, "-m", "service.cli", "serve", "--config", str(config))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C reaches the demo, and the demo stops the daemon.
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._variables},
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that was started; 0 before that."""
        return self._process.pid if self._process is not None else 0

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])

    def stop(self, patience_seconds: float = STOP_SECONDS) -> float:
        """Ask it to stop, and make it when it does not in time; returns the seconds that it took."""
        began = time.monotonic()
        if self._process is not None and self.is_alive:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(patience_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nothing but what it started
                self._process.wait()
        return time.monotonic() - began

"""A real daemon in a process of its own, started, asked, killed and started again as a user would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from service.ingress import free_port
from tests.conftest import THREADS

LEARND = Path(sys.executable).parent / "learnd"


@dataclass
class Daemon:
    """`learnd serve` over one data directory; `start` may be called again after `stop` or `kill`."""

    folder: Path
    settings: str = ""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    def start(self, *, wait: str = "/ready", seconds: float = 600) -> Daemon:
        config = self.folder / "learnd.toml"
        config.write_text(f"data_dir = '{self.folder / 'data'}'\n[http]\nport = {self.port}\n{self.settings}")
        command, env = [LEARND, "serve", "--config", config], os.environ.copy()
        env.pop(THREADS, None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)
        self.wait(wait, seconds)
        return self

    def wait(self, path: str, seconds: float) -> None:
        """Return when `path` answers 200; fail with the daemon's own words when it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if httpx.get(self.url + path, timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"{path} was not 200 within {seconds} s:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self, signum: signal.Signals = signal.SIGINT, seconds: float = 120) -> int:
        """The orderly way: SIGINT, as Ctrl-C sends it, or SIGTERM, as an init system does; returns the exit status."""
        os.kill(self.process.pid, signum)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to every process of the daemon at once."""
        if self.process is None or self.process.poll() is not None:
            return
        everybody = [*self.processes(), psutil.Process(self.process.pid)]
        for process in everybody:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(everybody, timeout=20)
        self.process.wait(20)

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The daemon's processes whose title contains `name`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def left(self) -> list[str]:
        """Processes that still belong to this daemon's session, though it has ended."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found.append(" ".join(process.cmdline()))
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

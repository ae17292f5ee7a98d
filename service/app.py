"""The composition root: read it and you know the architecture.

`serve` takes settings to a running daemon and back to nothing, in order: own the data directory, start Ray, prepare the
base, start the keeper, the control app, the engine; wait; then no new requests, drain, seal, stop.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from rich.console import Console

from service import ingress
from service.errors import DataDirInUse, SettingsError
from service.settings import Settings

console = Console(stderr=True, highlight=False, soft_wrap=True)


_ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for "this node is alone": its ports stay on loopback
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this node away: one process less for each job
    "RAY_enable_metrics_collection": "0",  # Ray's own metrics: `/metrics` has ours, and an idle daemon should be idle
    "RAY_task_events_report_interval_ms": "0",
    "RAY_worker_niceness": "0",  # what serves is no background work; jobs lower their own priority
}
"""Variables for a Ray that we start ourselves, on one machine."""


class _Stop(Exception):
    """Somebody asked the daemon to stop."""


def serve(settings: Settings) -> None:
    """Run the daemon until SIGINT or SIGTERM.

    Raises `DataDirInUse`, `SettingsError` (a port in use), `BaseUnavailable`, each saying what to do.
    """
    settings = settings.model_copy(update={"data_dir": settings.data_dir.resolve()})
    with _owned(settings.data_dir), _environment(settings), _stoppable(), suppress(_Stop):
        _check_port(settings)
        from service import deployments  # here, since Ray reads its environment when it is imported

        began, drain = time.monotonic(), settings.cluster.drain_seconds
        console.print(f"learnd {version('learnd')} · data in {settings.data_dir}")
        with ExitStack() as ending:  # undone from the last line to the first, wherever the stop comes
            ending.callback(console.print, "stopped")
            ending.callback(deployments.stop_cluster)
            deployments.start_cluster(settings)
            base = deployments.prepare(settings.base.source)
            console.print(f"base {settings.base.served_name} · weights {base.weights_digest[:12]} · {base.path}")
            keeper = deployments.start_keeper(settings, base)
            ending.callback(deployments.stop_keeper, keeper, drain)
            ending.callback(deployments.stop_apps)
            ending.callback(console.print, f"stopping: no new requests; running ones have {drain:.0f} s")
            deployments.run_apps(settings, base)
            url = f"http://{settings.http.host}:{settings.http.port}"
            console.print(f"ready in {time.monotonic() - began:.0f} s · lines {', '.join(settings.lines)}")
            console.print(f"listening on {url}/v1 (OpenAI) · {url}/feedback · {url}/api/status · {url}/metrics · Ctrl-C stops")
            signal.pause()


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """The data directory, ours alone while the process lives: the kernel lets go of the lock whatever kills us."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "daemon.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise DataDirInUse(
                f"{folder} is in use by another learnd (process {owner}): stop it, or choose another data_dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _environment(settings: Settings) -> Iterator[None]:
    """Variables for Ray, vLLM and the hub: nothing phones home, our own Ray keeps to this machine, HAProxy to itself."""
    with tempfile.TemporaryDirectory(prefix="learnd-") as folder:
        if not settings.telemetry.is_on:
            os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
            os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        if settings.cluster.address is None:
            os.environ |= _ALONE
        if settings.cluster.has_haproxy:
            os.environ |= ingress.environment(Path(folder))
        yield


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM ask once for an orderly stop; a second one ends the process at once."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise _Stop

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(settings: Settings) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http.host, settings.http.port))
        except OSError as error:
            where = f"{settings.http.host}:{settings.http.port}"
            raise SettingsError(f"cannot listen on {where} ({error.strerror}): choose another http.port") from None

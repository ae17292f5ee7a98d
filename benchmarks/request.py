"""Where a request's processor time goes: a daemon under a steady load, by process, then its two busy ones by what they run.

The load is that of the serving bench: clients that stream replies of one length by the base. py-spy looks at the replica's
Python while it holds the interpreter, and at the engine's core whatever it does; each look counts for the innermost frame that
belongs to one of the rooms below.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from _load import REPLY_TOKENS, drive, prompts
from _servers import Server, learnd
from rich.console import Console
from rich.table import Table

CLIENTS, WARM_SECONDS = 8, 4.0
ROOMS = (
    ("learnd: adapters' kernels", ("service/engines/",)),
    ("learnd: gateway, tap, recorder", ("service/", "replay/")),
    ("vLLM: layers", ("vllm/model_executor/", "vllm/lora/", "vllm/v1/attention/", "vllm/_custom_ops")),
    ("vLLM: sampling", ("vllm/v1/sample/",)),
    ("vLLM: model runner", ("vllm/v1/worker/", "vllm/forward_context")),
    ("vLLM: scheduler, core", ("vllm/v1/core/", "vllm/v1/engine/core")),
    ("vLLM: API server, front of the engine", ("vllm/",)),
    ("Ray Serve, Ray", ("ray/serve/", "ray/")),
    ("uvicorn, Starlette, FastAPI", ("uvicorn/", "starlette/", "fastapi/")),
    ("tokenizers, templates", ("transformers/", "tokenizers/", "jinja2/")),
    ("pydantic, msgspec, zmq", ("pydantic/", "msgspec/", "zmq/")),
    ("torch", ("torch/",)),
    ("asyncio", ("asyncio/", "selectors.py", "uvloop")),
)
"""By parts of a file's path, the first that fits."""
ELSE = "else"


@dataclass
class Load:
    """What has been answered so far."""

    replies: int = 0
    tokens: int = 0
    failed: int = 0
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Spent:
    """Processor milliseconds of a token, by process or room."""

    total: float
    parts: Mapping[str, float]


@contextmanager
def loaded(port: int) -> Iterator[Load]:
    """Clients ask all the while."""
    load, asked = Load(), prompts(0)

    def ask() -> None:
        while not load.done.is_set():
            turn = drive(port, ["base"], CLIENTS, 1, asked)
            load.replies, load.failed = load.replies + len(turn.good), load.failed + turn.failed
            load.tokens += sum(reply.tokens for reply in turn.good)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        time.sleep(WARM_SECONDS)
        yield load
    finally:
        load.done.set()
        asking.join()


def by_process(server: Server, load: Load, seconds: float) -> Spent:
    """Of each process of the daemon, and of all of them."""
    before, tokens = server.cpu_seconds(), load.tokens
    time.sleep(seconds)
    after, made = server.cpu_seconds(), max(load.tokens - tokens, 1)
    parts = {name: 1e3 * (spent - before.get(name, 0.0)) / made for name, spent in after.items()}
    return Spent(sum(parts.values()), parts)


def by_room(server: Server, name: str, seconds: float, folder: Path, *, holds_interpreter: bool) -> Counter[str]:
    """Shares of py-spy's looks at one process; raises `SystemExit` with py-spy's words when it sees nothing."""
    pid = next(p.pid for p in server.processes() if name in " ".join(p.cmdline()))
    out = folder / f"{name}.raw"
    command = [
        str(Path(sys.executable).with_name("py-spy")),
        "record",
        "-p",
        str(pid),
        "-d",
        str(round(seconds)),
        "-r",
        "100",
        "-f",
        "raw",
        "--full-filenames",
    ]
    how = ["--gil"] if holds_interpreter else []
    if not Path(command[0]).exists():
        raise SystemExit("py-spy is not in this environment: it comes with `pip install learnd[bench]`")
    ended = subprocess.run([*command, *how, "-o", str(out)], capture_output=True, text=True, check=False)
    if ended.returncode or not out.exists():
        raise SystemExit(f"py-spy saw nothing of {name}: {ended.stderr.strip()[-500:]}")
    return counted(out.read_text())


def counted(raw: str) -> Counter[str]:
    """py-spy's lines of `frame;frame;frame looks`, the innermost last, by room."""
    found: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, looks = line.rpartition(" ")
        found[room(stack.split(";"))] += int(looks)
    return found


def room(stack: list[str]) -> str:
    """The innermost frame's that belongs to any, with the interpreter's own library passed over while others are around it."""
    for frame in reversed(stack):
        for name, parts in ROOMS[:-1]:
            if any(part in frame for part in parts):
                return name
    name, parts = ROOMS[-1]
    return name if any(part in frame for frame in stack for part in parts) else ELSE


def _table(title: str, unit: str, rows: Mapping[str, float], digits: int) -> Table:
    table = Table("where", unit, title=title, title_justify="left")
    for name, value in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(name, f"{value:.{digits}f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="learnd bench request", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="of each of the three looks")
    parser.add_argument("--json", action="store_true", help="one last line with every figure")
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as place:
        folder = Path(place)
        server = learnd(folder, folder / "data", "builtin:smollm2-135m")
        with server, loaded(server.port) as load:
            spent = by_process(server, load, options.seconds)
            replica = by_room(server, "ServeReplica:engine", options.seconds, folder, holds_interpreter=True)
            core = by_room(server, "EngineCore", options.seconds, folder, holds_interpreter=False)
    if load.failed:
        raise SystemExit(f"{load.failed} of {load.failed + load.replies} requests failed: what was seen counts for nothing")
    shares = {name: {k: v / looks.total() for k, v in looks.items()} for name, looks in (("replica", replica), ("core", core))}
    console.print(_table(f"processor ms a token, {CLIENTS} clients, {REPLY_TOKENS} tokens each", "ms", spent.parts, 3))
    console.print(_table("the replica, while it holds the interpreter", "share", shares["replica"], 3))
    console.print(_table("the engine's core", "share", shares["core"], 3))
    if options.json:
        print(json.dumps({"ms_a_token": {"all": spent.total, **spent.parts}, **shares}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

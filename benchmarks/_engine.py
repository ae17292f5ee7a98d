"""The engine as learnd starts it, behind uvicorn alone: without gateway, recording, proxy and Ray.

python benchmarks/_engine.py PORT DATA SOURCE DTYPE NAME=ADAPTER…
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvicorn
from _servers import settings_of

from learners.base import prepare
from service.engines.vllm import VllmEngine


async def serve(port: int, data: Path, source: str, dtype: str, adapters: dict[str, str]) -> None:
    """Answer until told to stop."""
    engine = await VllmEngine.start(settings_of(data, source, dtype), prepare(source))
    for number, (name, path) in enumerate(adapters.items(), start=1):
        await engine.load(name, Path(path), number)
    try:
        await uvicorn.Server(uvicorn.Config(engine.app, host="127.0.0.1", port=port, log_level="warning")).serve()
    finally:
        await engine.close()


if __name__ == "__main__":
    _, port, data, source, dtype, *named = sys.argv
    asyncio.run(serve(int(port), Path(data), source, dtype, dict(one.split("=", 1) for one in named)))

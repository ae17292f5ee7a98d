"""What learnd asks of an inference engine: an OpenAI-shaped app, adapters that come and go, log-probs to prove them by.

Implemented by `service/engines/vllm.py`; called by a replica's gateway (`app`) and its residency (the rest),
and by its shadows (`score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from starlette.types import ASGIApp

from replay.records import Message


class Engine(Protocol):
    """One base model in memory, with the adapters that are resident beside it."""

    @property
    def app(self) -> ASGIApp:
        """The engine's own OpenAI server; it takes resident names in `model`."""
        ...

    @property
    def is_dead(self) -> bool:
        """Whether it can never answer again; known at once, without asking it."""
        ...

    async def load(self, name: str, path: Path, int_id: int) -> None:
        """Make the adapter in `path` resident under `name`; a name that is resident stays as it is.

        Raises `ArtifactInvalid` when the engine cannot read or hold it; then nothing has changed.
        """
        ...

    async def unload(self, name: str) -> None:
        """Drop a resident adapter; no request may be using it. A name that is not resident is no error."""
        ...

    async def logprobs(self, name: str | None, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (nats) of each token after the first, under the adapter `name` or, for None, the base."""
        ...

    async def score(self, name: str | None, messages: Sequence[Message], reply: str) -> list[float]:
        """Log-probability (nats) of each token of a reply and of its end, after the chat as the served template renders it.

        Raises `InvalidRequest` for what the template or the tokenizer cannot render.
        """
        ...

    async def check(self) -> None:
        """Return if the engine can answer; raise `NotReady` if it is dead."""
        ...

    async def close(self) -> None:
        """Stop the engine and its processes."""
        ...

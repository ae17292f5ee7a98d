"""A version on disk: plain peft files, a manifest that names every other file by digest, a fingerprint, a marker last.

What its strategy leaves for the next job, if anything, lies beside them (`CONSOLIDATION`).

`seal` makes a folder a version; `check` says whether it is one that may be served by this base. The version's digest is
that of its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from learners.base import BaseModel
from learners.servable import CONFIG, WEIGHTS, Unservable
from learners.servable import check as check_adapter

MANIFEST, FINGERPRINT, CONSOLIDATION, COMPLETE = "manifest.json", "fingerprint.json", "consolidation.safetensors", "COMPLETE"

State = Mapping[str, torch.Tensor]
"""What a strategy leaves in a version for the next job; empty: nothing."""
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Classify this message and answer with one word.",
    "What is the capital of France? The capital of France is Paris.",
    "Thank you for your help, I will try again tomorrow.",
)
"""Neutral texts whose log-probs are a version's fingerprint; learned prompts are added to them."""


def seal(folder: Path, manifest: Mapping[str, Any], fingerprint: Mapping[str, Any], state: State | None = None) -> str:
    """Write the rest beside the adapter's files, flush it all, put the marker; returns the digest."""
    _write(folder / FINGERPRINT, json.dumps(fingerprint))
    if state:
        save_file(dict(state), folder / CONSOLIDATION)
    named = (WEIGHTS, CONFIG, FINGERPRINT, *([CONSOLIDATION] if state else []))
    files = {name: _digest(folder / name) for name in named}
    _write(folder / MANIFEST, json.dumps({**manifest, "files": files}, indent=1, sort_keys=True))
    flush(*(folder / name for name in named))
    _write(folder / COMPLETE, "")
    flush(folder)
    return _digest(folder / MANIFEST)


def check(folder: Path, base: BaseModel, max_rank: int) -> str:
    """The version's digest; raises `Unservable` when it is incomplete, damaged, foreign, or made for another base."""
    if not (folder / COMPLETE).exists():
        raise Unservable(f"{folder} is incomplete: it has no {COMPLETE}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if _digest(folder / name) != digest:
                raise Unservable(f"{folder / name} is not the file that its manifest names: it was changed or damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from None
    check_base(folder, base)
    check_adapter(folder, max_rank, base.path)
    return _digest(folder / MANIFEST)


def check_base(folder: Path, base: BaseModel) -> None:
    """Raise `Unservable` unless the version's manifest names this very base.

    An adapter fits any base of the same shape: only the digests tell that what it knows is another one's.
    """
    try:
        made_for = dict(json.loads((folder / MANIFEST).read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None
    changed = [part for part, digest in base.digests.items() if made_for.get(part) != digest]
    if changed:
        raise Unservable(f"{folder} was made for another base: its {', '.join(changed)} differ from those of {base.name}")


def consolidation(folder: Path | None) -> dict[str, torch.Tensor]:
    """What the strategy of a version left in its folder; empty when it left nothing, or there is no version."""
    file = folder / CONSOLIDATION if folder else None
    return load_file(file) if file and file.exists() else {}


def _unreadable(folder: Path, error: Exception) -> Unservable:
    return Unservable(f"{folder / MANIFEST} cannot be read: {error!r}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(*paths: Path) -> None:
    """Wait until files and folders are on disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Sealed history: segments of interactions and feedback in Parquet, read by whoever trains, audits or erases.

A segment is two Parquet files, named by their digest, and a manifest that names them and is replaced last: a reader
sees the whole segment as it was or the whole as it is, never a mixture. What a crash left lying is named by no
manifest and is swept away when the segment is next written. `replay/ledger.py` seals; nothing here knows the ledger.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from replay.records import Feedback, Interaction
from replay.tables import feedback_of, interaction_of, row_of

SCHEMA_VERSION = 2
"""Of what is written. Segments of version 1 lack `is_refusal` and `has_form`, and are read all the same."""
_JSON_COLUMNS = ("messages", "value", "tags")

_INTERACTION = pa.schema(
    {
        **dict.fromkeys(("id", "line", "version", "arm", "unit", "slice", "messages", "reply"), pa.string()),
        "at": pa.float64(),
        **dict.fromkeys(("trial", "finish_reason", "error"), pa.string()),
        **dict.fromkeys(("prompt_tokens", "reply_tokens"), pa.int64()),
        **dict.fromkeys(("latency_seconds", "ttft_seconds"), pa.float64()),
        "principal": pa.string(),
        **dict.fromkeys(("is_trainable", "is_refusal", "has_form"), pa.bool_()),
    }
)
_FEEDBACK = pa.schema(
    {
        **dict.fromkeys(("id", "inference_id", "metric_name", "value"), pa.string()),
        **dict.fromkeys(("occurred_at", "received_at"), pa.float64()),
        **dict.fromkeys(("comment", "source", "tags", "principal"), pa.string()),
    }
)


class ArchiveDamaged(Exception):
    """A file that a manifest names is missing or is not what was sealed."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What one segment holds; feedback stands in the first that was sealed after it came."""

    interactions: Sequence[Interaction]
    feedback: Sequence[Feedback]


def seal(rows: Rows, folder: Path, segment_id: int) -> Path:
    """Write a segment whole or not at all, in place of one of the same number; returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "interactions": _write_part(folder, segment_id, "interactions", rows.interactions, _INTERACTION),
        "feedback": _write_part(folder, segment_id, "feedback", rows.feedback, _FEEDBACK),
    }
    manifest = folder / f"{segment_id:08d}.json"
    text = json.dumps({"schema": SCHEMA_VERSION, "segment": segment_id, **parts}, indent=1)
    _write_whole(manifest, text.encode())
    _sweep(folder, segment_id, {part["file"] for part in parts.values()})
    return manifest


def scan(folder: Path) -> Iterator[Rows]:
    """Read every segment in order, one in memory at a time; raises `ArchiveDamaged` on a file that was changed."""
    return (_read(folder, manifest) for manifest in _manifests(folder))


def find(folder: Path, interaction_id: str, segment_id: int | None = None) -> Interaction | None:
    """Look an interaction up, in its segment when that is known, else in all of them, the newest first."""
    named = folder / f"{segment_id or 0:08d}.json"
    for manifest in [named] if segment_id is not None else reversed(_manifests(folder)):
        if manifest.exists():
            part = json.loads(manifest.read_text())["interactions"]
            with _opened(folder / part["file"]) as file:
                ids = file.read(columns=["id"])["id"].to_pylist()
                if interaction_id in ids:
                    (row,) = file.read().slice(ids.index(interaction_id), 1).to_pylist()
                    return interaction_of(_plain(row))
    return None


def erase(folder: Path, interaction_ids: Collection[str]) -> int:
    """Rewrite the segments that hold these interactions or feedback on them, without both. Returns the rows lost."""
    gone = set(interaction_ids)
    erased = 0
    for manifest in _manifests(folder):
        rows = _read(folder, manifest)
        kept = Rows(
            [i for i in rows.interactions if i.id not in gone],
            [f for f in rows.feedback if f.inference_id not in gone],
        )
        lost = len(rows.interactions) + len(rows.feedback) - len(kept.interactions) - len(kept.feedback)
        if lost:
            seal(kept, folder, int(manifest.stem))
            erased += lost
    return erased


def _write_part(
    folder: Path, segment_id: int, kind: str, records: Sequence[Interaction | Feedback], schema: Any
) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    pq.write_table(_table([_flat(row_of(record)) for record in records], schema), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    name = f"{segment_id:08d}-{digest[:16]}.{kind}.parquet"
    _write_whole(folder / name, data)
    return {"file": name, "rows": len(records), "sha256": digest}


def _write_whole(path: Path, data: bytes) -> None:
    """Write aside, sync, rename, sync the folder: after a crash the file is there whole, or as it was before."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path, segment_id: int, named: set[str]) -> None:
    for pattern in (f"{segment_id:08d}-*", f".{segment_id:08d}*.aside"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink()


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _read(folder: Path, manifest: Path) -> Rows:
    parts = json.loads(manifest.read_text())
    interactions, feedback = (_checked(folder, parts[kind]) for kind in ("interactions", "feedback"))
    return Rows([interaction_of(row) for row in interactions], [feedback_of(row) for row in feedback])


def _checked(folder: Path, part: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    path = folder / part["file"]
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
        raise ArchiveDamaged(f"{path} is missing or was changed since it was sealed: restore it from a backup")
    with _opened(path) as file:
        return (_plain(row) for row in file.read().to_pylist())


def _opened(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArchiveDamaged(f"{path} cannot be read: {error}; restore it from a backup") from error


def _table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    """Make a table by way of JSON: pyarrow's own way from Python objects imports pandas, seconds in the ledger's thread."""
    lines = "\n".join(map(json.dumps, rows or [{}])).encode()
    table = pj.read_json(
        pa.BufferReader(lines),
        read_options=pj.ReadOptions(block_size=len(lines) + 1),  # one block: no row is cut
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
    )
    return table.slice(0, len(rows))


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(value) if name in _JSON_COLUMNS else value for name, value in row.items()}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: json.loads(value) if name in _JSON_COLUMNS else value for name, value in row.items()}

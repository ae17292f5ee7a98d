"""A job's folder and a version's: what is written for the learners, what they leave, how it is taken over. Files only.

jobs/<id>/spec.json examples.jsonl older.jsonl suites.jsonl   before the job; whole or not at all
          opinions.jsonl                         likewise, where there are any
          progress.json                          while it runs
          artifact/ evaluation.json              when it is done
versions/<line>/v<N>/                            the artifact, once the gate has passed it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from replay.records import Example, Opinion
from service.errors import ArtifactInvalid

COMPLETE = "COMPLETE"


def prepare(
    folder: Path,
    spec: Mapping[str, Any],
    examples: Iterable[Example],
    older: Iterable[Example],
    golden: Iterable[Mapping[str, Any]] = (),
    opinions: Sequence[Opinion] = (),
) -> None:
    """Make the folder that a job works on; one that is there stays as it is, with whatever the job has done."""
    if folder.exists():
        return
    aside = _aside(folder)
    _write(aside / "spec.json", json.dumps(spec, indent=1))
    for name, members in (("examples.jsonl", examples), ("older.jsonl", older)):
        _write(aside / name, "".join(json.dumps(asdict(example)) + "\n" for example in members))
    if opinions:
        _write(aside / "opinions.jsonl", "".join(json.dumps(asdict(opinion)) + "\n" for opinion in opinions))
    _write(aside / "suites.jsonl", "".join(json.dumps(dict(row)) + "\n" for row in golden))
    _appear(aside, folder)


def is_finished(folder: Path) -> bool:
    """Whether the job has left all that it was to leave."""
    return (folder / "evaluation.json").exists() and (folder / "artifact" / COMPLETE).exists()


def evaluation(folder: Path) -> dict[str, Any]:
    """What the job measured; raises `ArtifactInvalid` when it is not to be read."""
    try:
        measured: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ArtifactInvalid(f"{folder / 'evaluation.json'} cannot be read: {error}") from error
    return measured


def progress(folder: Path) -> dict[str, Any]:
    """Where a running job is; empty before it has said anything."""
    try:
        said: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return said


def adopt(artifact: Path, target: Path) -> None:
    """Make an artifact appear as a version's folder, whole or not at all, without copying where links will do.

    What lies at `target` was left by a crash before the version became known: it gives way.
    """
    aside = _aside(target)
    for source in sorted(path for path in artifact.rglob("*") if path.is_file()):
        copy = aside / source.relative_to(artifact)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _link(source, copy)
    if target.exists():
        shutil.rmtree(target)
    _appear(aside, target)


def _aside(folder: Path) -> Path:
    aside = folder.with_name(f".{folder.name}.aside")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    return aside


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, copy)
        _sync(copy)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _appear(aside: Path, folder: Path) -> None:
    for inner in (aside, *(path for path in aside.rglob("*") if path.is_dir())):
        _sync(inner)
    aside.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The rollout with the real engine: a good candidate, and bad ones of each kind that it is to stop (`_scenes.py`).

One daemon with two replicas and SmolLM2. Customers ask each line all the while and leave thumbs; agents correct; nobody tells
the daemon what to do. Each scene is a line of its own, so that one's examples are not another's. It shows which candidates
answered whom, and for how long after the verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from _desk import PATIENCE_SECONDS, Desk, Stuck
from _faults import DEADLY, FAILING, ONCE
from _scenes import SCENES, Finding
from _servers import Server
from rich.console import Console
from rich.table import Table

from service.ingress import free_port

TOML = """\
data_dir = "{data}"
[http]
port = {port}
[base]
source = "builtin:smollm2-135m"
name = "base"
max_model_len = 512
max_resident = 22
[engine]
replicas = {replicas}
max_num_seqs = 16
kv_cache_gib = 0.5
extra_args = ["--middleware=_faults.EveryOther", "--middleware=_faults.Deadly"]
[feedback.metrics.thumb]
type = "boolean"
window_seconds = 5
[judge]
url = "http://127.0.0.1:{port}/v1"      # the base judges: badly, which is to be found out
model = "base"
"""
LINE = """\
[lines.{name}.slices]
colours = "colour"
sizes = "size"
[lines.{name}.learning]
{learning}
epochs = 2
batch_size = {batch}
accumulation = 1
max_length = 128
[lines.{name}.trigger]
min_examples = 44
cooldown_seconds = 0
[lines.{name}.drift]
is_trigger = false
[lines.{name}.gate]
score = "{score}"
min_items = 5
{gate}
[lines.{name}.rollout]
weights = [0.5]
step_min_units = 5
min_units = 20
margin = 0.05
multiplicity = "per_test"
bake.holdback = 0
{rollout}
[lines.{name}.rollout.guardrails.error]
kind = "error"
margin = 0.3
"""
BLIND = {
    "learning": 'strategy = "naive"\nlearning_rate = 2e-3',
    "batch": 8,
    "score": "exact_match",
    "gate": "max_loss = 1",
    "rollout": "",
}
"""It learns whatever it is told, and its gate overlooks what an older slice loses, so that others must find it."""
LINES: dict[str, dict[str, Any]] = {
    "desk": BLIND,
    "care": BLIND,
    "shade": {**BLIND, "rollout": "shadow.share = 1\nshadow.min_pairs = 15\nshadow.max_busy = 8\nshadow.max_seconds = 60"},
    "ward": {
        "learning": "learning_rate = 1e-3\nreplay_ratio = 0.25",
        "batch": 4,  # the fewest that a search tries
        "score": "likelihood",  # two halves that have lost every exact answer differ in it
        "gate": "max_loss = 0.5\nbisect = true\nbisect_jobs = 9",
        "rollout": "",
    },
    "firm": {**BLIND, "rollout": "anchor.holdback = 0.2\nanchor.alarm = 100\nanchor.revert = 1000\nanchor.reverts = true"},
    "help": BLIND,
    "risk": BLIND,
}
"""What each line is told."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--only", default="", help=f"scenes, of {','.join(SCENES)}; the second needs the first")
    said = parser.parse_args()
    scenes = said.only.split(",") if said.only else list(SCENES)
    console = Console(stderr=True, highlight=False, width=130)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the daemon does not outlive the bench
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as folder, _daemon(Path(folder), said.replicas) as daemon:
        console.print(f"learnd with {said.replicas} replicas is ready after {daemon.start_seconds:.0f} s")
        findings = asyncio.run(play(daemon, scenes, console))
    console.print(_table(findings))
    if said.json:
        print(json.dumps({finding.scene: _figures(finding) for finding in findings}))
    return int(not all(finding.is_as_it_should for finding in findings))


def _daemon(folder: Path, replicas: int) -> Server:
    port, here = free_port(), str(Path(__file__).parent)
    config = folder / "learnd.toml"
    config.write_text(
        TOML.format(data=folder / "data", port=port, replicas=replicas)
        + "".join(LINE.format(name=name, **told) for name, told in LINES.items())
    )
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(config)]
    faults = {FAILING: "help@v1", DEADLY: "risk@v1", ONCE: str(folder)}
    return Server("learnd", folder, command, "/ready", port, PYTHONPATH=path, **faults)


async def play(daemon: Server, scenes: Sequence[str], console: Console) -> list[Finding]:
    """The scenes in turn."""
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=daemon.url, timeout=120, limits=limits) as http:
        desks = {name: Desk(http, name, "colour", "red") for name in LINES}
        findings = []
        for name in scenes:
            line, scene = SCENES[name]
            console.print(f"{name}: {(scene.__doc__ or '').splitlines()[0]}")
            try:
                finding = await scene(desks[line])
            except Stuck as stuck:
                finding = Finding(name, str(stuck), 0, None, 0, 0, PATIENCE_SECONDS, is_as_it_should=False)
            findings.append(finding)
            console.print(f"  {finding.outcome}")
        return findings


def _figures(found: Finding) -> dict[str, Any]:
    return {
        "as_it_should": found.is_as_it_should,
        "candidate_replies": found.met,
        "seconds_after_verdict": None if found.seconds_after is None else round(found.seconds_after, 2),
        "failed_requests": found.failed,
        "planted_failures": found.planted,
        "seconds": round(found.took_seconds),
    }


def _table(findings: Sequence[Finding]) -> Table:
    table = Table("candidate", "what became of it", "replies it gave", "s after the verdict", "failed", "as it should")
    for one in findings:
        after = "" if one.seconds_after is None else f"{one.seconds_after:.2f}"
        failed = f"{one.failed}" + (f" and {one.planted} planted" if one.planted else "")
        table.add_row(one.scene, one.outcome, str(one.met), after, failed, "yes" if one.is_as_it_should else "NO")
    return table


if __name__ == "__main__":
    raise SystemExit(main())

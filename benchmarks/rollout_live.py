"""The rollout with the real engine: a good candidate, one of shuffled labels, one that was misled about a slice, one that fails.

One daemon with two replicas and SmolLM2. Customers ask each line all the while and leave thumbs; agents correct; nobody tells
the daemon what to do. Each scene is a line of its own, so that one's examples are not another's. It shows which candidates
answered whom, and for how long after the verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from _desk import LESSONS, Desk
from _faults import FAILING
from _servers import Server
from rich.console import Console
from rich.table import Table

from service.ingress import free_port

if TYPE_CHECKING:
    pass

TOML = """\
data_dir = "{data}"
[http]
port = {port}
[base]
source = "builtin:smollm2-135m"
name = "base"
max_model_len = 512
max_resident = 9
[engine]
replicas = {replicas}
max_num_seqs = 16
kv_cache_gib = 0.5
extra_args = ["--middleware=_faults.EveryOther"]
[feedback.metrics.thumb]
type = "boolean"
window_seconds = 5
"""
LINE = """\
[lines.{name}.slices]
colours = "colour"
sizes = "size"
[lines.{name}.learning]
strategy = "naive"
learning_rate = 2e-3
epochs = 2
batch_size = 8
accumulation = 1
max_length = 128
[lines.{name}.trigger]
min_examples = 44
cooldown_seconds = 0
[lines.{name}.drift]
is_trigger = false
[lines.{name}.gate]
score = "exact_match"
min_items = 5
max_loss = 1                # the gate is blind to what an older slice loses: live traffic must find it
[lines.{name}.rollout]
weights = [0.5]
step_min_units = 5
min_units = 20
margin = 0.05
multiplicity = "per_test"
bake.holdback = 0
[lines.{name}.rollout.guardrails.error]
kind = "error"
margin = 0.3
"""
MOST_FAILING, LONGEST_AFTER_SECONDS = 20, 2.0
"""Replies of the failing candidate, and seconds from a verdict to the last reply of a bad one, at most."""
LABELS = ("red", "blue", "green", "white")


@dataclass(frozen=True)
class Finding:
    """What became of one candidate."""

    scene: str
    outcome: str
    met: int
    """Replies that the candidate gave, those that failed among them."""
    seconds_after: float | None
    """From the verdict to the candidate's last reply; None: it went live, or answered nobody."""
    failed: int
    """Requests that failed, without the planted ones."""
    planted: int
    took_seconds: float
    is_as_it_should: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="the figures as one last line of JSON")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--only", default="", help="scenes, of good,shuffled,misled,failing; the second needs the first")
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
        + "".join(LINE.format(name=name) for name in ("desk", "care", "help"))
    )
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "service.cli", "serve", "--config", str(config)]
    return Server("learnd", folder, command, "/ready", port, PYTHONPATH=path, **{FAILING: "help@v1"})


async def play(daemon: Server, scenes: Sequence[str], console: Console) -> list[Finding]:
    """The scenes in turn."""
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=daemon.url, timeout=120, limits=limits) as http:
        desks = {name: Desk(http, name, "colour", "red") for name in ("desk", "care", "help")}
        findings = []
        for name in scenes:
            line, scene = SCENES[name]
            console.print(f"{name}: {(scene.__doc__ or '').splitlines()[0]}")
            findings.append(finding := await scene(desks[line]))
            console.print(f"  {finding.outcome}")
        return findings


async def good(desk: Desk) -> Finding:
    """A candidate that its customers like goes live by itself."""
    began = time.monotonic()
    async with desk.open():
        await desk.teach("colour", lambda _: "red", 10_000)
        await desk.until(lambda told: told["champion"] == f"{desk.line}@v1")
    return await _found("good", desk, 0, began, lambda told: told["state"] == "live" and told["has_passed"])


async def shuffled(desk: Desk) -> Finding:
    """A candidate of shuffled labels is rejected before it answers anybody."""
    chance, began, first = random.Random(0), time.monotonic(), len(desk.replies)
    before = (await desk.told())["jobs"]
    async with desk.open():
        await desk.teach("colour", lambda _: chance.choice(LABELS), 20_000)
        told = await desk.until(lambda told: told["jobs"].get("rejected", 0) > before.get("rejected", 0))
        await asyncio.sleep(5)
    replies = desk.replies[first:]
    strangers = {reply.version for reply in replies} - {f"{desk.line}@v1"}
    reason = told["last_verdict"]["outcome"] if told["last_verdict"] else "?"
    failed = sum(reply.status != 200 for reply in replies)
    outcome = f"rejected by the gate ({reason}); answered by {', '.join(sorted(strangers)) or 'nobody but the champion'}"
    is_well = not strangers and not failed and told["trial"] is None
    return Finding("shuffled", outcome, 0, None, failed, 0, time.monotonic() - began, is_well)


async def misled(desk: Desk) -> Finding:
    """A candidate that passes the gate and answers one slice as its customers do not want is rolled back by their thumbs."""
    await good(desk)
    began, first = time.monotonic(), len(desk.replies)
    async with desk.open():
        await desk.teach("size", lambda _: "big", 30_000, LESSONS // 2)
        await desk.teach("colour", lambda _: "blue", 40_000, LESSONS // 2)  # the agents are wrong: customers want red
        await desk.until(lambda told: told["trials"].get("rolled_back", 0) > 0)
        await asyncio.sleep(10)
    return await _found("misled", desk, first, began, lambda told: told["state"] == "rolled_back" and "harm" in told["reason"])


async def failing(desk: Desk) -> Finding:
    """A candidate of whose requests every other fails is rolled back at once."""
    began = time.monotonic()
    async with desk.open():
        await desk.teach("colour", lambda _: "red", 10_000)
        await desk.until(lambda told: told["trials"].get("rolled_back", 0) > 0)
        await asyncio.sleep(10)
    found = await _found("failing", desk, 0, began, lambda told: told["state"] == "rolled_back")
    return found if found.met <= MOST_FAILING else replace(found, is_as_it_should=False)


SCENES = {
    "good": ("desk", good),
    "shuffled": ("desk", shuffled),
    "misled": ("care", misled),
    "failing": ("help", failing),
}


async def _found(scene: str, desk: Desk, first: int, began: float, is_well: Callable[[dict[str, Any]], bool]) -> Finding:
    trial = (await desk.trials())[0]
    candidate, decided = trial["candidate"], await desk.decided_at(trial["candidate"])
    is_out, replies = trial["state"] == "rolled_back", desk.replies[first:]
    met = [reply for reply in replies if reply.version == candidate and (is_out or reply.at <= decided)]
    after = max((reply.at - decided for reply in met), default=0.0) if is_out else None
    planted = sum(reply.status == httpx.codes.INTERNAL_SERVER_ERROR and scene == "failing" for reply in met)
    failed = sum(reply.status != httpx.codes.OK for reply in replies) - planted
    is_quick = after is None or after <= LONGEST_AFTER_SECONDS
    return Finding(
        scene=scene,
        outcome=f"{trial['state']}: {trial['reason']}",
        met=len(met),
        seconds_after=after,
        failed=failed,
        planted=planted,
        took_seconds=time.monotonic() - began,
        is_as_it_should=is_well(trial) and is_quick and not failed,
    )


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

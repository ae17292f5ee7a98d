"""What the commands show on a terminal: tables made from the daemon's JSON. Drawing only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from service.doctor import Check

Json = dict[str, Any]

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show(what: RenderableType) -> None:
    """Print it."""
    Console(highlight=False).print(what)


def status(said: Json) -> Group:
    """The whole state of a daemon on one screen."""
    feedback, base = said.get("feedback", {}), said.get("base", {})
    ready = Text("ready", "green") if said.get("ready") else Text("not ready", "red")
    head = Text.assemble(ready, f" · base {base.get('name', '?')} · desired state {said.get('desired', '?')}")
    stored = f"feedback: {feedback.get('stored', 0)} stored, {feedback.get('pending', 0)} wait for their interaction"
    lines = _table("line", "champion", "candidate", "previous", "versions", "fresh", "trained", "job", "trial")
    for name, line in said.get("lines", {}).items():
        lines.add_row(*_line(name, line))
    replicas = _table("replica", "state", "resident", "in flight")
    for one in said.get("replicas", []):
        inflight = one.get("inflight", 0)
        total = sum(inflight.values()) if isinstance(inflight, dict) else inflight
        replicas.add_row(str(one["id"]), str(one.get("number", "")), ", ".join(one.get("resident", [])), str(total))
    return Group(head, Text(stored), Text(), lines, Text(), replicas)


def versions(line: str, data: Sequence[Json]) -> Table:
    """A line's versions, each with its scores on held-out examples."""
    table = _table(line, "state", "aliases", "made", "from", "gate", "held-out exact matches")
    for one in data:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["created_at"])) if one.get("created_at") else ""
        scores = ", ".join(f"{name} {_number(score.get('exact'))}" for name, score in (one.get("slices") or {}).items())
        aliases = ", ".join(one.get("aliases") or [])
        table.add_row(one["name"], one.get("state", ""), aliases, made, one.get("parent") or "base", _gate(one), scores)
    return table


def checks(found: Iterable[Check]) -> Table:
    """The doctor's findings, each with what to do."""
    table = _table("", "check", "found", "what to do")
    for one in found:
        table.add_row(Text(one.level, COLOURS[one.level]), one.name, one.found, one.advice)
    return table


def job(running: Json | None) -> str:
    """A running job in a few words."""
    if not running:
        return "–"
    steps = f" {running.get('step') or 0}/{running['steps']}" if running.get("steps") else ""
    loss = f", loss {running['loss']:.3f}" if running.get("loss") is not None else ""
    left = f", {running['eta_seconds']:.0f} s left" if running.get("eta_seconds") is not None else ""
    return f"{running.get('phase') or running.get('state')}{steps}{loss}{left}"


def trial(running: Json | None) -> str:
    """A running trial in a few words."""
    if not running:
        return "–"
    said = f"{running['state']} at {running.get('weight') or 0:.0%}"
    if units := running.get("units"):
        said += f", units {units['candidate']}/{units['control']}"
    logs, limits = running.get("log_evidence"), running.get("thresholds")
    if logs and limits:
        said += f", promote {logs['promote']:.1f} of {limits['promote']:.1f}"
        said += f", roll back {logs['rollback']:.1f} of {limits['rollback']:.1f}"
    return said


def _line(name: str, line: Json) -> list[str]:
    aliases = [line.get(alias) or "–" for alias in ("champion", "candidate", "previous")]
    examples = line.get("examples", {})
    counts = [str(line.get("versions", 0)), str(examples.get("fresh", 0)), str(examples.get("trained", 0))]
    return [name, *aliases, *counts, job(line.get("job")), trial(line.get("trial"))]


def _gate(version: Json) -> str:
    gate = version.get("gate")
    return str(gate.get("outcome", "")) if isinstance(gate, dict) else str(gate or "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")

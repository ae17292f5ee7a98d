"""What the commands show on a terminal: tables made from the daemon's JSON. Drawing only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from service.doctor import Check

if TYPE_CHECKING:
    from learners.whole import Tuned

Json = dict[str, Any]

HARDLY_MOVED = 0.01
"""Nats per token from the base: what a few steps at a small rate come to, and no user would notice."""
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show(what: RenderableType) -> None:
    """Print it."""
    Console(highlight=False).print(what)


def status(said: Json) -> Group:
    """The whole state of a daemon on one screen."""
    feedback, base = said.get("feedback", {}), said.get("base", {})
    ready = Text("ready", "green") if said.get("ready") else Text("not ready", "red")
    thrown = said.get("kill_switch") or {"mode": "off"}
    if thrown["mode"] != "off":
        ready = Text.assemble(ready, Text(f" · kill switch: {thrown['mode']}", "red"))
    head = Text.assemble(ready, f" · base {base.get('name', '?')} · desired state {said.get('desired', '?')}")
    stored = f"feedback: {feedback.get('stored', 0)} stored, {feedback.get('pending', 0)} wait for their interaction"
    lines = _table("line", "champion", "candidate", "previous", "versions", "fresh", "held", "trained", "job", "trial")
    for name, line in said.get("lines", {}).items():
        lines.add_row(*_line(name, line))
    replicas = _table("replica", "state", "resident", "in flight")
    for one in said.get("replicas", []):
        inflight = one.get("inflight", 0)
        total = sum(inflight.values()) if isinstance(inflight, dict) else inflight
        replicas.add_row(str(one["id"]), str(one.get("number", "")), ", ".join(one.get("resident", [])), str(total))
    said_last = [Text(f"{name}: the gate says {verdict}") for name, verdict in _verdicts(said.get("lines", {}))]
    searched = {name: line["bisection"] for name, line in said.get("lines", {}).items() if line.get("bisection")}
    said_last += [Text(f"{name}: {search(found)}") for name, found in searched.items()]
    watched = {name: line["anchor"] for name, line in said.get("lines", {}).items() if line.get("anchor")}
    said_last += [Text(f"{name}: {anchor(one)}", "red" if one["standing"] != "ok" else "") for name, one in watched.items()]
    return Group(head, Text(stored), Text(), lines, *said_last, Text(), replicas)


def versions(line: str, data: Sequence[Json]) -> Group:
    """A line's versions: how each stands, and below what was measured of it on held-out examples."""
    table = _table(line, "state", "aliases", "made", "from", "gate")
    measured = _table(line, "accuracy", "BWT", "FWT", "forgetting", "intransigence", "prequential", "held-out exact matches")
    for one in data:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["created_at"])) if one.get("created_at") else ""
        scores = ", ".join(f"{name} {_number(score.get('exact'))}" for name, score in (one.get("slices") or {}).items())
        aliases = ", ".join(one.get("aliases") or [])
        table.add_row(one["name"], one.get("state", ""), aliases, made, one.get("parent") or "base", _gate(one))
        measured.add_row(one["name"], *_transfer(one), scores)
    return Group(table, "", measured)


def search(found: Json) -> str:
    """A search for harmful examples, in a few words."""
    told = found["reason"] or f"{found['suspects']} examples are suspected, {found['probe'] or 'no job'} tries a half"
    return f"{found['job']} lost the slice {found['slice']}: {told}"


def verdicts(data: Sequence[Json]) -> Table:
    """What became of a line's trials, and why."""
    table = _table("", "when", "trial", "candidate", "from", "to", "by", "why")
    for one in data:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["at"]))
        table.add_row(str(one["seq"]), when, *(str(one[name]) for name in ("trial", "candidate", "from", "to", "by", "reason")))
    return table


def cases(data: Sequence[Json]) -> Table:
    """What a guard stopped: which, why, and who decided since."""
    table = _table("feedback", "when", "what", "reason", "state", "from", "decided by")
    for one in data:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["at"]))
        names = ("kind", "reason", "state", "principal")
        table.add_row(one["feedback_id"], when, *(str(one[name]) for name in names), one["decided_by"] or "–")
    return table


def checks(found: Iterable[Check]) -> Table:
    """The doctor's findings, each with what to do."""
    table = _table("", "check", "found", "what to do")
    for one in found:
        table.add_row(Text(one.level, COLOURS[one.level]), one.name, one.found, one.advice)
    return table


def verdict(gate: Json) -> str:
    """A verdict of the gate in a few words: outcome, the slice nearest to being lost, limits broken, what the job warned of."""
    said = str(gate.get("outcome", ""))
    worst = next(
        (one for one in gate.get("findings", ()) if one["name"] == gate.get("worst") and one["must"] == "not_lose"), None
    )
    if worst:
        said += f", worst slice {worst['name']} [{worst['low']:+.3f}, {worst['high']:+.3f}], look {worst.get('looks', 1)}"
    broken = [one["told"] for one in gate.get("bounds", ()) if one["outcome"] != "pass"]
    return "; ".join([said, *broken, *gate.get("warnings", ())])


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
    if running["state"] == "shadow":
        return _shadow(running["shadow"])
    said = f"{running['state']} at {running.get('weight') or 0:.0%}"
    if units := running.get("units"):
        said += f", units {units['candidate']}/{units['control']}"
    logs, limits = running.get("log_evidence"), running.get("thresholds")
    if logs and limits:
        said += f", promote {logs['promote']:.1f} of {limits['promote']:.1f}"
        said += f", roll back {logs['rollback']:.1f} of {limits['rollback']:.1f}"
        said += f", harm that began late {logs['late']:.1f} of {limits['late']:.1f}" if "late" in logs else ""
        low, high = running.get("difference") or (-1.0, 1.0)
        said += f", difference in [{low:+.3f}, {high:+.3f}]"
    return said


def guardrails(running: Json) -> list[str]:
    """What is known of each guardrail of a trial, a line each."""
    shown, needed, harm_at = running.get("promote") or {}, running.get("thresholds") or {}, running.get("harm_at") or 0.0
    return [
        f"guardrail {name}: not worse {shown[name]:.1f} of {needed['promote']:.1f}, worse {harm:.1f} of {harm_at:.1f}"
        for name, harm in (running.get("harm") or {}).items()
    ]


def _shadow(said: Json) -> str:
    """How far a shadow is: nobody reads what it answers."""
    replies = f"{sum(said['outcomes'].values())} replies, {said['outcomes']['failed']} failed"
    harm = max(said["harm"].values())
    return f"shadow, {replies}, {said['pairs']} of {said['min_pairs']} compared, harm {harm:.1f} of {said['harm_at']:.1f}"


def anchor(found: Json) -> str:
    """How a line stands against its anchor, in a few words."""
    low, high = found["difference"]
    said = f"{found['standing']}, champion - anchor in [{low:+.3f}, {high:+.3f}] in this round"
    said += f", decay {found['log_evidence']:.1f} of {found['alarm_at']:.1f} after {found['blocks']} units of the anchor"
    return f"anchor {found['version'] or 'base'}: {said}"


@contextmanager
def progress() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar for a training that is told of its steps while inside."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=None)

        def report(told: Mapping[str, Any]) -> None:
            bar.update(task, completed=told["step"], total=told["steps"], description=f"loss {told['loss']:.3f}")

        yield report


def tuned(said: Tuned) -> Group:
    """What full fine-tuning made."""
    slices = _table("slice", "held-out examples", "base", "tuned")
    for one in said.slices:
        slices.add_row(one.slice, str(one.items), _number(one.base), _number(one.tuned))
    skipped = f", {said.skipped} that cannot be encoded left out" if said.skipped else ""
    strayed = f"{said.kl:.3f} nats per token from the base on neutral texts"
    head = f"learned {said.learned} examples in {said.seconds:.0f} s{skipped}; {strayed}"
    is_same = said.kl < HARDLY_MOVED and all(one.tuned == one.base for one in said.slices)
    hint = ["it has hardly moved: give it more --epochs or a higher --learning-rate"] if is_same else []
    return Group(head, slices, *hint, f'a base of its own: source = "{said.path}"')


def _line(name: str, line: Json) -> list[str]:
    aliases = [line.get(alias) or "–" for alias in ("champion", "candidate", "previous")]
    examples = line.get("examples", {})
    held = sum((line.get("quarantine") or {}).get("held", {}).values()) + examples.get("resting", 0)
    counts = [str(n) for n in (line.get("versions", 0), examples.get("fresh", 0), held, examples.get("trained", 0))]
    return [name, *aliases, *counts, job(line.get("job")), trial(line.get("trial"))]


def _gate(version: Json) -> str:
    return verdict(version.get("gate") or {})


def _verdicts(lines: Json) -> list[tuple[str, str]]:
    return [(name, verdict(line["last_verdict"])) for name, line in lines.items() if line.get("last_verdict")]


def _transfer(version: Json) -> list[str]:
    """What is read from exact matches up to this version, and from the stream lately; a dash where nothing is known."""
    matrix = ((version.get("gate") or {}).get("matrix") or {}).get("exact", {})
    read, stream = matrix.get("transfer") or {}, matrix.get("prequential") or {}
    measures = ("average", "backward", "forward", "forgetting", "intransigence")
    return [*(_number(read.get(name)) for name in measures), _number(stream.get("faded"))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")

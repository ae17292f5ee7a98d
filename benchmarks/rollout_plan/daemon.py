"""T14 and T15: the conductor itself, with its database and its files, before small true replicas and customers.

The replicas and customers are those of the tests (`tests/service/world.py`): an engine that answers well or badly by the
version's hidden quality, on the route table that the conductor publishes. Each crash point is a process of its own that kills
itself with SIGKILL, at a write or a side effect, and another one that goes on from what it left.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import func, select

from benchmarks.rollout_plan.paths import Check, Scale, most_by_chance
from replay import tables
from service import audit, job_folder, status
from service.rollout import trials
from service.rollout.stages import Stage, Trial
from tests.service.world import LINE, QUICK, World

MARGIN = 0.2
PLAIN = {"weights": [0.5], "guardrails": {}, "bake": {"holdback": 0}}
"""The plan's limits are of the metric's own processes; guardrails and bake have tests of their own."""
POLICY = {**PLAIN, "step_min_units": 5, "min_units": 20, "margin": MARGIN, "max_seconds": 2000, "max_units": 4000}
SETTINGS = {
    "feedback": {"metrics": {"thumb": {"type": "boolean", "window_seconds": 1}}},
    "lines": {LINE: {**QUICK["lines"][LINE], "rollout": POLICY}},
}
BRIEF = {**SETTINGS, "lines": {LINE: {**QUICK["lines"][LINE], "rollout": {**PLAIN, "min_units": 8}}}}


class Hidden(dict[str, float]):
    """Chance of a good reply by version, of those that are not named `usual`."""

    usual = 0.7

    def get(self, version: str, _: float = 0.0) -> float:  # type: ignore[override]
        return super().get(version, self.usual)


def quiet() -> None:
    """No log lines between the figures."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def opened(folder: Path, settings: dict[str, Any], seed: int = 0, replicas: int = 2) -> World:
    world = World(folder, settings, replicas=replicas)
    world.thumbs, world.quality, world.random = 1.0, Hidden(), random.Random(seed)
    world.crowd = f"customer-{seed}"
    return world


def one_trial(world: World, customers: int, most_steps: int = 3000) -> Trial:
    """Let the line learn something new and its trial come to an end."""
    before = len(world.read(lambda conn: trials.of(conn, LINE)))
    world.demonstrate(40)
    for _ in range(most_steps):
        world.step(customers=customers if world.trial and world.trial.stage.has_traffic else 0)
        found = world.read(lambda conn: trials.of(conn, LINE))
        if len(found) > before and not found[0].stage.is_open:
            return found[0]
    raise AssertionError(f"a trial without an end: {world.summary()}")


def asked_of(world: World, version: str, after: float = 0.0) -> int:
    """Requests that a version has answered."""
    asked = tables.interaction
    query = select(func.count()).select_from(asked).where(asked.c.version == version, asked.c.at > after)
    return world.read(lambda conn: conn.scalar(query)) or 0


@dataclass
class Ends:
    """How the trials of a stream ended: of equal candidates, and of those worse by the margin."""

    equal: list[Stage]
    worse: list[Stage]


def stream_of_trials(folder: Path, number: int, seed: int) -> Ends:
    """One line's candidates, every fifth worse by the margin, the others equal to what serves."""
    world, ends = opened(folder, SETTINGS, seed), Ends([], [])
    for index in range(1, number + number // 4 + 1):
        is_worse = index % 5 == 0
        if is_worse:
            world.quality[f"{LINE}@v{index}"] = Hidden.usual - MARGIN
        end = one_trial(world, customers=40)
        (ends.worse if is_worse else ends.equal).append(end.stage)
        if world.champion == end.candidate and is_worse:  # a mistake: what serves is the yardstick again
            world.quality.pop(end.candidate)
    world.read(_check_chain)
    world.writer.close()
    return ends


def _check_chain(conn: Any) -> None:
    assert audit.verify(conn).broken is None, "the audit log is broken"
    for one in trials.of(conn, LINE):
        assert all(told["is_same"] for told in status.replay(conn, one.id)), f"a verdict on {one.id} is not what its facts give"


def harmful(folder: Path, seed: int) -> tuple[int, int, int]:
    """Pairs that roll a candidate of -.20 back, units that it has answered by then, and its requests after that."""
    world = opened(folder, {**SETTINGS, "lines": {LINE: {**QUICK["lines"][LINE], "rollout": {**POLICY, "margin": 0.05}}}}, seed)
    world.quality[f"{LINE}@v1"] = Hidden.usual - 0.2
    end = one_trial(world, customers=4)
    answered = asked_of(world, end.candidate)
    for _ in range(20):
        world.step(customers=4)
    after = asked_of(world, end.candidate, after=end.ended_at or 0.0)
    look = world.read(lambda conn: trials.last_look(conn, end.id))
    world.writer.close()
    return (look.pairs, answered, after) if look and end.stage is Stage.ROLLED_BACK else (10**6, 10**6, after)


class Half:
    """Versions whose replies fail, every other one by chance."""

    def __init__(self, version: str, seed: int) -> None:
        self.version, self.random = version, random.Random(seed)

    def __contains__(self, version: object) -> bool:
        return version == self.version and self.random.random() < 0.5


def erring(folder: Path, seed: int) -> tuple[bool, int]:
    """Whether a candidate that fails half of its requests is rolled back, and how many it has met by then."""
    world = opened(folder, SETTINGS, seed)
    world.failing = Half(f"{LINE}@v1", seed)
    end = one_trial(world, customers=2)
    met = asked_of(world, end.candidate)
    world.writer.close()
    return end.stage is Stage.ROLLED_BACK, met


def queued(folder: Path) -> bool:
    """Whether examples that come in mid-canary wait for the trial's end, and are learned from then."""
    world = opened(folder, SETTINGS)
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.stage is Stage.CANARY, customers=4)
    world.demonstrate(40)
    for _ in range(5):
        world.step(customers=4)
    waited = world.read(lambda conn: len(trials.of(conn, LINE))) == 1 and world.job.version is not None
    world.until(lambda w: w.read(lambda conn: len(trials.of(conn, LINE))) == 2, customers=40, steps=2000)
    world.writer.close()
    return waited


def t15(scale: Scale) -> Iterator[Check]:
    """A stream of trials end to end; a harmful, an erring and a good candidate; one that comes mid-canary."""
    quiet()
    lines, each = (8, 25) if scale.is_full else (1, 4)
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as place:
        folder = Path(place)
        ends = [stream_of_trials(folder / f"line{seed}", each, seed) for seed in range(lines)]
        equal, worse = [e for one in ends for e in one.equal], [e for one in ends for e in one.worse]
        yield Check("T15", f"worse by the margin: promoted, of {len(worse)}", worse.count(Stage.LIVE), most=0)
        false = equal.count(Stage.ROLLED_BACK)
        what = f"A/A: rolled back, of {len(equal)} trials"
        yield Check("T15", what, false, most=most_by_chance(len(equal), 0.01))
        share = equal.count(Stage.LIVE) / len(equal)
        yield Check("T15", "A/A: share that goes live, not being worse", share, least=0.8 if scale.is_full else 0.5)
        met = [harmful(folder / f"harm{seed}", seed) for seed in range(400 if scale.is_full else 2)]
        if scale.is_full:
            pairs, answered = (statistics.median(one[what] for one in met) for what in (0, 1))
            yield Check("T15", "-.20: median pairs that roll it back", pairs, most=1.15 * 138)
            yield Check("T15", "-.20: median units until the rollback", answered, most=1.15 * 138)
        yield Check("T15", "-.20: requests after the rollback", sum(after for *_, after in met), most=0)
        failed = [erring(folder / f"err{seed}", seed) for seed in range(10 if scale.is_full else 2)]
        yield Check("T15", "every other reply fails: rolled back, share", sum(done for done, _ in failed) / len(failed), least=1)
        yield Check("T15", "every other reply fails: most requests met by then", max(n for _, n in failed), most=20)
        yield Check("T15", "examples that come mid-canary wait for its end", float(queued(folder / "queue")), least=1)


SCENARIOS: dict[str, tuple[float, Callable[[World], bool]]] = {
    "promotion": (1.0, lambda world: world.champion == f"{LINE}@v1"),
    "rollback": (0.0, lambda world: world.trial is not None and world.trial.stage is Stage.ROLLED_BACK),
}


class _Fate:
    """Counts the places to die, and dies by SIGKILL at the one that is meant."""

    def __init__(self, at: int) -> None:
        self.at, self.passed = at, 0

    def strikes(self) -> None:
        self.passed += 1
        if self.passed == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, deed: Callable[..., Any]) -> Callable[..., Any]:
        """The deed, with a place to die before it and one after it."""

        def mortal(*args: Any) -> Any:
            self.strikes()
            value = deed(*args)
            self.strikes()
            return value

        return mortal


class _MortalWriter:
    """A writer in whose process one may die inside of a transaction that writes, and after its commit."""

    def __init__(self, writer: Any, fate: _Fate) -> None:
        self.writer, self.fate = writer, fate

    def submit(self, work: Callable[..., Any]) -> Any:
        wrote = []

        def watched(conn: Any) -> Any:
            before = conn.connection.driver_connection.total_changes
            value = work(conn)
            if conn.connection.driver_connection.total_changes != before:
                wrote.append(True)
                self.fate.strikes()
            return value

        future = self.writer.submit(watched)
        future.exception()
        if wrote:
            self.fate.strikes()
        return future


def live(folder: Path, scenario: str, at: int) -> None:
    """One process: go on from what lies in `folder` until it is over or the `at`-th place to die; then say how it ended."""
    quiet()
    quality, is_over = SCENARIOS[scenario]
    fate = _Fate(at)
    world = opened(folder, BRIEF, replicas=1)
    world.quality = {f"{LINE}@v1": quality}
    world.failing = set() if quality else {f"{LINE}@v1"}
    asked = tables.interaction
    known, last = world.read(lambda conn: conn.execute(select(func.count(), func.max(asked.c.at)).select_from(asked)).one())
    world.asked, world.now = known, max(world.now, last or 0.0) + 1
    if not known:
        world.demonstrate(40)
    world.wrap = lambda writer: _MortalWriter(writer, fate)
    world.crash()
    job_folder._appear, job_folder._write = fate.around(job_folder._appear), fate.around(job_folder._write)  # noqa: SLF001
    world.launcher.start = fate.around(world.launcher.start)  # type: ignore[method-assign]
    world.until(is_over, customers=12)
    world.read(_check_chain)
    told = {"summary": world.summary(), "places": fate.passed}
    world.writer.close()
    (folder / "end.json").write_text(json.dumps(told, default=str, sort_keys=True))


def crash_matrix(scale: Scale, scenario: str, place: Path) -> tuple[int, int]:
    """Places to die, and how many of them lead to another end."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.rollout_plan.daemon"])

    def end(folder: Path, at: int) -> int | None:
        child = processes.Process(target=live, args=(folder, scenario, at))
        child.start()
        child.join()
        return child.exitcode

    assert end(place / "whole", 0) == 0, "the run without a crash failed"
    whole = json.loads((place / "whole" / "end.json").read_text())
    points = range(1, whole["places"] + 1, 1 if scale.is_full else 10)
    wrong = 0
    for at in points:
        folder = place / str(at)
        died, again = end(folder, at), end(folder, 0)
        file = folder / "end.json"
        is_same = again == 0 and json.loads(file.read_text())["summary"] == whole["summary"]
        wrong += died != -signal.SIGKILL or not is_same
    return len(points), wrong


def t14(scale: Scale) -> Iterator[Check]:
    """SIGKILL at each write and side effect, in a process of its own; the next one comes to the same end."""
    with tempfile.TemporaryDirectory(prefix="learnd-bench-") as place:
        for scenario in SCENARIOS:
            points, wrong = crash_matrix(scale, scenario, Path(place) / scenario)
            yield Check("T14", f"{scenario}: crash points", points, least=10 if scale.is_full else 2)
            yield Check("T14", f"{scenario}: other ends", wrong, most=0)

"""What to do next, for each line: a snapshot of the world in, actions out. Pure.

A line has at most one thing going on: a job, else a trial, else it waits for enough to learn from. Only a trial that a person
opens may come beside a job, whose result then waits for the trial's end. Deciding twice on the same snapshot gives the same
actions, and each action is applied in one transaction, so a conductor that dies anywhere decides the same again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from replay.ledger import Waiting
from service.jobs import Job, State
from service.registry import Change
from service.rollout.controller import Judgement, Look, Move, judge
from service.rollout.evidence import Evidence
from service.rollout.stages import Stage, Trial
from service.router import ReplicaReport
from service.settings import Trigger

MIN_AGED = 16
"""Fewer examples than this are not worth a job, however old they are."""

NOTHING = Waiting(0, None, 0)
DAY = 86_400.0
"""The longest pause that setbacks make, in seconds."""
BLOCKED = "rollback_blocked"
"""Why a trial stays in its bake although harm is shown: also the first word of its reason, so that it is told once."""
_SETBACKS = frozenset({Stage.REJECTED, Stage.ROLLED_BACK})


@dataclass(frozen=True, slots=True)
class JobState:
    """How a launcher says that a job stands; one that it does not know was lost with an earlier process."""

    state: Literal["unknown", "running", "done", "died"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Setbacks:
    """A line's latest candidates, one after the other, that were rejected or rolled back."""

    count: int = 0
    at: float | None = None
    """When the last of them was."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One line and what bears on it, at one moment."""

    now: float
    line: str
    trigger: Trigger
    max_attempts: int
    replicas: tuple[ReplicaReport, ...] = ()
    job: Job | None = None
    running: JobState = JobState("unknown")
    is_finished: bool = False
    """Whether the job has left all that it was to leave."""
    last_job: Job | None = None
    waiting: Waiting = NOTHING
    """Fresh examples that came after the last job's."""
    trial: Trial | None = None
    look: Look | None = None
    is_bisecting: bool = False
    """A search for harmful examples goes on, which makes the jobs until it is over."""
    is_training_frozen: bool = False
    """The kill switch lets no job begin."""
    drifted_at: float | None = None
    """When replies last became worse, if that asks for a job."""
    drift_examples: int = 1
    """How many fresh examples such a job needs."""
    rebased_at: float | None = None
    """Since when the line waits to learn all again from the base; None: it need not, or could not."""
    setbacks: Setbacks = Setbacks()
    unswapped: Change | None = None
    """The last change of champion, until every replica routes by it."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Make a job and reserve its examples."""

    line: str
    trigger: str


@dataclass(frozen=True, slots=True)
class Launch:
    """Prepare a job's folder and start it; or start it again, from where it was."""

    job: Job


@dataclass(frozen=True, slots=True)
class Retry:
    """Count a death and start the job again."""

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """End a job that died too often."""

    job: Job
    reason: str


@dataclass(frozen=True, slots=True)
class Assess:
    """Judge what a job made: reject it, or register the version and open its trial."""

    job: Job


@dataclass(frozen=True, slots=True)
class Advance:
    """Move a trial; out of `PROMOTING` to `BAKE` or `LIVE` means to promote."""

    trial: Trial
    move: Move
    said: Judgement


@dataclass(frozen=True, slots=True)
class Note:
    """Keep a look at a trial that goes on."""

    trial: Trial
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Blocked:
    """Tell, once, that a trial is to be rolled back and cannot be."""

    trial: Trial
    reason: str


@dataclass(frozen=True, slots=True)
class Swapped:
    """Every replica routes by a change of champion."""

    change: Change
    seconds: float


Action = Queue | Launch | Retry | Fail | Assess | Advance | Note | Blocked | Swapped


def decide(snapshot: Snapshot) -> list[Action]:
    """Everything that is due on a line now."""
    return [*_swap(snapshot), *_work(snapshot)]


def _work(snapshot: Snapshot) -> Iterator[Action]:
    if snapshot.trial is not None and snapshot.look is not None:
        yield from _trial(snapshot.trial, snapshot.look)
    if snapshot.job is not None:
        step = _job(snapshot.job, snapshot)
        if step is not None and not (snapshot.trial is not None and isinstance(step, Assess)):  # a trial by hand ends first
            yield step
    elif (
        snapshot.trial is None
        and not (snapshot.is_training_frozen or snapshot.is_bisecting)
        and (trigger := due(snapshot)) is not None
    ):
        yield Queue(snapshot.line, trigger)


def due(snapshot: Snapshot) -> Literal["rebase", "examples", "age", "drift"] | None:
    """Which trigger asks for a job; only what came after the last job counts, so that no data is tried twice in a row.

    A re-base comes first, since it is rare and takes what is fresh too: on a busy line it would never be its turn.
    """
    trigger, waiting, last = snapshot.trigger, snapshot.waiting, snapshot.last_job
    ended_at = max((at for at in (last.ended_at if last else None, snapshot.setbacks.at) if at is not None), default=None)
    if ended_at is not None and snapshot.now < ended_at + pause(trigger, snapshot.setbacks):
        return None
    if snapshot.rebased_at is not None and 0 < trigger.rebase_seconds <= snapshot.now - snapshot.rebased_at:
        return "rebase"
    if waiting.count >= trigger.min_examples:
        return "examples"
    age = snapshot.now - waiting.oldest_at if waiting.oldest_at is not None else 0.0
    if 0 < trigger.max_age_seconds < age and waiting.count >= MIN_AGED:
        return "age"
    is_new = snapshot.drifted_at is not None and (last is None or snapshot.drifted_at > last.created_at)
    return "drift" if is_new and waiting.count >= snapshot.drift_examples else None


def pause(trigger: Trigger, setbacks: Setbacks) -> float:
    """Seconds before the next job by itself: the cool-down, doubled by each setback in a row, up to a day."""
    return min(trigger.cooldown_seconds * 2.0**setbacks.count, max(trigger.cooldown_seconds, DAY))


def in_a_row(ends: Iterable[tuple[float, str]]) -> Setbacks:
    """Count the setbacks since a candidate last ended otherwise, from when and how each ended, in any order."""
    times = [at for at, _ in takewhile(lambda end: end[1] in _SETBACKS, sorted(ends, reverse=True))]
    return Setbacks(len(times), times[0] if times else None)


def _job(job: Job, snapshot: Snapshot) -> Action | None:
    said = snapshot.running
    if job.state is State.QUEUED:
        return Launch(job)
    if said.state == "running":
        return None
    if snapshot.is_finished:
        return Assess(job)
    if said.state == "unknown":
        return Launch(job)
    reason = said.reason if said.state == "died" else "it ended without an evaluation"
    return Retry(job, reason) if job.attempts + 1 < snapshot.max_attempts else Fail(job, reason)


def _trial(trial: Trial, look: Look) -> Iterator[Action]:
    said = judge(trial, look)
    if said.move is not None:
        yield Advance(trial, said.move, said)
        return
    if said.blocked and not trial.reason.startswith(BLOCKED):
        yield Blocked(trial, f"{BLOCKED}: {trial.champion} is not held by every replica; {said.blocked}")
    if said.evidence is not None and said.evidence.adds_to(look.last):
        yield Note(trial, said.evidence)


def _swap(snapshot: Snapshot) -> Iterator[Action]:
    change = snapshot.unswapped
    if change is not None and snapshot.replicas and all(r.number >= change.number for r in snapshot.replicas):
        yield Swapped(change, max(0.0, snapshot.now - change.at))

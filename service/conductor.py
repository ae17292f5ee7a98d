"""When to learn and what to judge next: load → decide → apply. The only writer of versions, aliases, jobs and trials.

`tick` looks at each line, lets `service.decisions` decide, and applies what is due: each action is one transaction, files
before it and the launcher after it, so a conductor killed anywhere decides the same again and goes on. Commands by hand
only change what is stored; the next tick acts on it. Synchronous: the keeper calls it in a thread, and passes in what
the live replicas said last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, assert_never

import structlog
from sqlalchemy import Connection

from learners.base import BaseModel
from learners.strategy import STRATEGIES
from replay import ledger
from replay.buffer import fill
from replay.records import Arm, Example, Split
from replay.writer import WriteFailed, Writer
from service import job_folder, jobs, registry
from service.decisions import Action, Advance, Assess, Fail, JobState, Launch, Note, Queue, Retry, Snapshot, Swapped, decide
from service.errors import ArtifactInvalid, Conflict, NotFound, StorageFailed
from service.jobs import Job
from service.rollout import controller, gates, trials
from service.rollout.controller import Look
from service.rollout.evidence import Evidence
from service.rollout.stages import Stage, Trial
from service.router import Desired, ReplicaReport
from service.settings import Line, Settings

__all__ = ["Conductor", "Event", "JobState", "Launcher", "create"]

T = TypeVar("T")
Json = dict[str, Any]

HELD_OUT_PER_SLICE = 200
"""Older held-out examples of each slice that a job is measured on: they cost three forward passes each."""

log = structlog.get_logger(__name__)


class Launcher(Protocol):
    """Where jobs run."""

    def start(self, job: str, folder: Path) -> None:
        """Begin the job in `folder`, or resume it from what it left there."""

    def poll(self, job: str) -> JobState:
        """How the job stands."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something was done on a line, and is on disk; `kind` is `failed` for what is to be tried again."""

    kind: str
    line: str
    at: float
    body: Mapping[str, Any]


def create(conn: Connection) -> None:
    """Make the conductor's tables that are missing."""
    registry.metadata.create_all(conn)


class Conductor:
    """Moves every line on; owned by the keeper."""

    def __init__(
        self,
        settings: Settings,
        base: BaseModel,
        writer: Writer,
        launcher: Launcher,
        *,
        validate: Callable[[Path], str],
        clock: Callable[[], float],
        listen: Callable[[Event], None] = lambda _: None,
    ) -> None:
        """`validate` gives an artifact's digest or raises `ArtifactInvalid`; `listen` is told of each event, in the caller's thread."""
        self._settings = settings
        self._base = base
        self._writer = writer
        self._launcher = launcher
        self._validate = validate
        self._clock = clock
        self._listen = listen
        self._serving_since: float | None = None
        self._looks: dict[str, Evidence] = {}
        self.failures: Counter[str] = Counter()
        """Ticks that failed, by line; each is tried again."""

    def tick(self, replicas: Sequence[ReplicaReport]) -> list[Action]:
        """Do what is due on every line; what fails is logged, counted and tried again at the next tick."""
        now = self._clock()
        self._serving_since = (self._serving_since if self._serving_since is not None else now) if replicas else None
        done: list[Action] = []
        for line in self._settings.lines:
            try:
                for action in decide(self._load(line, tuple(replicas), now)):
                    self._apply(action)
                    done.append(action)
            except Exception as error:
                self.failures[line] += 1
                log.exception("conductor_failed", line=line, failures=self.failures[line])
                self._listen(Event("failed", line, now, {"error": repr(error)}))
        return done

    def desired(self) -> Desired:
        """What replicas should hold and how they should route."""
        return self._do(self._desired)

    def look(self, trial: str) -> Evidence | None:
        """The latest look at an open trial, also when it was not kept."""
        return self._looks.get(trial)

    def progress(self, job: str) -> Json:
        """Where a running job is: step, steps, loss, speed; empty before it has said anything."""
        return job_folder.progress(self._job_folder(job))

    def train(self, line: str) -> Job:
        """Queue a job now, whatever the triggers say; raises `NotFound`, or `Conflict` when the line is busy or has nothing new."""
        self._check(line)

        def work(conn: Connection) -> tuple[Job, Json]:
            job = self._queue(conn, line, "operator")
            return job, _told(job)

        return self._record("job_queued", line, work)

    def promote(self, line: str, version: str | None = None) -> Trial:
        """Make a version (None: the candidate) the champion as soon as every replica has proven it.

        Raises `NotFound` or `Conflict`.
        """
        self._check(line)

        def work(conn: Connection) -> tuple[Trial, Json]:
            trial = trials.current(conn, line)
            if trial is not None and version in {None, trial.candidate}:
                if trial.stage in {Stage.VERIFYING, Stage.PROMOTING}:
                    raise Conflict(f"{trial.candidate} is {trial.stage}: there is nothing to hasten", param="version")
                moved = self._move(conn, trial, Stage.PROMOTING, "operator: promote")
            elif version is None:
                raise Conflict(f"{line!r} has no candidate: name a version", param="version")
            else:
                moved = self._summon(conn, line, version, "operator: promote")
            return moved, _where(moved)

        return self._record("trial_moved", line, work)

    def roll_back(self, line: str, version: str | None = None) -> Json:
        """End the trial, or else go back to a version (None: the previous champion); returns the champion and what was done.

        A version that replicas hold answers at once; an older one as soon as every replica has proven it. Raises
        `NotFound` or `Conflict`.
        """
        self._check(line)

        def work(conn: Connection) -> tuple[Json, Json]:
            trial, named = trials.current(conn, line), registry.aliases(conn, line)
            if trial is not None and version in {None, trial.candidate}:
                to = Stage.ABORTED if trial.stage is Stage.VERIFYING else Stage.ROLLING_BACK
                body = _where(self._move(conn, trial, to, "operator: rollback"))
            elif version in {None, named[registry.PREVIOUS]}:
                body = self._step_back(conn, line, named)
            else:
                body = _where(self._summon(conn, line, version, "operator: rollback"))
            body |= {"champion": registry.aliases(conn, line)[registry.CHAMPION]}
            return body, body

        return self._record("rolled_back", line, work)

    # Load.

    def _load(self, line: str, replicas: tuple[ReplicaReport, ...], now: float) -> Snapshot:
        stored = self._do(lambda conn: self._read(conn, line, replicas, now))
        job = stored.job
        if job is None or job.state is jobs.State.QUEUED:
            return stored
        running, is_finished = self._launcher.poll(job.id), job_folder.is_finished(self._job_folder(job.id))
        return Snapshot(
            now, line, stored.trigger, stored.max_attempts, replicas, job, running, is_finished, unswapped=stored.unswapped
        )

    def _read(self, conn: Connection, line: str, replicas: tuple[ReplicaReport, ...], now: float) -> Snapshot:
        last, trial, crowned = jobs.last(conn, line), trials.current(conn, line), registry.last_crowning(conn, line)
        return Snapshot(
            now=now,
            line=line,
            trigger=self._line(line).trigger,
            max_attempts=self._settings.training.max_attempts,
            replicas=replicas,
            job=jobs.current(conn, line),
            last_job=last,
            waiting=ledger.waiting(conn, line, after=last.cursor if last else 0),
            trial=trial,
            look=self._look(conn, trial, replicas, now) if trial else None,
            unswapped=crowned if crowned and crowned.swap_seconds is None else None,
        )

    def _look(self, conn: Connection, trial: Trial, replicas: tuple[ReplicaReport, ...], now: float) -> Look:
        policy, has_traffic = trial.policy, trial.stage.has_traffic
        metric = self._settings.feedback.metrics.get(policy.metric)
        units = (
            ledger.outcomes(conn, trial.id, policy.metric, metric.window_seconds, now, reward=controller.reward(metric))
            if has_traffic and metric
            else []
        )
        return Look(
            now=now,
            champion=registry.aliases(conn, trial.line)[registry.CHAMPION],
            replicas=replicas,
            desired=registry.number(conn),
            serving_since=self._serving_since,
            outcomes=tuple(units),
            failures=ledger.recent_failures(conn, trial.id, Arm.CANDIDATE, policy.error_window) if has_traffic else 0,
            last=trials.last_look(conn, trial.id),
        )

"""When to learn and what to judge next: load → decide → apply. The only writer of versions, aliases, jobs and trials.

`tick` looks at each line, lets `service.decisions` decide and applies what is due. Each action is one transaction, with
its files before and the launcher after it, so a conductor that is killed anywhere decides the same again and goes on.
Commands by hand only change what is stored; the next tick acts on it. All of it waits for the disk: the keeper calls it
in a thread, and passes in what the live replicas said last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from sqlalchemy import Connection

from learners.base import BaseModel
from replay import ledger
from replay.records import Arm
from replay.writer import Writer
from service import bisecting, comparing, decisions, drift, jobs, queueing, registry, switch, transitions
from service.anchoring import Anchoring
from service.bisecting import Bisecting
from service.decisions import Action, Advance, Assess, Fail, JobState, Launch, Note, Queue, Retry, Snapshot, Swapped, decide
from service.errors import Conflict, NotFound
from service.jobs import Job
from service.journal import Event, Journal, Json
from service.rollout import controller, guardrails, trials
from service.rollout.anchor import Step
from service.rollout.controller import Look, Verb
from service.rollout.stages import Stage, Trial
from service.router import Desired, ReplicaReport, Route
from service.settings import Line, Metric, Settings, SwitchMode
from service.switch import Switch
from service.training import Launcher, Training

__all__ = ["Conductor", "Event", "JobState", "Launcher", "create"]


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
        """`validate` gives an artifact's digest or raises `ArtifactInvalid`; `listen` is told of each event."""
        self._settings = settings
        self._clock = clock
        self._journal = Journal(writer, clock, listen)
        self._training = Training(settings, base, self._journal, launcher, validate)
        self._anchoring = Anchoring(settings, self._journal)
        self._bisecting = Bisecting(settings, self._journal)
        self._serving_since: float | None = None
        self.failures: Counter[str] = Counter()
        """Ticks that failed, by line; each is tried again."""

    def tick(self, replicas: Sequence[ReplicaReport]) -> list[Action | Step | str]:
        """Do what is due on every line; what fails is logged, counted and tried again at the next tick."""
        now = self._clock()
        self._serving_since = (self._serving_since if self._serving_since is not None else now) if replicas else None
        done: list[Action | Step | str] = []
        for line in self._settings.lines:
            try:
                done += self._bisecting.tick(line)  # before a trigger takes what is searched
                for action in decide(self._load(line, tuple(replicas), now)):
                    self._apply(action)
                    done.append(action)
                done += self._anchoring.tick(line, replicas, now)
            except Exception as error:  # noqa: BLE001 - the edge of a line's turn: the other lines go on, and so does it
                self.failures[line] += 1
                self._journal.failed(line, error)
        return done

    def desired(self) -> Desired:
        """What replicas should hold and how they should route."""
        return self._journal.do(self._desired)

    def progress(self, job: Job) -> Json:
        """Where a running job is: step, steps, loss, speed; empty before it has said anything."""
        return self._training.progress(job)

    def remembered(self, line: str) -> dict[str, int]:
        """How many examples the line's buffer holds, by slice."""
        return self._training.remembered(line)

    def train(self, line: str, strategy: str | None = None) -> Job:
        """Queue a job now, whatever the triggers say, by another strategy than the line's where one is named.

        Raises `NotFound`, `InvalidRequest`, or `Conflict` if the line is busy or nothing is new.
        """
        self._line(line)
        return self._queue(line, "operator", strategy)

    def bisect(self, job: str) -> Json:
        """See `Bisecting.begin`; raises `NotFound` or `Conflict`."""
        return self._bisecting.begin(job)

    def promote(self, line: str, version: str | None = None) -> Trial:
        """Make a version (None: the candidate) the champion as soon as every replica has proven it.

        Raises `NotFound` or `Conflict`.
        """
        policy, reason = self._line(line).rollout, "operator: promote"

        def deed(conn: Connection, now: float) -> tuple[Trial, Json]:
            switch.check(conn, self._settings.kill_switch, "freeze_promotion")
            self._anchoring.check(conn, line)
            trial = trials.current(conn, line)
            if trial is not None and version in {None, trial.candidate}:
                return trials.told(transitions.advance(conn, trial, controller.by_hand(trial, "promote"), now))
            if version is None:
                raise Conflict(f"{line!r} has no candidate: name a version", param="version")
            return trials.told(transitions.summon(conn, line, version, policy, now, reason=reason))

        return self._journal.record("trial_moved", line, deed)

    def roll_back(self, line: str, version: str | None = None) -> Json:
        """End the trial, or else go back to a version (None: the previous champion, or the base); returns what was done.

        The previous champion, which replicas hold, answers at once; an older version as soon as every replica has proven
        it. Raises `NotFound` or `Conflict`.
        """
        policy, reason = self._line(line).rollout, "operator: rollback"

        def deed(conn: Connection, now: float) -> tuple[Json, Json]:
            trial, previous = trials.current(conn, line), registry.aliases(conn, line)[registry.PREVIOUS]
            is_way_out = trial is not None and trial.stage is Stage.BAKE and version == previous
            if trial is not None and (version in {None, trial.candidate} or is_way_out):
                _, body = trials.told(transitions.advance(conn, trial, controller.by_hand(trial, "rollback"), now))
            elif version is None or version == previous:
                change = transitions.step_back(conn, line, now, reason)
                body = {"from": change.source, "to": change.target, "number": change.number}
            else:
                _, body = trials.told(transitions.summon(conn, line, version, policy, now, reason=reason))
            return body, body

        return self._journal.record("rolled_back", line, deed)

    def steer(self, line: str, verb: Verb) -> Trial:
        """Pause, resume or abort the line's trial; raises `NotFound`, or `Conflict` when there is none or it cannot.

        To resume is a step forward, which kill switch and anchor hold back whoever asks for it.
        """
        self._line(line)

        def deed(conn: Connection, now: float) -> tuple[Trial, Json]:
            if (trial := trials.current(conn, line)) is None:
                raise Conflict(f"{line!r} has no trial to {verb}", param="line")
            move = controller.by_hand(trial, verb)
            if move.to in controller.FORWARD:
                switch.check(conn, self._settings.kill_switch, "freeze_promotion")
                self._anchoring.check(conn, line)
            return trials.told(transitions.advance(conn, trial, move, now))

        return self._journal.record("trial_moved", line, deed)

    def anchor(self, line: str, version: str) -> Json:
        """See `Anchoring.name`; raises `NotFound` or `Conflict`."""
        self._line(line)
        return self._anchoring.name(line, version)

    def throw(self, mode: SwitchMode, reason: str) -> Switch:
        """Put the kill switch where a person wants it; returns where it stands then."""

        def deed(conn: Connection, now: float) -> tuple[Switch, Json]:
            switch.throw(conn, mode, reason, now)
            return switch.read(conn, self._settings.kill_switch), {"mode": mode, "reason": reason}

        return self._journal.record("switch_thrown", switch.EVERYWHERE, deed)

    # Load.

    def _load(self, line: str, replicas: tuple[ReplicaReport, ...], now: float) -> Snapshot:
        stored = self._journal.do(lambda conn: self._read(conn, line, replicas, now))
        if stored.job is None or stored.job.state is jobs.State.QUEUED:
            return stored
        running, is_finished = self._training.poll(stored.job)
        return replace(stored, running=running, is_finished=is_finished)

    def _read(self, conn: Connection, line: str, replicas: tuple[ReplicaReport, ...], now: float) -> Snapshot:
        thrown = switch.read(conn, self._settings.kill_switch)
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
            is_bisecting=bisecting.open_on(conn, line) is not None,
            is_training_frozen=thrown.holds_back("freeze_training"),
            drifted_at=drift.last_worse(conn, line) if self._line(line).drift.is_trigger else None,
            drift_examples=self._line(line).drift.min_examples,
            rebased_at=queueing.rebased_at(conn, self._line(line), line),
            setbacks=decisions.in_a_row([*jobs.rejections(conn, line), *trials.ends(conn, line)]),
            unswapped=crowned if crowned and crowned.swap_seconds is None else None,
        )

    def _look(self, conn: Connection, trial: Trial, replicas: tuple[ReplicaReport, ...], now: float) -> Look:
        policy, has_traffic = trial.policy, trial.stage.has_traffic
        metric = self._settings.feedback.metrics.get(policy.metric, Metric(type="boolean"))
        declared = guardrails.guards(policy.guardrails, self._settings.feedback.metrics, controller.reward)
        how: dict[str, Any] = {"reward": controller.reward(metric), "guards": declared}
        known = trial.evidence_id
        units = ledger.outcomes(conn, known, policy.metric, metric.window_seconds, now, **how) if has_traffic else []
        return Look(
            now=now,
            champion=registry.aliases(conn, trial.line)[registry.CHAMPION],
            replicas=replicas,
            desired=registry.number(conn),
            serving_since=self._serving_since,
            outcomes=tuple(units),
            window_seconds=metric.window_seconds,
            failures=ledger.recent_failures(conn, known, Arm.CANDIDATE, policy.error_window) if has_traffic else 0,
            crashes=ledger.crashes(conn, known, Arm.CANDIDATE) if has_traffic else 0,
            promotions=trials.promotions(conn, trial.line),
            last=trials.last_look(conn, trial.id),
            exposed_twice=ledger.exposed_twice(conn, known, trial.resumed_at) if has_traffic else 0,
            heard_at=ledger.last_heard(conn, known, policy.metric) if has_traffic else None,
            is_frozen=switch.read(conn, self._settings.kill_switch).holds_back("freeze_promotion")
            or self._anchoring.is_frozen(conn, trial.line),
            shadow=comparing.tally(conn, trial) if trial.stage is Stage.SHADOW else None,
        )

    def _desired(self, conn: Connection) -> Desired:
        lines = list(self._settings.lines)
        running = {line: trial for line in lines if (trial := trials.current(conn, line)) is not None}
        should = registry.desired(conn, lines, running, self._training.versions, self._anchoring.watched(conn))
        is_base_only = switch.read(conn, self._settings.kill_switch).holds_back("base_only")
        return replace(should, routes={line: Route(line) for line in lines}, is_base_only=True) if is_base_only else should

    # Apply.

    def _apply(self, action: Action) -> None:
        match action:
            case Queue(line, trigger):
                self._queue(line, trigger)
            case Launch(job):
                self._training.launch(job)
            case Retry(job, reason):
                self._training.retry(job, reason)
            case Fail(job, reason):
                self._training.end(job, jobs.State.FAILED, reason)
            case Assess(job):
                self._training.assess(job)
            case Advance():
                self._advance(action)
            case Note(trial, evidence):
                self._journal.do(lambda conn: trials.note(conn, trial.id, evidence))
            case decisions.Blocked(trial, why):
                self._journal.record(decisions.BLOCKED, trial.line, lambda conn, _: trials.told(trials.remark(conn, trial, why)))
            case Swapped(change, seconds):
                self._journal.record("swapped", change.line, lambda conn, _: transitions.swap(conn, change, seconds))
            case _:
                assert_never(action)

    def _queue(self, line: str, trigger: str, strategy: str | None = None) -> Job:
        def deed(conn: Connection, now: float) -> tuple[Job, Json]:
            return queueing.queue(conn, self._settings, line, trigger, strategy, now)

        return self._journal.record("job_queued", line, deed)

    def _advance(self, due: Advance) -> None:
        is_crowning = due.trial.stage is Stage.PROMOTING and due.move.to in {Stage.BAKE, Stage.LIVE}
        kind = "promoted" if is_crowning else "trial_moved"

        def deed(conn: Connection, now: float) -> tuple[Trial, Json]:
            return trials.told(transitions.advance(conn, due.trial, due.move, now, due.said))

        self._journal.record(kind, due.trial.line, deed)

    def _line(self, line: str) -> Line:
        try:
            return self._settings.lines[line]
        except KeyError:
            raise NotFound(f"no line {line!r}; these exist: {', '.join(self._settings.lines)}", param="line") from None

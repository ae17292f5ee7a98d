"""A job's way from its reserved examples to a version on trial, or to its end: folders, launcher and gate.

Each step may be repeated after a crash: a folder that is there is kept, an artifact is adopted before its version is
known, and the launcher resumes what it finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection

from learners.base import BaseModel
from learners.strategy import STRATEGIES
from replay import general, ledger, memory, opinions
from replay.buffer import fill
from replay.mixture import drawn_in_all
from replay.records import Example, Message, Split
from service import audit, bisecting, job_folder, jobs, registry, suites, transitions
from service.decisions import JobState
from service.errors import ArtifactInvalid, SettingsError
from service.jobs import Job, State
from service.journal import Journal, Json
from service.rollout import gates, looks, stream, verdicts
from service.rollout.gates import Verdict
from service.settings import Settings
from service.suites import Suite
from service.transitions import Made

HELD_OUT_PER_SLICE = 200
"""Older held-out examples of each slice that a job is measured on: each costs three forward passes; the next job takes others."""
VALIDATED_PER_SLICE = 50
"""Older validation examples that help to choose a checkpoint, of each slice that the job does not teach: where it does, they may
say the opposite of what is new. Each costs a forward pass at each validation."""
TAUGHT_SHARE = 0.1
"""Of the fresh examples: a slice of fewer is not what a job is for, and a few late corrections leave it its older validations."""


def taught(fresh: Sequence[Example]) -> set[str]:
    """The slices that a job teaches."""
    return {name for name, count in Counter(e.slice for e in fresh).items() if count >= TAUGHT_SHARE * len(fresh)}


class Launcher(Protocol):
    """Where jobs run."""

    def start(self, job: str, folder: Path) -> None:
        """Begin the job in `folder`, or resume it from what it left there."""

    def poll(self, job: str) -> JobState:
        """How the job stands."""


class Training:
    """Runs jobs; owned by the conductor, which says when."""

    def __init__(
        self, settings: Settings, base: BaseModel, journal: Journal, launcher: Launcher, validate: Callable[[Path], str]
    ) -> None:
        """`validate` gives an artifact's digest or raises `ArtifactInvalid`."""
        self._settings = settings
        self._base = base
        self._journal = journal
        self._launcher = launcher
        self._validate = validate

    @property
    def versions(self) -> Path:
        """The folder of all versions."""
        return self._settings.data_dir.absolute() / "versions"

    def poll(self, job: Job) -> tuple[JobState, bool]:
        """How a job stands, and whether it has left all that it was to leave."""
        return self._launcher.poll(job.id), job_folder.is_finished(self._folder(job))

    def progress(self, job: Job) -> Json:
        """Where a running job is: step, steps, loss, speed; empty before it has said anything."""
        return job_folder.progress(self._folder(job))

    def remembered(self, line: str) -> dict[str, int]:
        """How many examples the line remembers, by slice."""
        capacity = self._settings.lines[line].learning.replay_capacity
        return self._journal.do(lambda conn: memory.sizes(conn, line, capacity))

    def launch(self, job: Job) -> None:
        """Prepare a job's folder, unless that is done, and start it."""
        if job.state is State.QUEUED or not self._folder(job).exists():
            try:
                golden = suites.read_all(self._settings.lines[job.line].suites)
                given = suites.general(self._settings.lines[job.line].learning)
            except SettingsError as error:  # it could be read at the start
                self.end(job, State.FAILED, f"suite_invalid: {error.message}")
                return
            plan, older, spec = self._journal.do(lambda conn: self._plan(conn, job, golden, given))
            said = self._journal.do(lambda conn: opinions.held(conn, job.id))
            if not any(example.split is Split.TRAIN for example in plan):
                self.end(job, State.FAILED, "nothing_to_train: every example of it is held out")
                return
            rows = [row for name, suite in golden.items() for row in suite.rows(name)]
            job_folder.prepare(self._folder(job), spec, plan, older, rows, said)
            self._note_start(job, plan)
        self._launcher.start(job.id, self._folder(job))

    def retry(self, job: Job, reason: str) -> None:
        """Count a death and start the job again, from what it left."""

        def deed(conn: Connection, _: float) -> tuple[None, Json]:
            jobs.count_death(conn, job.id, reason)
            return None, {"job": job.id, "attempts": job.attempts + 1, "reason": reason}

        self._journal.record("job_died", job.line, deed)
        self._launcher.start(job.id, self._folder(job))

    def end(self, job: Job, state: State, reason: str, verdict: Verdict | None = None) -> None:
        """End a job without a version; its examples are free again."""

        def deed(conn: Connection, now: float) -> tuple[None, Json]:
            jobs.end(conn, job.id, state, now, reason=reason, verdict=verdict.as_json() if verdict else None)
            self._tell(conn, now, job, None, verdict)
            return None, {"job": job.id, "state": state.value, "reason": reason, **_warned(verdict)}

        self._journal.record("job_ended", job.line, deed)

    def assess(self, job: Job) -> None:
        """Judge what a job made, and end it: with a version on trial, or with the reason why not."""
        champion, number, matrix, came = self._journal.do(lambda conn: self._standing(conn, job))
        if champion != job.parent:
            self.end(job, State.REJECTED, f"champion_changed: it was compared with {job.parent or 'the base'}")
            return
        try:
            measured = job_folder.evaluation(self._folder(job))
            verdict = gates.judge(measured, self._settings.lines[job.line].gate, is_rebase=job.is_rebase)
            grown = gates.matrix(measured, matrix, f"{job.line}@v{number}")
            verdict = replace(verdict, matrix=stream.beside(grown, measured, matrix, came))
            if job.trigger == jobs.BISECT:
                self.end(job, State.REJECTED, f"bisect: {verdict.outcome}, and no version comes of it", verdict)
                return
            digest = self._validate(self._folder(job) / "artifact")
        except (ArtifactInvalid, KeyError, TypeError, ValueError) as error:
            self.end(job, State.REJECTED, f"artifact_invalid: {error}")
            return
        if verdict.outcome == "pass":
            self._put_on_trial(job, digest, gates.scores(measured), verdict)
        else:
            self.end(job, State.REJECTED, f"gate_{verdict.outcome}: {'; '.join(verdict.reasons)}", verdict)

    def _standing(self, conn: Connection, job: Job) -> tuple[str | None, int, Json, list[str]]:
        """The line's champion, its next version's number, the matrix of the job's parent, and the job's examples as they came."""
        champion = registry.aliases(conn, job.line)[registry.CHAMPION]
        parent = registry.version(conn, job.parent).gate if job.parent else {}
        return champion, registry.next_number(conn, job.line), dict(parent.get("matrix") or {}), jobs.held(conn, job.id)

    def _put_on_trial(self, job: Job, digest: str, scores: Json, verdict: Verdict) -> None:
        path = f"{job.line}/v{self._journal.do(lambda conn: registry.next_number(conn, job.line))}"
        job_folder.adopt(self._folder(job) / "artifact", self.versions / path)
        made, policy = Made(path, digest, scores, verdict.as_json()), self._settings.lines[job.line].rollout

        def deed(conn: Connection, now: float) -> tuple[None, Json]:
            trial = transitions.open_trial(conn, job, made, policy, now)
            self._tell(conn, now, job, trial.candidate, verdict)
            told = {"job": job.id, "version": trial.candidate, "trial": trial.id, "digest": digest}
            return None, {**told, **_warned(verdict)}

        self._journal.record("version_made", job.line, deed)

    def _tell(self, conn: Connection, now: float, job: Job, version: str | None, verdict: Verdict | None) -> None:
        """Record what the gate said, where it said something, with all that it rests on."""
        if verdict is not None:
            record = verdicts.record_gate(job.id, version, self._settings.lines[job.line].gate, verdict)
            audit.tell(conn, now, job.line, "gate_verdict", record)

    def _note_start(self, job: Job, plan: list[Example]) -> None:
        remembered = [example.id for example in plan if example.source == "remembered"]
        extra = sum(example.source == "general" for example in plan)

        def deed(conn: Connection, now: float) -> tuple[None, Json]:
            jobs.start(conn, job.id, remembered, now)
            told = {"examples": len(plan) - extra, "remembered": len(remembered), "general": extra}
            return None, {"job": job.id, **told}

        self._journal.record("job_started", job.line, deed)

    def _plan(
        self, conn: Connection, job: Job, golden: Mapping[str, Suite], given: Suite | None
    ) -> tuple[list[Example], list[Example], Json]:
        own = self._settings.lines[job.line].learning
        learning = own.model_copy(update={"strategy": job.strategy or own.strategy})
        fresh, remembered = ledger.reserved(conn, job.id), memory.remembered(conn, job.line, learning.replay_capacity)
        if job.trigger == jobs.BISECT:  # beside as much rehearsal as the whole had: else less of it would do the more harm
            parts = bisecting.asked(conn, job.id) / max(1, sum(e.split is Split.TRAIN for e in fresh))
            learning = learning.model_copy(update={"replay_ratio": learning.replay_ratio * parts})
        next_memory = fill([*remembered, *fresh], learning.replay_capacity, memory.SEED)
        seen, held = looks.turns(one.verdict for one in jobs.of(conn, job.line)), ledger.holdouts(conn, job.line)
        measured = [*(e.messages for some in held.values() for e in some), *(m for s in golden.values() for m in s.prompts())]
        kept = self._general(job, given, fresh, measured)
        ratio = drawn_in_all(learning.replay_ratio, learning.epochs)
        plan = STRATEGIES[learning.strategy].plan(fresh, remembered, kept, ratio, learning.seed)
        older = [e for name, some in held.items() for e in ledger.rotated(some, HELD_OUT_PER_SLICE, seen[name])]
        choosing = ledger.validations(conn, job.line, VALIDATED_PER_SLICE)
        older += chain.from_iterable(some for name, some in choosing.items() if name not in taught(fresh))
        counted = looks.counted(fresh, jobs.judged(conn, job.line), held, golden, seen, HELD_OUT_PER_SLICE)
        spec = {
            "id": job.id,
            "line": job.line,
            "base": {**asdict(self._base), "path": str(self._base.path)},
            "parent": str(self.versions / registry.version(conn, job.parent).path) if job.parent else None,
            "learning": learning.model_dump(mode="json"),
            "leaves": learning.strategy if STRATEGIES[learning.strategy].is_stacked else own.strategy,
            "trainer": self._settings.training.model_dump(mode="json", include={"threads", "report_to", "fsdp", "deepspeed"}),
            "kept": [example.id for example in next_memory.examples()],
            "looks": counted,
            "suites": {name: suite.digest for name, suite in golden.items()},
            "general": given and {"file": str(learning.general or "shipped"), "digest": given.digest},
            "max_rank": self._settings.base.max_rank,
            "seed": learning.seed,
            "created_at": job.created_at,
        }
        return plan, older, spec

    def _general(
        self, job: Job, given: Suite | None, fresh: Sequence[Example], measured: Iterable[tuple[Message, ...]]
    ) -> list[Example]:
        """General examples for the job, by its ratio to the fresh ones that train, none of them like what is held out."""
        if given is None:
            return []
        learning = self._settings.lines[job.line].learning
        pairs = general.examples((item.model_dump(include={"messages", "reply"}) for item in given.items), job.line)
        held_out = [*measured, *(e.messages for e in fresh if e.split is not Split.TRAIN)]
        count = round(learning.general_ratio * sum(e.split is Split.TRAIN for e in fresh))
        return general.drawn(general.apart(pairs, held_out), count, f"{learning.seed}:{job.id}")

    def _folder(self, job: Job) -> Path:
        return self._settings.data_dir.absolute() / "jobs" / job.id


def _warned(verdict: Verdict | None) -> Json:
    """The job's warnings, for the log, where it has any."""
    return {"warnings": list(verdict.warnings)} if verdict and verdict.warnings else {}

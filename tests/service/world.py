"""A small world around a conductor: a launcher that trains nothing, replicas that do as desired, customers with thumbs.

All of it is true to the interfaces and lives on a real database in a folder; time passes only when the test says so.
`World.crash` drops every object and opens the folder anew, as a daemon does that was killed.
"""

import json
import random
from pathlib import Path

from learners.base import BaseModel
from replay import ledger, opinions, votes
from replay.records import Feedback, Interaction
from replay.shadows import Score, Shadow
from replay.writer import Writer
from service import comparing, jobs, registry
from service import conductor as conductors
from service.comparing import ShadowReport
from service.conductor import Conductor, JobState
from service.errors import ArtifactInvalid
from service.rollout import trials
from service.rollout.probe import ProbeResult
from service.router import ReplicaReport, resolve
from service.settings import Settings

BASE = BaseModel(Path("/base"), "base", "w", "t", "c")
LINE = "desk"
QUICK = {
    "feedback": {"metrics": {"thumb": {"type": "boolean", "window_seconds": 5}}},
    "lines": {
        LINE: {
            "trigger": {"min_examples": 40, "cooldown_seconds": 0},
            "gate": {"score": "exact_match", "min_items": 5},
            "rollout": {
                "weights": [0.5],
                "step_min_units": 5,
                "min_units": 20,
                "max_seconds": 500,
                "verify_seconds": 60,
                "guardrails": {"error": {"kind": "error", "margin": 0.5}},  # shown by twelve pairs without an error
                "bake": {"holdback": 0},
            },
        }
    },
}


def write_outcome(folder, *, champion=0.0, candidate=0.8, older=None, suites=None, items=60, is_new=True, warnings=()):
    """What a job leaves: an artifact and exact-match scores of the three on the new slice, and on older ones."""

    def scores(share):
        exact = [float(i < share * items) for i in range(items)]
        return {"exact": exact, "loglik": [value - 1.0 for value in exact]}

    def measured(is_new, champion, candidate):
        ids = [f"e{i}" for i in range(items)]
        return {"is_new": is_new, "ids": ids, "base": scores(0.0), "champion": scores(champion), "candidate": scores(candidate)}

    slices = {"new": measured(is_new, champion, candidate)}
    slices |= {name: measured(False, *shares) for name, shares in (older or {}).items()}
    golden = {name: {**measured(False, 1.0, share), "must_pass": [True] * items} for name, share in (suites or {}).items()}
    (folder / "artifact").mkdir(exist_ok=True)
    (folder / "artifact" / "adapter_model.safetensors").write_bytes(folder.name.encode())
    (folder / "evaluation.json").write_text(json.dumps({"slices": slices, "suites": golden, "warnings": warnings}))
    (folder / "artifact" / "COMPLETE").touch()


class FakeLauncher:
    """Jobs that take one poll; `dies` are the reasons of the deaths to come, `outcome` is what the next one leaves, perhaps by its folder."""

    def __init__(self):
        self.started = []
        self.polls = {}
        self.dies = []
        self.outcome = {}

    def start(self, job, folder):
        assert (folder / "spec.json").exists(), "a job starts only on a folder that is whole"
        self.started.append(job)
        self.polls[job] = (0, folder)

    def poll(self, job):
        if job not in self.polls:
            return JobState("unknown")
        seen, folder = self.polls[job]
        self.polls[job] = (seen + 1, folder)
        if seen == 0:
            return JobState("running")
        if self.dies:
            del self.polls[job]
            return JobState("died", self.dies.pop(0))
        write_outcome(folder, **(self.outcome(folder) if callable(self.outcome) else self.outcome))
        return JobState("done")


class World:
    def __init__(self, folder, settings=None, replicas=2):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = Settings(**{**QUICK, **(settings or {}), "data_dir": folder})
        self.now = 1000.0
        self.random = random.Random(0)
        self.asked = 0
        self.crowd = "customer"
        """Who asks: a trial deals other names to other arms."""
        self.quality = {}
        """Chance of a good reply by version; the base's is 0."""
        self.thumbs = 0.5
        self.failing = set()
        """Versions whose every reply fails…"""
        self.failure = "engine_error"
        """…and how."""
        self.refusing = set()
        """Versions whose every reply is a refusal."""
        self.refused = {}
        """Why replicas cannot hold a version, by its name."""
        self.likes = {}
        """Nats a token that a version gives to good replies beyond the base's, by its name."""
        self.says = {}
        """What versions say in the shadow, by name."""
        self.mute = set()
        """Versions whose every shadow fails."""
        self.numbers = dict.fromkeys((f"r{i}" for i in range(replicas)), -1)
        self.events = []
        self._routes = None
        self.outcome = {}
        self.wrap = lambda writer: writer
        self.open()

    def open(self):
        self.launcher = FakeLauncher()
        self.launcher.outcome = self.outcome
        self.writer = Writer(self.folder / "ledger.db", 0.0)
        self.writer.submit(ledger.create).result()
        self.writer.submit(conductors.create).result()
        self.conductor = Conductor(
            self.settings,
            BASE,
            self.wrap(self.writer),
            self.launcher,
            validate=validate,
            clock=lambda: self.now,
            listen=self.events.append,
        )

    def crash(self):
        self.writer.close()
        self.open()

    def read(self, work):
        return self.writer.submit(work).result()

    def demonstrate(self, count, slice="new"):
        """Customers ask and agents correct: `count` new examples."""
        asked = [self._interaction(slice) for _ in range(count)]
        said = [Feedback(f"d-{i.id}", i.id, "demonstration", f"label of {i.id}", self.now, self.now) for i in asked]
        self._store(asked, said)

    def ask(self):
        """One customer, one question."""
        return self._store([self._interaction()], [])[0]

    def customers(self, count):
        """Customers of whom some leave a thumb, up when the reply was good."""
        asked, thumbs = [self._interaction() for _ in range(count)], []
        for one in asked:
            if one.trial is not None and self.random.random() < self.thumbs:
                is_good = self.random.random() < self.quality.get(one.version, 0.0)
                thumbs.append(Feedback(f"t-{one.id}", one.id, "thumb", is_good, self.now, self.now))
        self._store(asked, thumbs)
        if (shadow := self.routes.routes[LINE].shadow) is not None:
            self._shadow(asked, shadow)

    def _shadow(self, asked, shadow):
        """The replicas let the candidate answer all of them too, and score what the keeper hands out; all are thumbed up."""
        says = self.says.get(shadow.version, "so")
        error = "engine_error" if shadow.version in self.mute else None
        done = [
            Shadow(f"shadow-{i.id}", shadow.trial, i.id, i.unit, shadow.version, "r0", says, 1, self.now, 0.1, error)
            for i in asked
        ]
        self._store(asked, [Feedback(f"t-{i.id}", i.id, "thumb", True, self.now, self.now) for i in asked])

        def work(conn):
            while votes.review(conn, lambda _: None):
                pass
            golds, scores = comparing.take(conn, self.settings, ShadowReport("r0", tuple(done)), {"r0"}), ()
            while golds:
                scores = tuple(Score(g.trial, g.interaction_id, g.kind, *self._liked(g.candidate)) for g in golds)
                golds = comparing.take(conn, self.settings, ShadowReport("r0", (), scores), {"r0"})

        self.read(work)

    def _liked(self, candidate):
        champion = self.routes.routes[LINE].champion or "base"
        return self.likes.get(candidate, 0.0) - 1, self.likes.get(champion, 0.0) - 1

    def _interaction(self, slice="new"):
        """A question as it goes through the route table that the replicas follow."""
        self.asked += 1
        choice = resolve(self.routes, "base", LINE, f"{self.crowd}-{self.asked}")
        is_failed = choice.version in self.failing
        return Interaction(
            id=f"i{self.asked}",
            line=LINE,
            version=choice.version,
            arm=choice.arm,
            unit=choice.unit,
            slice=slice,
            messages=({"role": "user", "content": f"question {self.asked}"},),
            reply="" if is_failed else "an answer",
            at=self.now,
            trial=choice.trial,
            error=self.failure if is_failed else None,
            is_refusal=choice.version in self.refusing,
        )

    def _store(self, asked, said):
        if asked:
            self.read(lambda conn: [ledger.record(conn, asked), [ledger.give(conn, one) for one in said]])
        return asked

    @property
    def routes(self):
        """The route table as it was when the replicas last looked."""
        if self._routes is None:
            self._routes = self._desired()
        return self._routes

    def _desired(self):
        def work(conn):
            running = trials.current(conn, LINE)
            watched = self.conductor._anchoring.watched(conn)
            return registry.desired(conn, [LINE], {LINE: running} if running else {}, self.folder / "versions", watched)

        return self.read(work)

    def reports(self):
        """The replicas: each holds what was desired when it last looked, then looks again."""
        desired = self._routes = self._desired()
        said = []
        for name, number in self.numbers.items():
            verdicts = {v.name: ProbeResult(v.name not in self.refused, self.refused.get(v.name)) for v in desired.resident}
            said.append(ReplicaReport(name, number, verdicts))
            self.numbers[name] = desired.number
        return said

    def step(self, seconds=1.0, customers=0):
        self.customers(customers)
        done = self.conductor.tick(self.reports())
        self._routes = None
        self.now += seconds
        return done

    def until(self, holds, steps=200, customers=0, seconds=1.0):
        for taken in range(steps):
            if holds(self):
                return taken
            self.step(seconds, customers)
        raise AssertionError(f"not within {steps} steps: {self.summary()}")

    @property
    def champion(self):
        return self.read(lambda conn: registry.aliases(conn, LINE))["champion"]

    @property
    def trial(self):
        return next(iter(self.read(lambda conn: trials.of(conn, LINE))), None)

    @property
    def job(self):
        return self.read(lambda conn: jobs.last(conn, LINE))

    @property
    def examples(self):
        return self.read(ledger.counts).get(LINE, {})

    def kinds(self):
        return [event.kind for event in self.events]

    def summary(self):
        """What must be the same however often the daemon died: no times, no numbers of attempts to say so."""

        def work(conn):
            made = [(v.name, v.state, v.digest, v.parent) for v in registry.versions(conn, LINE)]
            ended = [(t.id, t.candidate, t.champion, t.stage, t.fdr_index, t.has_passed) for t in trials.of(conn, LINE)]
            crowned = [(c.alias, c.source, c.target) for c in registry.history(conn, LINE)]
            done = [(j.id, j.state, j.version, j.cursor, j.examples, j.attempts) for j in jobs.of(conn, LINE)]
            return {
                "versions": made,
                "trials": ended,
                "crowned": crowned,
                "jobs": done,
                "aliases": registry.aliases(conn, LINE),
                "examples": ledger.counts(conn),
                "opinions": opinions.counts(conn, LINE, self.settings.wanted(LINE)),
            }

        return self.read(work)


def validate(folder):
    if not (folder / "COMPLETE").exists():
        raise ArtifactInvalid(f"{folder} is incomplete")
    return (folder / "adapter_model.safetensors").read_text()

"""The metrics of the lines, how they learn and what they try; a part of those in `service.metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SWAP_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
LEARNING_SECONDS = (60, 120, 300, 600, 1800, 3600, 6 * 3600, 86_400, 7 * 86_400)
_MEANS: tuple[str, ...] = ("mean", "faded")


class Learning:
    """Examples, jobs, gates, and what the champion keeps of each slice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"learnd_{name}", text, ("line", *labels), registry=registry)

        self.events = Counter(
            "learnd_conductor_events_total", "What the conductor did, `failed` included.", ("line", "kind"), registry=registry
        )
        self.examples = gauge("examples", "Examples, by state.", "state")
        self.buffer = gauge("replay_buffer_examples", "Examples remembered for rehearsal.", "slice")
        self.quarantine = gauge("quarantine", "Feedback that a guard stopped, by what stands of it.", "state", "reason")
        self.drift = gauge("drift_changes", "Changes found in what comes in, by signal.", "signal")
        self.jobs = gauge("jobs", "Learning jobs, by state.", "state")
        self.gates = gauge("gate_verdicts", "Verdicts of the gate on held-out examples.", "outcome")
        self.scores = gauge("champion_score", "The champion on held-out examples, when it was made.", "slice", "score")
        self.transfer = gauge("champion_transfer", "What its line's versions gained and lost.", "measure", "score")
        self.stream = gauge("prequential_score", "New examples as they were answered before they were learned.", "mean", "score")
        self.progress = {
            "step": gauge("job_steps_done", "Optimiser steps that the running job has made."),
            "steps": gauge("job_steps_planned", "Optimiser steps that the running job will make at most."),
            "loss": gauge("job_loss", "The running job's last training loss, in nats per token."),
            "tokens_per_second": gauge("job_tokens_per_second", "The running job's speed."),
            "eta_seconds": gauge("job_eta_seconds", "The running job's estimate of the time that is left."),
        }

    def show(self, status: Mapping[str, Any]) -> None:
        """Set every gauge from the daemon's status."""
        lines = status["lines"]
        shown = {"examples": self.examples, "buffer": self.buffer, "jobs": self.jobs, "gates": self.gates, "drift": self.drift}
        for key, gauge in shown.items():
            show_exactly(gauge, {(name, part): n for name, line in lines.items() for part, n in line[key].items()})
        matrices = [(name, score, found) for name, line in lines.items() for score, found in line["matrix"].items()]
        last = [(name, score, zip(found["slices"], found["scores"][-1], strict=True)) for name, score, found in matrices]
        show_exactly(self.scores, {(name, part, score): value for name, score, row in last for part, value in row})
        read = [(name, score, found["transfer"] or {}) for name, score, found in matrices]
        measures = {(name, what, score): value for name, score, told in read for what, value in told.items()}
        show_exactly(self.transfer, {labels: value for labels, value in measures.items() if value is not None})
        streams = [(name, score, found.get("prequential") or {}) for name, score, found in matrices]
        heard = [(name, score, told) for name, score, told in streams if told.get("items")]
        show_exactly(self.stream, {(name, mean, score): told[mean] for name, score, told in heard for mean in _MEANS})
        stopped = ((name, state, by) for name, line in lines.items() for state, by in line["quarantine"].items())
        show_exactly(self.quarantine, {(name, state, reason): n for name, state, by in stopped for reason, n in by.items()})
        running = {name: line["job"] for name, line in lines.items() if line["job"]}
        for field, gauge in self.progress.items():
            show_exactly(gauge, {(name,): job.get(field) for name, job in running.items()})


class Rollout:
    """Trials, their evidence, and changes of champion."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"learnd_trial_{name}", text, ("line", *labels), registry=registry)

        self.weight = gauge("weight", "Share of units that the candidate answers.")
        self.units = gauge("units", "Matured units of the open trial.", "arm")
        self.evidence = gauge("log_evidence", "Log of the e-process of the open trial.", "bound")
        self.threshold = gauge("log_threshold", "What the log of the e-process must reach.", "bound")
        self.shadows = gauge("shadow_replies", "Shadow replies of the open trial, by outcome.", "outcome")
        self.trials = Gauge("learnd_trials", "Trials, by stage.", ("line", "stage"), registry=registry)
        self.decay = Gauge("learnd_anchor_log_evidence", "That it is worse than its anchor.", ("line",), registry=registry)
        self.alarm = Gauge("learnd_anchor_alarm", "1 when that is known.", ("line",), registry=registry)
        self.swap_seconds = Histogram(
            "learnd_swap_seconds",
            "From the decision until every replica answers with the new champion.",
            ("line",),
            buckets=SWAP_SECONDS,
            registry=registry,
        )
        self.feedback_to_live_seconds = Histogram(
            "learnd_feedback_to_live_seconds",
            "From the oldest feedback that a version learned from until it is champion.",
            ("line",),
            buckets=LEARNING_SECONDS,
            registry=registry,
        )

    def show(self, status: Mapping[str, Any]) -> None:
        """Set every gauge from the daemon's status."""
        lines = status["lines"]
        trials = {name: line["trial"] for name, line in lines.items() if line["trial"]}
        show_exactly(self.trials, {(name, stage): n for name, line in lines.items() for stage, n in line["trials"].items()})
        show_exactly(self.weight, {(name,): trial["weight"] for name, trial in trials.items()})
        hidden = {name: trial["shadow"] for name, trial in trials.items() if trial.get("shadow")}
        show_exactly(self.shadows, {(name, part): n for name, one in hidden.items() for part, n in one["outcomes"].items()})
        watched = {name: line["anchor"] for name, line in lines.items() if line.get("anchor")}
        show_exactly(self.decay, {(name,): one["log_evidence"] for name, one in watched.items()})
        show_exactly(self.alarm, {(name,): float(one["standing"] != "ok") for name, one in watched.items()})
        for gauge, key in ((self.units, "units"), (self.evidence, "log_evidence"), (self.threshold, "thresholds")):
            show_exactly(gauge, {(name, part): n for name, trial in trials.items() for part, n in trial[key].items()})


def show_exactly(gauge: Gauge, values: Mapping[tuple[str, ...], float | None]) -> None:
    """Show exactly these label sets, so that what has ended disappears; None stands for not known."""
    gauge.clear()
    for labels, value in values.items():
        gauge.labels(*labels).set(math.nan if value is None else value)

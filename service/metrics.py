"""Every metric of the daemon, in one place: the only door to prometheus_client.

Counters and histograms are told of each event; gauges are set from the status at each scrape, so they cannot go stale or
disagree with it. Base units, prefix `learnd_`, no label that grows with users. What is counted restarts at 0 with the keeper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from replay.records import Feedback, Interaction, Receipt

VERSION_LABELS = ("line", "version", "arm")
ANSWER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
WRITE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
GROUP_SIZES = tuple(2**power for power in range(13))
SWAP_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
LEARNING_SECONDS = (60, 120, 300, 600, 1800, 3600, 6 * 3600, 86_400, 7 * 86_400)


class Metrics:
    """All metrics over one registry of their own."""

    def __init__(self, version: str, base: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter brings a `_created` gauge along
        self._registry = CollectorRegistry()
        self._traffic = _Traffic(self._registry)
        self._feedback = _Feedback(self._registry)
        self._ledger = _Ledger(self._registry)
        self._learning = _Learning(self._registry)
        self._rollout = _Rollout(self._registry)
        self._serving = _Serving(self._registry)
        build = Gauge("learnd_build_info", "What runs: always 1.", ("version", "base"), registry=self._registry)
        build.labels(version, base).set(1)

    def saw_interactions(self, interactions: Iterable[Interaction]) -> None:
        """Requests were answered and recorded."""
        for interaction in interactions:
            self._traffic.saw(interaction)

    def saw_feedback(self, item: Feedback, outcome: Receipt | Exception) -> None:
        """Feedback was stored, known already, or refused for contradicting what is stored."""
        self._feedback.saw(item, outcome)

    def saw_joined(self, items: Iterable[Feedback], now: float) -> None:
        """Pending feedback found its interaction."""
        for item in items:
            self._feedback.joined.labels(item.metric_name).observe(max(0.0, now - item.received_at))

    def saw_expired(self, number: int) -> None:
        """Pending feedback waited for too long."""
        self._feedback.expired.inc(number)

    def saw_sealed(self, number: int) -> None:
        """Interactions went into the archive."""
        self._ledger.sealed.inc(number)

    def saw_commit(self, size: int, seconds: float) -> None:
        """A group of `size` writes was committed, its fsync included, in `seconds`."""
        self._ledger.group_size.observe(size)
        self._ledger.commit_seconds.observe(seconds)

    def saw_write(self, seconds: float) -> None:
        """A caller waited so long from asking to being on disk."""
        self._ledger.lag_seconds.observe(seconds)

    def saw_write_failure(self) -> None:
        """The ledger could not write."""
        self._ledger.failures.inc()

    def saw_event(self, kind: str, line: str) -> None:
        """The conductor did something, or failed to."""
        self._learning.events.labels(line, kind).inc()

    def saw_swap(self, line: str, seconds: float, feedback_to_live_seconds: float | None) -> None:
        """Every replica routes by a new champion; and how old the oldest feedback was that it learned from."""
        self._rollout.swap_seconds.labels(line).observe(seconds)
        if feedback_to_live_seconds is not None:
            self._rollout.feedback_to_live_seconds.labels(line).observe(feedback_to_live_seconds)

    def saw_failure(self, where: str) -> None:
        """A background loop failed once and goes on."""
        self._serving.failures.labels(where).inc()

    def render(self, status: Mapping[str, Any], accept: str = "") -> tuple[bytes, str]:
        """Set the gauges from `status`, as `Keeper.status` gives it; the text, and its content type, that `accept` prefers."""
        for group in (self._feedback, self._ledger, self._learning, self._rollout, self._serving):
            group.show(status)
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Traffic:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "learnd_requests_total", "Requests answered, by outcome.", (*VERSION_LABELS, "code"), registry=registry
        )
        self.seconds = Histogram(
            "learnd_request_duration_seconds",
            "From a request's arrival to the last byte of its reply.",
            VERSION_LABELS,
            buckets=ANSWER_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "learnd_time_to_first_token_seconds",
            "From a request's arrival to the first token of a streamed reply.",
            VERSION_LABELS,
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("learnd_tokens_total", "Tokens read and written.", (*VERSION_LABELS, "kind"), registry=registry)

    def saw(self, interaction: Interaction) -> None:
        labels = (interaction.line, interaction.version, interaction.arm.value)
        self.requests.labels(*labels, interaction.error or "ok").inc()
        self.seconds.labels(*labels).observe(interaction.latency_seconds)
        if interaction.ttft_seconds is not None:
            self.first_token_seconds.labels(*labels).observe(interaction.ttft_seconds)
        self.tokens.labels(*labels, "prompt").inc(interaction.prompt_tokens)
        self.tokens.labels(*labels, "reply").inc(interaction.reply_tokens)


class _Feedback:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.received = Counter(
            "learnd_feedback_total", "Feedback received, by answer.", ("metric", "status", "source"), registry=registry
        )
        self.joined = Histogram(
            "learnd_feedback_wait_seconds",
            "How long pending feedback waited for its interaction.",
            ("metric",),
            buckets=(1, 5, 30, 60, 300, 3600, 86_400),
            registry=registry,
        )
        self.expired = Counter("learnd_feedback_expired_total", "Feedback that waited too long.", registry=registry)
        self.stored = Gauge("learnd_feedback_stored", "Feedback on disk.", registry=registry)
        self.pending = Gauge("learnd_feedback_pending", "Feedback whose interaction is unknown yet.", registry=registry)
        self.pending_age = Gauge("learnd_feedback_pending_age_seconds", "Age of the oldest pending feedback.", registry=registry)
        self.refused = Gauge(
            "learnd_feedback_not_learned", "Feedback on disk that nothing is learned from.", ("reason",), registry=registry
        )

    def saw(self, item: Feedback, outcome: Receipt | Exception) -> None:
        self.received.labels(item.metric_name, _answer(outcome), item.source).inc()

    def show(self, status: Mapping[str, Any]) -> None:
        self.stored.set(status["feedback"]["stored"])
        self.pending.set(status["feedback"]["pending"])
        self.pending_age.set(status["feedback"]["oldest_pending_seconds"])
        _replace(self.refused, {(reason,): number for reason, number in status["feedback"]["refusals"].items()})


class _Ledger:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.group_size = Histogram("learnd_ledger_group_writes", "Writes in one commit.", buckets=GROUP_SIZES, registry=registry)
        self.commit_seconds = Histogram(
            "learnd_ledger_commit_seconds", "One commit with its fsync.", buckets=WRITE_SECONDS, registry=registry
        )
        self.lag_seconds = Histogram(
            "learnd_ledger_lag_seconds", "From asking to being on disk.", buckets=WRITE_SECONDS, registry=registry
        )
        self.failures = Counter("learnd_ledger_failures_total", "Writes that were not stored.", registry=registry)
        self.sealed = Counter("learnd_archive_sealed_total", "Interactions sealed into the archive.", registry=registry)
        self.rows = Gauge("learnd_ledger_rows", "Rows in the ledger.", ("table",), registry=registry)
        self.bytes = Gauge("learnd_storage_bytes", "Bytes on disk, by place.", ("place",), registry=registry)
        self.segments = Gauge("learnd_archive_segments", "Sealed segments.", registry=registry)
        self.open = Gauge("learnd_ledger_open_interactions", "Interactions that are not sealed yet.", registry=registry)
        self.open_age = Gauge("learnd_ledger_open_age_seconds", "Age of the oldest of those.", registry=registry)

    def show(self, status: Mapping[str, Any]) -> None:
        ledger = status["ledger"]
        _replace(self.rows, {(table,): number for table, number in ledger["rows"].items()})
        _replace(self.bytes, {(place,): number for place, number in ledger["bytes"].items()})
        self.segments.set(ledger["segments"])
        self.open.set(ledger["open_interactions"])
        self.open_age.set(ledger["oldest_open_seconds"])


class _Learning:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"learnd_{name}", text, ("line", *labels), registry=registry)

        self.events = Counter(
            "learnd_conductor_events_total", "What the conductor did, `failed` included.", ("line", "kind"), registry=registry
        )
        self.examples = gauge("examples", "Examples, by state.", "state")
        self.buffer = gauge("replay_buffer_examples", "Examples remembered for rehearsal.", "slice")
        self.jobs = gauge("jobs", "Learning jobs, by state.", "state")
        self.gates = gauge("gate_verdicts", "Verdicts of the gate on held-out examples.", "outcome")
        self.progress = {
            "step": gauge("job_steps_done", "Optimiser steps that the running job has made."),
            "steps": gauge("job_steps_planned", "Optimiser steps that the running job will make at most."),
            "loss": gauge("job_loss", "The running job's last training loss, in nats per token."),
            "tokens_per_second": gauge("job_tokens_per_second", "The running job's speed."),
            "eta_seconds": gauge("job_eta_seconds", "The running job's estimate of the time that is left."),
        }

    def show(self, status: Mapping[str, Any]) -> None:
        lines = status["lines"]
        for gauge, key in ((self.examples, "examples"), (self.buffer, "buffer"), (self.jobs, "jobs"), (self.gates, "gates")):
            _replace(gauge, {(name, part): n for name, line in lines.items() for part, n in line[key].items()})
        running = {name: line["job"] for name, line in lines.items() if line["job"]}
        for field, gauge in self.progress.items():
            _replace(gauge, {(name,): job.get(field) for name, job in running.items()})


class _Rollout:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"learnd_trial_{name}", text, ("line", *labels), registry=registry)

        self.weight = gauge("weight", "Share of units that the candidate answers.")
        self.units = gauge("units", "Matured units of the open trial.", "arm")
        self.evidence = gauge("log_evidence", "Log of the e-process of the open trial.", "bound")
        self.threshold = gauge("log_threshold", "What the log of the e-process must reach.", "bound")
        self.trials = Gauge("learnd_trials", "Trials, by stage.", ("line", "stage"), registry=registry)
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
        lines = status["lines"]
        trials = {name: line["trial"] for name, line in lines.items() if line["trial"]}
        _replace(self.trials, {(name, stage): n for name, line in lines.items() for stage, n in line["trials"].items()})
        _replace(self.weight, {(name,): trial["weight"] for name, trial in trials.items()})
        for gauge, key in ((self.units, "units"), (self.evidence, "log_evidence"), (self.threshold, "thresholds")):
            _replace(gauge, {(name, part): n for name, trial in trials.items() for part, n in trial[key].items()})


class _Serving:
    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"learnd_{name}", text, labels, registry=registry)

        self.ready = gauge("ready", "1 when every champion is resident and proven and the ledger writes.")
        self.desired = gauge("desired_number", "Number of the state that replicas should have.")
        self.number = gauge("replica_number", "Number of the state that a replica has.", "replica")
        self.inflight = gauge("replica_inflight_requests", "Requests that a replica is answering.", "replica")
        self.resident = gauge("adapter_resident", "1 for each version that a replica holds and has proven.", "replica", "version")
        self.failures = Counter(
            "learnd_background_failures_total", "Failures of a background loop, which went on.", ("loop",), registry=registry
        )

    def show(self, status: Mapping[str, Any]) -> None:
        replicas = status["replicas"]
        self.ready.set(status["ready"])
        self.desired.set(status["desired"])
        _replace(self.number, {(r["id"],): r["number"] for r in replicas})
        _replace(self.inflight, {(r["id"],): r["inflight"] for r in replicas})
        _replace(self.resident, {(r["id"], version): 1 for r in replicas for version in r["resident"]})


def _answer(outcome: Receipt | Exception) -> str:
    if isinstance(outcome, Exception):
        return "conflict"
    return "repeat" if outcome.is_repeat else outcome.status.value


def _replace(gauge: Gauge, values: Mapping[tuple[str, ...], float | None]) -> None:
    """Show exactly these label sets, so that what has ended disappears; None stands for not known."""
    gauge.clear()
    for labels, value in values.items():
        gauge.labels(*labels).set(math.nan if value is None else value)

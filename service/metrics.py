"""Every metric of the daemon: with `service/metrics_lines.py` the only door to prometheus_client.

Counters and histograms are told of each event; gauges are set from the status at each scrape, so they cannot go stale or
disagree with it. Base units, prefix `learnd_`, no label that grows with users. What is counted restarts at 0 with the keeper.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from replay.records import Feedback, Interaction, Receipt
from service.metrics_lines import Learning, Rollout, show_exactly

VERSION_LABELS = ("line", "version", "arm")
ANSWER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
WRITE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
GROUP_SIZES = tuple(2**power for power in range(13))


class Metrics:
    """All metrics over one registry of their own."""

    def __init__(self, version: str, base: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # else each counter brings a `_created` gauge along
        self._registry = CollectorRegistry()
        self._traffic = _Traffic(self._registry)
        self._feedback = _Feedback(self._registry)
        self._ledger = _Ledger(self._registry)
        self._learning = Learning(self._registry)
        self._rollout = Rollout(self._registry)
        self._serving = _Serving(self._registry)
        build = Gauge("learnd_build_info", "What runs: always 1.", ("version", "base"), registry=self._registry)
        build.labels(version, base).set(1)

    def saw_interactions(self, interactions: Iterable[Interaction]) -> None:
        """Requests were answered and recorded."""
        for interaction in interactions:
            self._traffic.saw(interaction)

    def saw_feedback(self, items: Iterable[Feedback], outcomes: Iterable[Receipt | Exception]) -> None:
        """Feedback was stored, known already, or refused for contradicting what is stored: an outcome for each."""
        self._feedback.saw(items, outcomes)

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
        self.findings = Counter(
            "learnd_reply_findings_total", "What replies were found to be.", (*VERSION_LABELS, "finding"), registry=registry
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
        if interaction.is_refusal:
            self.findings.labels(*labels, "refusal").inc()
        if interaction.has_form is not None:
            self.findings.labels(*labels, "form_kept" if interaction.has_form else "form_broken").inc()


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

    def saw(self, items: Iterable[Feedback], outcomes: Iterable[Receipt | Exception]) -> None:
        alike = collections.Counter(
            (i.metric_name, _answer(outcome), i.source) for i, outcome in zip(items, outcomes, strict=True)
        )
        for labels, number in alike.items():
            self.received.labels(*labels).inc(number)

    def show(self, status: Mapping[str, Any]) -> None:
        self.stored.set(status["feedback"]["stored"])
        self.pending.set(status["feedback"]["pending"])
        self.pending_age.set(status["feedback"]["oldest_pending_seconds"])
        show_exactly(self.refused, {(reason,): number for reason, number in status["feedback"]["refusals"].items()})


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
        show_exactly(self.rows, {(table,): number for table, number in ledger["rows"].items()})
        show_exactly(self.bytes, {(place,): number for place, number in ledger["bytes"].items()})
        self.segments.set(ledger["segments"])
        self.open.set(ledger["open_interactions"])
        self.open_age.set(ledger["oldest_open_seconds"])


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
        show_exactly(self.number, {(r["id"],): r["number"] for r in replicas})
        show_exactly(self.inflight, {(r["id"],): r["inflight"] for r in replicas})
        show_exactly(self.resident, {(r["id"], version): 1 for r in replicas for version in r["resident"]})


def _answer(outcome: Receipt | Exception) -> str:
    if isinstance(outcome, Exception):
        return "conflict"
    return "repeat" if outcome.is_repeat else outcome.status.value

"""What a trial's units experienced: the evidence that a verdict is made of, read from the ledger.

A unit has one window. It opens with the unit's first answer and closes `window_seconds` later; only requests answered
and feedback received inside it count, and only a unit whose window has closed is matured. So a matured outcome never
changes, and units mature in the order of their first answer: evidence may be recomputed at any time, and only ever
grows. (One bounded outcome for each unit of randomisation: requests of one user are not independent.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, func, select

from replay.join import Said, last_word
from replay.records import Arm, FeedbackStatus, FeedbackValue
from replay.tables import feedback, interaction

REQUESTS_PER_UNIT = 20
"""Later requests of a unit do not count: one busy user must not outweigh the rest of its own window."""

SILENCE = 0.5
FAILURE = 0.0
"""The reward of a reply that nobody judged, and of one that the server failed to give."""

ENGINE_DEAD = "engine_dead"
"""The `error` of a reply that was under way when the engine died."""

Reward = Callable[[FeedbackValue], float]
Arms = tuple[Arm, Arm]
TRIAL: Arms = (Arm.CANDIDATE, Arm.CONTROL)
"""The two that are compared, unless others are named."""


@dataclass(frozen=True, slots=True)
class Guard:
    """What gives a request a loss besides its reward: it has missed a bound, or a metric says so."""

    has_missed: Callable[[Any], bool] | None = None
    """Asked with the request's row."""
    is_about: Callable[[Any], bool] | None = None
    """Of which requests it knows anything, by their rows; None: of all. The others lose nothing, as if nobody had spoken."""
    metric: str | None = None
    """Else the metric whose reward, turned over, is the loss; silence is one half."""
    reward: Reward | None = None


@dataclass(frozen=True, slots=True)
class UnitOutcome:
    """What one unit of a trial experienced."""

    unit: str
    arm: Arm
    first_at: float
    """When its first reply was complete: its window opens."""
    reward: float | None
    """Mean over its counted requests, in [0, 1]; None until it is matured."""
    is_matured: bool
    errors: int
    """Failed replies among `requests`; a client that hung up (before it had waited long) or asked wrongly is no failure."""
    requests: int
    asked_at: float | None = None
    """When the first of them came in; None: not known, so taken as `first_at`."""
    answered: float = 1.0
    """Share of its counted requests of which something was said under the metric; 1 until it is matured."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """By guard: mean over its counted requests, in [0, 1]; empty until it is matured."""
    answers: Mapping[str, float] = field(default_factory=dict)
    """As `answered`, by guard with a metric of its own, or about some requests only; of the others all is known."""

    @property
    def is_silent(self) -> bool:
        """Nobody has said anything under the metric of any counted request."""
        return self.answered == 0


def outcomes(
    conn: Connection,
    trial: str,
    metric: str,
    window_seconds: float,
    now: float,
    *,
    reward: Reward,
    guards: Mapping[str, Guard] | None = None,
    arms: Arms = TRIAL,
) -> list[UnitOutcome]:
    """Give each unit's outcome by its first answer; a unit seen in both arms (which nested weights avoid) is left out.

    `trial` is the name that the requests are recorded under. `reward` maps a value of `metric` into [0, 1]; `guards` are what
    else is lost, by name.
    """
    requests: dict[str, list[Row[*tuple[Any, ...]]]] = defaultdict(list)
    for row in conn.execute(_requests(trial, arms)):
        requests[row.unit].append(row)
    asked = guards or {}
    words = _Words(metric, reward, asked, _heard(conn, trial, {metric, *(g.metric for g in asked.values() if g.metric)}))
    found = [_outcome(rows, words, window_seconds, now) for rows in requests.values() if len({row.arm for row in rows}) == 1]
    return sorted(found, key=lambda o: (o.first_at, o.unit))


def feedback_of(conn: Connection, trial: str, metric: str) -> Mapping[str, Sequence[Said]]:
    """Everything said under `metric` of a trial's interactions, by interaction."""
    query = (
        select(feedback.c.inference_id, feedback.c.value, feedback.c.occurred_at, feedback.c.received_at, feedback.c.seq)
        .join(interaction, interaction.c.id == feedback.c.inference_id)
        .where(interaction.c.trial == trial, feedback.c.metric_name == metric)
        .where(feedback.c.status == FeedbackStatus.MATCHED)
    )
    said: dict[str, list[Said]] = defaultdict(list)
    for inference_id, *rest in conn.execute(query):
        said[inference_id].append(Said(*rest))
    return said


def recent_failures(conn: Connection, trial: str, arm: Arm, last: int) -> int:
    """Count the failed replies among the `last` ones of an arm: the evidence of a burst, which waits for no window."""
    query = select(interaction.c.error).where(interaction.c.trial == trial, interaction.c.arm == arm)
    return sum(is_failure(error) for error in conn.scalars(query.order_by(interaction.c.seq.desc()).limit(last)))


def crashes(conn: Connection, trial: str, arm: Arm) -> int:
    """Count an arm's replies that were under way when an engine died: whose fault it was, nobody can say of one such death."""
    of = interaction.c
    query = select(func.count()).where(of.trial == trial, of.arm == arm, of.error == ENGINE_DEAD)
    return conn.scalar(query) or 0


def exposed_twice(conn: Connection, trial: str, since: float = 0.0) -> int:
    """How many units both arms have answered, which should be none; of requests that came `since` then."""
    of = interaction.c
    arms = select(of.unit).where(of.trial == trial, of.arm.in_([Arm.CANDIDATE, Arm.CONTROL]), of.at >= since)
    twice = arms.group_by(of.unit).having(func.count(of.arm.distinct()) > 1).subquery()
    return conn.scalar(select(func.count()).select_from(twice)) or 0


def last_heard(conn: Connection, trial: str, metric: str) -> float | None:
    """When the last feedback under `metric` came on a trial's interactions, by the server's clock."""
    query = select(func.max(feedback.c.received_at)).join(interaction, interaction.c.id == feedback.c.inference_id)
    found: float | None = conn.scalar(query.where(interaction.c.trial == trial, feedback.c.metric_name == metric))
    return found


def is_failure(error: str | None) -> bool:
    """Whether the server failed to reply, by the interaction's `error`.

    A client that had waited long for a first word when it left is `timeout`, not `client_disconnected`.
    """
    return error is not None and error != "client_disconnected" and not error.startswith("http_4")


@dataclass(frozen=True, slots=True)
class _Words:
    """How a trial's requests are judged, and what was said of them: by metric, then by interaction."""

    metric: str
    reward: Reward
    guards: Mapping[str, Guard]
    heard: Mapping[str, Mapping[str, Sequence[Said]]]

    def of(self, metric: str | None, request: str, closes_at: float) -> Said | None:
        """The last word on a request under a metric."""
        return last_word(self.heard.get(metric or self.metric, {}).get(request, ()), closes_at)


def _heard(conn: Connection, trial: str, metrics: Iterable[str]) -> dict[str, Mapping[str, Sequence[Said]]]:
    return {metric: feedback_of(conn, trial, metric) for metric in metrics}


def _requests(trial: str, arms: Arms) -> Any:
    of = interaction.c
    answered_at = (of.at + of.latency_seconds).label("answered_at")
    measured = (of.latency_seconds, of.ttft_seconds, of.reply_tokens, of.is_refusal, of.has_form)
    return (
        select(of.id, of.unit, of.arm, of.error, of.at, *measured, answered_at)
        .where(of.trial == trial, of.arm.in_(arms))
        .order_by(answered_at, of.seq)
    )


def _outcome(rows: Sequence[Row[*tuple[Any, ...]]], words: _Words, window_seconds: float, now: float) -> UnitOutcome:
    """Judge one unit by its requests, in the order of their answers."""
    first_at = rows[0].answered_at
    closes_at = first_at + window_seconds
    counted = [row for row in rows if row.answered_at <= closes_at][:REQUESTS_PER_UNIT]
    is_matured = now >= closes_at
    plain: dict[str, Any] = {
        "unit": rows[0].unit,
        "arm": Arm(rows[0].arm),
        "first_at": first_at,
        "is_matured": is_matured,
        "errors": sum(is_failure(row.error) for row in counted),
        "requests": len(counted),
        "asked_at": min(row.at for row in rows),
    }
    return UnitOutcome(reward=None, **plain) if not is_matured else UnitOutcome(**plain, **_judged(counted, words, closes_at))


def _judged(counted: Sequence[Row[*tuple[Any, ...]]], words: _Words, closes_at: float) -> dict[str, Any]:
    """What a matured unit experienced, as the mean over its counted requests."""

    def answered(metric: str) -> float:
        return mean(lambda row: words.of(metric, row.id, closes_at) is not None)

    def loss(guard: Guard) -> Callable[[Row[*tuple[Any, ...]]], float]:
        return lambda row: _loss(row, guard, words, closes_at)

    def mean(value: Callable[[Row[*tuple[Any, ...]]], float]) -> float:
        return sum(map(value, counted)) / len(counted)

    return {
        "reward": mean(lambda row: _reward(row, words, closes_at)),
        "answered": answered(words.metric),
        "losses": {name: mean(loss(guard)) for name, guard in words.guards.items()},
        "answers": {name: answered(guard.metric) for name, guard in words.guards.items() if guard.metric}
        | {name: mean(guard.is_about) for name, guard in words.guards.items() if guard.is_about},
    }


def _reward(row: Row[*tuple[Any, ...]], words: _Words, closes_at: float) -> float:
    if is_failure(row.error):
        return FAILURE
    word = words.of(None, row.id, closes_at)
    return SILENCE if word is None else words.reward(word.value)


def _loss(row: Row[*tuple[Any, ...]], guard: Guard, words: _Words, closes_at: float) -> float:
    if guard.has_missed is not None:
        return float(guard.has_missed(row))
    word = words.of(guard.metric, row.id, closes_at)
    return 1.0 - SILENCE if word is None or guard.reward is None else 1.0 - guard.reward(word.value)

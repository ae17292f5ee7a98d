"""What a trial's units experienced: the evidence that a verdict is made of, read from the ledger.

A unit has one window. It opens with the unit's first answer and closes `window_seconds` later; only requests answered
and feedback received inside it count, and only a unit whose window has closed is matured. So a matured outcome never
changes, and units mature in the order of their first answer: evidence may be recomputed at any time, and only ever
grows. (One bounded outcome for each unit of randomisation: requests of one user are not independent.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, select

from replay.join import Said, last_word
from replay.records import Arm, FeedbackStatus, FeedbackValue
from replay.tables import feedback, interaction

REQUESTS_PER_UNIT = 20
"""Later requests of a unit do not count: one busy user must not outweigh the rest of its own window."""

SILENCE = 0.5
FAILURE = 0.0
"""The reward of a reply that nobody judged, and of one that the server failed to give."""

Reward = Callable[[FeedbackValue], float]


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
    """Failed replies among `requests`; a client that hung up or asked wrongly is no failure."""
    requests: int


def outcomes(
    conn: Connection, trial: str, metric: str, window_seconds: float, now: float, *, reward: Reward
) -> list[UnitOutcome]:
    """Give each unit's outcome by its first answer; a unit seen in both arms (which nested weights avoid) is left out.

    `reward` maps a value of `metric` into [0, 1].
    """
    requests: dict[str, list[Row[*tuple[Any, ...]]]] = defaultdict(list)
    for row in conn.execute(_requests(trial)):
        requests[row.unit].append(row)
    said = feedback_of(conn, trial, metric)
    found = [
        _outcome(rows, said, window_seconds, now, reward) for rows in requests.values() if len({row.arm for row in rows}) == 1
    ]
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


def is_failure(error: str | None) -> bool:
    """Whether the server failed to reply, by the interaction's `error`."""
    return error is not None and error != "client_disconnected" and not error.startswith("http_4")


def _requests(trial: str) -> Any:
    answered_at = (interaction.c.at + interaction.c.latency_seconds).label("answered_at")
    return (
        select(interaction.c.id, interaction.c.unit, interaction.c.arm, interaction.c.error, answered_at)
        .where(interaction.c.trial == trial, interaction.c.arm.in_([Arm.CANDIDATE, Arm.CONTROL]))
        .order_by(answered_at, interaction.c.seq)
    )


def _outcome(
    rows: Sequence[Row[*tuple[Any, ...]]],
    said: Mapping[str, Sequence[Said]],
    window_seconds: float,
    now: float,
    reward: Reward,
) -> UnitOutcome:
    """Judge one unit by its requests, in the order of their answers."""
    first_at = rows[0].answered_at
    closes_at = first_at + window_seconds
    counted = [row for row in rows if row.answered_at <= closes_at][:REQUESTS_PER_UNIT]
    is_matured = now >= closes_at
    total = sum(_reward(row, said.get(row.id, ()), closes_at, reward) for row in counted) if is_matured else 0.0
    return UnitOutcome(
        unit=rows[0].unit,
        arm=Arm(rows[0].arm),
        first_at=first_at,
        reward=total / len(counted) if is_matured else None,
        is_matured=is_matured,
        errors=sum(is_failure(row.error) for row in counted),
        requests=len(counted),
    )


def _reward(row: Row[*tuple[Any, ...]], said: Sequence[Said], closes_at: float, reward: Reward) -> float:
    if is_failure(row.error):
        return FAILURE
    word = last_word(said, closes_at)
    return SILENCE if word is None else reward(word.value)

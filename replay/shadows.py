"""What candidates answered in the shadow, and how they found the replies that were good: apart from interactions.

Functions on a connection, each idempotent. Feedback is joined to interactions alone, so nothing that is said of a shadow
reply is ever learned from; and no query for examples, outcomes or metrics looks into these tables. A reply's words stay only as
long as its trial is in the shadow; scores stay, so that no verdict changes. Read and written by the keeper.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Exists,
    Float,
    Index,
    Integer,
    String,
    Table,
    Text,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from replay.examples import State
from replay.guard import Standing
from replay.outcomes import ENGINE_DEAD, is_failure
from replay.records import Message
from replay.tables import example, interaction, metadata, vote

PREFIX = "shadow-"
"""How the ids of shadow replies begin, which are shown to nobody who could give feedback on them."""
KINDS = ("corrected", "accepted", "judged")
"""What is compared: replies that are known to be good, put in the champion's place by somebody or the champion's with a thumb up,
by their likelihood; and both versions' own replies, where there is a judge that may be trusted."""
ScoreError = Literal["not_finite", "unscorable"]
NOT_FINITE: ScoreError = "not_finite"
UNSCORABLE: ScoreError = "unscorable"

shadow = Table(
    "shadow",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("trial", String, nullable=False),
    Column("interaction_id", String, nullable=False, index=True),
    Column("unit", String, nullable=False),
    Column("version", String, nullable=False),
    Column("replica", String, nullable=False),
    Column("reply", Text),  # null once its trial has left the shadow, or it was erased
    Column("reply_tokens", Integer, nullable=False),
    Column("at", Float, nullable=False),
    Column("latency_seconds", Float, nullable=False),
    Column("error", String),
)
Index("shadow_of_trial", shadow.c.trial, shadow.c.interaction_id, unique=True)
_score = Table(
    "shadow_score",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("trial", String, nullable=False),
    Column("interaction_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("candidate", Float, nullable=False),
    Column("champion", Float, nullable=False),
    Column("error", String),
)
Index("shadow_score_once", _score.c.trial, _score.c.interaction_id, _score.c.kind, unique=True)


@dataclass(frozen=True, slots=True)
class Shadow:
    """What a candidate answered to a prompt that the champion has answered for real."""

    id: str
    trial: str
    interaction_id: str
    """The champion's reply."""
    unit: str
    version: str
    replica: str
    reply: str
    reply_tokens: int
    at: float
    latency_seconds: float
    error: str | None = None
    """As an interaction's; `timeout` when it took too long."""


@dataclass(frozen=True, slots=True)
class Gold:
    """A good reply to a prompt of which there is a shadow, to be scored by both versions."""

    trial: str
    interaction_id: str
    kind: str
    candidate: str
    messages: tuple[Message, ...]
    reply: str


@dataclass(frozen=True, slots=True)
class Score:
    """How likely both found a good reply, in nats a token; where `error` says that they could not be compared, both are 0."""

    trial: str
    interaction_id: str
    kind: str
    candidate: float
    champion: float
    error: ScoreError | None = None
    """`not_finite` when the candidate gave no number, which speaks against it, `unscorable` when the text cannot be read."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How many shadow replies there are of a trial."""

    replies: int
    failed: int
    not_finite: int
    """Scores of the candidate that are no numbers."""


def record(conn: Connection, shadows: Sequence[Shadow]) -> None:
    """Store shadow replies, but for those known."""
    for one in shadows:
        is_of_it = (shadow.c.trial == one.trial, shadow.c.interaction_id == one.interaction_id)
        if not conn.scalar(select(exists().where(*is_of_it))):
            conn.execute(insert(shadow).values(asdict(one)))


def score(conn: Connection, scores: Sequence[Score]) -> None:
    """Store scores; of two of one text the first stands."""
    for one in scores:
        if not conn.scalar(select(_is_scored(one.trial, one.kind, one.interaction_id))):
            conn.execute(insert(_score).values(asdict(one)))


def corrected(conn: Connection, trial: str, replica: str, live: Collection[str], limit: int) -> list[Gold]:
    """Corrections that became examples and are to be scored by this replica: of its shadows, and of those no more `live`.

    They are as the guard has left them, so what it refuses or holds is no evidence.
    """
    query = (
        select(shadow.c.interaction_id, shadow.c.version, example.c.body)
        .join(example, example.c.interaction_id == shadow.c.interaction_id)
        .where(shadow.c.trial == trial, _is_mine(replica, live), example.c.state != State.FORGOTTEN)
        .where(~_is_scored(trial, "corrected", shadow.c.interaction_id))
        .order_by(example.c.seq)
        .limit(limit)
    )
    rows = {row[0]: row for row in conn.execute(query)}
    return [Gold(trial, said, "corrected", who, tuple(body["messages"]), body["reply"]) for said, who, body in rows.values()]


def accepted(
    conn: Connection, trial: str, replica: str, live: Collection[str], limit: int, *, metric: str, good: bool
) -> list[Gold]:
    """Replies of the champion with a vote `good` under `metric` that nothing is wrong with, while their words are here."""
    said = interaction.c
    is_good = (vote.c.metric == metric, vote.c.value == good, vote.c.state.in_([Standing.ADMITTED, Standing.RELEASED]))
    query = (
        select(shadow.c.interaction_id, shadow.c.version, said.messages, said.reply)
        .join(vote, vote.c.interaction_id == shadow.c.interaction_id)
        .join(interaction, said.id == shadow.c.interaction_id)
        .where(shadow.c.trial == trial, _is_mine(replica, live), *is_good, said.messages.is_not(None), said.reply != "")
        .where(~_is_scored(trial, "accepted", shadow.c.interaction_id))
        .order_by(vote.c.seq)
        .limit(limit)
    )
    rows = {row[0]: row for row in conn.execute(query)}
    return [Gold(trial, said, "accepted", who, tuple(asked), reply) for said, who, asked, reply in rows.values()]


def compared(conn: Connection, trial: str) -> dict[str, list[tuple[float, float]]]:
    """Scores (candidate, champion) by kind: the first of each unit, since the prompts of one user are not independent."""
    query = (
        select(_score.c.kind, shadow.c.unit, _score.c.candidate, _score.c.champion)
        .join(shadow, (shadow.c.trial == _score.c.trial) & (shadow.c.interaction_id == _score.c.interaction_id))
        .where(_score.c.trial == trial, _score.c.error.is_(None))
        .order_by(_score.c.seq)
    )
    first: dict[tuple[str, str], tuple[float, float]] = {}
    for kind, unit, candidate, champion in conn.execute(query):
        first.setdefault((kind, unit), (candidate, champion))
    found: dict[str, list[tuple[float, float]]] = {}
    for (kind, _), pair in first.items():
        found.setdefault(kind, []).append(pair)
    return found


def counts(conn: Connection, trial: str) -> Counted:
    """How many there are."""
    errors = list(conn.scalars(select(shadow.c.error).where(shadow.c.trial == trial)))
    broken = select(func.count()).select_from(_score).where(_score.c.trial == trial, _score.c.error == NOT_FINITE)
    return Counted(len(errors), sum(map(is_failure, errors)), conn.scalar(broken) or 0)


def recent_failures(conn: Connection, trial: str, last: int) -> int:
    """Count the failed ones among the `last` shadow replies."""
    query = select(shadow.c.error).where(shadow.c.trial == trial).order_by(shadow.c.seq.desc()).limit(last)
    return sum(map(is_failure, conn.scalars(query)))


def crashes(conn: Connection, trial: str) -> int:
    """Count the shadow replies that were under way when an engine died."""
    return conn.scalar(select(func.count()).where(shadow.c.trial == trial, shadow.c.error == ENGINE_DEAD)) or 0


def hush(conn: Connection, trial: str) -> None:
    """Drop the words of a trial's shadow replies: it has left the shadow."""
    conn.execute(update(shadow).where(shadow.c.trial == trial).values(reply=None))


def forget(conn: Connection, interaction_ids: Sequence[str]) -> None:
    """Erase what was answered to these prompts in the shadow."""
    conn.execute(update(shadow).where(shadow.c.interaction_id.in_(interaction_ids)).values(reply=None))


def _is_mine(replica: str, live: Collection[str]) -> ColumnElement[bool]:
    return or_(shadow.c.replica == replica, shadow.c.replica.not_in(live))


def _is_scored(trial: str, kind: str, interaction_id: Any) -> Exists:
    return exists().where(_score.c.trial == trial, _score.c.kind == kind, _score.c.interaction_id == interaction_id)

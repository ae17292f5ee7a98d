"""What a judge said of shadow replies, and of corrections, by which it is seen whether it agrees with people.

Functions on a connection, each idempotent. A judge is known by a digest of all that makes its verdicts, so another model, address
or question is another judge, which has to be tried anew. Asked by `service/judging.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Exists, Index, Integer, String, Table, exists, insert, select

from replay.examples import State
from replay.intake import interaction as read
from replay.records import Message
from replay.shadows import shadow
from replay.tables import example, interaction, metadata

JUDGED, CHECKED = "judged", "checked"
MIN_AGREEMENT, MIN_CHECKED = 0.6, 20
"""A judge counts while it agrees with people so often, on so many of their corrections at least; no setting makes it less."""
LAST_CHECKED = 200
"""Of which the last so many are looked at."""

_judgement = Table(
    "judgement",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("judge", String, nullable=False),  # digest of what it is and is asked
    Column("line", String, nullable=False),
    Column("trial", String),
    Column("interaction_id", String, nullable=False),
    Column("verdict", Integer, nullable=False),
)
Index("judgement_once", _judgement.c.interaction_id, _judgement.c.kind, _judgement.c.judge, unique=True)
Index("judgement_of", _judgement.c.judge, _judgement.c.kind, _judgement.c.line)


@dataclass(frozen=True, slots=True)
class Dispute:
    """Two replies to one prompt, for a judge."""

    kind: str
    """`judged`: the candidate's and the champion's; `checked`: a person's correction and what it corrected."""
    line: str
    trial: str | None
    interaction_id: str
    messages: tuple[Message, ...]
    ours: str
    """The candidate's, or the correction."""
    theirs: str
    """The champion's."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge said of it: 1 for ours, -1 for theirs, 0 for neither."""

    kind: str
    judge: str
    line: str
    trial: str | None
    interaction_id: str
    verdict: int


@dataclass(frozen=True, slots=True)
class Trust:
    """How far a judge agrees with people on a line."""

    agreement: float | None
    """Share of corrections that it prefers to what they corrected, a tie as half; None before the first."""
    checked: int

    @property
    def is_enough(self) -> bool:
        """Whether it may speak against a candidate."""
        return self.agreement is not None and self.checked >= MIN_CHECKED and self.agreement >= MIN_AGREEMENT


def unchecked(conn: Connection, line: str, judge: str, limit: int, folder: Path | None = None) -> list[Dispute]:
    """A line's newest corrections that this judge has not been tried on, with what they corrected; `folder` is the archive."""
    said = interaction.c
    query = (
        select(said.id, example.c.body)
        .join(example, example.c.interaction_id == said.id)
        .where(example.c.line == line, example.c.state != State.FORGOTTEN, said.error.is_(None))
        .where(~_is_judged(CHECKED, judge, said.id))
        .order_by(example.c.seq.desc())
        .limit(limit)
    )
    found = []
    for identity, body in dict(conn.execute(query).all()).items():
        asked = read(conn, identity, folder)
        if asked is not None:
            found.append(Dispute(CHECKED, line, None, identity, asked.messages, body["reply"], asked.reply))
    return found


def unjudged(conn: Connection, line: str, trial: str, judge: str, limit: int) -> list[Dispute]:
    """Both replies to the prompts of a shadow that this judge has not seen, while their words are here; one of each unit."""
    said, other = interaction.c, shadow.alias()
    is_first = ~exists().where(other.c.trial == trial, other.c.unit == shadow.c.unit, other.c.seq < shadow.c.seq)
    query = (
        select(said.id, said.messages, shadow.c.reply, said.reply)
        .join(shadow, shadow.c.interaction_id == said.id)
        .where(shadow.c.trial == trial, shadow.c.error.is_(None), shadow.c.reply.is_not(None), is_first)
        .where(said.messages.is_not(None), ~_is_judged(JUDGED, judge, said.id))
        .order_by(shadow.c.seq)
        .limit(limit)
    )
    return [Dispute(JUDGED, line, trial, of, tuple(asked), ours, theirs) for of, asked, ours, theirs in conn.execute(query)]


def judge(conn: Connection, judgements: Sequence[Judgement]) -> None:
    """Store what a judge said; of two on one dispute the first stands."""
    for one in judgements:
        if not conn.scalar(select(_is_judged(one.kind, one.judge, one.interaction_id))):
            conn.execute(insert(_judgement).values(asdict(one)))


def judged(conn: Connection, trial: str) -> tuple[str | None, list[int]]:
    """The last judge that a trial's shadow has had, and its verdicts."""
    of = _judgement.c
    last = conn.scalar(select(of.judge).where(of.trial == trial, of.kind == JUDGED).order_by(of.seq.desc()).limit(1))
    query = select(of.verdict).where(of.trial == trial, of.kind == JUDGED, of.judge == last).order_by(of.seq)
    return last, list(conn.scalars(query))


def last_on(conn: Connection, line: str) -> str | None:
    """The judge that was last asked about a line."""
    of = _judgement.c
    found: str | None = conn.scalar(select(of.judge).where(of.line == line).order_by(of.seq.desc()).limit(1))
    return found


def trust(conn: Connection, line: str, judge: str | None) -> Trust:
    """How far a judge agrees with the people of a line, on the corrections that it was last tried on."""
    of = _judgement.c
    query = select(of.verdict).where(of.kind == CHECKED, of.judge == judge, of.line == line)
    found = list(conn.scalars(query.order_by(of.seq.desc()).limit(LAST_CHECKED)))
    return Trust(sum((1 + verdict) / 2 for verdict in found) / len(found) if found else None, len(found))


def _is_judged(kind: str, judge: str, interaction_id: Any) -> Exists:
    of = _judgement.c
    return exists().where(of.kind == kind, of.judge == judge, of.interaction_id == interaction_id)

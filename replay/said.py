"""What was said of a line's replies and may become an opinion: thumbs, corrections, preferences. Each kind is one query.

Functions on a connection, newest first, at most `MOST` of each; `replay.opinions` makes opinions of what they find. The last
word on a reply counts. Whatever a job has, or a version learned, or cannot be learned from, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, RowMapping, Select, func, select, tuple_

from replay.examples import State
from replay.guard import CAPS, Share, Standing
from replay.records import NOBODY, FeedbackStatus, Source
from replay.tables import example, feedback, interaction, opinion, ruling, vote

MOST = 10_000
"""Rows that one look reads: the writer has others to serve."""
PREFERENCE = "preference"
"""The metric under which somebody says which of two replies was better, by their ids."""

_GOOD = (Standing.ADMITTED, Standing.RELEASED)
_KNOWN = select(opinion.c.feedback_id).where(opinion.c.feedback_id == feedback.c.id, opinion.c.state != State.FRESH).exists()
_correction = example.alias()
_CORRECTED = (
    select(_correction.c.seq)
    .where(_correction.c.interaction_id == interaction.c.id, _correction.c.state != State.FORGOTTEN)
    .exists()
)
_RELEASED = (
    select(ruling.c.feedback_id).where(ruling.c.feedback_id == feedback.c.id, ruling.c.state == Standing.RELEASED).exists()
)
_SAID = (
    select(
        feedback.c.id,
        feedback.c.inference_id,
        feedback.c.value,
        feedback.c.metric_name,
        feedback.c.principal,
        feedback.c.occurred_at,
        feedback.c.seq,
        interaction.c.unit,
        _CORRECTED.label("is_corrected"),
        _RELEASED.label("is_released"),
    )
    .join(interaction, interaction.c.id == feedback.c.inference_id)
    .where(~_KNOWN)
    .order_by(feedback.c.occurred_at.desc(), feedback.c.seq.desc())
    .limit(MOST)
)


class Said(NamedTuple):
    """One piece of feedback that may become an opinion."""

    feedback_id: str
    source: Source
    interaction_id: str
    other_id: str | None
    """The worse reply of a pick."""
    is_good: bool
    """Of a thumb; a pair's is True."""
    share: Share
    """Who gave it, for the caps."""


def thumbs(conn: Connection, line: str, good: Mapping[str, bool]) -> list[Said]:
    """The votes that nothing is wrong with, by metric and the value that means good; no thumb up for what was corrected."""
    found = [(row, row["is_up"] is good[row["metric_name"]]) for row in _rows(conn, _votes(line, good))]
    return [
        _said(row, Source.THUMB, row["inference_id"], None, is_good=is_good, is_free=row["state"] == Standing.RELEASED)
        for row, is_good in found
        if not (is_good and row["is_corrected"])
    ]


def count_thumbs(conn: Connection, line: str, good: Mapping[str, bool]) -> dict[str, int]:
    """Count what `thumbs` would give: `up` and `down`."""
    of = _votes(line, good).subquery().c
    counted = {"up": 0, "down": 0}
    groups = select(of.metric_name, of.is_up, of.is_corrected, func.count()).group_by(of.metric_name, of.is_up, of.is_corrected)
    for metric, is_up, is_corrected, number in conn.execute(groups):
        is_good = is_up is good[metric]
        counted["up" if is_good else "down"] += 0 if is_good and is_corrected else number
    return counted


def corrections(conn: Connection, line: str, job: str) -> list[Said]:
    """The demonstrations that `job` holds, or that earlier versions learned to imitate."""
    newer = example.alias()
    is_superseded = (
        select(newer.c.seq)
        .where(newer.c.interaction_id == example.c.interaction_id, newer.c.seq > example.c.seq)
        .where(newer.c.state != State.FORGOTTEN)
        .exists()
    )
    is_taken = (example.c.state == State.TRAINED) | ((example.c.state == State.RESERVED) & (example.c.job == job))
    of_line = (example.c.line == line, is_taken, ~is_superseded)
    query = _SAID.join(example, example.c.feedback_id == feedback.c.id).where(*of_line)
    return [_said(row, Source.CORRECTION, row["inference_id"], None) for row in _rows(conn, query)]


def picks(conn: Connection, line: str) -> list[Said]:
    """The preferences between two replies that are not tied, the last on each two."""
    of_line = (interaction.c.line == line, feedback.c.status == FeedbackStatus.MATCHED)
    query = _SAID.where(feedback.c.metric_name == PREFERENCE, *of_line)
    judged = {frozenset(two) for two in conn.execute(_JUDGED.where(opinion.c.line == line))}
    found = []
    for row in _rows(conn, query):
        better, worse = _two(row["value"])
        if better and worse and frozenset((better, worse)) not in judged:
            judged.add(frozenset((better, worse)))
            found.append(_said(row, Source.PICK, better, worse))
    return found


def taken(conn: Connection, line: str, since: float, *, are_thumbs: bool) -> list[Share]:
    """Who gave the thumbs, or the pairs, that jobs took of what came since then, and those that a cap holds."""
    held = (opinion.c.state == Standing.HELD) & opinion.c.reason.in_(CAPS)
    is_so = (opinion.c.line == line, opinion.c.state.in_([State.RESERVED, State.TRAINED]) | held)
    names = ("id", "principal", "occurred_at", "seq")
    query = (
        select(*(feedback.c[name] for name in names), interaction.c.unit, _RELEASED.label("is_released"))
        .join(opinion, opinion.c.feedback_id == feedback.c.id)
        .join(interaction, interaction.c.id == feedback.c.inference_id)
        .where(*is_so, (opinion.c.source == Source.THUMB) == are_thumbs, feedback.c.received_at >= since)
        .order_by(feedback.c.seq.desc())
        .limit(MOST)
    )
    return [_share(row) for row in _rows(conn, query)]


def _votes(line: str, good: Mapping[str, bool]) -> Select[Any]:
    newer = vote.alias()
    said = feedback.alias()
    is_superseded = (
        select(newer.c.seq)
        .join(said, said.c.id == newer.c.feedback_id)
        .where(newer.c.interaction_id == vote.c.interaction_id, newer.c.metric.in_(good), newer.c.state.in_(_GOOD))
        .where(tuple_(said.c.occurred_at, said.c.seq) > tuple_(feedback.c.occurred_at, feedback.c.seq))
        .exists()
    )
    of_line = (vote.c.line == line, vote.c.metric.in_(good), vote.c.state.in_(_GOOD), ~is_superseded)
    columns = (vote.c.state, vote.c.value.label("is_up"))
    return _SAID.add_columns(*columns).join(vote, vote.c.feedback_id == feedback.c.id).where(*of_line)


_JUDGED = select(opinion.c.interaction_id, opinion.c.other_id).where(
    opinion.c.other_id.is_not(None), opinion.c.state != State.FRESH
)
"""Two replies between which somebody's word was taken: it stands."""


def _two(value: Any) -> tuple[str, str]:
    """The better and the worse reply's id, or nothing: a tie teaches nothing."""
    said = value if isinstance(value, dict) and not value.get("tied") else {}
    return str(said.get("preferred", "")), str(said.get("other", ""))


def _rows(conn: Connection, query: Select[Any]) -> Sequence[RowMapping]:
    return conn.execute(query).mappings().all()


def _said(
    row: RowMapping, source: Source, interaction_id: str, other_id: str | None, *, is_good: bool = True, is_free: bool = False
) -> Said:
    return Said(row["id"], source, interaction_id, other_id, is_good, _share(row, is_free=is_free))


def _share(row: RowMapping, *, is_free: bool = False) -> Share:
    """All that was said of requests that named nobody is one principal's: else whoever names nobody had no cap."""
    who, order = NOBODY if row["unit"].startswith(NOBODY) else row["unit"], (row["occurred_at"], row["seq"])
    return Share(row["id"], row["principal"], f"{row['principal']}/{who}", order, is_free=is_free or bool(row["is_released"]))

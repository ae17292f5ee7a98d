"""What rests: examples and opinions that versions learned from which the line's champion does not descend.

Functions on a connection, each idempotent. When the champion moves, `rest` puts to rest what the versions beside its lineage
learned, and `wake` brings back what those in it did, each with its place in the memory; so what a line remembers is a function
of its champion's lineage. Nothing that rests is rehearsed, measured on, or learned by itself again: a person releases it, drops
it (`replay.quarantine`), or goes back to a version that learned it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from replay import memory
from replay.admission import Reason
from replay.examples import State
from replay.intake import chunks
from replay.records import Split
from replay.tables import example, example_of, opinion

STOPPED = (State.RESTING, State.DROPPED)
"""What `release` may be said of."""

_newer = example.alias()
IS_LAST_WORD: ColumnElement[bool] = ~(
    select(_newer.c.seq)
    .where(_newer.c.interaction_id == example.c.interaction_id, _newer.c.seq > example.c.seq)
    .where(_newer.c.state != State.FORGOTTEN)
    .exists()
)
"""Of an example: nobody has said something else of its interaction since."""


class Lesson(NamedTuple):
    """What one version learned."""

    version: str
    job: str
    held: Sequence[str]
    """The ids of its fresh examples, also of those that another version learned later."""


def rest(conn: Connection, jobs: Sequence[str]) -> None:
    """Put to rest what these jobs' versions learned; the lookups are by job, whatever else is stored."""
    for chunk in chunks(list(jobs)):
        learned = (example.c.job.in_(chunk), example.c.state == State.TRAINED)
        about = list(conn.scalars(select(example.c.interaction_id).where(*learned)))
        conn.execute(update(example).where(*learned).values(state=State.RESTING, key=None))
        _remember(conn, about)  # an earlier word on the same interaction has its place again
        of_them = (opinion.c.job.in_(chunk), opinion.c.state == State.TRAINED)
        conn.execute(update(opinion).where(*of_them).values(state=State.RESTING))


def wake(conn: Connection, line: str, lessons: Iterable[Lesson]) -> None:
    """Count as learned again what these versions learned; `lessons` is not read when nothing of the line rests."""
    of_line = (example.c.line == line, example.c.state == State.RESTING)
    examples = dict(conn.execute(select(example.c.id, example.c.interaction_id).where(*of_line)).all())
    opinions = conn.scalar(select(opinion.c.feedback_id).where(opinion.c.line == line, opinion.c.state == State.RESTING).limit(1))
    if not examples and opinions is None:
        return
    for lesson in lessons:
        woken = {"state": State.TRAINED, "job": lesson.job, "version": lesson.version}
        for chunk in chunks([one for one in lesson.held if one in examples]):
            conn.execute(update(example).where(example.c.id.in_(chunk)).values(woken))
            _remember(conn, [examples[one] for one in chunk])
        of_it = (opinion.c.job == lesson.job, opinion.c.state == State.RESTING)
        conn.execute(update(opinion).where(*of_it).values(state=State.TRAINED))


def refusal(conn: Connection, feedback_id: str) -> Reason | None:
    """Why nothing is learned from a piece of feedback any more, if it rests."""
    for table in (example, opinion):
        rests = (table.c.feedback_id == feedback_id, table.c.state == State.RESTING)
        if conn.scalar(select(table.c.feedback_id).where(*rests).limit(1)) is not None:
            return Reason.ROLLED_BACK
    return None


def release(conn: Connection, feedback_id: str) -> bool:
    """Let it be learned afresh, as if it had come now: the example at the end of what waits, the opinion in the next job.

    False, and nothing is done, when somebody has said something else of the interaction since.
    """
    of_it = (example.c.feedback_id == feedback_id, example.c.state.in_(STOPPED), IS_LAST_WORD)
    row = conn.execute(select(example).where(*of_it)).mappings().one_or_none()
    if row is None and conn.scalar(select(example.c.seq).where(*of_it[:2])) is not None:
        return False
    if row is not None:
        anew = {"state": State.FRESH, "job": None, "version": None, "key": None}
        conn.execute(delete(example).where(example.c.seq == row["seq"]))
        conn.execute(insert(example).values({name: value for name, value in row.items() if name != "seq"} | anew))
    _settle(conn, feedback_id, State.FRESH)
    return True


def drop(conn: Connection, feedback_id: str) -> None:
    """Never learn from it, rehearse it or measure on it again, whichever version answers; its words stay until it is erased."""
    of_it = (example.c.feedback_id == feedback_id, example.c.state == State.RESTING)
    conn.execute(update(example).where(*of_it).values(state=State.DROPPED))
    _settle(conn, feedback_id, State.DROPPED)


def _settle(conn: Connection, feedback_id: str, state: State) -> None:
    of_it = (opinion.c.feedback_id == feedback_id, opinion.c.state.in_(STOPPED), opinion.c.job.is_not(None))
    conn.execute(update(opinion).where(*of_it).values(state=state))


def _remember(conn: Connection, about: Sequence[str]) -> None:
    """Give what is learned of these interactions its places, as when it was learned."""
    for chunk in chunks(list(about)):
        of_them = (example.c.interaction_id.in_(chunk), example.c.state == State.TRAINED, example.c.split == Split.TRAIN)
        rows = conn.execute(select(example).where(*of_them)).mappings().all()
        memory.keep(conn, [example_of(row) for row in rows])

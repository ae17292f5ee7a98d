"""Examples in the ledger, from admission to the version that learned them: fresh, reserved, trained, resting, forgotten.

Functions on a connection, each idempotent, so that a conductor that died half-way says the same thing again. An
example is reserved by one job; the job that fails gives it back, the promotion consumes it: it is never trained as
fresh twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, Connection, Select, bindparam, delete, func, insert, select, update

from replay import memory
from replay.admission import Reason, Refusal, admit
from replay.join import supersedes
from replay.records import Example, Feedback, Interaction, Split
from replay.tables import example, example_of, feedback, use, vetted

Vet = Callable[[Connection, Interaction, Feedback, Example], Example | Refusal]
"""What a line's guard makes of an example (`replay.vetting`)."""

_CHUNK = 500
"""Ids in one statement, well under every database's limit."""

_NEWEST = (
    select(example.c.seq, example.c.state, feedback.c.id, feedback.c.occurred_at)
    .join(feedback, feedback.c.id == example.c.feedback_id)
    .where(example.c.interaction_id == bindparam("interaction_id"))
    .order_by(feedback.c.occurred_at.desc(), example.c.seq.desc())
    .limit(1)
)
_ADMITTED = insert(example)
"""The statements of each demonstration, made once."""


class State(StrEnum):
    """Where an example stands."""

    FRESH = "fresh"
    RESERVED = "reserved"
    """A job is learning it."""
    TRAINED = "trained"
    """A version in the champion's lineage learned it, or is measured on it when it is held out."""
    RESTING = "resting"
    """Only versions beside that lineage did (`replay.resting`)."""
    DROPPED = "dropped"
    """It rested, and a person said: never again."""
    FORGOTTEN = "forgotten"
    """Erased: its words are gone, its id stays so that it never comes back."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a line has to learn from."""

    count: int
    oldest_at: float | None
    """When the oldest of them was admitted."""
    last_seq: int
    """The newest one's place: a job keeps it, so that the next asks for what came after."""


def take(conn: Connection, interaction: Interaction, said: Feedback, vet: Vet | None = None) -> Reason | None:
    """Admit what was said of an interaction as a fresh example, or give the reason why not; `vet` has the last word.

    A newer demonstration replaces one that is still fresh; one that a job holds or a version learned stands beside it.
    """
    verdict = admit(interaction, said)
    if isinstance(verdict, Refusal):
        return verdict.reason
    older = conn.execute(_NEWEST, {"interaction_id": interaction.id}).one_or_none()
    if older is not None and not supersedes(said.occurred_at, older.occurred_at):
        return Reason.SUPERSEDED
    if older is not None and older.state == State.FRESH:
        _supersede(conn, older.seq, older.id)
    final = verdict if vet is None else vet(conn, interaction, said, verdict)
    if isinstance(final, Refusal):
        return final.reason
    store(conn, final)
    return None


def store(conn: Connection, admitted: Example) -> None:
    """Put an example at the end of what its line has to learn from."""
    names = ("id", "interaction_id", "feedback_id", "line", "slice", "split", "weight", "admitted_at")
    body = {"messages": list(admitted.messages), "reply": admitted.reply}
    plain = {name: getattr(admitted, name) for name in names}
    conn.execute(_ADMITTED, {**plain, "body": body, "state": State.FRESH, "attempts": 0})


def fresh(conn: Connection, line: str, after: int = 0) -> list[Example]:
    """Examples that no job holds and no version learned, by admission, those after place `after`."""
    return _read(conn, _of(line, State.FRESH).where(example.c.seq > after))


def unlearned(conn: Connection, line: str) -> list[Example]:
    """Examples that no promoted version learned, by admission, whether a job holds them or not."""
    return _read(conn, _of(line, State.FRESH, State.RESERVED))


def waiting(conn: Connection, line: str, after: int = 0) -> Waiting:
    """Count what `fresh` would give."""
    of_line = (example.c.line == line, example.c.state == State.FRESH, example.c.seq > after)
    seq, at = example.c.seq, example.c.admitted_at
    row = conn.execute(select(func.count(), func.min(at), func.max(seq)).where(*of_line)).one()
    return Waiting(count=row[0], oldest_at=row[1], last_seq=row[2] or after)


def reserve(conn: Connection, line: str, job: str) -> list[Example]:
    """Give a job every fresh example of its line; asked again, the same ones and none that came since."""
    is_known = conn.scalar(select(func.count()).select_from(example).where(example.c.job == job))
    if not is_known:
        of_line = (example.c.line == line, example.c.state == State.FRESH)
        conn.execute(update(example).where(*of_line).values(state=State.RESERVED, job=job))
    return reserved(conn, job)


def reserved(conn: Connection, job: str) -> list[Example]:
    """Read what a job holds, by admission."""
    query = select(example).where(example.c.job == job, example.c.state == State.RESERVED)
    return _read(conn, query.order_by(example.c.seq))


def release(conn: Connection, job: str) -> int:
    """Take back what a job holds, one attempt more on each, without those corrected meanwhile. Returns how many."""
    newer = example.alias()
    is_corrected = (
        select(newer.c.seq)
        .where(newer.c.interaction_id == example.c.interaction_id, newer.c.seq > example.c.seq)
        .where(newer.c.state == State.FRESH)
        .exists()
    )
    is_held = (example.c.job == job, example.c.state == State.RESERVED)
    for row in conn.execute(select(example.c.seq, example.c.feedback_id).where(*is_held, is_corrected)).all():
        _supersede(conn, row.seq, row.feedback_id)
    back = {"state": State.FRESH, "job": None, "attempts": example.c.attempts + 1}
    return conn.execute(update(example).where(*is_held).values(back)).rowcount


def reclaim(conn: Connection, job: str, ids: Sequence[str]) -> int:
    """Give an ended job those of its examples that nobody else took since: its version is tried again. Returns how many."""
    held = 0
    for start in range(0, len(ids), _CHUNK):
        is_ours = (example.c.id.in_(ids[start : start + _CHUNK]), example.c.state == State.FRESH)
        held += conn.execute(update(example).where(*is_ours).values(state=State.RESERVED, job=job)).rowcount
    return held


def consume(conn: Connection, job: str, version: str, remembered: Iterable[str] = ()) -> int:
    """Mark what a job holds as learned by `version`, which also rehearsed the ids `remembered`. Returns how many."""
    held = reserved(conn, job)
    shaped = {e.id for e in held if e.split is not Split.HOLDOUT} | set(remembered)
    known = set(conn.scalars(select(use.c.example_id).where(use.c.version == version)))
    if news := sorted(shaped - known):
        conn.execute(insert(use), [{"example_id": e, "version": version} for e in news])
    is_held = (example.c.job == job, example.c.state == State.RESERVED)
    conn.execute(update(example).where(*is_held).values(state=State.TRAINED, version=version))
    memory.keep(conn, held)
    return len(held)


def trained(conn: Connection, line: str) -> list[Example]:
    """Read what the champion's lineage learned, without what it was measured on: all that `replay.memory` keeps the best of."""
    return _latest(_read(conn, _of(line, State.TRAINED).where(example.c.split == Split.TRAIN)))


def holdouts(conn: Connection, line: str, per_slice: int | None = None) -> dict[str, list[Example]]:
    """Held-out examples of what the champion's lineage learned, by slice: never trained on, by the split.

    Of several for one interaction the last stands. `per_slice` bounds each by the hash of the id: the same ones each
    time.
    """
    return _apart(conn, line, Split.HOLDOUT, per_slice)


def validations(conn: Connection, line: str, per_slice: int | None = None) -> dict[str, list[Example]]:
    """The same of the validation split: which checkpoint of a later job is kept, they decide with its own."""
    return _apart(conn, line, Split.VALIDATION, per_slice)


def _apart(conn: Connection, line: str, split: Split, per_slice: int | None) -> dict[str, list[Example]]:
    slices: dict[str, list[Example]] = {}
    for held in _latest(_read(conn, _of(line, State.TRAINED).where(example.c.split == split))):
        slices.setdefault(held.slice, []).append(held)
    return {name: rotated(members, per_slice) for name, members in sorted(slices.items())}


def rotated(members: Sequence[Example], limit: int | None, turn: int = 0) -> list[Example]:
    """At most `limit` of the examples by the hash of their ids, at each turn the next ones, round and round."""
    by_hash = sorted(members, key=lambda e: hashlib.sha256(e.id.encode()).digest())
    if limit is not None and len(by_hash) > limit:
        start = turn * limit % len(by_hash)
        by_hash = [*by_hash[start:], *by_hash[:start]]
    return sorted(by_hash[:limit], key=lambda e: e.seq)


def counts(conn: Connection) -> dict[str, dict[str, int]]:
    """Count examples by line, then by state."""
    both = (example.c.line, example.c.state)
    found: dict[str, dict[str, int]] = {}
    for line, state, number in conn.execute(select(*both, func.count()).group_by(*both)):
        found.setdefault(line, {})[state] = number
    return found


def used_in(conn: Connection, feedback_id: str) -> list[str]:
    """Name the versions that learned from a piece of feedback, each once."""
    query = select(use.c.version).join(example, example.c.id == use.c.example_id)
    return sorted(set(conn.scalars(query.where(example.c.feedback_id == feedback_id))))


def forget(conn: Connection, interaction_ids: Sequence[str]) -> int:
    """Blank the examples of these interactions and keep them from every later job. Returns how many."""
    blank = {"state": State.FORGOTTEN, "job": None, "key": None, "body": {"messages": [], "reply": ""}}
    return conn.execute(update(example).where(example.c.interaction_id.in_(interaction_ids)).values(blank)).rowcount


def _supersede(conn: Connection, seq: int, feedback_id: str) -> None:
    identity = select(example.c.id).where(example.c.seq == seq).scalar_subquery()
    told = {"state": "superseded", "reason": Reason.SUPERSEDED}  # as `replay.guard.Standing` has it
    conn.execute(update(vetted).where(vetted.c.example_id == identity).values(told))
    conn.execute(delete(example).where(example.c.seq == seq))
    conn.execute(update(feedback).where(feedback.c.id == feedback_id).values(refusal=Reason.SUPERSEDED))


def _of(line: str, *states: State) -> Select[*tuple[object, ...]]:
    chosen: tuple[ColumnElement[bool], ...] = (example.c.line == line, example.c.state.in_(states))
    return select(example).where(*chosen).order_by(example.c.seq)


def _read(conn: Connection, query: Select[*tuple[object, ...]]) -> list[Example]:
    return [example_of(row) for row in conn.execute(query).mappings()]


def _latest(examples: list[Example]) -> list[Example]:
    """Keep the last example of each interaction, in the order of their places."""
    return sorted({e.interaction_id: e for e in examples}.values(), key=lambda e: e.seq)

"""Opinions that a job learns from beside its examples: replies that were good or bad, and pairs of a better and a worse one.

Functions on a connection, each idempotent. Opinions are made when a job takes them, of what `replay.said` finds, under the rules
that examples have: cleaned by the line's guard, capped by who gave them, split by a hash of what was asked, held by one job,
given back when it fails, consumed at the promotion, at rest while only versions beside the champion's lineage learned them
(`replay.resting`); never trained twice. A kind of which there is too little waits: see `replay.records.Wanted`. What cannot be
taken has a row with its reason, which `replay.quarantine` lists and overrules. Which version gave a reply does not matter, since
the loss asks how likely the reply is, not who gave it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection, delete, func, insert, select, update

from replay import caps, said, vetting
from replay.admission import Reason, refusal
from replay.examples import State
from replay.guard import Guard, Share, Standing, echo, standing
from replay.hygiene import has_markers, has_turns
from replay.intake import chunks, interaction
from replay.records import Interaction, Message, Opinion, Source, Split, Wanted, asked_digest, split_of
from replay.said import Said
from replay.tables import example, feedback, opinion, vetted

_WHOLE = frozenset({None, "stop", "completed", "end_turn", "stop_sequence"})
"""How a reply of words ends that the model ended itself, as chat and completions, responses, and messages say it."""


def reserve(
    conn: Connection, line: str, job: str, wanted: Wanted, guard: Guard | None = None, folder: Path | None = None
) -> dict[str, int]:
    """Give a job what was said of its line's replies, and count it by source; asked again, the same and none that came since.

    To be called after the job has its examples. Thumbs are taken when enough of them train, and enough of either thumb; pairs
    when enough train. What is taken is at most `max_items` of each kind, the newest. `folder` is the archive.
    """
    if not (held_already := held(conn, job)):
        thumbs = said.thumbs(conn, line, wanted.thumbs) if wanted.thumbs else []
        pairs = said.corrections(conn, line, job) if wanted.corrections else []
        pairs += said.picks(conn, line) if wanted.picks else []
        for found, minority in ((thumbs, wanted.min_minority), (pairs, 0)):
            _take(conn, line, job, found, wanted, minority, guard, folder)
        held_already = held(conn, job)
    return dict(Counter(one.source.value for one in held_already))


def held(conn: Connection, job: str) -> list[Opinion]:
    """Read what a job holds, in no order that tells who said it when."""
    of_job = select(opinion).where(opinion.c.job == job, opinion.c.state == State.RESERVED)
    return [
        Opinion(
            id=row["feedback_id"],
            messages=tuple(row["body"]["messages"]),
            good=row["body"]["good"],
            bad=row["body"]["bad"],
            split=Split(row["split"]),
            source=Source(row["source"]),
        )
        for row in conn.execute(of_job.order_by(opinion.c.feedback_id)).mappings()
    ]


def release(conn: Connection, job: str) -> None:
    """Take back what a job holds; `reclaim` may give it again."""
    _move(conn, job, State.RESERVED, State.FRESH)


def reclaim(conn: Connection, job: str) -> None:
    """Give an ended job what it held, as far as no other took it."""
    _move(conn, job, State.FRESH, State.RESERVED)


def consume(conn: Connection, job: str, version: str) -> None:
    """Mark what a job holds as learned by `version`: it is not rehearsed, so its words go."""
    is_held = (opinion.c.job == job, opinion.c.state == State.RESERVED)
    conn.execute(update(opinion).where(*is_held).values(state=State.TRAINED, version=version, body=None))


def used_in(conn: Connection, feedback_id: str) -> list[str]:
    """Name the version that learned from a piece of feedback as an opinion, if any did."""
    learned = (opinion.c.feedback_id == feedback_id, opinion.c.version.is_not(None), opinion.c.split == Split.TRAIN)
    return list(conn.scalars(select(opinion.c.version).where(*learned)))


def stopped(conn: Connection, feedback_id: str) -> Reason | None:
    """Why nothing is learned from a piece of feedback as an opinion, if so."""
    is_stopped = opinion.c.state.in_([Standing.HELD, Standing.REFUSED, Standing.DROPPED])
    reason = conn.scalar(select(opinion.c.reason).where(opinion.c.feedback_id == feedback_id, is_stopped))
    return None if reason is None else Reason(reason)


def let_in(conn: Connection, feedback_id: str, guard: Guard | None, folder: Path | None) -> Reason | None:
    """Let the next job take what was stopped, or say why nothing can be learned from it whatever a person says."""
    row = conn.execute(select(opinion).where(opinion.c.feedback_id == feedback_id)).one()
    share = Share(feedback_id, "", "", (0.0, 0), is_free=True)
    one = Said(feedback_id, Source(row.source), row.interaction_id, row.other_id, is_good=True, share=share)
    made = _made(conn, row.line, one, guard, folder)
    if not isinstance(made, Opinion):
        return made
    conn.execute(update(opinion).where(opinion.c.feedback_id == feedback_id).values(state=State.FRESH, job=None))
    return None


def keep_out(conn: Connection, feedback_id: str) -> State | None:
    """Keep from every job what was stopped or let in, unless one has it already: then its state is returned."""
    of_it = opinion.c.feedback_id == feedback_id
    state = conn.scalar(select(opinion.c.state).where(of_it))
    if state in {State.RESERVED, State.TRAINED}:
        return State(state)
    conn.execute(update(opinion).where(of_it).values(state=Standing.DROPPED, job=None))
    return None


def forget(conn: Connection, interaction_ids: Sequence[str]) -> None:
    """Blank the opinions on these interactions and keep them from every later job."""
    is_on_them = opinion.c.interaction_id.in_(interaction_ids) | opinion.c.other_id.in_(interaction_ids)
    conn.execute(update(opinion).where(is_on_them).values(state=State.FORGOTTEN, job=None, body=None))


def counts(conn: Connection, line: str, wanted: Wanted) -> dict[str, int]:
    """What waits (`up`, `down`, `pairs`, each of the newest `said.MOST`), and what was taken or refused, by state."""
    up_and_down = said.count_thumbs(conn, line, wanted.thumbs) if wanted.thumbs else {"up": 0, "down": 0}
    pairs = len(said.corrections(conn, line, "") if wanted.corrections else ())
    pairs += len(said.picks(conn, line) if wanted.picks else ())
    waiting = up_and_down | {"pairs": pairs}
    of_line = select(opinion.c.state, func.count()).where(opinion.c.line == line, opinion.c.state != State.FRESH)
    return waiting | {state: number for state, number in conn.execute(of_line.group_by(opinion.c.state))}  # noqa: C416 - no pairs to mypy


def _take(
    conn: Connection,
    line: str,
    job: str,
    found: list[Said],
    wanted: Wanted,
    minority: int,
    guard: Guard | None,
    folder: Path | None,
) -> None:
    """Reserve opinions of one kind, unless there are too few of them; what cannot be learned from is written down at once.

    What is over a cap is held once there is enough: as long as too little waits, more may come and the cap be another.
    """
    over = caps.over(conn, line, found, guard)
    newest = [one for one in found if one.share.id not in over][: wanted.max_items]
    if not _is_enough([one.is_good for one in newest], wanted, minority):
        return
    taken: list[tuple[Said, Opinion]] = []
    rows: list[dict[str, object]] = []
    for one in newest:
        made = _made(conn, line, one, guard, folder)
        if isinstance(made, Opinion):
            taken.append((one, made))
        else:
            rows.append(_stopped(conn, line, one, made))
    if _is_enough([one.is_good for one, made in taken if made.split is Split.TRAIN], wanted, minority):
        held = {"job": job, "state": State.RESERVED}
        rows += [_row(one, line) | held | {"split": made.split, "body": _body(made)} for one, made in taken]
        rows += [_stopped(conn, line, one, over[one.feedback_id]) for one in found if one.feedback_id in over]
    for chunk in chunks(rows):
        conn.execute(delete(opinion).where(opinion.c.feedback_id.in_([row["feedback_id"] for row in chunk])))  # given back before
        conn.execute(insert(opinion), chunk)


def _is_enough(goods: Sequence[bool], wanted: Wanted, minority: int) -> bool:
    up = sum(goods)
    return len(goods) >= max(wanted.min_items, 1) and min(up, len(goods) - up) >= minority


def _row(one: Said, line: str) -> dict[str, object]:
    plain = dict.fromkeys(("job", "reason", "body"))
    named = {name: getattr(one, name) for name in ("feedback_id", "interaction_id", "other_id", "source")}
    return {**plain, **named, "line": line}


def _stopped(conn: Connection, line: str, one: Said, reason: Reason) -> dict[str, object]:
    """The row of what is not taken; a correction is an example all the same, so only the others are refused as a whole."""
    if one.source is not Source.CORRECTION:
        conn.execute(update(feedback).where(feedback.c.id == one.feedback_id).values(refusal=reason))
    return _row(one, line) | {"split": "", "state": standing(reason), "reason": reason}


def _body(made: Opinion) -> dict[str, object]:
    return {"messages": list(made.messages), "good": made.good, "bad": made.bad}


def _made(conn: Connection, line: str, one: Said, guard: Guard | None, folder: Path | None) -> Opinion | Reason:
    """Make an opinion of what was said, or say why not; what a person released is cleaned, not judged again."""
    asked = interaction(conn, one.interaction_id, folder)
    if asked is None or asked.line != line:
        return Reason.NO_PAIR if one.source is Source.PICK else Reason.NO_LINE
    reply = _reply(asked, guard, is_free=one.share.is_free)
    if isinstance(reply, Reason):
        return reply
    messages, text = reply
    split = _split(conn, line, messages)
    if one.source is Source.THUMB:
        good, bad = (text, None) if one.is_good else (None, text)
        return Opinion(one.feedback_id, messages, good, bad, split, one.source)
    if one.source is Source.CORRECTION:
        row = conn.execute(select(example.c.body, example.c.split).where(example.c.feedback_id == one.feedback_id)).one_or_none()
        if row is None:  # another correction has taken its place since it was stopped
            return Reason.SUPERSEDED
        return _pair(one, tuple(row.body["messages"]), row.body["reply"], text, Split(row.split))
    return _picked(one, asked, reply, interaction(conn, one.other_id or "", folder), split, guard)


def _picked(
    one: Said,
    better: Interaction,
    reply: tuple[tuple[Message, ...], str],
    other: Interaction | None,
    split: Split,
    guard: Guard | None,
) -> Opinion | Reason:
    """Make a pair of two replies to one question; nobody may pick what was put into the model's mouth."""
    if other is None or not _are_alike(better, other):
        return Reason.NO_PAIR
    worse = _reply(other, guard, is_free=one.share.is_free)
    if isinstance(worse, Reason):
        return worse
    is_judged = guard is not None and one.share.tenant not in guard.trusted and not one.share.is_free
    is_echo = guard is not None and is_judged and echo(*reply) >= guard.echo_share
    return Reason.ECHO if is_echo else _pair(one, *reply, worse[1], split)


def _pair(one: Said, messages: tuple[Message, ...], good: str, bad: str, split: Split) -> Opinion | Reason:
    if " ".join(good.split()) == " ".join(bad.split()):
        return Reason.NO_PAIR
    return Opinion(one.feedback_id, messages, good, bad, split, one.source)


def _are_alike(one: Interaction, other: Interaction) -> bool:
    """Whether two replies answer the same question of the same line."""
    return one.line == other.line and asked_digest(one.line, one.messages) == asked_digest(other.line, other.messages)


def _reply(asked: Interaction, guard: Guard | None, *, is_free: bool) -> tuple[tuple[Message, ...], str] | Reason:
    """The prompt and the served reply as they may be learned from, or why they may not."""
    if (reason := refusal(asked, asked.reply)) is not None:
        return reason
    if not is_free and (asked.error is not None or asked.finish_reason not in _WHOLE):
        return Reason.CUT_OFF
    if guard is None:
        return asked.messages, asked.reply
    messages, reply = vetting.tidied(asked.messages, asked.reply, guard)
    if is_free:
        return messages, reply
    if not has_turns(messages):
        return Reason.BAD_TURNS
    return Reason.TEMPLATE_MARKERS if has_markers(messages, reply) else (messages, reply)


def _split(conn: Connection, line: str, messages: tuple[Message, ...]) -> Split:
    """As an example of the same question has it."""
    asked = asked_digest(line, messages)
    cluster = conn.scalar(select(vetted.c.cluster).where(vetted.c.line == line, vetted.c.asked == asked).limit(1))
    return split_of(cluster or asked)


def _move(conn: Connection, job: str, before: State, after: State) -> None:
    conn.execute(update(opinion).where(opinion.c.job == job, opinion.c.state == before).values(state=after))

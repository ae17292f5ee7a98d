"""The guard between joined feedback and examples: each demonstration is cleaned, compared with those before, and judged.

Functions on a connection, in the transaction of the feedback itself: what was acknowledged was judged, and a kill leaves
neither without the other. The order: clean, replace personal data, turns, who else asked this, contamination,
contradiction, duplicates; caps come when a job takes what waits (`replay.caps`). The cost of one does not grow with what is
stored: whoever may be alike is found by keys in an index. Each verdict is a row, with its reason; `replay.quarantine` lists
and overrules them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, RowMapping, bindparam, case, delete, insert, select, update

from replay import privacy, similarity
from replay.admission import Reason, Refusal
from replay.examples import State
from replay.guard import ANONYMOUS, MAX_WEIGHT, Ballot, Guard, Standing, elect, standing, words_in
from replay.hygiene import clean, folded, has_markers, has_turns, rewritten, texts
from replay.join import supersedes
from replay.records import Example, Feedback, Interaction, Message, Split, asked_digest, split_of
from replay.tables import example, feedback, trace, vetted

Guards = Callable[[str], Guard | None]
"""The guard of a line, by its name; None: nothing is guarded."""

RECENT = 32
"""Prompts before this one that tell what belongs to the template."""
MOST_ALIKE = 64
"""Earlier prompts that are compared with a new one, the newest that share a key with it."""

_COUNTS = (Standing.ADMITTED, Standing.RELEASED, Standing.HELD, Standing.REFUSED)
_SAME = (
    select(vetted).where(vetted.c.line == bindparam("line"), vetted.c.asked == bindparam("asked")).order_by(vetted.c.seq).limit(1)
)
_SHARING = select(trace.c.vetted).where(trace.c.key.in_(bindparam("keys", expanding=True)))
_ALIKE = (
    select(vetted)
    .where(vetted.c.line == bindparam("line"), vetted.c.seq.in_(bindparam("seqs", expanding=True)))
    .order_by(vetted.c.seq.desc())
)
_BEFORE = (
    select(vetted.c.shingles)
    .where(vetted.c.line == bindparam("line"), vetted.c.slice == bindparam("slice"))
    .order_by(vetted.c.seq.desc())
    .limit(RECENT)
)
_OF_INTERACTION = select(vetted).where(vetted.c.interaction_id == bindparam("id"), vetted.c.state.in_(_COUNTS))
"""The statements of each demonstration, made once."""
_RESTS = select(example.c.seq).where(example.c.id == vetted.c.example_id, example.c.state == State.RESTING).exists()
"""No version that answers has learned it: it is nobody's word on a question, and nothing is its duplicate."""
_TAUGHT = (Standing.ADMITTED, Standing.RELEASED)


@dataclass(frozen=True, slots=True)
class Subject:
    """A demonstration as it is compared."""

    example: Example
    """Cleaned, its personal data replaced."""
    said: Feedback
    principal: str
    asked: str
    reply: str
    """Digest of the reply as it is compared."""
    words: int
    numbers: str
    shingles: similarity.Shingles
    template: frozenset[int]
    keys: tuple[int, ...] = ()
    """Under which those meet that may be alike."""
    peers: tuple[RowMapping, ...] = ()
    """Earlier ones that may be alike."""

    @property
    def telling(self) -> frozenset[int]:
        """The prompt's shingles without the template's."""
        return frozenset(self.shingles) - self.template

    def is_like(self, row: RowMapping, threshold: float) -> bool:
        """Whether an earlier prompt is the same, or at least so much like this one."""
        if row["asked"] == self.asked:
            return True
        theirs = frozenset(similarity.unpacked(row["shingles"])) - self.template
        is_comparable = row["numbers"] == self.numbers and min(len(theirs), len(self.telling)) >= similarity.FEWEST
        return is_comparable and similarity.jaccard(theirs, self.telling) >= threshold


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on a demonstration, and on those that it overturns."""

    reason: Reason | None
    cluster: str
    overturned: tuple[tuple[RowMapping, Standing, Reason], ...] = ()


def cleaned(admitted: Example, guard: Guard) -> Example:
    """The example as it may be learned from. Pure."""
    messages, reply = tidied(admitted.messages, admitted.reply, guard)
    return replace(admitted, messages=messages, reply=reply)


def tidied(asked: tuple[Message, ...], said: str, guard: Guard) -> tuple[tuple[Message, ...], str]:
    """A prompt and a reply to it as they may be learned from: cleaned, personal data replaced. Pure."""
    messages, reply = rewritten(asked, clean), clean(said)
    return privacy.redact(messages, reply, region=guard.phone_region, keep=guard.keep) if guard.redacts else (messages, reply)


def vet(conn: Connection, asked: Interaction, said: Feedback, admitted: Example, guard: Guard) -> Example | Refusal:
    """Judge what would be an example, write down the verdict, and give the example as it is to be stored, or the refusal."""
    if not _is_last_word(conn, asked.id, said):
        return Refusal(Reason.SUPERSEDED)
    subject = _subject(conn, asked, said, admitted, guard)
    judged = _judge(conn, subject, guard)
    final = replace(subject.example, split=split_of(judged.cluster))
    for row, after, reason in judged.overturned:
        overturn(conn, row, after, reason)
    _write(conn, subject, final, judged)
    return final if judged.reason is None else Refusal(judged.reason)


def overturn(conn: Connection, row: RowMapping, after: Standing, reason: Reason) -> None:
    """Change an earlier verdict; what a job holds or a version learned stays where it is."""
    conn.execute(delete(example).where(example.c.id == row["example_id"], example.c.state == State.FRESH))
    if conn.scalar(select(example.c.seq).where(example.c.id == row["example_id"])) is None:
        conn.execute(update(vetted).where(vetted.c.seq == row["seq"]).values(state=after, reason=reason))
        conn.execute(update(feedback).where(feedback.c.id == row["feedback_id"]).values(refusal=reason))


def forget(conn: Connection, interaction_ids: Sequence[str]) -> None:
    """Forget how these interactions read; who said what of them when, and what was thought of it, stays."""
    of_them = vetted.c.interaction_id.in_(interaction_ids)
    conn.execute(delete(trace).where(trace.c.vetted.in_(select(vetted.c.seq).where(of_them))))
    conn.execute(update(vetted).where(of_them).values(shingles=b"", numbers=""))


def _is_last_word(conn: Connection, interaction_id: str, said: Feedback) -> bool:
    """Whether nothing later was said of the interaction; what was said before and is not in use counts no more."""
    rows = conn.execute(_OF_INTERACTION, {"id": interaction_id}).mappings().all()
    if not all(supersedes(said.occurred_at, row["occurred_at"]) for row in rows):
        return False
    for row in rows:
        overturn(conn, row, Standing.SUPERSEDED, Reason.SUPERSEDED)
    return True


def _subject(conn: Connection, asked: Interaction, said: Feedback, admitted: Example, guard: Guard) -> Subject:
    final = cleaned(admitted, guard)
    prompt = "\n".join(text for text, m in zip(texts(final.messages), final.messages, strict=True) if m.get("role") != "system")
    recent = conn.scalars(_BEFORE, {"line": final.line, "slice": final.slice})
    is_known, tenant = said.principal != ANONYMOUS, said.principal
    subject = Subject(
        example=final,
        said=said,
        principal=f"{tenant}/{asked.unit}" if is_known and tenant not in guard.trusted else tenant,
        asked=asked_digest(final.line, final.messages),
        reply=_digest(folded(final.reply)),
        words=words_in(final.reply),
        numbers=_digest(" ".join(similarity.numbers(prompt))),
        shingles=similarity.shingles(prompt),
        template=similarity.boilerplate(similarity.unpacked(one) for one in recent),
    )
    subject = replace(subject, keys=tuple(_keys(subject, guard)))
    peers = tuple(_peers(conn, subject))
    family = {row["asked"]: similarity.unpacked(row["shingles"]) for row in peers if row["asked"] != subject.asked}
    return replace(subject, peers=peers, template=subject.template | similarity.shared(family.values()))


def _judge(conn: Connection, subject: Subject, guard: Guard) -> Judged:
    messages, reply = subject.example.messages, subject.example.reply
    cluster = _cluster(subject, guard)
    if not has_turns(messages):
        return Judged(Reason.BAD_TURNS, cluster)
    if has_markers(messages, reply):
        return Judged(Reason.TEMPLATE_MARKERS, cluster)
    if _is_contaminated(subject, cluster, guard):
        return Judged(Reason.CONTAMINATED, cluster)
    since = subject.said.received_at - guard.window_seconds
    of_cluster = (vetted.c.line == subject.example.line, vetted.c.cluster == cluster, vetted.c.at >= since)
    counts = (*of_cluster, vetted.c.state.in_(_COUNTS), ~_RESTS)
    rows = conn.execute(select(vetted).where(*counts).order_by(vetted.c.seq)).mappings().all()
    return _among(subject, cluster, [row for row in rows if row["reason"] not in _NO_BALLOT], guard)


_NO_BALLOT = frozenset({Reason.BAD_TURNS, Reason.TEMPLATE_MARKERS, Reason.CONTAMINATED})


def _among(subject: Subject, cluster: str, rows: list[RowMapping], guard: Guard) -> Judged:
    """Judge a reply among those that others gave to the same question. Pure."""
    others = [row for row in rows if row["said"] != subject.reply and max(row["words"], subject.words) <= guard.label_words]
    same = [row for row in rows if row["said"] == subject.reply]
    mine = Ballot(subject.said.principal, subject.reply, (subject.said.occurred_at, _NEWEST))
    if others:
        winner = elect([mine, *map(_ballot, [*others, *same])], guard)
        if winner is None:
            open_again = [row for row in rows if row["state"] == Standing.ADMITTED or row["reason"] == Reason.OUTVOTED]
            return Judged(Reason.CONTRADICTED, cluster, tuple((row, Standing.HELD, Reason.CONTRADICTED) for row in open_again))
        if winner != subject.reply:
            return Judged(Reason.OUTVOTED, cluster)
    lost = [row for row in others if row["state"] in {Standing.ADMITTED, Standing.HELD}]
    won = [row for row in same if row["state"] == Standing.HELD]
    overturned = (
        *((row, Standing.REFUSED, Reason.OUTVOTED) for row in lost),
        *((row, Standing.REFUSED, Reason.DUPLICATE) for row in won),
    )
    taught = [row for row in same if row["state"] in _TAUGHT]
    if not taught:
        return Judged(None, cluster, overturned)
    is_exact = any(row["asked"] == subject.asked for row in taught)
    return Judged(Reason.DUPLICATE if is_exact else Reason.NEAR_DUPLICATE, cluster, overturned)


_NEWEST = 2**62
"""The place of what is not stored yet."""


def _ballot(row: RowMapping) -> Ballot:
    return Ballot(row["tenant"], row["said"], (row["occurred_at"], row["seq"]))


def _cluster(subject: Subject, guard: Guard) -> str:
    """The question that this one is like: one that is the same first, else the oldest that is nearly so, else itself."""
    alike = [row for row in subject.peers if subject.is_like(row, guard.near_duplicate)]
    first = min(alike, key=lambda row: (row["asked"] != subject.asked, row["seq"]), default=None)
    return subject.asked if first is None else str(first["cluster"])


def _is_contaminated(subject: Subject, cluster: str, guard: Guard) -> bool:
    """Whether the prompt is too like one on the other side of the held-out split."""
    is_held_out = split_of(cluster) is Split.HOLDOUT
    across = (row for row in subject.peers if (row["split"] == Split.HOLDOUT) != is_held_out and row["cluster"] != cluster)
    return any(subject.is_like(row, guard.contamination) or _shares_a_run(subject, row, guard) for row in across)


def _shares_a_run(subject: Subject, row: RowMapping, guard: Guard) -> bool:
    theirs = similarity.unpacked(row["shingles"])
    return similarity.share_a_run(subject.shingles, theirs, subject.template, guard.contamination_words)


def _peers(conn: Connection, subject: Subject) -> list[RowMapping]:
    """Earlier prompts that are the same or share a key, newest first."""
    line = subject.example.line
    found = list(conn.execute(_SAME, {"line": line, "asked": subject.asked}).mappings())
    sharing = set(conn.scalars(_SHARING, {"keys": subject.keys})) if subject.keys else set()
    newest = sorted(sharing, reverse=True)[:MOST_ALIKE]
    return [*found, *conn.execute(_ALIKE, {"line": line, "seqs": newest}).mappings()] if newest else found


def _keys(subject: Subject, guard: Guard) -> list[int]:
    line = subject.example.line
    runs = similarity.winnowed(subject.shingles, subject.template, line, guard.contamination_words)
    return [*similarity.bands(subject.telling, line), *runs]


def _write(conn: Connection, subject: Subject, final: Example, judged: Judged) -> None:
    state = Standing.ADMITTED if judged.reason is None else standing(judged.reason)
    names = ("line", "slice", "interaction_id", "feedback_id", "split")
    row: dict[str, Any] = {name: getattr(final, name) for name in names} | {
        name: getattr(subject, name) for name in ("principal", "asked", "words", "numbers")
    }
    row |= {"example_id": final.id, "tenant": subject.said.principal, "cluster": judged.cluster, "said": subject.reply}
    row |= {"occurred_at": subject.said.occurred_at, "at": subject.said.received_at, "state": state, "reason": judged.reason}
    seq = conn.execute(insert(vetted).values(**row, shingles=similarity.packed(subject.shingles))).inserted_primary_key
    if subject.keys:
        conn.execute(insert(trace), [{"key": key, "vetted": seq[0] if seq else 0} for key in subject.keys])
    if judged.reason in {Reason.DUPLICATE, Reason.NEAR_DUPLICATE}:
        _corroborate(conn, subject, judged.cluster)


def _corroborate(conn: Connection, subject: Subject, cluster: str) -> None:
    """Another tenant says the same: the example that waits weighs one more, up to `MAX_WEIGHT`."""
    is_same = (vetted.c.cluster == cluster, vetted.c.said == subject.reply, vetted.c.state.in_(_TAUGHT))
    others = select(vetted.c.example_id).where(*is_same, vetted.c.tenant != subject.said.principal)
    heavier = case((example.c.weight + 1 > MAX_WEIGHT, MAX_WEIGHT), else_=example.c.weight + 1)
    conn.execute(update(example).where(example.c.id.in_(others), example.c.state == State.FRESH).values(weight=heavier))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

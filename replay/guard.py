"""What guards a line's examples: its settings, and the decisions that need no database.

Pure. Who gave an example is known by its API key (the tenant), and within it by whose question it was about (the
principal). Without keys there is one tenant, `anonymous`, which contradicts only itself and has no cap; nor has it as the
principal of a demonstration. Thumbs and picks are told apart by whose question it was, with keys or without.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from replay.admission import Reason
from replay.hygiene import folded, texts
from replay.records import Message

ANONYMOUS = "anonymous"
ECHO_WORDS = 8
"""In a row: what a reply shares with its prompt by so many words it has from there."""
MAX_WEIGHT = 3.0
"""However many tenants say the same, it counts no more than this."""


class Standing(StrEnum):
    """What became of what the guard looked at."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    """For good, unless somebody overrules it."""
    HELD = "held"
    """In quarantine: a majority or a person decides."""
    RELEASED = "released"
    """Admitted by a person; no cap holds it again."""
    DROPPED = "dropped"
    """Refused by a person."""
    SUPERSEDED = "superseded"
    """Whoever said it has said something else since."""


CAPS = frozenset({Reason.OVER_PRINCIPAL_CAP, Reason.OVER_TENANT_CAP})
HELD = frozenset({Reason.CONTRADICTED, Reason.HARMFUL, *CAPS, Reason.ECHO, Reason.FLIPPED})
"""Reasons that hold; the others refuse."""


@dataclass(frozen=True, slots=True)
class Guard:
    """How a line's examples are guarded; `lines.NAME.admission` in the settings says what each means."""

    redacts: bool = True
    phone_region: str = "US"
    keep: tuple[str, ...] = ()
    near_duplicate: float = 0.8
    contamination: float = 0.6
    contamination_words: int = 13
    window_seconds: float = 604_800.0
    label_words: int = 8
    majority_tenants: int = 3
    principal_share: float = 0.01
    tenant_share: float = 0.2
    fair_shares: float = 3.0
    min_cap: int = 5
    trusted: tuple[str, ...] = ()
    echo_share: float = 0.5
    max_flips: int = 3


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one tenant says of a question."""

    tenant: str
    said: str
    order: tuple[float, int]
    """When it was said, and its place in the ledger, which breaks ties."""


@dataclass(frozen=True, slots=True)
class Share:
    """One example that waits for a job, and who gave it."""

    id: str
    tenant: str
    principal: str
    order: tuple[float, int]
    is_free: bool = False
    """Released by a person: it counts, and no cap holds it."""


def standing(reason: Reason) -> Standing:
    """Whether a reason holds or refuses."""
    return Standing.HELD if reason in HELD else Standing.REFUSED


def elect(ballots: Iterable[Ballot], guard: Guard) -> str | None:
    """What is to be learned of one question: the one thing that all say, else a strict majority's; None: nobody knows.

    Each tenant's last word counts once. Where trusted tenants have spoken, they alone count. A majority needs
    `majority_tenants` voters. The order in which ballots come in does not matter.
    """
    last: dict[str, Ballot] = {}
    for ballot in ballots:
        if ballot.tenant not in last or last[ballot.tenant].order < ballot.order:
            last[ballot.tenant] = ballot
    voters = {name: ballot for name, ballot in last.items() if name in guard.trusted} or last
    counts = Counter(ballot.said for ballot in voters.values())
    said, most = max(counts.items(), key=lambda pair: pair[1], default=(None, 0))
    if len(counts) <= 1:
        return said
    return said if len(voters) >= guard.majority_tenants and 2 * most > len(voters) else None


def excess(waiting: Sequence[Share], guard: Guard) -> dict[str, Reason]:
    """The ids of what is over a cap, with the reason: the same for every order in which it came.

    A cap is the largest of `min_cap`, the share of all that waits, and `fair_shares` times an equal share: so one alone
    is never capped, nor is anybody who gives about as much as the others do. The first that were said are kept.
    """
    over = _over([(share, share.principal) for share in waiting], guard.principal_share, guard)
    reasons = dict.fromkeys(over, Reason.OVER_PRINCIPAL_CAP)
    left = [(share, share.tenant) for share in waiting if share.id not in reasons]
    return reasons | dict.fromkeys(_over(left, guard.tenant_share, guard), Reason.OVER_TENANT_CAP)


def _over(waiting: Sequence[tuple[Share, str]], part: float, guard: Guard) -> list[str]:
    """The ids of what is over one kind of cap; each share with the group that it counts for."""
    given: dict[str, list[Share]] = defaultdict(list)
    for share, group in waiting:
        if group != ANONYMOUS:
            given[group].append(share)
    total = sum(map(len, given.values()))
    cap = int(max(guard.min_cap, part * total, guard.fair_shares * total / max(1, len(given))))
    judged = (shares for shares in given.values() if shares[0].tenant not in guard.trusted)
    ordered = ([share.id for share in sorted(shares, key=lambda share: share.order) if not share.is_free] for shares in judged)
    return [identity for shares in ordered for identity in shares[cap:]]


def echo(messages: Sequence[Message], reply: str) -> float:
    """The share of the reply's eight words in a row that stand in the chat before it; 0 for a shorter reply.

    What the system and tools said is the house's own, and may be quoted.
    """
    chat = [message for message in messages if message.get("role") in {"user", "assistant"}]
    said, given = _runs(reply), {run for text in texts(chat) for run in _runs(text)}
    return sum(run in given for run in said) / len(said) if said else 0.0


def has_flipped(votes: Mapping[str, Iterable[bool]], guard: Guard) -> bool:
    """Whether one principal's votes on one question look like a choice of what to teach: by reply, its thumbs.

    Both thumbs, on more replies than `max_flips`: who merely judges has no reason to ask the same thing so often.
    """
    values = {value for given in votes.values() for value in given}
    return len(values) > 1 and len(votes) > guard.max_flips


def words_in(reply: str) -> int:
    """How many words a reply has: few make a label, which another one contradicts."""
    return len(folded(reply).split())


def _runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return [tuple(words[i : i + ECHO_WORDS]) for i in range(len(words) - ECHO_WORDS + 1)]

"""How often held-out examples have been looked at, and which of them are next. Pure.

A set that decides on one candidate after the other wears out: those that pass are a little adapted to it. So a large set is
taken in turns, and each verdict says how many have looked at what it rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from replay.records import Example, Split

OLDER = " (older)"
"""How a slice's earlier examples are told from its new ones, where a job has both."""


def turns(verdicts: Iterable[Mapping[str, Any] | None]) -> Counter[str]:
    """How many of a line's verdicts rest on the older examples of each slice, and on each suite."""
    return Counter(name for verdict in verdicts if verdict for name in verdict.get("measured", ()))


def counted(
    fresh: Iterable[Example],
    judged: Sequence[AbstractSet[str]],
    older: Mapping[str, Sequence[Example]],
    suites: Iterable[str],
    seen: Mapping[str, int],
    limit: int,
) -> dict[str, int]:
    """Looks at each part of a job's evaluation, the coming one among them.

    `judged` are the ids that earlier jobs with a verdict held: what a rejected one gave back is no longer unseen. `older` is
    all that is held out, of which each turn takes `limit`.
    """
    new: dict[str, set[str]] = {}
    for example in fresh:
        if example.split is Split.HOLDOUT:
            new.setdefault(example.slice, set()).add(example.id)
    found = {name: 1 + sum(not ids.isdisjoint(held) for held in judged) for name, ids in new.items()}
    for name, members in older.items():
        found[name + OLDER if name in new else name] = 1 + seen.get(name, 0) * min(limit, len(members)) // len(members)
    return found | {f"suite:{name}": 1 + seen.get(f"suite:{name}", 0) for name in suites}


def measured(evaluation: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that `turns` counts, of one evaluation."""
    older = [name.removesuffix(OLDER) for name, body in evaluation["slices"].items() if not body["is_new"]]
    return (*sorted(older), *(f"suite:{name}" for name in sorted(evaluation.get("suites", {}))))

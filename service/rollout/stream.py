"""The prequential score of a line: how good the version that serves was at each new example before any learned of it. Pure.

A job measures the champion on its new held-out examples, which no version ever learns, before it trains. That is a test before
training of a fifth of what was corrected, a fair sample since a hash deals it; the rest costs a pass more and is not scored. An
example whose job makes no version is fresh again, so along a line of versions, each from the last, it counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from learners.matrix import Prequential


def beside(
    matrix: Mapping[str, Any], evaluation: Mapping[str, Any], parent: Mapping[str, Any], came: Sequence[str]
) -> dict[str, Any]:
    """A version's matrix, by score, with `prequential`: its parent's, and the new examples in the order of `came`."""
    order = {identity: place for place, identity in enumerate(came)}
    found = {}
    for score, history in matrix.items():
        before = Prequential.from_json(parent.get(score, {}).get("prequential"))
        found[score] = {**history, "prequential": before.extended(_scores(evaluation, score, order)).as_json()}
    return found


def _scores(evaluation: Mapping[str, Any], field: str, order: Mapping[str, int]) -> list[float]:
    """What the champion scored on the new examples, the base where there is none."""
    new = [body for body in evaluation["slices"].values() if body["is_new"]]
    scored = [pair for body in new for pair in zip(body["ids"], (body.get("champion") or body["base"])[field], strict=True)]
    return [score for _, score in sorted(scored, key=lambda pair: order.get(pair[0], len(order)))]

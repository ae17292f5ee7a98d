"""What came out of a demo: the numbers of its last line, and whether the daemon kept its promises. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.demo.tally import Tally
from service.demo.watch import Evidence, short

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything measured, by the clients or asked of the daemon over HTTP at the end."""

    tally: Tally
    evidence: list[Evidence]
    promotions: list[Json]
    """Changes of the desk's champion, oldest first, as `/api/lines/desk/history` tells them."""
    feedback_acknowledged: int
    feedback_refused: list[str]
    feedback_stored: int
    examples_trained: int
    seconds: float
    began_at: float
    """Unix seconds."""


def summary(outcome: Outcome) -> Json:
    """The demo's last line."""
    tally = outcome.tally
    return {
        "skills": {
            skill: {version: round(score.accuracy, 3) for version, score in row.items() if score.accuracy is not None}
            for skill, row in tally.matrix().items()
        },
        "promotions": len(outcome.promotions),
        "requests": tally.requests,
        "failed_requests": len(tally.failures),
        "feedback_acknowledged": outcome.feedback_acknowledged,
        "feedback_stored": outcome.feedback_stored,
        "examples_trained": outcome.examples_trained,
        "swap_seconds": _seconds(outcome.promotions, "swap_seconds"),
        "feedback_to_live_seconds": _seconds(outcome.promotions, "feedback_to_live_seconds"),
        "seconds": round(outcome.seconds, 1),
    }


def broken_promises(outcome: Outcome) -> list[str]:
    """What should have held and did not, in words; empty when all is well."""
    tally, wrong = outcome.tally, []
    if tally.failures:
        wrong.append(f"{len(tally.failures)} requests failed, the first with: {tally.failures[0]}")
    if outcome.feedback_refused:
        wrong.append(f"{len(outcome.feedback_refused)} pieces of feedback were refused: {outcome.feedback_refused[0]}")
    if outcome.feedback_stored != outcome.feedback_acknowledged:
        said = f"{outcome.feedback_acknowledged} pieces of feedback were acknowledged"
        wrong.append(f"{said}, {outcome.feedback_stored} are stored")
    versions = [short(one["to"]) for one in outcome.promotions]
    if versions != ["v1", "v2"]:
        wrong.append(f"promoted were {', '.join(versions) or 'none'}, not v1 and v2")
    return wrong


def _seconds(promotions: list[Json], key: str) -> list[float]:
    return [round(one[key], 2) for one in promotions if one.get(key) is not None]

"""What must not get worse besides quality: failed, slow, long and short replies, refusals, broken forms, a declared metric. Pure.

What a reply was is read from its row alone, where it stands since it was recorded: no text is read again, so that erasing one
changes no verdict. Each guardrail gives a unit a loss from 0 to 1. A candidate is promoted only when it is shown, for each of
them, to lose by less than its margin, and rolled back when it is shown to lose by more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from replay.outcomes import Guard, is_failure
from replay.records import FeedbackValue
from service.settings import Guardrail, Metric

QUALITY = "quality"
"""The name of the rollout's own metric among what is weighed."""

Reward = Callable[[FeedbackValue], float]


def guards(
    declared: Mapping[str, Guardrail], metrics: Mapping[str, Metric], reward: Callable[[Metric], Reward]
) -> dict[str, Guard]:
    """How each guardrail is read from the ledger; one on a metric that is not declared any more hears nothing."""
    return {name: _guard(one, metrics, reward) for name, one in declared.items()}


def _guard(one: Guardrail, metrics: Mapping[str, Metric], reward: Callable[[Metric], Reward]) -> Guard:
    if one.kind == "metric":
        return Guard(metric=one.metric, reward=reward(metrics.get(one.metric, Metric(type="boolean"))))
    return Guard(has_missed=_MISSES[one.kind](one.limit), is_about=_had_form_to_keep if one.kind == "format" else None)


def _had_form_to_keep(row: Any) -> bool:
    """Where few ask for a form, the margin is that of those who do: else every rare form could break."""
    return row.has_form is not None


def _error(_: float) -> Callable[[Any], bool]:
    return lambda row: is_failure(row.error)


def _slow(limit: float) -> Callable[[Any], bool]:
    return lambda row: bool(row.latency_seconds > limit)


def _late(limit: float) -> Callable[[Any], bool]:
    return lambda row: row.ttft_seconds is not None and bool(row.ttft_seconds > limit)


def _long(limit: float) -> Callable[[Any], bool]:
    return lambda row: bool(row.reply_tokens > limit)


def _short(limit: float) -> Callable[[Any], bool]:
    return lambda row: bool(row.reply_tokens < limit)


def _refused(_: float) -> Callable[[Any], bool]:
    return lambda row: bool(row.is_refusal)


def _broken(_: float) -> Callable[[Any], bool]:
    return lambda row: row.has_form is not None and not row.has_form


_MISSES: Mapping[str, Callable[[float], Callable[[Any], bool]]] = {
    "error": _error,
    "latency": _slow,
    "first_token": _late,
    "long": _long,
    "short": _short,
    "refusal": _refused,
    "format": _broken,
}

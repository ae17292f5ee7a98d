"""Is the adapter that was loaded the one that was trained? A pure judgement on log-probs of fixed texts.

The trainer leaves a fingerprint beside each version: for a few texts, the log-prob of every token after the first under
the adapter and under the base. A replica measures the same with its engine. Loaders may drop weights with no more than
a warning, so a load that nobody measured counts for nothing. Log-probs are in nats, distances are means over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

TOLERANCE = 0.15
"""Nats a token between engine and trainer: bf16 kernels differ by some hundredths, a wrong adapter by far more."""

MOST_NOISE = 0.2
"""Nats a token between the two on the base alone that pass for the engine's rounding: int8's inputs make 0.11 on long texts
(`learnd bench parity`), more on few tokens. With the adapter it is another rounding: twice it is let pass where that is more."""

NOOP_SHARE = 0.25
"""An adapter that moves the base by less than this share of what the trainer saw does nothing."""

MIN_EFFECT = 1e-3
"""Nats a token: an adapter that moves the base by less was not worth training, and cannot be told from it."""

MIN_AGREEMENT = 0.5
"""Share of the trainer's effect that must be found again; 1 when all of it, about 0 for another adapter's."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A replica's verdict on one version that it has loaded."""

    ok: bool
    reason: str | None = None
    """None when ok, else `artifact_invalid`, `fingerprint_invalid`, `id_reused`, `load_failed`, `engine_crash`, `noop_adapter`,
    `fingerprint_mismatch`, or `not_finite`."""
    distance_to_fingerprint: float | None = None
    distance_to_base: float | None = None
    agreement: float | None = None
    """The measured effect projected on the trainer's: insensitive to what engine and trainer do differently to both."""
    detail: str = ""

    @property
    def in_words(self) -> str:
        """The reason and what it is about, or `ok`."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason or "ok"


def judge(
    fingerprint: Mapping[str, Any],
    adapter: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]],
    tolerance: float = TOLERANCE,
) -> ProbeResult:
    """Compare what the engine answers for each probe's tokens, under the adapter and the base, with the trainer's."""
    probes = fingerprint["probes"]
    told = list(chain.from_iterable(probe["adapter"] for probe in probes))
    told_base = list(chain.from_iterable(probe["base"] for probe in probes))
    seen, seen_base = list(chain.from_iterable(adapter)), list(chain.from_iterable(base))
    if not told or len({len(told), len(told_base), len(seen), len(seen_base)}) > 1:
        sizes = f"{len(told)}/{len(told_base)} tokens in the fingerprint, {len(seen)}/{len(seen_base)} measured"
        return ProbeResult(ok=False, reason="fingerprint_invalid", detail=sizes)
    if not all(map(math.isfinite, (*told, *told_base, *seen, *seen_base))):
        return ProbeResult(ok=False, reason="not_finite")
    wanted, effect = _difference(told, told_base), _difference(seen, seen_base)
    to_fingerprint, to_base, size = _mean(_difference(seen, told)), _mean(effect), _mean(wanted)
    noise = min(_mean(_difference(seen_base, told_base)), MOST_NOISE)
    agreement = sum(a * b for a, b in zip(effect, wanted, strict=True)) / (sum(a * a for a in wanted) or math.inf)
    reason = None
    if size < MIN_EFFECT or to_base < NOOP_SHARE * size:
        reason = "noop_adapter"
    elif to_fingerprint > max(tolerance, 2 * noise) or agreement < MIN_AGREEMENT:
        reason = "fingerprint_mismatch"
    return ProbeResult(reason is None, reason, to_fingerprint, to_base, agreement)


def _difference(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _mean(differences: Sequence[float]) -> float:
    return sum(map(abs, differences)) / len(differences)

"""A verdict as it is recorded, and the verdict that its recorded counts give again. Pure.

A record holds the trial as it stood (with its policy), the facts, the evidence, the move, and digests of policy and code:
enough to decide the same without the ledger. What a person asked for rests on no facts, and says so.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from replay import outcomes
from service.audit import digest_of
from service.rollout.controller import Judgement, Move, verdict
from service.rollout.stages import Trial
from service.rollout.weighing import Facts

Json = dict[str, Any]

_TRIAL = TypeAdapter(Trial)
_FACTS = TypeAdapter(Facts)
TOLERANCE = 1e-9
"""Two computations of a log agree so far, relative and absolute: machines add in different orders."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One recorded verdict beside the one that its facts give now."""

    recorded: str
    """Stage and reason."""
    replayed: str | None
    """None: a person asked for it, so there is nothing to recompute."""
    is_same: bool
    is_same_code: bool
    """Whether the code that decides is what it was."""


def record(trial: Trial, move: Move, said: Judgement | None) -> Json:
    """All of a verdict, before the trial moves; `said` is None when a person asked for the move."""
    stood = _TRIAL.dump_python(trial, mode="json")
    return {
        "by": "auto" if said else "operator",
        "trial": stood,
        "move": asdict(move),
        "facts": _FACTS.dump_python(said.facts, mode="json") if said else None,
        "evidence": said.evidence.to_json() if said and said.evidence else None,
        "policy_digest": digest_of(stood["policy"]),
        "code_digest": code_digest(),
    }


def replay(recorded: Json) -> Replayed:
    """Decide again from what was recorded, and compare: the move, and each number of the evidence."""
    is_same_code = recorded["code_digest"] == code_digest()
    was = f"{recorded['move']['to']}: {recorded['move']['reason']}"
    if recorded["facts"] is None:
        return Replayed(was, None, is_same=True, is_same_code=is_same_code)
    try:
        said = verdict(_TRIAL.validate_python(recorded["trial"]), _FACTS.validate_python(recorded["facts"]))
    except ValidationError as error:
        return Replayed(
            was, f"cannot be read by this learnd: {error.error_count()} fields", is_same=False, is_same_code=is_same_code
        )
    now = f"{said.move.to}: {said.move.reason}" if said.move else "no move"
    evidence = said.evidence.to_json() if said.evidence else None
    is_policy = recorded["policy_digest"] == digest_of(recorded["trial"]["policy"])
    is_move = said.move is not None and asdict(said.move) == recorded["move"]
    return Replayed(was, now, is_policy and is_move and _is_close(evidence, recorded["evidence"]), is_same_code)


@cache
def code_digest() -> str:
    """SHA-256 over the code that counts and decides: this package, and what makes outcomes of the ledger."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(outcomes.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _is_close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_close, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)

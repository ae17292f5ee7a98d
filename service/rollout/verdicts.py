"""A verdict as it is recorded, and the verdict that its recorded counts give again. Pure.

A trial's record holds the trial as it stood (with its policy), the facts, the evidence, the move, and digests of policy and code:
enough to decide the same without the ledger. What a person asked for rests on no facts, and says so. The gate's and an anchor's
records hold the same of theirs; which of the three it is stands under `of`, a trial's where there is none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from replay import outcomes
from service.audit import canonical, digest_of
from service.rollout import anchor, gates
from service.rollout.controller import Judgement, Move, verdict
from service.rollout.measured import Measured
from service.rollout.stages import Trial
from service.rollout.weighing import Facts
from service.settings import Anchor, Gate

Json = dict[str, Any]

_TRIAL = TypeAdapter(Trial)
_FACTS = TypeAdapter(Facts)
_MEASURED = TypeAdapter(Measured)
_WATCH = TypeAdapter(anchor.Watch)
_SIGHT = TypeAdapter(anchor.Sight)
KINDS = ("verdict", "gate_verdict", "anchor_verdict")
"""What records of verdicts are called in the audit log: on trials, of the gate, and on a line against its anchor."""
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


def record_gate(job: str, version: str | None, gate: Gate, said: gates.Verdict) -> Json:
    """All of what the gate said of a job; `version` is None where none came of it."""
    who = {"of": "gate", "by": "auto", "job": job, "version": version}
    return {**who, "facts": asdict(said.facts), "verdict": _decided(said), **_under(gate)}


def record_anchor(watch: anchor.Watch, sight: anchor.Sight, policy: Anchor, step: anchor.Step) -> Json:
    """All of a verdict on a line against its anchor, before the watch moves."""
    who = {"of": "anchor", "by": "auto", "round": watch.name, "watch": asdict(watch)}
    return {**who, "facts": asdict(sight), "step": asdict(step), **_under(policy)}


def names(recorded: Json) -> frozenset[str]:
    """What a record may be asked for by, besides its line: trial, job, version, or round of an anchor."""
    trial = recorded.get("trial") or {}
    found = (trial.get("id"), trial.get("candidate"), *(recorded.get(name) for name in ("job", "version", "round")))
    return frozenset(name for name in found if name)


def replay(recorded: Json) -> Replayed:
    """Decide again from what was recorded, and compare: what was decided, and each number of it."""
    was, again = _READ[recorded.get("of", "trial")]
    told, is_same_code = was(recorded), recorded["code_digest"] == code_digest()
    if recorded["facts"] is None:
        return Replayed(told, None, is_same=True, is_same_code=is_same_code)
    try:
        now, is_same = again(recorded)
    except ValidationError as error:
        return Replayed(
            told, f"cannot be read by this learnd: {error.error_count()} fields", is_same=False, is_same_code=is_same_code
        )
    policy = recorded["policy"] if "of" in recorded else recorded["trial"]["policy"]
    return Replayed(told, now, is_same and recorded["policy_digest"] == digest_of(policy), is_same_code)


def _trial(recorded: Json) -> tuple[str, bool]:
    said = verdict(_TRIAL.validate_python(recorded["trial"]), _FACTS.validate_python(recorded["facts"]))
    evidence = said.evidence.to_json() if said.evidence else None
    is_move = said.move is not None and asdict(said.move) == recorded["move"]
    now = f"{said.move.to}: {said.move.reason}" if said.move else "no move"
    return now, is_move and _is_close(evidence, recorded["evidence"])


def _gate(recorded: Json) -> tuple[str, bool]:
    said = gates.decide(_MEASURED.validate_python(recorded["facts"]), Gate.model_validate(recorded["policy"]))
    return f"gate_{said.outcome}: {'; '.join(said.reasons)}", _is_close(_plain(_decided(said)), recorded["verdict"])


def _anchor(recorded: Json) -> tuple[str, bool]:
    watch, sight = _WATCH.validate_python(recorded["watch"]), _SIGHT.validate_python(recorded["facts"])
    step = anchor.judge(watch, sight, Anchor.model_validate(recorded["policy"]))
    is_same = step is not None and _is_close(_plain(asdict(step)), recorded["step"])
    return f"{step.does}: {step.reason}" if step else "no step", is_same


_Read = tuple[Callable[[Json], str], Callable[[Json], tuple[str, bool]]]
_READ: Mapping[str, _Read] = {
    "trial": (lambda told: f"{told['move']['to']}: {told['move']['reason']}", _trial),
    "gate": (lambda told: f"gate_{told['verdict']['outcome']}: {'; '.join(told['verdict']['reasons'])}", _gate),
    "anchor": (lambda told: f"{told['step']['does']}: {told['step']['reason']}", _anchor),
}
"""For each kind of verdict what was decided, in words, and what is decided now, with whether it is the same."""


@cache
def code_digest() -> str:
    """SHA-256 over the code that counts and decides: this package, and what makes outcomes of the ledger."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(outcomes.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _under(policy: Gate | Anchor) -> Json:
    settings = policy.model_dump(mode="json")
    return {"policy": settings, "policy_digest": digest_of(settings), "code_digest": code_digest()}


def _decided(said: gates.Verdict) -> Json:
    """Without the matrix and the job's warnings, which decide nothing."""
    return {name: value for name, value in said.as_json().items() if name not in {"matrix", "warnings"}}


def _plain(value: Any) -> Any:
    """As it is read back."""
    return json.loads(canonical(value))


def _is_close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_close, one, other))
    if isinstance(one, float) and isinstance(other, int | float):
        is_neither = math.isnan(one) and math.isnan(other)  # a divergence that is no number fails the gate, and is recorded
        return is_neither or math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)

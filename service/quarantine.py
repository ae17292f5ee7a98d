"""The guard's verdicts as the daemon shows them, and a person's word on them, written into the log with who said it.

Functions on a connection, for the keeper to run; `replay.quarantine` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection

from replay import quarantine
from replay.guard import Standing
from replay.quarantine import Case, Decision, NotHeld
from replay.vetting import Guards
from service import audit
from service.errors import Conflict, NotFound
from service.settings import Settings

Json = dict[str, Any]
Which = Literal["held", "all"]
"""What waits for a decision, or everything that was stopped or decided."""

MOST = 1000
"""Cases in one list, the newest."""

_STATES = {
    "held": (Standing.HELD,),
    "all": (Standing.HELD, Standing.REFUSED, Standing.RELEASED, Standing.DROPPED),
}


@dataclass(frozen=True, slots=True)
class Ruling:
    """Who decides what, and when."""

    decision: Decision
    by: str
    """The name of the API key, or `anonymous` where none are needed."""
    now: float


def listed(conn: Connection, settings: Settings, line: str, which: Which, reason: str | None) -> list[Json]:
    """The line's cases, newest first; raises `NotFound` for an unknown line."""
    if line not in settings.lines:
        raise NotFound(f"no line {line!r}; there is {', '.join(settings.lines)}", param="line")
    return [_as_json(case) for case in quarantine.cases(conn, line, _STATES[which], reason, MOST)]


def overrule(conn: Connection, ids: Sequence[str], how: Ruling, guards: Guards, folder: Path) -> list[Json]:
    """Decide on feedback by its ids, all of it or none; raises `Conflict` when one cannot be decided."""
    return [_decide(conn, one, how, guards, folder) for one in ids]


def _decide(conn: Connection, feedback_id: str, how: Ruling, guards: Guards, folder: Path) -> Json:
    try:
        before = quarantine.case(conn, feedback_id)
        case = quarantine.decide(conn, feedback_id, how.decision, how.by, how.now, guards, folder)
    except NotHeld as error:
        raise Conflict(str(error), param="ids") from error
    if case == before:  # said again
        return _as_json(case)
    told = {name: getattr(case, name) for name in ("feedback_id", "kind", "reason")}
    audit.tell(conn, how.now, case.line, "overruled", {**told, "decision": how.decision, "by": how.by})
    return _as_json(case)


def _as_json(case: Case) -> Json:
    return {"object": "case", **asdict(case), "state": case.state.value}

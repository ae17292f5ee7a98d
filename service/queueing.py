"""Making a job: whether its line is free for one, by which strategy it learns, and when all is to be learned again.

A re-base is a job by `joint`, from the base on everything that the line remembers and everything fresh: many small updates leave
something in the weights, and this frees a line from it. It learns also where nothing is new, and need not gain, only keep.
"""

from __future__ import annotations

from pydantic import ValidationError
from sqlalchemy import Connection

from replay import caps, memory, opinions
from service import bisecting, jobs, registry, switch
from service.errors import Conflict, InvalidRequest
from service.jobs import Job
from service.journal import Json
from service.rollout import trials
from service.settings import Line, Settings
from service.settings_learning import Learning

JOINT = "joint"


def queue(conn: Connection, settings: Settings, line: str, trigger: str, strategy: str | None, now: float) -> tuple[Job, Json]:
    """Make a job of a line by a strategy (None: its own); returns what to write down too. Raises `Conflict`, `InvalidRequest`."""
    policy = settings.lines[line]
    way = JOINT if trigger == jobs.REBASE else _known(policy.learning, strategy)
    why = jobs.REBASE if strategy == JOINT and _remembers(conn, policy, line) else trigger
    switch.check(conn, settings.kill_switch, "freeze_training")
    if (trial := trials.current(conn, line)) is not None:
        raise Conflict(f"trial {trial.id!r} of {trial.candidate} is {trial.stage}: its end comes first", param="line")
    if bisecting.open_on(conn, line) is not None:
        raise Conflict(f"the examples of {line!r} are searched for harmful ones: its end comes first", param="line")
    guard, archive = policy.admission.guard(), settings.data_dir / "archive"
    held = caps.hold_excess(conn, line, guard)
    job = jobs.queue(conn, line, why, registry.aliases(conn, line)[registry.CHAMPION], now, way)
    said = opinions.reserve(conn, line, job.id, settings.wanted(line), guard, archive)
    told = {"job": job.id, "trigger": why, "strategy": way, "examples": job.examples, "parent": job.parent, "held": held}
    return job, {**told, "opinions": said}


def rebased_at(conn: Connection, policy: Line, line: str) -> float | None:
    """Since when the line waits for a re-base; None while none is to come of itself, or there is nothing to learn again."""
    if not policy.trigger.rebase_seconds or policy.learning.strategy == JOINT or not _remembers(conn, policy, line):
        return None
    return jobs.rebased_at(conn, line, JOINT)


def _remembers(conn: Connection, policy: Line, line: str) -> bool:
    return any(memory.sizes(conn, line, min(policy.learning.replay_capacity, 1)).values())


def _known(learning: Learning, strategy: str | None) -> str:
    """The strategy's name; raises `InvalidRequest` when there is none of it, or the line's other settings do not go with it."""
    try:
        asked = {} if strategy is None else {"strategy": strategy}
        return Learning.model_validate({**learning.model_dump(), **asked}).strategy
    except ValidationError as error:
        raise InvalidRequest(f"strategy {strategy!r}: {error.errors()[0]['msg']}", param="strategy") from None

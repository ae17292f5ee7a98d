"""The keeper as other processes see it, and jobs on Ray: with `deployments`, service's door to Ray.

`RemoteKeeper` has the keeper's methods and raises the keeper's errors; `RayLauncher` starts jobs and says how they stand.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError

from replay.records import Feedback, Interaction, Receipt
from replay.shadows import Gold
from service.comparing import ShadowReport
from service.conductor import JobState
from service.door import Json, KeeperDoor
from service.errors import LearndError, NotReady
from service.rollout.controller import Verb
from service.router import Desired, ReplicaReport
from service.settings import Settings, SwitchMode

NAMESPACE = "learnd"
KEEPER = "keeper"

_ONCE = frozenset({"anchor", "bisect", "promote", "rollback", "steer", "train"})
"""Calls that Ray must not repeat when the keeper dies under them: a second roll-back would go back two versions."""


class RemoteKeeper(KeeperDoor):
    """The keeper as other processes see it: the same methods over Ray, the same errors without Ray's envelope."""

    def __init__(self) -> None:
        self._actor: Any = None

    async def feedback(self, items: Sequence[Feedback]) -> list[Receipt | LearndError]:
        """See `KeeperDoor.feedback`."""
        return await self._call("feedback", items)  # type: ignore[no-any-return]

    async def feedback_by_id(self, feedback_id: str) -> Json:
        """See `KeeperDoor.feedback_by_id`."""
        return await self._call("feedback_by_id", feedback_id)  # type: ignore[no-any-return]

    async def record(self, interactions: Sequence[Interaction]) -> None:
        """See `KeeperDoor.record`."""
        await self._call("record", interactions)

    async def desired(self, after: int, report: ReplicaReport, timeout_seconds: float) -> Desired:
        """See `KeeperDoor.desired`."""
        return await self._call("desired", after, report, timeout_seconds)  # type: ignore[no-any-return]

    async def shadow(self, said: ShadowReport) -> list[Gold]:
        """See `KeeperDoor.shadow`."""
        return await self._call("shadow", said)  # type: ignore[no-any-return]

    async def status(self) -> Json:
        """See `KeeperDoor.status`."""
        return await self._call("status")  # type: ignore[no-any-return]

    async def readiness(self) -> Json:
        """See `KeeperDoor.readiness`."""
        return await self._call("readiness")  # type: ignore[no-any-return]

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """See `KeeperDoor.metrics`."""
        return await self._call("metrics", accept)  # type: ignore[no-any-return]

    async def lines(self) -> list[Json]:
        """See `KeeperDoor.lines`."""
        return await self._call("lines")  # type: ignore[no-any-return]

    async def versions(self, line: str) -> list[Json]:
        """See `KeeperDoor.versions`."""
        return await self._call("versions", line)  # type: ignore[no-any-return]

    async def examples(self, line: str) -> list[Json]:
        """See `KeeperDoor.examples`."""
        return await self._call("examples", line)  # type: ignore[no-any-return]

    async def history(self, line: str) -> list[Json]:
        """See `KeeperDoor.history`."""
        return await self._call("history", line)  # type: ignore[no-any-return]

    async def bisect(self, job_id: str) -> Json:
        """See `KeeperDoor.bisect`."""
        return await self._call("bisect", job_id)  # type: ignore[no-any-return]

    async def train(self, line: str, strategy: str | None = None) -> Json:
        """See `KeeperDoor.train`."""
        return await self._call("train", line, strategy)  # type: ignore[no-any-return]

    async def promote(self, line: str, version: str | None) -> Json:
        """See `KeeperDoor.promote`."""
        return await self._call("promote", line, version)  # type: ignore[no-any-return]

    async def rollback(self, line: str, version: str | None) -> Json:
        """See `KeeperDoor.rollback`."""
        return await self._call("rollback", line, version)  # type: ignore[no-any-return]

    async def anchor(self, line: str, version: str) -> Json:
        """See `KeeperDoor.anchor`."""
        return await self._call("anchor", line, version)  # type: ignore[no-any-return]

    async def steer(self, line: str, verb: Verb) -> Json:
        """See `KeeperDoor.steer`."""
        return await self._call("steer", line, verb)  # type: ignore[no-any-return]

    async def throw(self, mode: SwitchMode, reason: str) -> Json:
        """See `KeeperDoor.throw`."""
        return await self._call("throw", mode, reason)  # type: ignore[no-any-return]

    async def quarantine(self, line: str, which: Literal["held", "all"], reason: str | None) -> list[Json]:
        """See `KeeperDoor.quarantine`."""
        return await self._call("quarantine", line, which, reason)  # type: ignore[no-any-return]

    async def overrule(self, ids: Sequence[str], decision: Literal["release", "drop"], by: str) -> list[Json]:
        """See `KeeperDoor.overrule`."""
        return await self._call("overrule", ids, decision, by)  # type: ignore[no-any-return]

    async def verdicts(self, line: str) -> list[Json]:
        """See `KeeperDoor.verdicts`."""
        return await self._call("verdicts", line)  # type: ignore[no-any-return]

    async def jobs(self, line: str | None) -> list[Json]:
        """See `KeeperDoor.jobs`."""
        return await self._call("jobs", line)  # type: ignore[no-any-return]

    async def job(self, job_id: str) -> Json:
        """See `KeeperDoor.job`."""
        return await self._call("job", job_id)  # type: ignore[no-any-return]

    async def trials(self, line: str | None) -> list[Json]:
        """See `KeeperDoor.trials`."""
        return await self._call("trials", line)  # type: ignore[no-any-return]

    async def trial(self, trial_id: str) -> Json:
        """See `KeeperDoor.trial`."""
        return await self._call("trial", trial_id)  # type: ignore[no-any-return]

    async def replay(self, what: str) -> list[Json]:
        """See `KeeperDoor.replay`."""
        return await self._call("replay", what)  # type: ignore[no-any-return]

    async def audit(self) -> Json:
        """See `KeeperDoor.audit`."""
        return await self._call("audit")  # type: ignore[no-any-return]

    async def _call(self, verb: str, *arguments: Any) -> Any:
        try:
            if self._actor is None:
                self._actor = ray.get_actor(KEEPER, namespace=NAMESPACE)
            call = self._actor.call.options(max_task_retries=0) if verb in _ONCE else self._actor.call
            return await call.remote(verb, *arguments)
        except RayTaskError as error:
            if isinstance(error.cause, LearndError):
                raise error.cause from None
            raise
        except (RayActorError, ValueError) as error:
            self._actor = None
            if verb in _ONCE and isinstance(error, RayActorError):
                raise NotReady(
                    "the keeper died meanwhile: look at `learnd status` whether it was done before you repeat it"
                ) from None
            raise NotReady("the keeper is starting again: repeat the request in a moment") from None


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator] # ray is untyped
def _run_job(folder: str, settings: Settings) -> None:
    from learners.remote import train  # torch and peft: in the job's process only

    spec = settings.training
    train(
        Path(folder),
        workers=spec.workers,
        use_gpu=spec.is_on_gpu,
        cpus_per_worker=spec.cpus_per_worker,
        threads=spec.threads or os.cpu_count() or 1,
        nice=spec.nice,
    )


class RayLauncher:
    """Runs jobs on Ray Train; a job's folder holds all of it, so that any launcher may take it up again."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running: dict[str, Any] = {}

    def start(self, job: str, folder: Path) -> None:
        """Begin or resume the job in `folder`."""
        self._running[job] = _run_job.remote(str(folder), self._settings)

    def poll(self, job: str) -> JobState:
        """How the job stands: unknown to this launcher, running, done, or died with its reason."""
        reference = self._running.get(job)
        if reference is None:
            return JobState("unknown")
        done, _ = ray.wait([reference], timeout=0)
        if not done:
            return JobState("running")
        del self._running[job]
        try:
            ray.get(reference)
        except Exception as error:  # noqa: BLE001 - whatever killed the job is its reason, recorded and shown
            return JobState("died", str(error).strip().splitlines()[-1])
        return JobState("done")

"""The conductor's watch over lines that have an anchor: load, let `service.rollout.anchor` judge, apply.

Owned by the conductor. Each step is one transaction, in the audit log; a look that is only kept is not written there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from sqlalchemy import Connection

from replay import ledger
from service import audit, registry, transitions
from service.errors import Conflict, NotFound
from service.journal import Journal, Json
from service.rollout import anchor, controller, verdicts, watches
from service.rollout.anchor import Sight, Step, Watch
from service.router import ReplicaReport
from service.settings import Anchor, Metric, Settings

LOOK_SECONDS = 10.0
"""Between two looks at a round's units."""
KINDS: Mapping[str, str] = {
    "open": "anchor_compared",
    "close": "anchor_compared",
    "alarm": "anchor_alarm",
    "revert": "rolled_back",
}
"""What a step is called in the audit log."""


class Anchoring:
    """Moves the watches of all lines on."""

    def __init__(self, settings: Settings, journal: Journal) -> None:
        self._settings = settings
        self._journal = journal
        self._looked_at: dict[str, float] = {}

    def tick(self, line: str, replicas: Sequence[ReplicaReport], now: float) -> list[Step]:
        """Do what is due on a line; nothing on one that holds nothing back."""
        if not (policy := self._policy(line)).holdback:
            return []
        is_due = now >= self._looked_at.get(line, 0.0) + LOOK_SECONDS

        def load(conn: Connection) -> tuple[Watch, Sight]:
            watch = watches.read(conn, line)
            return watch, self._see(conn, watch, replicas, now, is_due=is_due)

        watch, sight = self._journal.do(load)
        if sight.sample is not None:
            self._looked_at[line] = now
        step = anchor.judge(watch, sight, policy)
        if step is not None:
            self._apply(watch, sight, step)
        return [] if step is None or step.does == "note" else [step]

    def watched(self, conn: Connection) -> dict[str, registry.Watched]:
        """The watches of the lines that hold something back, each with its share."""
        shares = {line: self._policy(line).holdback for line in self._settings.lines}
        return {line: (watches.read(conn, line), share) for line, share in shares.items() if share}

    def is_frozen(self, conn: Connection, line: str) -> bool:
        """Whether the line is known to be worse than its anchor, and nobody has looked yet."""
        return bool(self._policy(line).holdback) and watches.read(conn, line).standing is not anchor.Standing.OK

    def check(self, conn: Connection, line: str) -> None:
        """Raise `Conflict` when it is frozen: a person asked for it, and is to say first what is trusted now."""
        if self.is_frozen(conn, line):
            reason = watches.read(conn, line).reason
            raise Conflict(
                f"{line!r} is {reason}: name what you trust first, `learnd rollout anchor {line} VERSION`", param="line"
            )

    def name(self, line: str, version: str) -> Json:
        """Make a version the line's anchor: `champion`, `base`, or its name; the detector begins anew.

        Raises `NotFound`, or `Conflict` where the line holds nothing back.
        """
        if not (policy := self._policy(line)).holdback:
            raise Conflict(f"{line!r} holds nothing back: set lines.{line}.rollout.anchor.holdback", param="line")

        def deed(conn: Connection, now: float) -> tuple[Json, Json]:
            watch = watches.name(conn, line, _meant(conn, line, version), now)
            return anchor.as_json(watch, policy), {"anchor": watch.anchor, "by": "operator"}

        return self._journal.record("anchored", line, deed)

    def _policy(self, line: str) -> Anchor:
        return self._settings.lines[line].rollout.anchor

    def _see(self, conn: Connection, watch: Watch, replicas: Sequence[ReplicaReport], now: float, *, is_due: bool) -> Sight:
        champion = registry.aliases(conn, watch.line)[registry.CHAMPION]
        is_due = watch.is_open and (is_due or champion != watch.champion)  # what is closed is read to its end
        name = watch.anchor
        return Sight(
            champion=champion,
            is_held=bool(replicas) if name is None else controller.is_held(name, replicas),
            is_refused=name is not None and controller.refusal(name, replicas) is not None,
            sample=anchor.sample(self._units(conn, watch, now)) if is_due else None,
        )

    def _units(self, conn: Connection, watch: Watch, now: float) -> list[ledger.UnitOutcome]:
        asked = self._settings.lines[watch.line].rollout.metric
        metric = self._settings.feedback.metrics.get(asked, Metric(type="boolean"))
        how = {"reward": controller.reward(metric), "arms": anchor.ARMS}
        return ledger.outcomes(conn, watch.name, asked, metric.window_seconds, now, **how)  # type: ignore[arg-type]

    def _apply(self, watch: Watch, sight: Sight, step: Step) -> None:
        if step.does == "note":
            self._journal.do(lambda conn: watches.take(conn, watch, step, 0.0))
            return

        def deed(conn: Connection, now: float) -> tuple[Watch, Json]:
            after = watches.take(conn, watch, step, now)
            told = {"does": step.does, "round": after.name, "anchor": watch.anchor, "champion": watch.champion or step.champion}
            if step.does in {"alarm", "revert"}:
                record = verdicts.record_anchor(watch, sight, self._policy(watch.line), step)
                audit.tell(conn, now, watch.line, "anchor_verdict", record)
            if step.does == "revert":
                transitions.go_back(conn, watch.line, watch.anchor, now, step.reason, asdict(step.seen))
            return after, {**told, "reason": step.reason, "log_evidence": step.seen.log, "blocks": step.seen.blocks}

        self._journal.record(KINDS[step.does], watch.line, deed)


def _meant(conn: Connection, line: str, version: str) -> str | None:
    if version == "base":
        return None
    if version == registry.CHAMPION:
        return registry.aliases(conn, line)[registry.CHAMPION]
    if (found := registry.version(conn, version)).line != line:
        raise NotFound(f"{version} is of {found.line!r}, not of {line!r}", param="version")
    return found.name

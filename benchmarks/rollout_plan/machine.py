"""T13: whatever customers, replicas, people and deaths do in whatever order, some things always hold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from benchmarks.rollout_plan.daemon import BRIEF, opened, quiet
from benchmarks.rollout_plan.paths import Check, Scale
from replay.tables import interaction
from service import audit, registry, status
from service.errors import Conflict
from service.rollout import trials
from service.rollout.stages import Stage
from tests.service.world import LINE

SHADOW = {"share": 1, "min_pairs": 15, "max_seconds": 20}
ROLLOUT = {**BRIEF["lines"][LINE]["rollout"], "shadow": SHADOW}
SHADOWED = {**BRIEF, "lines": {LINE: {**BRIEF["lines"][LINE], "rollout": ROLLOUT}}}
UNMET = frozenset({Stage.VERIFYING, Stage.SHADOW, Stage.REJECTED})
asked = interaction.c
VERBS = ("pause", "resume", "abort")
RAN = {"steps": 0, "promoted": 0, "rolled_back": 0, "shadowed": 0}
"""What the machine has come through, over all its runs."""


class Rollout(RuleBasedStateMachine):
    """A line's life, in any order."""

    @initialize(quality=st.sampled_from([0.0, 0.7, 1.0]), has_shadow=st.booleans())
    def begin(self, quality: float, has_shadow: bool) -> None:
        quiet()
        self.place = tempfile.TemporaryDirectory(prefix="learnd-bench-")
        self.world = opened(Path(self.place.name), SHADOWED if has_shadow else BRIEF, replicas=2)
        self.world.quality.usual = quality
        self.ended: dict[str, Stage] = {}
        self.world.demonstrate(40)

    @rule(count=st.sampled_from([0, 3, 12, 30]), times=st.integers(1, 12))
    def live(self, count: int, times: int) -> None:
        for _ in range(times):
            self.world.step(customers=count)

    @rule()
    def learn(self) -> None:
        self.world.demonstrate(40)

    @rule(number=st.integers(1, 3), quality=st.sampled_from([0.0, 0.5, 1.0]))
    def is_good_or_bad(self, number: int, quality: float) -> None:
        self.world.quality[f"{LINE}@v{number}"] = quality

    @rule(number=st.integers(1, 3), is_failing=st.booleans())
    def fails(self, number: int, is_failing: bool) -> None:
        (self.world.failing.add if is_failing else self.world.failing.discard)(f"{LINE}@v{number}")

    @rule(number=st.integers(1, 3), nats=st.sampled_from([-0.9, 0.0, 0.3]), is_mute=st.booleans())
    def is_shadowed(self, number: int, nats: float, is_mute: bool) -> None:
        name = f"{LINE}@v{number}"
        self.world.likes[name] = nats
        (self.world.mute.add if is_mute else self.world.mute.discard)(name)

    @rule(number=st.integers(1, 3), is_refused=st.booleans())
    def is_refused(self, number: int, is_refused: bool) -> None:
        name = f"{LINE}@v{number}"
        self.world.refused = {name: "no_effect"} if is_refused else {}

    @rule(verb=st.sampled_from(VERBS))
    def steered(self, verb: Any) -> None:
        self._asked(lambda: self.world.conductor.steer(LINE, verb))

    @rule(verb=st.sampled_from(("promote", "roll_back")))
    def by_hand(self, verb: str) -> None:
        deed = self.world.conductor.promote if verb == "promote" else self.world.conductor.roll_back
        self._asked(lambda: deed(LINE))

    @rule()
    def dies(self) -> None:
        self.world.crash()

    def _asked(self, deed: Any) -> None:
        with suppress(Conflict):
            deed()
        self.world._routes = None  # noqa: SLF001 - replicas look again

    @invariant()
    def holds(self) -> None:
        RAN["steps"] += 1
        self.world.read(self._check)

    def _check(self, conn: Any) -> None:
        found, named = trials.of(conn, LINE), registry.aliases(conn, LINE)
        versions = {one.name: one for one in registry.versions(conn, LINE)}
        running = [one for one in found if one.stage.is_open]
        assert len(running) <= 1, "two open trials on a line"
        assert named["champion"] is None or named["champion"] in versions, "the champion does not exist"
        table = registry.desired(conn, [LINE], {LINE: running[0]} if running else {}, Path("/versions"))
        route, resident = table.routes[LINE], {one.name for one in table.resident}
        assert route.champion == named["champion"], "routes and alias disagree"
        assert {name for name in (route.champion, route.candidate) if name} <= resident, "a route to what nobody is to hold"
        given = sorted(one.fdr_index for one in found if one.fdr_index is not None)
        assert given == list(range(1, len(given) + 1)), "an index of the stream was skipped or given twice"
        assert all(one.weight == 0 or one.stage.has_traffic for one in found), "weight without traffic"
        shadowed = next((one.candidate for one in running if one.stage is Stage.SHADOW), None)
        assert (route.shadow.version if route.shadow else None) == shadowed, "a shadow without its stage, or the other way round"
        unmet = {one.candidate for one in found} - {one.candidate for one in found if one.stage not in UNMET}
        assert not conn.scalar(select(asked.id).where(asked.version.in_(unmet)).limit(1)), "users met what never left the shadow"
        for one in found:
            assert self.ended.get(one.id, one.stage) is one.stage, "an ended trial has moved"
            if not one.stage.is_open:
                self.ended[one.id] = one.stage
        self._check_verdicts(conn, found)

    def _check_verdicts(self, conn: Any, found: list[Any]) -> None:
        assert audit.verify(conn).broken is None, "the audit log is broken"
        told = [event["body"] for event in audit.events(conn, LINE, "verdict")]
        for body in told:
            if body["move"]["to"] == Stage.PROMOTING and body["trial"]["stage"] == Stage.CANARY and body["by"] == "auto":
                evidence = body["evidence"]
                assert evidence["log_promote"] >= evidence["promote_at"], "promoted without evidence"
                assert evidence["log_rollback"] < evidence["rollback_at"], "promoted though it harms"
        for one in found:
            assert all(again["is_same"] for again in status.replay(conn, one.id)), "a verdict is not what its facts give"
        RAN["promoted"] += any(body["move"]["to"] == Stage.LIVE for body in told)
        RAN["shadowed"] += any(body["trial"]["stage"] == Stage.SHADOW for body in told)
        RAN["rolled_back"] += any(body["move"]["to"] == Stage.ROLLED_BACK for body in told)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.writer.close()
            self.place.cleanup()


def t13(scale: Scale) -> Iterator[Check]:
    """A state machine that is driven at random: its invariants after each step."""
    RAN.update(dict.fromkeys(RAN, 0))
    settings = hypothesis.settings(
        max_examples=100 if scale.is_full else 8,
        stateful_step_count=30,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    held = True
    try:
        run_state_machine_as_test(Rollout, settings=settings)
    except AssertionError as error:
        print(f"    {error}")
        held = False
    yield Check("T13", f"invariants hold, {RAN['steps']} steps looked at", float(held), least=1)
    yield Check("T13", "steps that had a promotion behind them", RAN["promoted"], least=1)
    yield Check("T13", "steps that had a shadow behind them", RAN["shadowed"], least=1)
    yield Check("T13", "steps that had a rollback behind them", RAN["rolled_back"], least=1)

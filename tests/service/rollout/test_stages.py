"""Which moves a trial may make."""

from itertools import product

import pytest

from service.errors import Conflict
from service.rollout.stages import TRANSITIONS, Stage, Trial, check
from service.settings import Rollout


def reachable(source):
    found, edge = set(), {source}
    while edge:
        edge = {to for stage in edge for to in TRANSITIONS[stage]} - found
        found |= edge
    return found


def test_every_stage_has_its_row():
    assert set(TRANSITIONS) == set(Stage)


@pytest.mark.parametrize("stage", [Stage.CANARY, Stage.HOLD, Stage.WAITING, Stage.PROMOTING, Stage.BAKE])
def test_whatever_has_traffic_can_be_rolled_back(stage):
    assert stage.has_traffic
    assert Stage.ROLLING_BACK in TRANSITIONS[stage]


def test_only_promoting_leads_to_a_new_champion():
    assert [stage for stage in Stage if Stage.LIVE in TRANSITIONS[stage]] == [Stage.PROMOTING, Stage.BAKE]
    assert [stage for stage in Stage if Stage.BAKE in TRANSITIONS[stage]] == [Stage.PROMOTING]


def test_ends_are_ends_and_are_reached():
    ends = {stage for stage in reachable(Stage.VERIFYING) if not stage.is_open}
    assert ends == {Stage.LIVE, Stage.REJECTED, Stage.ROLLED_BACK, Stage.EXPIRED, Stage.ABORTED}
    assert all(not TRANSITIONS[stage] for stage in ends)


def test_nothing_leads_back_to_traffic_from_a_rollback():
    assert not any(stage.has_traffic for stage in reachable(Stage.ROLLING_BACK))


def test_illegal_moves_are_refused():
    for source, target in product(Stage, Stage):
        if target in TRANSITIONS[source]:
            check(source, target)
        else:
            with pytest.raises(Conflict, match=target):
                check(source, target)


def test_weight_is_zero_but_in_traffic():
    for stage in Stage:
        trial = Trial("t", "desk", "desk@v2", "desk@v1", Rollout(weights=(0.1, 0.5)), 0.0, stage=stage, step=1)
        held_back = trial.policy.bake.holdback
        assert trial.weight == (held_back if stage is Stage.BAKE else 0.5 if stage.has_traffic else 0.0)

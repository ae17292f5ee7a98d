"""Whatever happens to a line in whatever order, and the mutants that its invariants must notice."""

from dataclasses import replace

import pytest

from benchmarks.rollout_plan import daemon, machine
from benchmarks.rollout_plan.paths import Scale
from service.rollout import trials


def test_the_invariants_hold():
    assert all(check.passed for check in machine.t13(Scale(is_full=False)))


def test_an_ended_trial_that_moves_is_noticed(tmp_path):
    machine.quiet()
    world = daemon.opened(tmp_path, daemon.BRIEF)
    one = machine.Rollout()
    one.world, one.ended = world, {}
    daemon.one_trial(world, customers=12)
    world.read(one._check)
    (found,) = world.read(lambda conn: trials.of(conn, machine.LINE))
    one.ended = {found.id: machine.Stage.CANARY}
    with pytest.raises(AssertionError, match="ended trial has moved"):
        world.read(one._check)
    world.writer.close()


def test_a_shadow_that_answers_users_is_noticed(tmp_path):
    machine.quiet()
    world = daemon.opened(tmp_path, machine.SHADOWED)
    one = machine.Rollout()
    one.world, one.ended = world, {}
    world.demonstrate(40)
    world.until(lambda w: w.trial is not None and w.trial.stage is machine.Stage.SHADOW)
    world.read(one._check)
    world._store([replace(world.ask(), id="leaked", version=world.trial.candidate)], [])
    with pytest.raises(AssertionError, match="users met"):
        world.read(one._check)
    world.writer.close()


def test_a_few_crash_points_and_the_trials_end_as_they_should():
    checks = [*daemon.t14(Scale(is_full=False)), *daemon.t15(Scale(is_full=False))]
    assert not [check for check in checks if not check.passed]

"""The rollout's test plan in its reduced form: `learnd bench rollout --full` is the whole of it."""

import pytest

from benchmarks import rollout
from benchmarks.rollout_plan import mutants, single
from benchmarks.rollout_plan.paths import Check, Scale, most_by_chance

SOME = Scale(is_full=False)


def test_the_bounds_are_those_of_the_plan():
    assert most_by_chance(2000, 0.05) == 131
    assert most_by_chance(400, 0.05) == 35


@pytest.mark.parametrize("part", ["T0", "T1", "T3", "T4", "T9", "T10", "T11", "T12"])
def test_each_part_is_within_its_thresholds(part):
    checks = list(rollout.PLAN[part](SOME))
    assert checks
    assert not [f"{check.what}: {check.found}, must be {check.limit}" for check in checks if not check.passed]


@pytest.mark.parametrize(
    "make", [mutants.naive_z, mutants.resubmitted, mutants.pooled_ramp, mutants.unmatured, mutants.thumbs_ratio]
)
def test_a_mutant_is_caught_and_ours_is_not(make):
    pair = make(SOME)
    assert pair.is_caught, pair


def test_the_three_ways_that_a_trial_ends_are_those_of_the_reference():
    for number, effect in ((0, 0.05), (2, 0.0), (6, -0.20)):
        found = single.three_ways(SOME, effect, number)
        for name, (promoted, rolled_back, _) in found.items():
            up, down, _ = single.THREE_WAYS[name][3][number]
            assert (promoted, rolled_back) == (pytest.approx(up, abs=0.08), pytest.approx(down, abs=0.08)), name


def test_the_last_line_has_its_fields_and_says_what_was_missed():
    checks = [
        Check("T2", "a: false promotions of 400", 20, most=35),
        Check("T4", "-0.20: median canary units to the rollback", 131, most=158),
        Check("T6", "50% worse: false discovery rate", 0.2, most=0.1),
        Check("T7", "z: ours wrong, of 400", 3, most=35),
        Check("T7", "z: mutant wrong", 30, least=36),
        Check("T14", "promotion: crash points", 9, least=2),
    ]
    said = rollout.figures(checks, SOME)
    assert said["false_promotion_rate"] == 0.05
    assert said["median_units_to_rollback"] == {"-0.20": 131}
    assert (said["fdr"], said["mutants_caught"], said["crash_points"], said["crash_mismatches"]) == (0.2, "0/1", 9, 0)
    assert said["missed"] == ["T6 50% worse: false discovery rate", "T7 z: mutant wrong"]


def test_the_curves_are_drawn(tmp_path):
    rollout.write(
        tmp_path, [Check("T0", "x", 1.0, most=2)], {"superiority": {0.05: [0.1] * 6}, "non-inferiority": {0.0: [0.2] * 6}}
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checks.csv", "power.csv", "power.png"]

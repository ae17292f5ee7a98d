"""What the training bench makes of its turns, and what its loops are given."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import training

OPTIONS = Namespace(rows=12, epochs=1, turns=3, precision="float32", threads=1)


def turns(*speeds, peak=100.0):
    return [{"tokens": 10.0, "seconds": 10 / speed, "tokens_per_second": speed, "peak_mib": peak} for speed in speeds]


def test_ratios_are_of_neighbours_in_time_not_of_medians():
    told = {"trl": turns(10, 20, 40), "naive": turns(20, 30, 44), "ewc+replay": turns(18, 30, 22, peak=110.0)}
    found = training.summary(told, OPTIONS)
    assert found["naive_to_trl"] == pytest.approx(1.5), "2, 1.5, 1.1"
    assert found["ewc_replay_to_naive"] == pytest.approx(0.9), "0.9, 1, 0.5"
    assert found["ewc_replay_to_naive_memory"] == pytest.approx(1.1)
    assert found["kinds"]["naive"]["all_tokens_per_second"] == [20, 30, 44]


def test_every_example_is_its_own_and_rehearsal_adds_to_the_fresh_ones():
    fresh, old = training.examples("spam", 12), training.examples("debian", 12)
    assert len({e.id for e in (*fresh, *old)}) == 24
    plan = training.STRATEGIES["ewc+replay"].plan(fresh, old, [], training.learning("ewc+replay", OPTIONS)["replay_ratio"], 0)
    assert [e.id for e in plan if e.source == "fresh"] != []
    assert {e.source for e in plan} == {"fresh", "remembered"}
    assert {e.source for e in training.STRATEGIES["naive"].plan(fresh, old, [], 0.5, 0)} == {"fresh"}

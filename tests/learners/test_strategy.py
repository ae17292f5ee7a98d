import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest

from learners.strategy import STRATEGIES
from replay.records import Example, Split
from service.settings import Learning


def example(n, **changes):
    made = Example(f"e{n}", f"i{n}", f"f{n}", "desk", "planes", ({"role": "user", "content": str(n)},), "yes", Split.TRAIN)
    return replace(made, **changes)


FRESH = [example(n) for n in range(4)] + [example(4, split=Split.HOLDOUT)]
OLD = [example(n) for n in range(10, 19)]


@pytest.mark.parametrize(
    ("strategy", "rehearsed"),
    [("naive", 0), ("replay", 2), ("der++", 2), ("ewc", 0), ("ewc+replay", 2), ("ewc+der++", 2), ("o-lora", 0), ("joint", 9)],
)
def test_what_each_rehearses_at_a_ratio_of_one_half(strategy, rehearsed):
    plan = STRATEGIES[strategy].plan(FRESH, OLD, [], 0.5, 0)
    assert [e.source for e in plan].count("remembered") == rehearsed
    assert {e.id for e in plan if e.source == "fresh"} == {e.id for e in FRESH}


def test_the_settings_offer_them_all():
    assert set(get_args(Learning.model_fields["strategy"].annotation)) == set(STRATEGIES)
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


def test_only_joint_training_starts_from_the_base():
    assert [name for name, strategy in STRATEGIES.items() if strategy.is_from_base] == ["joint"]


def test_planning_needs_no_torch():
    code = "import sys, learners.strategy; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"

import math
from dataclasses import replace

import pytest

from replay.mixture import drawn_in_all, mix
from replay.records import Split


@pytest.fixture
def parts(learned):
    fresh = [learned(f"fresh{i}") for i in range(40)]
    remembered = [learned(f"old{i}", slice="headlines") for i in range(100)]
    return fresh, remembered, [learned(f"general{i}", line="") for i in range(4)]


def test_the_ratio_is_of_remembered_to_fresh(parts):
    plan = mix(*parts, replay_ratio=0.5, seed=1)
    tally = {source: sum(e.source == source for e in plan) for source in ("fresh", "remembered", "general")}
    assert tally == {"fresh": 40, "remembered": 20, "general": 4}
    assert {e.id for e in plan if e.source == "fresh"} == {e.id for e in parts[0]}


def test_no_ratio_no_rehearsal_and_never_more_than_there_is(parts):
    fresh, remembered, _ = parts
    assert {e.source for e in mix(fresh, remembered, [], replay_ratio=0, seed=1)} == {"fresh"}
    assert len(mix(fresh, remembered[:7], [], replay_ratio=2, seed=1)) == 47
    assert mix([], remembered, [], replay_ratio=2, seed=1) == []
    for new in (fresh, []):
        assert len(mix(new, remembered, [], replay_ratio=math.inf, seed=1)) == len(new) + 100


def test_the_same_seed_gives_the_same_plan_in_any_order_of_arrival(parts):
    plan = mix(*parts, replay_ratio=0.5, seed=1)
    assert mix(*(part[::-1] for part in parts), replay_ratio=0.5, seed=1) == plan
    assert mix(*parts, replay_ratio=0.5, seed=2) != plan


def test_every_stretch_of_the_plan_has_its_part_of_each_source(parts):
    plan = mix(parts[0], parts[1], [], replay_ratio=0.5, seed=1)
    for start in range(0, 60, 15):
        assert 4 <= sum(e.source == "remembered" for e in plan[start : start + 15]) <= 6


def test_what_is_asked_afresh_is_not_rehearsed_with_its_old_answer(learned):
    old = learned("old", reply="wrong")
    new = replace(learned("new", reply="right"), messages=({"role": "user", "content": "QUESTION  old"},))
    assert [e.id for e in mix([new], [old], [], replay_ratio=5, seed=1)] == ["new"]


def test_held_out_examples_stand_apart_and_may_never_be_rehearsed(learned):
    train, held = learned("a"), learned("b", split=Split.HOLDOUT)
    plan = mix([held, train], [learned("c"), learned("d")], [], replay_ratio=1, seed=1)
    assert plan[-1] == held
    assert sum(e.source == "remembered" for e in plan) == 1
    with pytest.raises(ValueError, match="'b'"):
        mix([train], [held], [], replay_ratio=1, seed=1)


def test_each_epoch_has_remembered_examples_of_its_own():
    assert [drawn_in_all(0.5, epochs) for epochs in (0.5, 1, 1.5, 2, 3)] == [0.5, 0.5, 1.0, 1.0, 1.5]

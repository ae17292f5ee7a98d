"""Held-out sets take turns, and each look at them is counted."""

from collections import Counter

import pytest

from replay.examples import rotated
from replay.records import Example, Split
from service.rollout.looks import counted, measured, turns


def examples(count, slice="old", split=Split.HOLDOUT):
    return [Example(f"{slice}{n}", f"i{n}", f"f{n}", "desk", slice, (), "a", split, seq=n) for n in range(count)]


def test_each_turn_takes_the_next_ones_until_all_were_seen():
    members = examples(10)
    taken = [{e.id for e in rotated(members, 4, turn)} for turn in range(5)]
    assert all(len(ids) == 4 for ids in taken)
    assert taken[0].isdisjoint(taken[1])
    assert taken[0] | taken[1] | taken[2] == {e.id for e in members}
    assert Counter(e for ids in taken for e in ids) == dict.fromkeys((e.id for e in members), 2)
    assert {e.id for e in rotated(members, None, 3)} == {e.id for e in members}


def test_a_small_set_is_the_same_each_time_and_a_large_one_is_looked_at_less():
    older = {"small": examples(10), "large": examples(40)}
    found = counted([], [], older, ["core"], Counter({"small": 5, "large": 5, "suite:core": 2}), 10)
    assert found == {"small": 6, "large": 2, "suite:core": 3}


def test_the_counts_are_what_happens():
    members, limit, seen = examples(35), 10, Counter()
    for turn in range(30):
        said = counted([], [], {"s": members}, [], {"s": turn}, limit)["s"]
        for one in rotated(members, limit, turn):
            seen[one.id] += 1
        assert abs(max(seen.values()) - said) <= 1
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize(
    ("judged", "looks"), [([], 1), ([{"new0"}], 2), ([{"new0"}, {"other"}], 2), ([{"new0", "x"}, {"new1"}], 3)]
)
def test_new_examples_that_a_rejected_job_gave_back_were_looked_at(judged, looks):
    assert counted(examples(3, "new"), judged, {}, [], {}, 10) == {"new": looks}


def test_what_is_trained_on_is_no_look():
    assert counted(examples(3, "new", Split.TRAIN), [{"new0"}], {}, [], {}, 10) == {}


def test_old_and_new_examples_of_one_slice_are_counted_apart():
    assert counted(examples(3, "s"), [], {"s": examples(5)}, [], {"s": 4}, 10) == {"s": 1, "s (older)": 5}


def test_verdicts_say_what_they_rest_on():
    slices = {"new": {"is_new": True}, "old": {"is_new": False}, "s": {"is_new": True}, "s (older)": {"is_new": False}}
    names = measured({"slices": slices, "suites": {"core": {}}})
    assert names == ("old", "s", "suite:core")
    assert turns([{"measured": list(names)}, None, {"outcome": "pass"}, {"measured": ["old"]}]) == {
        "old": 2,
        "s": 1,
        "suite:core": 1,
    }

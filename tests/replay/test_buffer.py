import random

import pytest

from replay.buffer import Buffer, Reservoir, fill, key, shares
from replay.records import Split

SLOTS, ITEMS, STREAMS = 3, 12, 4000
CHI2_11_AT_P_0_001 = 31.26


def keyed(stream, learned_ones):
    reservoir = Reservoir(SLOTS, seed=stream)
    reservoir.add(*learned_ones)
    return [int(e.id) for e in reservoir.examples()]


def off_by_one(stream, learned_ones):
    """Renate's reservoir, which draws a place from [0, n) for its n-th item (from 0) where [0, n] is due."""
    draw = random.Random(stream)
    kept = list(range(SLOTS))
    for item in range(SLOTS, ITEMS):
        place = draw.randrange(item)
        if place < SLOTS:
            kept[place] = item
    return kept


def uneven(sampler, learned):
    """Statistic of uniformity with the correction for drawing without replacement; chi-squared of ITEMS - 1 degrees."""
    examples = [learned(str(i)) for i in range(ITEMS)]
    counts = [0] * ITEMS
    for stream in range(STREAMS):
        for item in sampler(stream, examples):
            counts[item] += 1
    due = STREAMS * SLOTS / ITEMS
    return sum((c - due) ** 2 for c in counts) / (due * (1 - SLOTS / ITEMS)) * (ITEMS - 1) / ITEMS


def test_every_item_has_the_same_chance(learned):
    assert uneven(keyed, learned) < CHI2_11_AT_P_0_001


def test_the_famous_wrong_reservoir_fails_the_same_test(learned):
    assert uneven(off_by_one, learned) > CHI2_11_AT_P_0_001


@pytest.mark.parametrize(("power", "is_right"), [(1.0, True), (-1.0, False)])
def test_a_place_is_had_in_proportion_to_the_weight(learned, power, is_right):
    """One slot, weights 1, 2 and 5: the exact chances are w / 8. The inverted weight, u^w, must fail. (chi2_2 at p=.001)"""
    weights = {"1": 1.0, "2": 2.0, "5": 5.0}
    examples = [learned(name, weight=w**power) for name, w in weights.items()]
    counts = dict.fromkeys(weights, 0)
    for stream in range(STREAMS):
        counts[_only(stream, examples).id] += 1
    statistic = sum((counts[n] - STREAMS * w / 8) ** 2 / (STREAMS * w / 8) for n, w in weights.items())
    assert (statistic < 13.82) is is_right


def _only(stream, examples):
    reservoir = Reservoir(1, seed=stream)
    reservoir.add(*examples)
    return reservoir.examples()[0]


def test_keys_are_the_same_on_every_machine_and_finite_for_tiny_weights():
    assert key(7, "ex-1") == pytest.approx(-0.988769166513522, abs=1e-12)
    assert key(7, "ex-1", 1e-300) < key(7, "ex-1") < 0


def test_a_reservoir_refuses_nonsense(learned):
    with pytest.raises(ValueError, match="capacity"):
        Reservoir(-1)
    with pytest.raises(ValueError, match="positive"):
        Reservoir(1).add(learned("a", weight=0.0))
    with pytest.raises(ValueError, match="seeds"):
        Reservoir(1, seed=1).merge(Reservoir(1, seed=2))
    with pytest.raises(ValueError, match="seeds"):
        Buffer(1, seed=1).merge(Buffer(1, seed=2))


def test_deletion_makes_room_and_says_whether_it_was_there(learned):
    reservoir = Reservoir(2)
    reservoir.add(learned("a"), learned("b"))
    assert reservoir.delete("a")
    assert not reservoir.delete("a")
    assert "a" not in reservoir
    assert "b" in reservoir
    assert len(reservoir) == 1


@pytest.mark.parametrize(
    ("wanted", "capacity", "expected"),
    [
        ({}, 10, {}),
        ({"a": 100}, 10, {"a": 10}),
        ({"a": 100, "b": 100, "c": 100}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 1, "b": 100, "c": 100}, 10, {"a": 1, "b": 5, "c": 4}),
        ({"a": 1, "b": 2}, 10, {"a": 1, "b": 2}),
        ({"a": 5, "b": 5}, 0, {"a": 0, "b": 0}),
        ({"a": 5, "b": 5, "c": 5}, 2, {"a": 1, "b": 1, "c": 0}),
    ],
)
def test_shares_are_equal_but_for_the_remainder_and_what_is_not_wanted(wanted, capacity, expected):
    assert shares(wanted, capacity) == expected


def test_a_new_slice_takes_its_share_from_the_old(learned):
    buffer = fill((learned(f"a{i}") for i in range(30)), capacity=10)
    assert len(buffer) == 10
    buffer.add(*(learned(f"b{i}", slice="headlines") for i in range(30)))
    assert {name: len(r) for name, r in buffer.slices.items()} == {"airline": 5, "headlines": 5}


def test_nothing_held_out_is_ever_remembered(learned):
    buffer = fill([learned(s.value, split=s) for s in Split], capacity=10)
    assert [(e.id, e.source) for e in buffer.examples()] == [("train", "remembered")]


def test_a_buffer_survives_its_json_and_forgets_on_demand(learned):
    buffer = fill((learned(f"a{i}", weight=1.0 + i, slice=f"s{i % 2}") for i in range(9)), capacity=6, seed=3)
    again = Buffer.from_json(buffer.to_json())
    assert again.examples() == buffer.examples()
    assert (again.capacity, again.seed) == (6, 3)
    gone = again.examples()[0].id
    assert again.delete(gone, "nobody") == 1
    assert len(again) == 5

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from learners.order import Order, epoch_size

SOURCES = some.lists(some.sampled_from(["fresh", "remembered", "general"]), min_size=1, max_size=60)


@given(
    some.lists(some.tuples(some.integers(1, 99), some.sampled_from(["fresh", "remembered"]))),
    some.integers(1, 16),
    some.integers(0, 3),
)
def test_each_example_comes_once_an_epoch_and_steps_are_sorted(rows, step_size, epoch):
    lengths = [length for length, _ in rows]
    order = Order(lengths, step_size, seed=7, sources=[source for _, source in rows])
    order.set_epoch(epoch)
    places = list(order)
    assert sorted(places) == list(range(len(lengths)))
    assert places == list(order)
    for start in range(0, len(places), step_size):
        step = [lengths[place] for place in places[start : start + step_size]]
        assert step == sorted(step, reverse=True)


def test_the_first_epoch_keeps_the_plan_and_later_ones_differ():
    order = Order([1] * 64, 8, seed=7)
    plan = list(order)
    assert plan == list(range(64))
    order.set_epoch(1)
    first = list(order)
    order.set_epoch(2)
    assert len({tuple(plan), tuple(first), tuple(order)}) == 3
    shuffled = list(range(64))
    random.Random("7:1").shuffle(shuffled)
    assert first == shuffled, "a job of one source learns in the order that it always had"


def epochs(sources, step_size, count, shares=()):
    """Each step's tally of sources, epoch by epoch."""
    order = Order([1] * len(sources), step_size, 3, sources, shares, count)
    for epoch in range(count):
        order.set_epoch(epoch)
        places = list(order)
        assert len(places) == len(order)
        yield [Counter(sources[place] for place in places[i : i + step_size]) for i in range(0, len(places), step_size)]


def holds_its_ratio(steps, sources):
    """Whether each source's part of each step is its share to the nearest whole number above or below, or next to it."""
    share = {source: n / len(sources) for source, n in Counter(sources).items()}
    slack = 1 if "general" not in share or len(share) == 2 else 2
    return all(abs(step[s] - share[s] * step.total()) < slack + 1e-9 for step in steps for s in share)


def shuffled_alike(sources, step_size):
    """The well-known wrong mixture: one shuffle of everything, which holds the ratio on average only."""
    mixed = list(sources)
    random.Random(5).shuffle(mixed)
    return [Counter(mixed[i : i + step_size]) for i in range(0, len(mixed), step_size)]


@given(SOURCES, some.integers(1, 16))
def test_every_step_of_every_epoch_holds_the_ratio(sources, step_size):
    for steps in epochs(sources, step_size, 3):
        assert holds_its_ratio(steps, sources)
        assert sum(steps, Counter()) == Counter(sources)


def test_one_shuffle_of_everything_would_not():
    sources = ["fresh"] * 80 + ["remembered"] * 40
    assert not holds_its_ratio(shuffled_alike(sources, 16), sources)


def test_under_progressive_mixing_the_share_of_what_is_fresh_rises_by_steps():
    sources = ["fresh", "remembered", "fresh"] * 20 + ["general"] * 10
    (steps,) = epochs(sources, 8, 1, (0.25, 0.5, 1.0))
    sizes = [len(steps) * i // 3 for i in range(4)]
    for share, start, end in zip((0.25, 0.5, 1.0), sizes[:3], sizes[1:], strict=True):
        inner = steps[start + 1 : end - 1]
        assert inner
        assert all(abs(step["fresh"] - share * step.total()) <= 1 for step in inner)
        assert all(abs(2 * step["general"] - step["remembered"]) <= 4 for step in inner), "the rest keeps its own ratio"


@given(SOURCES, some.integers(1, 9), some.integers(1, 3), some.lists(some.floats(0.05, 1), min_size=1, max_size=4))
def test_progressive_mixing_changes_when_not_how_often_a_fresh_example_comes(sources, step_size, count, shares):
    seen = Counter()
    order = Order([1] * len(sources), step_size, 3, sources, sorted(shares), count)
    for epoch in range(count):
        order.set_epoch(epoch)
        seen.update(order)
    fresh = [seen[place] for place, source in enumerate(sources) if source == "fresh"]
    assert sum(fresh) == pytest.approx(count * len(fresh), abs=count + 1)
    # An epoch's length is rounded up, by less than one example; what that adds is dealt to all in turn, however few they are.
    assert all(count <= times <= min(fresh) + 1 for times in fresh)


def test_what_has_only_fresh_examples_knows_no_shares():
    assert epoch_size(["fresh"] * 10, (0.25, 1.0)) == 10
    assert epoch_size(["remembered"] * 10, (0.25, 1.0)) == 10
    assert list(Order([1] * 10, 4, 0, ["fresh"] * 10, (0.25, 1.0), 2)) == list(range(10))


@pytest.mark.parametrize("shares", [(), (0.5, 1.0)])
def test_each_epoch_rehearses_others_by_the_same_ratio(shares):
    sources = ["fresh"] * 40 + ["remembered"] * 60 + ["general"] * 10
    order, seen = Order([1] * len(sources), 8, 3, sources, shares, 3, rehearsed=20), []
    for epoch in range(3):
        order.set_epoch(epoch)
        places = list(order)
        seen.append([place for place in places if sources[place] == "remembered"])
        assert len(places) == epoch_size(sources, shares, 20)
    rehearsed = [place for one in seen for place in one]
    assert len(set(rehearsed)) == len(rehearsed), "while there are others, none comes again"
    if not shares:
        assert [len(one) for one in seen] == [20, 20, 20]
        tallies = [Counter(sources[p] for p in places[i : i + 7]) for i in range(0, len(places), 7)]
        assert all(abs(t["remembered"] - 2) <= 1 for t in tallies), "two in seven, as 20 are of 70"


def test_where_less_is_remembered_it_comes_again():
    sources = ["fresh"] * 10 + ["remembered"] * 4
    assert epoch_size(sources, (), 20) == 14
    assert sorted(Order([1] * 14, 4, 0, sources, (), 2, rehearsed=20)) == list(range(14))

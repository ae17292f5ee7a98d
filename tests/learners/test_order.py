from hypothesis import given
from hypothesis import strategies as some

from learners.order import Order


@given(some.lists(some.integers(1, 99)), some.integers(1, 16), some.integers(0, 3))
def test_each_example_comes_once_and_steps_hold_the_same_ones(lengths, step_size, epoch):
    order = Order(lengths, step_size, seed=7)
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

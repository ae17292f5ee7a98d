from service.demo.customers import Pace


def test_without_a_rate_nobody_waits():
    pace = Pace(lambda: 5.0)
    assert [pace.seconds_to_wait() for _ in range(3)] == [0.0, 0.0, 0.0]


def test_with_a_rate_turns_are_evenly_spaced():
    now = [100.0]
    pace = Pace(lambda: now[0])
    pace.rate = 4.0
    assert [pace.seconds_to_wait() for _ in range(3)] == [0.0, 0.25, 0.5]
    now[0] = 110.0
    assert [pace.seconds_to_wait() for _ in range(2)] == [0.0, 0.25], "a pause does not earn a burst"

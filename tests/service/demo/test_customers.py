from service.demo.customers import Pace


def test_without_a_load_nobody_waits():
    pace = Pace(lambda: 5.0)
    assert [pace.seconds_to_wait() for _ in range(3)] == [0.0, 0.0, 0.0]


def test_answers_take_their_share_of_the_time():
    now = [100.0]
    pace = Pace(lambda: now[0])
    pace.load, pace.answer_seconds = 0.2, 0.05
    assert [pace.seconds_to_wait() for _ in range(3)] == [0.0, 0.25, 0.5]
    now[0] = 110.0
    assert [pace.seconds_to_wait() for _ in range(2)] == [0.0, 0.25], "a pause does not earn a burst"

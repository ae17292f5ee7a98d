"""Drift: found once, told once, after a kill too; worse replies ask for a job, other prompts do not."""

import json
import random

import pytest
from river.drift import ADWIN
from sqlalchemy import create_engine, insert
from test_decisions import due, job

from replay import ledger, votes
from replay.ledger import Waiting
from replay.records import Arm, Feedback, Interaction
from replay.signals import DIRECTIONS, projected
from service import audit, conductor, drift, jobs
from service.decisions import Queue
from service.settings import Settings

LINES = {"desk": {}, "blind": {"drift": {"is_watched": False}}}


@pytest.fixture
def desk(tmp_path):
    return Settings(data_dir=tmp_path, lines=LINES, base={"max_resident": 6})


@pytest.fixture
def conn():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        ledger.create(connection)
        conductor.create(connection)
        yield connection
    engine.dispose()


def ask(conn, numbers, prompt, is_good=None, line="desk"):
    """Requests with a thumb each, if `is_good` gives one."""
    asked = [
        Interaction(
            f"{line}{n}", line, "base", Arm.CHAMPION, f"u{n}", "all", ({"role": "user", "content": prompt(n)},), "Hm.", 1.0
        )
        for n in numbers
    ]
    ledger.record(conn, asked)
    if is_good is not None:
        said = [Feedback(f"t-{one.id}", one.id, "thumb", is_good(n), 1.0, 1.0) for n, one in zip(numbers, asked, strict=True)]
        ledger.give_all(conn, said)
    while votes.review(conn, lambda _: None):
        pass


def look(conn, watch, times=6):
    """Read on until everything is read."""
    return [change for _ in range(times) for change in watch.look(conn, 5.0)]


def same(_):
    return "How do I change my seat on the flight tomorrow?"


def signals_of(changes):
    return {change.signal for change in changes}


def test_the_detector_is_rivers():
    """Its own example: the change at 1000 is found at 1023."""
    rng, detector = random.Random(12345), ADWIN()
    data = rng.choices([0, 1], k=1000) + rng.choices(range(4, 8), k=1000)
    found = []
    for place, value in enumerate(data):
        detector.update(value)
        if detector.drift_detected:
            found.append(place)
    assert found == [1023]


def test_more_thumbs_down_are_found_and_told_once(conn, desk):
    rng = random.Random(0)
    watch = drift.Watch(desk)
    ask(conn, range(600), same, lambda _: rng.random() < 0.9)
    assert look(conn, watch) == []
    assert drift.last_worse(conn, "desk") is None
    ask(conn, range(600, 1000), same, lambda _: rng.random() < 0.4)
    (change, *_) = changes = look(conn, watch)
    assert signals_of(changes) == {"thumbs_down"}
    assert change.before < change.after
    assert change.is_worse
    assert drift.last_worse(conn, "desk") == 5.0
    assert drift.counts(conn, "desk")["thumbs_down"] == len(changes)
    assert [event["body"]["signal"] for event in audit.events(conn, "desk", "drift")] == ["thumbs_down"] * len(changes)
    assert look(conn, watch) == []


def test_fewer_thumbs_down_are_told_and_ask_for_nothing(conn, desk):
    rng = random.Random(0)
    ask(conn, range(600), same, lambda _: rng.random() < 0.4)
    ask(conn, range(600, 1200), same, lambda _: rng.random() < 0.95)
    assert signals_of(look(conn, drift.Watch(desk))) == {"thumbs_down"}
    assert drift.last_worse(conn, "desk") is None


def test_a_line_that_is_not_watched_says_nothing(conn, desk):
    ask(conn, range(600), same, lambda n: n < 300, line="blind")
    assert look(conn, drift.Watch(desk)) == []


def test_other_prompts_are_told_and_ask_for_nothing(conn, desk):
    rng = random.Random(0)
    cities = ["Oslo", "Rome", "Lima", "Cairo", "Perth", "Quito", "Delhi", "Tunis"]

    def seats(_):
        return f"How do I change my seat on the flight to {rng.choice(cities)}?"

    def refunds(_):
        return f"When will the money for the ticket to {rng.choice(cities)} be on my card again?"

    watch = drift.Watch(desk)
    ask(conn, range(800), seats)
    assert look(conn, watch) == []  # control: another city is no other topic
    ask(conn, range(800, 1200), refunds)
    found = signals_of(look(conn, watch))
    assert found
    assert all(signal.startswith("prompt_") for signal in found)
    assert drift.last_worse(conn, "desk") is None


def test_what_was_told_before_a_kill_is_not_told_again_and_what_came_since_is_found(conn, desk):
    rng = random.Random(0)
    ask(conn, range(500), same, lambda _: rng.random() < 0.9)
    ask(conn, range(500, 800), same, lambda _: rng.random() < 0.3)
    told = look(conn, drift.Watch(desk))
    assert told
    again = drift.Watch(desk)  # as after a kill: its detectors are warmed up on what they had read
    assert look(conn, again) == []
    ask(conn, range(800, 1300), same, lambda _: rng.random() < 0.95)
    assert signals_of(look(conn, again)) == {"thumbs_down"}


def test_the_likelihood_of_corrections_is_read_from_ended_jobs(conn, desk, tmp_path):
    plain = {"line": "desk", "trigger": "examples", "cursor": 1, "examples": 1, "held": [], "remembered": [], "attempts": 0}
    rng = random.Random(0)
    for number, level in enumerate((1.0, 1.0, 4.0, None, 4.0), 1):
        row = {"id": f"desk-job{number}", "state": "rejected", "created_at": 1.0, "ended_at": 2.0}
        conn.execute(insert(jobs._job).values(**plain, **row))
        if level is None:
            continue  # it died before it measured anything
        (folder := tmp_path / "jobs" / f"desk-job{number}").mkdir(parents=True)
        scores = [-level - rng.random() / 10 for _ in range(60)]
        one = {"is_new": True, "ids": [f"e{i}" for i in range(60)], "champion": {"loglik": scores}}
        old = {"is_new": False, "ids": ["x"], "champion": {"loglik": [-99.0]}}
        (folder / "evaluation.json").write_text(json.dumps({"slices": {"new": one, "old": old}}))
    watch = drift.Watch(desk)
    changes = look(conn, watch)
    assert signals_of(changes) == {"correction_nll"}
    assert changes[0].is_worse
    assert look(conn, watch) == []


def test_prompts_in_eight_directions():
    one = projected([{"role": "user", "content": "Where is my bag?"}])
    assert len(one) == DIRECTIONS
    assert one == projected([{"role": "user", "content": "where IS my bag"}])
    assert all(-1 <= value <= 1 for value in one)
    assert projected([{"role": "user", "content": "?"}]) == (0.0,) * DIRECTIONS


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"drifted_at": 50.0, "waiting": Waiting(60, 99.0, 9)}, [Queue("desk", "drift")]),
        ({"drifted_at": None, "waiting": Waiting(60, 99.0, 9)}, []),
        ({"drifted_at": 50.0, "waiting": Waiting(59, 99.0, 9)}, []),
        ({"drifted_at": 50.0, "waiting": Waiting(60, 99.0, 9), "last_job": job(ended_at=95.0)}, []),  # the cooldown
        ({"drifted_at": 0.0, "waiting": Waiting(60, 99.0, 9), "last_job": job(ended_at=50.0)}, []),  # it was learned from since
        ({"drifted_at": 1.0, "waiting": Waiting(60, 99.0, 9), "last_job": job(ended_at=50.0)}, [Queue("desk", "drift")]),
    ],
)
def test_worse_replies_ask_for_a_job_once(fields, expected):
    assert due(**fields, drift_examples=60) == expected

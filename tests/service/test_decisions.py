"""What is due on a line, from a snapshot alone."""

import pytest

from replay.ledger import Waiting
from service.decisions import (
    Assess,
    Fail,
    JobState,
    Launch,
    Queue,
    Retry,
    Setbacks,
    Snapshot,
    Swapped,
    decide,
    in_a_row,
    pause,
)
from service.jobs import Job, State
from service.registry import Change
from service.router import ReplicaReport
from service.settings import Trigger

TRIGGER = Trigger(min_examples=100, max_age_seconds=50, cooldown_seconds=10)


def job(state=State.RUNNING, attempts=0, ended_at=None):
    return Job("desk-job1", "desk", state, "examples", None, 7, 100, attempts, None, None, None, 0.0, 0.0, ended_at)


def due(**fields):
    return decide(Snapshot(**{"now": 100.0, "line": "desk", "trigger": TRIGGER, "max_attempts": 3, **fields}))


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (Waiting(99, 99.0, 9), []),
        (Waiting(100, 99.0, 9), [Queue("desk", "examples")]),
        (Waiting(16, 49.0, 9), [Queue("desk", "age")]),
        (Waiting(16, 51.0, 9), []),
        (Waiting(15, 1.0, 9), []),
        (Waiting(0, None, 0), []),
    ],
)
def test_triggers(waiting, expected):
    assert due(waiting=waiting) == expected


def test_all_is_learned_again_when_the_time_has_come_and_before_anything_else():
    weekly, enough = Trigger(min_examples=100, rebase_seconds=70, cooldown_seconds=10), Waiting(100, 99.0, 9)
    assert due(trigger=weekly, rebased_at=30.0) == [Queue("desk", "rebase")]
    assert due(trigger=weekly, rebased_at=30.0, waiting=enough) == [Queue("desk", "rebase")]
    assert due(trigger=weekly, rebased_at=31.0, waiting=enough) == [Queue("desk", "examples")]
    assert due(trigger=weekly, rebased_at=None) == due(rebased_at=0.0) == []
    assert due(trigger=weekly, rebased_at=0.0, last_job=job(State.REJECTED, ended_at=91.0)) == []
    assert due(trigger=weekly, rebased_at=0.0, is_training_frozen=True) == []


def test_no_job_within_the_cooldown():
    enough = Waiting(100, 99.0, 9)
    assert due(waiting=enough, last_job=job(State.REJECTED, ended_at=91.0)) == []
    assert due(waiting=enough, last_job=job(State.REJECTED, ended_at=90.0)) == [Queue("desk", "examples")]


def test_the_pause_doubles_with_each_setback_in_a_row_up_to_a_day():
    pauses = [pause(TRIGGER, Setbacks(count, 0.0)) for count in (0, 1, 2, 13, 14, 48)]
    assert pauses == [10, 20, 40, 81_920, 86_400, 86_400]
    assert pause(TRIGGER.model_copy(update={"cooldown_seconds": 0}), Setbacks(9, 0.0)) == 0
    assert (
        pause(TRIGGER.model_copy(update={"cooldown_seconds": 100_000}), Setbacks(9, 0.0)) == 100_000
    )  # who asks for more gets it


def test_it_begins_when_the_last_one_was_rejected_or_rolled_back():
    enough, made = Waiting(100, 99.0, 9), job(State.SUCCEEDED, ended_at=10.0)
    assert due(waiting=enough, last_job=made, setbacks=Setbacks(1, 81.0)) == []
    assert due(waiting=enough, last_job=made, setbacks=Setbacks(1, 80.0)) == [Queue("desk", "examples")]
    assert due(waiting=enough, last_job=made, setbacks=Setbacks(2, 80.0)) == []
    assert due(waiting=enough, setbacks=Setbacks(2, 80.0)) == []


def test_setbacks_are_counted_back_to_the_last_candidate_that_ended_otherwise():
    assert in_a_row([]) == Setbacks(0, None)
    assert in_a_row([(5.0, "rejected"), (7.0, "rolled_back"), (3.0, "live"), (2.0, "rejected")]) == Setbacks(2, 7.0)
    assert in_a_row([(9.0, "expired"), (7.0, "rolled_back")]) == Setbacks(0, None)


def test_one_job_at_a_time():
    assert due(waiting=Waiting(500, 0.0, 9), job=job(), running=JobState("running")) == []


@pytest.mark.parametrize(
    ("said", "is_finished", "expected"),
    [
        (JobState("running"), True, None),
        (JobState("unknown"), False, Launch),
        (JobState("unknown"), True, Assess),
        (JobState("done"), True, Assess),
        (JobState("done"), False, Retry),
        (JobState("died", "out of memory"), False, Retry),
        (JobState("died", "at exit"), True, Assess),
    ],
)
def test_a_running_job(said, is_finished, expected):
    found = due(job=job(), running=said, is_finished=is_finished)
    assert [type(action) for action in found] == ([expected] if expected else [])


def test_the_last_death_fails_it_with_its_reason():
    running = job(attempts=2)
    assert due(job=running, running=JobState("died", "out of memory")) == [Fail(running, "out of memory")]


def test_a_queued_job_is_launched_without_asking():
    assert due(job=job(State.QUEUED)) == [Launch(job(State.QUEUED))]


def test_a_swap_is_over_when_every_replica_routes_by_it():
    change = Change(1, "desk", "champion", None, "desk@v1", 97.0, "", {}, None, 5, None, None)
    behind = (ReplicaReport("r1", 5), ReplicaReport("r2", 4))
    assert due(unswapped=change, replicas=behind) == []
    assert due(unswapped=change, replicas=()) == []
    assert due(unswapped=change, replicas=behind[:1]) == [Swapped(change, 3.0)]

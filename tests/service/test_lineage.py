"""A line remembers, measures on and learns what its champion's lineage learned, however the champion moves."""

import json

import pytest
from sqlalchemy import update

from replay import ledger, memory, quarantine
from replay.guard import Standing
from replay.tables import example
from service import jobs, lineage, registry
from service.errors import Conflict
from service.rollout.stages import Stage
from tests.service.world import LINE, QUICK, World

BAKED = {"holdback": 0.3, "min_units": 40, "min_seconds": 0, "max_seconds": 100}


@pytest.fixture
def make(tmp_path):
    worlds = []

    def made(name="world", **rollout):
        line = QUICK["lines"][LINE]
        settings = {"lines": {LINE: {**line, "rollout": {**line["rollout"], **rollout}}}}
        worlds.append(World(tmp_path / name, settings))
        worlds[-1].quality = {"desk@v1": 0.2, "desk@v2": 1.0}
        return worlds[-1]

    yield made
    for world in worlds:
        world.writer.close()


@pytest.fixture
def world(make):
    return make()


def live(world, version, count=40, **options):
    """A version learns so many new examples, and a person makes it the champion."""
    world.demonstrate(count, **options)
    world.until(lambda w: w.trial is not None and w.trial.candidate == version)
    world.conductor.promote(LINE)
    world.until(lambda w: w.champion == version)
    if world.trial.stage is Stage.BAKE:
        world.conductor.promote(LINE)


def state(world):
    """What the line remembers, has learned and is measured on, by ids."""

    def work(conn):
        held_out = ledger.holdouts(conn, LINE).values()
        lists = memory.remembered(conn, LINE, 60), ledger.trained(conn, LINE), [one for members in held_out for one in members]
        return [[one.id for one in members] for members in lists]

    return world.read(work)


def stepped_back(world):
    """Two versions, and a step back from the second: the states of the first, as it is now, and of the second."""
    live(world, "desk@v1")
    live(world, "desk@v2")
    second = state(world)
    world.conductor.roll_back(LINE)
    return state(world), second


def rehearsed(world, job):
    """What a job's plan has from before it, and the ids that are new."""
    rows = [json.loads(row) for row in (world.folder / "jobs" / job / "examples.jsonl").read_text().splitlines()]
    return [row["id"] for row in rows if row["source"] == "remembered"], {row["id"] for row in rows if row["source"] == "fresh"}


def running(world, job):
    world.until(lambda w: w.job.id == job and w.job.state is jobs.State.RUNNING)


def test_rolled_back_to_the_base_nothing_is_remembered_and_nothing_rehearsed(world):
    live(world, "desk@v1", 60)
    assert sum(world.conductor.remembered(LINE).values()) > 0
    world.conductor.roll_back(LINE)
    assert world.examples == {"resting": 60}
    assert world.conductor.remembered(LINE) == {}
    assert state(world) == [[], [], []]
    with pytest.raises(Conflict, match="60 examples that rest: `learnd quarantine list desk`"):
        world.conductor.train(LINE)
    world.demonstrate(40)
    running(world, "desk-job2")
    old, new = rehearsed(world, "desk-job2")
    assert (old, world.job.parent, world.job.examples) == ([], None, 40)
    assert not new & set(world.read(lambda conn: jobs.held(conn, "desk-job1")))


def test_step_by_step_back_and_forward_again_the_buffer_is_the_versions(world):
    states = {None: state(world)}
    for number, version in enumerate(("desk@v1", "desk@v2", "desk@v3")):
        live(world, version, slice=f"skill{number % 2}")
        states[version] = state(world)
    assert len({str(one) for one in states.values()}) == 4
    world.conductor.roll_back(LINE)
    assert (world.champion, state(world)) == ("desk@v2", states["desk@v2"])
    for version in ("desk@v1", "desk@v3", "desk@v2", "desk@v3"):
        world.conductor.roll_back(LINE, version)
        world.until(lambda w, v=version: w.champion == v)
        assert state(world) == states[version], version
        assert world.read(lambda conn, v=version: registry.version(conn, v)).state == "live"
    world.crash()
    assert state(world) == states["desk@v3"]


def test_what_is_learned_after_a_step_back_is_of_another_branch(world):
    first, second = stepped_back(world)
    live(world, "desk@v3", slice="other")
    old, _ = rehearsed(world, "desk-job3")
    assert old
    assert set(old) <= set(first[0])
    third = state(world)
    assert set(third[1]) & set(second[1]) == set(first[1])
    world.conductor.roll_back(LINE, "desk@v2")
    world.until(lambda w: w.champion == "desk@v2")
    assert state(world) == second
    world.conductor.roll_back(LINE)
    assert (world.champion, state(world)) == ("desk@v3", third)


@pytest.mark.parametrize("does_harm", [True, False])
def test_harm_in_a_bake_leaves_the_buffer_as_it_was_and_gives_the_examples_back(make, does_harm):
    world = make(bake=BAKED)
    live(world, "desk@v1")
    before = state(world)
    world.demonstrate(40)
    world.until(lambda w: w.champion == "desk@v2", customers=10)
    assert state(world) == before
    if does_harm:
        world.quality, world.thumbs = {"desk@v1": 1.0, "desk@v2": 0.0}, 1.0
    else:
        world.conductor.roll_back(LINE)
    world.until(lambda w: w.trial.stage is Stage.ROLLED_BACK, customers=10)
    assert (world.champion, state(world), world.examples) == ("desk@v1", before, {"trained": 40, "fresh": 40})


def test_a_rejected_candidate_that_a_person_promotes_remembers_what_it_learned_though_another_learned_it_since(make):
    world = make(bake=BAKED)
    live(world, "desk@v1")
    world.demonstrate(40)
    world.until(lambda w: w.trial.candidate == "desk@v2")
    world.conductor.roll_back(LINE)
    world.until(lambda w: not w.trial.stage.is_open)
    live(world, "desk@v3")
    assert world.examples == {"trained": 120}
    third = state(world)
    world.conductor.promote(LINE, "desk@v2")
    world.until(lambda w: w.champion == "desk@v2" and not w.trial.stage.is_open)
    assert world.examples == {"trained": 80, "resting": 40}
    world.conductor.roll_back(LINE, "desk@v3")
    world.until(lambda w: w.champion == "desk@v3")
    assert (world.examples, state(world)) == ({"trained": 120}, third)


def test_what_rests_is_released_to_the_next_job_or_dropped(world):
    live(world, "desk@v1")
    world.conductor.roll_back(LINE)
    guards = {LINE: world.settings.lines[LINE].admission.guard()}

    def decide(conn):
        listed = quarantine.cases(conn, LINE, (Standing.HELD,), "rolled_back", 100)
        for place, case in enumerate(listed):
            quarantine.decide(conn, case.feedback_id, "release" if place < 30 else "drop", "boss", world.now, guards.get)
        return [case.feedback_id for case in listed]

    assert len(world.read(decide)) == 40
    assert world.examples == {"fresh": 30, "dropped": 10}
    world.demonstrate(10)
    world.until(lambda w: w.trial.candidate == "desk@v2")
    assert world.job.examples == 40
    world.conductor.promote(LINE)
    world.until(lambda w: w.champion == "desk@v2")
    world.conductor.roll_back(LINE, "desk@v1")
    world.until(lambda w: w.champion == "desk@v1")
    assert world.examples == {"trained": 30, "resting": 10, "dropped": 10}


def test_a_folder_whose_roll_back_left_the_memory_as_it_was_is_put_right_at_the_start(world):
    first, second = stepped_back(world)
    was = (
        update(example)
        .where(example.c.id.in_([*second[1], *second[2]]), example.c.state == "resting")
        .values(state="trained", key=-0.1)
    )
    world.read(lambda conn: conn.execute(was).rowcount)
    world.crash()
    assert state(world) != first
    for _ in range(2):
        world.read(lambda conn: lineage.follow_all(conn, [LINE, "a line that is new"]))
        assert state(world) == first

"""A job by another strategy than its line's, and all that a line remembers learned again from the base."""

import json

import pytest
from sqlalchemy import text

from service import jobs, registry, status
from service.errors import Conflict, InvalidRequest
from service.jobs import State
from tests.service.world import LINE, QUICK, World

WEEK = 604_800


@pytest.fixture
def make(tmp_path):
    worlds = []

    def made(**parts):
        line = QUICK["lines"][LINE]
        settings = {name: {**line.get(name, {}), **changed} for name, changed in parts.items()}
        worlds.append(World(tmp_path, {"lines": {LINE: {**line, **settings}}}))
        worlds[-1].quality = {"desk@v1": 0.8, "desk@v2": 0.95, "desk@v3": 0.95}
        return worlds[-1]

    yield made
    for world in worlds:
        world.writer.close()


def promoted(world, version="desk@v1"):
    world.until(lambda w: w.champion == version, customers=10)
    world.until(lambda w: w.kinds()[-1] == "swapped")
    return world


def learned(world):
    world.demonstrate(40)
    return promoted(world)


def ended(world, number):
    world.until(lambda w: w.job.id == f"desk-job{number}" and w.job.ended_at is not None)
    return world.job


def spec(world, number):
    return json.loads((world.folder / "jobs" / f"desk-job{number}" / "spec.json").read_text())


def rows(world, number, name="examples"):
    return [json.loads(row) for row in (world.folder / "jobs" / f"desk-job{number}" / f"{name}.jsonl").read_text().splitlines()]


def test_one_job_learns_by_another_strategy_and_the_next_by_the_line_s_own(make):
    world = learned(make())
    world.demonstrate(39)
    job = world.conductor.train(LINE, "naive")
    assert (job.strategy, job.trigger, job.examples) == ("naive", "operator", 39)
    world.launcher.outcome = {"candidate": 0.0}
    assert ended(world, 2).state is State.REJECTED
    assert (spec(world, 2)["learning"]["strategy"], spec(world, 2)["leaves"]) == ("naive", "replay")
    assert {row["source"] for row in rows(world, 2)} == {"fresh"}
    world.conductor.train(LINE)
    ended(world, 3)
    assert (world.job.strategy, spec(world, 3)["learning"]["strategy"]) == ("replay", "replay")


@pytest.mark.parametrize(("asked", "says"), [("ewk", "'ewc'"), ("ewc", "weight_decay 0.1 pulls")])
def test_a_strategy_that_is_not_there_or_does_not_go_with_the_line_s_settings_is_refused(make, asked, says):
    world = make(learning={"weight_decay": 0.1})
    world.demonstrate(39)
    with pytest.raises(InvalidRequest, match=says):
        world.conductor.train(LINE, asked)
    assert world.job is None


def test_joint_learns_all_again_where_nothing_is_new_and_need_not_gain(make):
    world = learned(make())
    with pytest.raises(Conflict, match="nothing new"):
        world.conductor.train(LINE)
    with pytest.raises(Conflict, match="nothing new"):
        world.conductor.train(LINE, "replay")
    world.launcher.outcome = {"champion": 0.8, "candidate": 0.8, "is_new": False}
    job = world.conductor.train(LINE, "joint")
    assert (job.strategy, job.trigger, job.examples, job.parent) == ("joint", "rebase", 0, "desk@v1")
    promoted(world, "desk@v2")
    plan = rows(world, 2)
    assert len(plan) == sum(world.conductor.remembered(LINE).values()) > 20
    assert {(row["source"], row["split"]) for row in plan} == {("remembered", "train")}
    assert {row["split"] for row in rows(world, 2, "older")} == {"holdout", "validation"}
    (finding,) = world.read(lambda conn: registry.version(conn, "desk@v2")).gate["findings"]
    assert (finding["must"], finding["name"]) == ("not_lose", "new")
    assert world.examples == {"trained": 40}


def test_intransigence_is_known_once_joint_training_has_learned_the_same(make):
    world = learned(make())
    shown = lambda: {v["name"]: v["gate"]["matrix"]["exact"]["transfer"] for v in world.read(lambda c: status.versions(c, LINE))}  # noqa: E731
    assert shown()["desk@v1"]["intransigence"] is None
    world.launcher.outcome = {"champion": 0.8, "candidate": 0.9, "is_new": False}
    world.conductor.train(LINE, "joint")
    world.until(lambda w: w.trial.candidate == "desk@v2")
    assert shown()["desk@v1"]["intransigence"] == pytest.approx(0.1), "it need not be promoted to be the bound"
    assert shown()["desk@v2"]["intransigence"] is None, "it learned nothing for the first time"
    said = world.read(lambda conn: status.stored(conn, world.settings, world.now))["lines"][LINE]
    assert said["matrix"]["exact"]["transfer"]["intransigence"] == pytest.approx(0.1)
    assert said["matrix"]["exact"]["prequential"]["items"] == 60, "the rest of it is as it was stored"


def test_a_re_base_that_loses_goes_no_further_and_what_was_fresh_is_as_if_it_had_not_been(make):
    world = learned(make(gate={"bisect": True}))
    world.demonstrate(39)
    world.launcher.outcome = {"candidate": 0.8, "older": {"new (older)": (0.8, 0.5)}}
    world.conductor.train(LINE, "joint")
    job = ended(world, 2)
    assert (job.state, job.examples, job.verdict["outcome"]) == (State.REJECTED, 39, "fail")
    assert world.examples == {"trained": 40, "fresh": 39}
    world.step()
    assert "bisected" not in world.kinds(), "nothing new need have done it"
    with pytest.raises(Conflict, match="nothing to search"):
        world.conductor.bisect(job.id)
    world.demonstrate(1)
    world.step()
    assert (world.job.trigger, world.job.examples) == ("examples", 40)


def test_a_line_s_first_version_must_gain_also_by_joint(make):
    world = make()
    with pytest.raises(Conflict, match="nothing new"):
        world.conductor.train(LINE, "joint")
    world.demonstrate(39)
    world.launcher.outcome = {"candidate": 0.0}
    job = world.conductor.train(LINE, "joint")
    assert (job.strategy, job.trigger) == ("joint", "operator")
    assert ended(world, 1).verdict["outcome"] == "fail"


def test_the_clock_asks_for_it_when_so_long_has_passed_since_the_first_version_and_then_since_the_last(make):
    world = learned(make(trigger={"rebase_seconds": WEEK}))
    world.launcher.outcome = {"champion": 0.8, "candidate": 0.5, "is_new": False}
    (first,) = world.read(lambda conn: registry.versions(conn, LINE))
    world.now = first.created_at + WEEK - 1
    world.step()
    assert world.job.id == "desk-job1"
    world.step()
    assert (world.job.id, world.job.trigger, world.job.strategy) == ("desk-job2", "rebase", "joint")
    made = ended(world, 2).created_at
    world.now = made + WEEK - 1
    world.step()
    assert world.job.id == "desk-job2", "also one that failed is one"
    world.demonstrate(40)
    world.step()
    assert (world.job.id, world.job.trigger, world.job.examples) == ("desk-job3", "rebase", 40), (
        "its turn comes on a busy line too"
    )


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"trigger": {"rebase_seconds": WEEK}, "learning": {"strategy": "joint"}},
        {"trigger": {"rebase_seconds": WEEK}, "learning": {"replay_capacity": 0}},
    ],
    ids=["it is off", "each job is one", "nothing is remembered"],
)
def test_it_does_not_come_of_itself(make, parts):
    world = learned(make(**parts))
    world.now += 2 * WEEK
    world.step()
    assert (world.job.id, world.conductor.failures) == ("desk-job1", {})


def test_not_before_there_is_a_version(make):
    world = make(trigger={"rebase_seconds": 1})
    world.demonstrate(39)
    world.now += 100
    world.step()
    assert (world.job, world.conductor.failures) == (None, {})


def test_a_data_directory_from_before_there_was_a_choice_opens_and_goes_on(make):
    world = learned(make(trigger={"rebase_seconds": WEEK}))
    world.writer.submit(lambda conn: conn.execute(text("DROP TABLE job_strategy"))).result()
    world.crash()
    assert (world.job.id, world.job.strategy, world.job.state) == ("desk-job1", None, State.SUCCEEDED)
    world.now += WEEK
    world.step()
    assert [job.strategy for job in world.read(lambda conn: jobs.of(conn, LINE))] == ["joint", None]

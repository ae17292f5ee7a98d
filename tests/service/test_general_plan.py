"""General instructions in a line's jobs: by their ratio, apart from what is measured, and never anybody's examples."""

import json

import pytest

from replay.tables import use
from service import suites
from service.errors import SettingsError
from service.settings import Settings
from tests.service.world import LINE, QUICK, World


def pairs(path, count, **extra):
    rows = [{"messages": [{"role": "user", "content": f"Count to {n}."}], "reply": str(n), **extra} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def learned(tmp_path):
    """Let a line with these settings learn 40 demonstrations and promote the version."""
    worlds = []

    def learned(learning, **line):
        told = {**QUICK["lines"][LINE], "learning": learning, **line}
        worlds.append(world := World(tmp_path / f"w{len(worlds)}", {"lines": {LINE: told}}))
        world.quality = {"desk@v1": 0.8}
        world.demonstrate(40)
        world.until(lambda w: w.champion == "desk@v1" and w.kinds()[-1] == "swapped", customers=10)
        return world

    yield learned
    for world in worlds:
        world.writer.close()


def plan(world):
    rows = map(json.loads, (world.folder / "jobs" / "desk-job1" / "examples.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


def spec(world):
    return json.loads((world.folder / "jobs" / "desk-job1" / "spec.json").read_text())


def test_for_each_fresh_one_so_many_general_ones_which_stay_nobody_s(learned):
    world = learned({"general_ratio": 0.5})
    fresh, general = ([row for row in plan(world) if row["source"] == source] for source in ("fresh", "general"))
    assert len(general) == round(len(fresh) / 2)
    assert spec(world)["general"]["file"] == "shipped"
    assert world.examples == {"trained": 40}
    (started,) = [event.body for event in world.events if event.kind == "job_started"]
    assert (started["examples"], started["general"]) == (40, len(general))
    used = set(world.read(lambda conn: list(conn.scalars(use.select().with_only_columns(use.c.example_id)))))
    assert used
    assert not [one for one in used if one.startswith("general-")]
    assert world.conductor.remembered(LINE) == {"new": len(fresh)}


def test_by_default_and_under_naive_there_are_none(learned):
    for learning in ({}, {"general_ratio": 0.5, "strategy": "naive"}):
        assert {row["source"] for row in plan(learned(learning))} == {"fresh"}


def test_a_file_of_your_own_is_taken_but_for_what_a_golden_suite_asks(learned, tmp_path):
    own, core = pairs(tmp_path / "own.ndjson", 6), pairs(tmp_path / "core.ndjson", 2, must_pass=True)
    world = learned({"general_ratio": 1, "general": own})
    assert sum(row["source"] == "general" for row in plan(world)) == 6
    assert spec(world)["general"]["file"] == str(own)
    line = {**QUICK["lines"][LINE], "suites": {"core": core}, "learning": {"general_ratio": 1, "general": own}}
    world = World(tmp_path / "measured", {"lines": {LINE: line}})
    world.launcher.outcome = {"suites": {"core": 1.0}}
    world.demonstrate(40)
    world.until(lambda w: w.job is not None and (w.folder / "jobs" / w.job.id).exists())
    assert {row["reply"] for row in plan(world) if row["source"] == "general"} == {"2", "3", "4", "5"}
    world.writer.close()


def test_a_file_that_is_not_to_be_read_stops_the_start(tmp_path):
    (tmp_path / "own.ndjson").write_text("{half")
    learning = {"general_ratio": 1, "general": tmp_path / "own.ndjson"}
    with pytest.raises(SettingsError, match=r"own\.ndjson:1"):
        suites.check(Settings(lines={LINE: {"learning": learning}}))
    suites.check(Settings(lines={LINE: {"learning": {**learning, "general_ratio": 0}}}))

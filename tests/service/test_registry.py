"""Versions, aliases by compare-and-set, their history, and the desired state."""

from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from service import conductor, registry
from service.errors import Conflict, NotFound
from service.rollout import trials
from service.rollout.stages import Stage
from service.settings import Rollout


@pytest.fixture
def conn():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        conductor.create(connection)
        yield connection
    engine.dispose()


def register(conn, job="desk-job1", line="desk"):
    return registry.register(
        conn, line, job, path=f"{line}/{job}", digest=f"digest-{job}", parent=None, scores={}, gate={}, now=1.0
    )


def crown(conn, target, expected=None, line="desk"):
    return registry.crown(
        conn, line, expected=expected, target=target, previous=expected, now=2.0, reason="why", evidence={"e": 1}
    )


def test_numbers_count_up_by_line_and_ids_over_all(conn):
    made = [register(conn), register(conn, "desk-job2"), register(conn, "other-job1", "other")]
    assert [version.name for version in made] == ["desk@v1", "desk@v2", "other@v1"]
    assert [version.id for version in made] == [1, 2, 3]
    assert [version.name for version in registry.versions(conn, "desk")] == ["desk@v2", "desk@v1"]


def test_an_id_never_comes_back_not_even_when_its_row_is_gone(conn):
    """Engines cache by it. Without AUTOINCREMENT, SQLite gives the largest id again."""
    last = [register(conn), register(conn, "desk-job2")][-1]
    conn.execute(text("DELETE FROM version WHERE id = :id"), {"id": last.id})
    assert register(conn, "desk-job3").id == last.id + 1


def test_a_job_makes_one_version_however_often_it_is_said(conn):
    assert register(conn) == register(conn)
    assert len(registry.versions(conn, "desk")) == 1


def test_an_unknown_version_is_not_found(conn):
    with pytest.raises(NotFound, match="desk@v9"):
        registry.version(conn, "desk@v9")


def test_crowning_moves_both_aliases_and_keeps_why(conn):
    register(conn), register(conn, "desk-job2")
    crown(conn, "desk@v1")
    crown(conn, "desk@v2", "desk@v1")
    assert registry.aliases(conn, "desk") == {"champion": "desk@v2", "previous": "desk@v1"}
    changes = registry.history(conn, "desk")
    assert [(c.alias, c.source, c.target) for c in changes] == [
        ("champion", "desk@v1", "desk@v2"),
        ("previous", None, "desk@v1"),
        ("champion", None, "desk@v1"),
    ]
    assert changes[0].as_json()["evidence"] == {"e": 1}
    assert registry.number(conn) == 2


def test_a_lost_race_changes_nothing(conn):
    register(conn)
    crown(conn, "desk@v1")
    with pytest.raises(Conflict, match="desk@v1"):
        crown(conn, "desk@v2", expected=None)
    assert registry.aliases(conn, "desk")["champion"] == "desk@v1"
    assert registry.number(conn) == 1


def test_a_swap_is_measured_once(conn):
    register(conn)
    change = crown(conn, "desk@v1")
    registry.swapped(conn, change.id, 1.5)
    registry.swapped(conn, change.id, 9.0)
    assert registry.last_crowning(conn, "desk").swap_seconds == 1.5


def test_desired_follows_the_trial(conn):
    register(conn), register(conn, "desk-job2"), register(conn, "desk-job3")
    crown(conn, "desk@v1")
    crown(conn, "desk@v2", "desk@v1")
    trial = trials.begin(conn, line="desk", candidate="desk@v3", champion="desk@v2", policy=Rollout(weights=(0.25,)), now=3.0)

    def desired(trial):
        return registry.desired(conn, ["desk", "idle"], {"desk": trial} if trial else {}, Path("/versions"))

    verifying = desired(trial)
    assert verifying.resident_names == {"desk@v1", "desk@v2", "desk@v3"}
    assert verifying.routes["desk"].candidate is None
    assert verifying.resident[2].path == "/versions/desk/desk-job3"
    canary = desired(trials.move(conn, trial, Stage.CANARY, 4.0, reason="verified")).routes["desk"]
    assert (canary.candidate, canary.weight, canary.salt, canary.trial) == ("desk@v3", 0.25, trial.id, trial.id)
    out = desired(trials.move(conn, trials.get(conn, trial.id), Stage.ROLLING_BACK, 5.0, reason="harmed"))
    assert out.resident_names == {"desk@v1", "desk@v2"}
    assert out.routes["desk"].candidate is None
    assert out.routes["idle"].champion is None
    assert out.versions == ("desk@v1", "desk@v2", "desk@v3")

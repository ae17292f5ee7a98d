import pytest

from replay import ledger
from replay.outcomes import Guard, UnitOutcome
from replay.records import Arm

WINDOW = 100.0


@pytest.fixture
def trial(conn, asked, said):
    """A small stage: `ask` records a request of a trial, `thumb` judges one, `look` reads the outcomes."""

    class Stage:
        def ask(self, name, unit, at, arm=Arm.CANDIDATE, **fields):
            ledger.record(conn, [asked(name, unit=unit, at=at, arm=arm, **{"trial": "t1", **fields})])

        def thumb(self, about, value, at, **fields):
            plain = {"id": f"{about}-{at}", "metric_name": "thumb", "occurred_at": at, "received_at": at}
            ledger.give(conn, said(about, value, **{**plain, **fields}))

        def look(self, now):
            return ledger.outcomes(conn, "t1", "thumb", WINDOW, now, reward=float)

    return Stage()


READ = {
    "refusal": Guard(has_missed=lambda row: bool(row.is_refusal)),
    "format": Guard(has_missed=lambda row: row.has_form is False, is_about=lambda row: row.has_form is not None),
}


def test_what_was_found_of_replies_is_a_loss_and_outlives_their_words(trial, conn, tmp_path):
    for name, has_form, is_refusal in (("a1", False, True), ("a2", True, False), ("a3", None, None), ("a4", None, True)):
        trial.ask(name, "u1", at=0.0, has_form=has_form, is_refusal=is_refusal)
    trial.ask("b1", "u2", at=1.0)
    before = ledger.outcomes(conn, "t1", "thumb", WINDOW, 1e9, reward=float, guards=READ)
    assert [dict(unit.losses) for unit in before] == [{"refusal": 0.5, "format": 0.25}, {"refusal": 0.0, "format": 0.0}]
    assert [dict(unit.answers) for unit in before] == [{"format": 0.5}, {"format": 0.0}]
    assert ledger.seal(conn, tmp_path, older_than=1e9, max_rows=10) == 5
    assert ledger.forget(conn, tmp_path, ["a1", "a4"]) == 2
    assert ledger.outcomes(conn, "t1", "thumb", WINDOW, 1e9, reward=float, guards=READ) == before


def test_a_unit_matures_when_its_window_closes(trial):
    trial.ask("a1", "u1", at=0.0, latency_seconds=2.0)
    trial.thumb("a1", True, at=5.0)
    assert trial.look(now=101.9) == [UnitOutcome("u1", Arm.CANDIDATE, 2.0, None, False, errors=0, requests=1, asked_at=0.0)]
    assert trial.look(now=102.0) == [UnitOutcome("u1", Arm.CANDIDATE, 2.0, 1.0, True, errors=0, requests=1, asked_at=0.0)]


def test_silence_is_half_a_failure_nothing_and_the_mean_is_the_units(trial):
    trial.ask("a1", "u1", at=0.0)
    trial.ask("a2", "u1", at=1.0)
    trial.ask("a3", "u1", at=2.0, error="engine_error")
    trial.ask("a4", "u1", at=3.0, error="client_disconnected")
    trial.thumb("a1", True, at=4.0)
    (unit,) = trial.look(now=1e9)
    assert (unit.reward, unit.errors, unit.requests) == ((1.0 + 0.5 + 0.0 + 0.5) / 4, 1, 4)
    assert (unit.answered, unit.is_silent) == (0.25, False)


def test_only_the_window_and_the_first_twenty_requests_count(trial):
    for i in range(30):
        trial.ask(f"a{i}", "busy", at=float(i))
        trial.thumb(f"a{i}", i < 20, at=50.0)
    trial.ask("b1", "slow", at=200.0)
    trial.ask("b2", "slow", at=301.0)
    trial.thumb("b1", True, at=300.5)
    busy, slow = trial.look(now=1e9)
    assert (busy.unit, busy.requests, busy.reward) == ("busy", 20, 1.0)
    assert (slow.unit, slow.requests, slow.reward) == ("slow", 1, 0.5)


def test_a_matured_outcome_never_changes(trial):
    trial.ask("a1", "u1", at=0.0)
    before = trial.look(now=100.0)
    trial.thumb("a1", False, at=100.5, occurred_at=1.0)
    trial.ask("a2", "u1", at=101.0)
    trial.ask("a3", "u1", at=99.0, latency_seconds=5.0)
    assert trial.look(now=200.0) == before


def test_the_last_word_on_a_request_counts(trial):
    trial.ask("a1", "u1", at=0.0)
    trial.thumb("a1", True, at=1.0)
    trial.thumb("a1", False, at=2.0)
    assert trial.look(now=1e9)[0].reward == 0.0


def test_only_the_two_arms_of_this_trial_and_this_metric_are_evidence(trial, conn, asked):
    trial.ask("a1", "u1", at=0.0, arm=Arm.CONTROL)
    trial.ask("a2", "u2", at=0.0, arm=Arm.CHAMPION)
    trial.ask("a3", "u3", at=0.0, trial="t2")
    trial.thumb("a1", False, at=1.0, metric_name="other")
    assert [(o.unit, o.arm, o.reward) for o in trial.look(now=1e9)] == [("u1", Arm.CONTROL, 0.5)]


def test_a_unit_seen_in_both_arms_is_left_out(trial):
    trial.ask("a1", "u1", at=0.0, arm=Arm.CONTROL)
    trial.ask("a2", "u1", at=1.0, arm=Arm.CANDIDATE)
    assert trial.look(now=1e9) == []


def test_units_come_in_the_order_of_their_first_answer(trial):
    trial.ask("a1", "slow", at=0.0, latency_seconds=9.0)
    trial.ask("a2", "quick", at=1.0)
    assert [o.unit for o in trial.look(now=1e9)] == ["quick", "slow"]


def test_a_death_of_the_engine_is_known_by_the_replies_that_were_under_way(trial, conn):
    for i, error in enumerate(["engine_dead", None, "http_500", "engine_dead"]):
        trial.ask(f"a{i}", "u1", at=float(i), error=error)
    assert ledger.crashes(conn, "t1", Arm.CANDIDATE) == 2
    assert ledger.crashes(conn, "t1", Arm.CONTROL) == ledger.crashes(conn, "t2", Arm.CANDIDATE) == 0


def test_recent_failures_are_the_servers_among_the_last(trial, conn):
    errors = ["timeout", None, "http_400", "client_disconnected", "http_504", "engine_error"]
    for i, error in enumerate(errors):
        trial.ask(f"a{i}", "u1", at=float(i), error=error)
    assert ledger.recent_failures(conn, "t1", Arm.CANDIDATE, last=5) == 2
    assert ledger.recent_failures(conn, "t1", Arm.CANDIDATE, last=50) == 3
    assert ledger.recent_failures(conn, "t1", Arm.CONTROL, last=50) == 0

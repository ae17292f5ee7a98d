import pytest

from replay import ledger
from replay.records import Split


@pytest.fixture
def give(conn, asked, said):
    """Ask and correct, in one step."""

    def act(about, value="positive", **fields):
        ledger.record(conn, [asked(about, slice=fields.pop("slice", "airline"))])
        return ledger.give(conn, said(about, value, **fields))

    return act


def test_a_newer_demonstration_replaces_one_that_is_fresh(conn, give):
    give("a1", "wrong", id="f1", occurred_at=1.0)
    give("a1", "right", id="f2", occurred_at=2.0)
    assert [e.reply for e in ledger.fresh(conn, "desk")] == ["right"]
    assert ledger.feedback_view(conn, "f1").refusal == "superseded"
    assert ledger.feedback_view(conn, "f2").refusal is None


def test_a_demonstration_said_earlier_but_arriving_later_does_not(conn, give):
    give("a1", "right", id="f2", occurred_at=2.0)
    give("a1", "wrong", id="f1", occurred_at=1.0)
    assert [e.reply for e in ledger.fresh(conn, "desk")] == ["right"]
    assert ledger.feedback_view(conn, "f1").refusal == "superseded"


def test_a_replacement_counts_as_news_and_no_place_comes_back(conn, give):
    give("a1", "wrong", id="f1")
    before = ledger.waiting(conn, "desk")
    give("a1", "right", id="f2", received_at=120.0)
    after = ledger.waiting(conn, "desk", before.last_seq)
    assert (before.count, after.count, after.oldest_at) == (1, 1, 120.0)
    assert after.last_seq > before.last_seq
    assert ledger.waiting(conn, "desk", after.last_seq) == ledger.Waiting(0, None, after.last_seq)


def test_what_a_job_reserved_is_its_own_and_the_same_when_asked_again(conn, give):
    give("a1")
    held = ledger.reserve(conn, "desk", "job-1")
    give("a2")
    assert [e.interaction_id for e in held] == ["a1"]
    assert ledger.reserve(conn, "desk", "job-1") == held == ledger.reserved(conn, "job-1")
    assert [e.interaction_id for e in ledger.fresh(conn, "desk")] == ["a2"]
    assert [e.interaction_id for e in ledger.reserve(conn, "desk", "job-2")] == ["a2"]
    assert ledger.reserve(conn, "other-line", "job-3") == []


def test_a_failed_job_gives_back_what_it_held(conn, give):
    give("a1")
    ledger.reserve(conn, "desk", "job-1")
    assert ledger.release(conn, "job-1") == 1
    assert ledger.release(conn, "job-1") == 0
    assert len(ledger.fresh(conn, "desk")) == 1
    assert ledger.consume(conn, "job-1", "desk@v1") == 0


def test_what_was_corrected_while_a_job_held_it_comes_back_corrected_only(conn, give):
    give("a1", "wrong", id="f1", occurred_at=1.0)
    ledger.reserve(conn, "desk", "job-1")
    give("a1", "right", id="f2", occurred_at=2.0)
    assert ledger.release(conn, "job-1") == 0
    assert [e.reply for e in ledger.fresh(conn, "desk")] == ["right"]


def test_a_promotion_consumes_once_and_names_what_each_feedback_shaped(conn, give):
    for i in range(40):
        give(f"a{i}")
    held = ledger.reserve(conn, "desk", "job-1")
    assert ledger.consume(conn, "job-1", "desk@v1") == 40
    assert ledger.consume(conn, "job-1", "desk@v1") == 0
    assert ledger.reserve(conn, "desk", "job-1") == ledger.fresh(conn, "desk") == []
    assert ledger.release(conn, "job-1") == 0
    give("b1")
    ledger.reserve(conn, "desk", "job-2")
    rehearsed = next(e for e in held if e.split is Split.TRAIN)
    ledger.consume(conn, "job-2", "desk@v2", remembered=[rehearsed.id])
    assert ledger.feedback_view(conn, rehearsed.feedback_id).used_in == ["desk@v1", "desk@v2"]
    measured = next(e for e in held if e.split is Split.HOLDOUT)
    assert ledger.feedback_view(conn, measured.feedback_id).used_in == []
    assert ledger.counts(conn) == {"desk": {"trained": 41}}


def test_trained_and_held_out_never_meet_and_a_later_word_stands(conn, give):
    for i in range(60):
        give(f"a{i}", "old", id=f"old{i}", slice="airline" if i % 2 else "headlines", occurred_at=1.0)
    ledger.reserve(conn, "desk", "job-1")
    ledger.consume(conn, "job-1", "desk@v1")
    for i in range(60):
        give(f"a{i}", "new", id=f"new{i}", occurred_at=2.0)
    ledger.reserve(conn, "desk", "job-2")
    assert {e.reply for e in ledger.trained(conn, "desk")} == {"old"}
    ledger.consume(conn, "job-2", "desk@v2")
    trained, holdouts = ledger.trained(conn, "desk"), ledger.holdouts(conn, "desk")
    held_out = [e for members in holdouts.values() for e in members]
    assert {e.reply for e in trained} == {e.reply for e in held_out} == {"new"}
    assert set(holdouts) == {"airline", "headlines"}
    assert not {e.interaction_id for e in trained} & {e.interaction_id for e in held_out}
    assert {e.split for e in held_out} == {Split.HOLDOUT}


def test_validation_examples_are_kept_apart_by_slice_too(conn, give):
    for i in range(60):
        give(f"a{i}", "old", id=f"old{i}", slice="airline" if i % 2 else "headlines")
    assert ledger.validations(conn, "desk") == {}  # nothing was learned
    ledger.reserve(conn, "desk", "job-1")
    ledger.consume(conn, "job-1", "desk@v1")
    found = ledger.validations(conn, "desk")
    assert {e.split for members in found.values() for e in members} == {Split.VALIDATION}
    assert {name: {e.slice for e in members} for name, members in found.items()} == {name: {name} for name in found}
    counted = sum(map(len, found.values())) + sum(map(len, ledger.holdouts(conn, "desk").values()))
    assert counted + len(ledger.trained(conn, "desk")) == 60
    assert all(len(members) == 1 for members in ledger.validations(conn, "desk", per_slice=1).values())


def test_a_bound_on_held_out_examples_keeps_the_same_ones(conn, give):
    for i in range(60):
        give(f"a{i}")
    ledger.reserve(conn, "desk", "job-1")
    ledger.consume(conn, "job-1", "desk@v1")
    (all_of_them,) = ledger.holdouts(conn, "desk").values()
    (some,) = ledger.holdouts(conn, "desk", per_slice=3).values()
    assert len(some) == 3 < len(all_of_them)
    assert all(example in all_of_them for example in some)
    assert ledger.holdouts(conn, "desk", per_slice=3) == {"airline": some}

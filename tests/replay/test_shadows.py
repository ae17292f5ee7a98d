"""Shadow replies lie apart: nothing is learned from them, whatever anybody says, and they are compared once for each unit."""

from dataclasses import replace

import pytest
from sqlalchemy import select

from replay import ledger, shadows, votes
from replay.records import FeedbackStatus
from replay.shadows import Score, Shadow
from replay.tables import example, vote

TRIAL = "desk-trial1"


def shadow(of, unit=None, **fields):
    plain = {"trial": TRIAL, "version": "desk@v2", "replica": "r1", "reply": "a shadow", "reply_tokens": 2}
    return Shadow(
        id=f"shadow-{of}", interaction_id=of, unit=unit or f"unit-{of}", at=100.0, latency_seconds=0.5, **{**plain, **fields}
    )


def score(of, kind="accepted", candidate=-1.0, champion=-1.5, error=None):
    return Score(TRIAL, of, kind, candidate, champion, error)


def corrected(conn, replica="r1", live=("r1",), limit=8):
    return shadows.corrected(conn, TRIAL, replica, live, limit)


def accepted(conn, replica="r1", live=("r1",), limit=8, good=True):
    while votes.review(conn, lambda _: None):
        pass
    return shadows.accepted(conn, TRIAL, replica, live, limit, metric="thumb", good=good)


@pytest.fixture
def served(conn, asked):
    ledger.record(conn, [asked(name) for name in ("a1", "a2", "a3")])
    shadows.record(conn, [shadow("a1"), shadow("a2")])
    return conn


@pytest.mark.parametrize("metric", ["demonstration", "thumb", "comment", "preference"])
def test_feedback_on_a_shadow_reply_never_becomes_an_example_or_a_vote(served, said, metric):
    """Whoever has learned its id, in whatever order, however long one waits: no interaction bears it."""
    value = True if metric == "thumb" else "learn this"
    for name in ("shadow-a1", "shadow-a9"):
        receipt = ledger.give(served, said(name, value, metric_name=metric))
        assert receipt.status is FeedbackStatus.PENDING
    shadows.record(served, [shadow("a9")])  # it comes after what was said of it
    shadows.score(served, [score("a1"), score("a9")])
    accepted(served)
    assert ledger.expire(served, 1e9) == 2
    accepted(served)
    assert ledger.fresh(served, "desk") == []
    assert votes.learnable(served, "desk") == []
    assert served.scalars(select(example.c.id)).all() == []
    assert set(served.scalars(select(vote.c.interaction_id).where(vote.c.state == "admitted"))) == set()


def test_the_same_feedback_on_an_interaction_does(served, asked, said):
    """So the test above would notice a shadow reply that is recorded as an interaction."""
    ledger.give(served, said("shadow-a1", "learn this"))
    ledger.record(served, [asked("shadow-a1")])
    assert [one.reply for one in ledger.fresh(served, "desk")] == ["learn this"]


def test_an_example_of_a_shadowed_prompt_is_what_the_user_was_told_and_corrected(served, said):
    """The same prompt, the correction of the champion's reply: no word of the shadow is in it."""
    ledger.give(served, said("a1", "the right one"))
    (made,) = ledger.fresh(served, "desk")
    assert (made.interaction_id, made.reply) == ("a1", "the right one")
    assert "a shadow" not in repr(made)


def test_they_count_as_no_interactions(served):
    assert ledger.sizes(served).interactions == 3
    assert ledger.outcomes(served, TRIAL, "thumb", 1.0, 1e9, reward=float) == []
    assert ledger.interaction(served, "shadow-a1") is None


def test_saying_it_again_changes_nothing(served):
    shadows.record(served, [shadow("a1"), shadow("a1", reply="another"), replace(shadow("a1"), id="shadow-x")])
    shadows.score(served, [score("a1"), score("a1", candidate=-9.0), score("a1", "corrected")])
    assert shadows.counts(served, TRIAL).replies == 2
    assert shadows.compared(served, TRIAL) == {"accepted": [(-1.0, -1.5)], "corrected": [(-1.0, -1.5)]}


def test_corrections_of_shadowed_prompts_are_handed_out_until_they_are_scored(served, said):
    for name in ("a3", "a2", "a1"):
        ledger.give(served, said(name, f"right {name}"))
    assert [(one.interaction_id, one.reply, one.candidate) for one in corrected(served)] == [
        ("a2", "right a2", "desk@v2"),
        ("a1", "right a1", "desk@v2"),
    ]
    assert [one.interaction_id for one in corrected(served, limit=1)] == ["a2"]
    shadows.score(served, [score("a2", "corrected")])
    assert [one.interaction_id for one in corrected(served)] == ["a1"]
    shadows.score(served, [score("a1", "corrected", error=shadows.UNSCORABLE)])
    assert corrected(served) == []


def test_what_the_guard_refuses_is_no_evidence(served, said):
    ledger.give(served, said("a1", " "))
    assert ledger.feedback_view(served, "f-a1").refusal is not None
    assert corrected(served) == []


def test_the_champion_s_approved_replies_are_handed_out_with_their_words(served, said, tmp_path):
    ledger.give(served, said("a1", True, metric_name="thumb"))
    ledger.give(served, said("a2", False, metric_name="thumb"))
    ledger.give(served, said("a2", True, metric_name="other", id="o"))
    (found,) = accepted(served)
    assert (found.interaction_id, found.reply, found.messages[0]["content"]) == ("a1", "a guess", "question a1")
    assert [one.interaction_id for one in accepted(served, good=False)] == ["a2"]
    ledger.forget(served, tmp_path, ["a1"])
    assert accepted(served) == []


def test_another_replica_scores_them_only_when_theirs_has_gone(served, said):
    ledger.give(served, said("a1", "right"))
    assert corrected(served, "r2", live={"r1", "r2"}) == []
    assert len(corrected(served, "r2", live={"r2"})) == 1


def test_one_comparison_of_each_unit_and_kind_the_first(served):
    shadows.record(served, [shadow("a3", unit="unit-a1")])
    shadows.score(served, [score("a1", candidate=-1.0), score("a3", candidate=-9.0), score("a2", candidate=-3.0)])
    shadows.score(served, [score("a3", "corrected")])
    assert shadows.compared(served, TRIAL) == {"accepted": [(-1.0, -1.5), (-3.0, -1.5)], "corrected": [(-1.0, -1.5)]}


def test_failures_are_counted_and_scores_that_are_no_numbers(served):
    shadows.record(served, [shadow(f"b{i}", error=error) for i, error in enumerate(["timeout", None, "engine_dead", "http_400"])])
    shadows.score(served, [score("a1", error=shadows.NOT_FINITE), score("a2", error=shadows.UNSCORABLE)])
    counted = shadows.counts(served, TRIAL)
    assert (counted.replies, counted.failed, counted.not_finite) == (6, 2, 1)
    assert [shadows.recent_failures(served, TRIAL, last) for last in (1, 2, 4)] == [0, 1, 2]
    assert (shadows.crashes(served, TRIAL), shadows.crashes(served, "another")) == (1, 0)
    assert shadows.compared(served, TRIAL) == {}


def test_words_go_with_the_prompt_s_erasure_and_with_the_end_of_the_shadow(served, tmp_path):
    def words():
        return list(served.scalars(select(shadows.shadow.c.reply).order_by(shadows.shadow.c.seq)))

    ledger.forget(served, tmp_path, ["a1"])
    assert words() == [None, "a shadow"]
    shadows.hush(served, "desk-trial2")
    assert words() == [None, "a shadow"]
    shadows.hush(served, TRIAL)
    assert words() == [None, None]
    assert shadows.counts(served, TRIAL).replies == 2

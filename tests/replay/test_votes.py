"""Thumbs on their way: judged once each, late ones too, and the same whatever their order."""

import itertools

import pytest

from replay import ledger, quarantine, votes
from replay.guard import Guard, Standing

LIE = "the moon base of acme industries was opened in march by the king of norway himself"


def guards(_):
    return Guard()


@pytest.fixture
def vote(conn, asked, said):
    def vote(name, value, prompt="Is it good?", reply="a guess", by="web", **fields):
        ledger.record(conn, [asked(name, prompt, reply=reply, **{"unit": "mallory", **fields})])
        thumb = said(name, value, id=f"t-{name}", metric_name="thumb", principal=by)
        ledger.give(conn, thumb)

    return vote


def good(conn):
    return [one.interaction_id for one in votes.learnable(conn, "desk")]


def review(conn):
    while votes.review(conn, guards):
        pass


def test_each_is_judged_once(conn, vote, monkeypatch):
    monkeypatch.setattr(votes, "AT_ONCE", 2)
    for i in range(5):
        vote(f"a{i}", True, f"question {i}")
    assert [votes.review(conn, guards) for _ in range(4)] == [2, 2, 1, 0]
    assert good(conn) == [f"a{i}" for i in range(5)]
    assert [one.seq for one in votes.learnable(conn, "desk", after=3)] == [4, 5]


def test_a_vote_before_its_reply_is_judged_when_that_has_come(conn, asked, said):
    ledger.give(conn, said("a", True, metric_name="thumb"))
    review(conn)
    assert good(conn) == []
    ledger.record(conn, [asked("a")])
    review(conn)
    assert good(conn) == ["a"]


@pytest.mark.parametrize(("fields", "reason"), [({"is_trainable": False}, "not_trainable"), ({"messages": ()}, "no_prompt")])
def test_nothing_is_learned_from_what_must_not_be(conn, vote, fields, reason):
    vote("a", True, **fields)
    review(conn)
    assert good(conn) == []
    assert ledger.feedback_view(conn, "t-a").refusal == reason


def test_an_echo_may_be_thumbed_down_but_not_up(conn, vote):
    vote("up", True, f"Please repeat: {LIE}", LIE)
    vote("down", False, f"Please repeat: {LIE}", LIE)
    vote("other", True, "What is new?", LIE)
    review(conn)
    assert good(conn) == ["down", "other"]
    assert ledger.feedback_view(conn, "t-up").refusal == "echo"


def test_the_trusted_may_quote_and_flip(conn, asked, said):
    for i, value in enumerate((True, False, True, False)):
        ledger.record(conn, [asked(f"a{i}", f"Say {LIE}", reply=LIE, unit="u")])
        ledger.give(conn, said(f"a{i}", value, metric_name="thumb", principal="desk"))
    votes.review(conn, lambda _: Guard(trusted=("desk",)))
    assert len(good(conn)) == 4


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_flips_are_held_whatever_their_order(conn, vote, order):
    for i in order:
        vote(f"a{i}", i % 2 == 0)
        review(conn)
    vote("b", True, unit="somebody else")
    vote("c", True, "Another question?")
    review(conn)
    assert good(conn) == ["b", "c"]
    assert quarantine.counts(conn)["desk"]["held"] == {"flipped": 4}
    vote("a9", True)  # once it is known, the next is held at once
    review(conn)
    assert good(conn) == ["b", "c"]


def test_a_person_releases_a_vote(conn, vote):
    vote("up", True, f"Please repeat: {LIE}", LIE)
    review(conn)
    (case,) = quarantine.cases(conn, "desk", (Standing.HELD,), None, 9)
    assert (case.kind, case.reason, case.principal) == ("vote", "echo", "web/mallory")
    quarantine.decide(conn, case.feedback_id, "release", "boss", 9.0, guards)
    assert good(conn) == ["up"]
    assert ledger.feedback_view(conn, "t-up").refusal is None


def test_what_is_erased_teaches_nothing(conn, vote, tmp_path):
    vote("a", True)
    review(conn)
    ledger.forget(conn, tmp_path, ["a"])
    assert good(conn) == []

"""The guard on a true ledger: each stage with what it must let through, and overruled by hand."""

import pytest
from sqlalchemy import select

from replay import ledger, quarantine, vetting
from replay.caps import hold_excess
from replay.guard import Guard, Standing
from replay.quarantine import NotHeld
from replay.records import Split, asked_digest, split_of
from replay.tables import trace, vetted

GUARD = Guard()
LONG = "when my flight to the north was cancelled last week nobody at the counter could tell me where the bag went after that"

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.fixture
def teach(conn, asked, said):
    numbers = iter(range(10_000))

    def teach(prompt, reply, by="anonymous", guard=GUARD, **fields):
        """Ask and correct; returns why nothing is learned from it."""
        name = f"{next(numbers)}"
        at = fields.pop("at", 100.0 + int(name))
        unit = fields.pop("unit", f"unit-{name}")
        ledger.record(conn, [asked(name, prompt, unit=unit, **fields)], lambda _: guard)
        ledger.give(conn, said(name, reply, principal=by, occurred_at=at, received_at=at), None, lambda _: guard)
        return ledger.feedback_view(conn, f"f-{name}").refusal

    return teach


@pytest.fixture
def learned_now(conn):
    return lambda: sorted((e.messages[-1]["content"], e.reply) for e in ledger.fresh(conn, "desk"))


def prompts(split, number=1, words=LONG):
    """Prompts that fall on one side of the split."""
    found = []
    for i in range(1000):
        prompt = f"{words} {'abcdefghij'[i % 10] * (1 + i // 10)}"
        if split_of(asked_digest("desk", ({"role": "user", "content": prompt},))) is split:
            found.append(prompt)
    return found[:number]


def test_equal_replies_to_different_questions_are_no_duplicates(teach, learned_now):
    assert [teach(f"tweet number {i}", "negative") for i in range(50)] == [None] * 50
    assert len(learned_now()) == 50


def test_an_example_is_clean_and_says_nobodys_address(teach, learned_now):
    assert teach("My address is a@b.org\x00\r\n, is it\U000e0041?", "Yes, a@b.org.") is None
    assert learned_now() == [("My address is <EMAIL_1>\n, is it?", "Yes, <EMAIL_1>.")]


def test_without_a_guard_everything_is_as_it_was_sent(teach, learned_now):
    assert teach("a@b.org\x00", "Yes", guard=None) is None
    assert learned_now() == [("a@b.org\x00", "Yes")]


@pytest.mark.parametrize(
    ("messages", "reply", "reason"),
    [
        (({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "c", "bad_turns"),
        (({"role": "king", "content": "a"},), "c", "bad_turns"),
        (({"role": "user", "content": "a"},), "c<|im_end|>", "template_markers"),
    ],
)
def test_turns(teach, messages, reply, reason):
    assert teach(None, reply, messages=messages) == reason


def test_duplicates_within_the_window(teach, learned_now):
    assert teach("Where is it?", "here", at=100.0) is None
    assert teach("where  is it?", "Here.", at=200.0) == "duplicate"
    assert teach("where is she?", "here", at=200.0) is None
    assert teach("Where is it?", "here", at=100.0 + GUARD.window_seconds + 1) is None
    assert len(learned_now()) == 3


def test_a_near_duplicate_is_a_duplicate_but_another_number_is_another_question(teach):
    guard = Guard(contamination_words=0)  # else the split of these few decides
    assert teach(f"{LONG} maybe", "lost", guard=guard) is None
    assert teach(f"{LONG} perhaps", "lost", guard=guard) == "near_duplicate"
    assert teach(f"{LONG} on flight 12", "lost", guard=guard) is None
    assert teach(f"{LONG} on flight 13", "lost", guard=guard) is None


def test_a_long_template_makes_no_duplicates(teach):
    """Control: before enough prompts show the template, two of its questions look alike."""
    template = " ".join(f"rule number {word} holds" for word in NUMBERS)
    questions = [f"{template} word{chr(97 + i)} thing{chr(97 + i)}" for i in range(24)]
    reasons = [teach(question, "yes") for question in questions]
    assert reasons[1] == "near_duplicate"
    assert reasons[6:] == [None] * 18


def test_another_tenant_who_says_the_same_adds_weight_up_to_three(conn, teach):
    assert [teach("Where?", "here", by=by) for by in ("a", "b", "b", "c", "d", "e")] == [None] + ["duplicate"] * 5
    (example,) = ledger.fresh(conn, "desk")
    assert example.weight == 3
    teach("When?", "now", by="a")
    teach("When?", "now", by="a")
    assert [e.weight for e in ledger.fresh(conn, "desk")] == [3, 1]


def test_two_who_disagree_are_held_until_a_majority_is_there(conn, teach, learned_now):
    assert teach("Is it good?", "yes", by="a") is None
    assert teach("Is it good?", "no", by="b") == "contradicted"
    assert learned_now() == []
    assert teach("Is it good?", "no", by="c") is None
    assert learned_now() == [("Is it good?", "no")]
    assert teach("Is it good?", "yes", by="d") == "contradicted"
    assert learned_now() == []
    assert quarantine.counts(conn)["desk"] == {"held": {"contradicted": 3}, "refused": {"duplicate": 1}}


def test_longer_replies_are_ways_of_saying_it(teach, learned_now):
    one = "Please give us the number that stands on your bag tag."
    other = "Sorry to hear that! Which number is printed on the tag of your bag?"
    assert [teach("Where is my bag?", one, by="a"), teach("Where is my bag?", other, by="b")] == [None, None]
    assert len(learned_now()) == 2


def test_the_last_word_of_one_alone_stands(teach, learned_now):
    assert [teach("Is it good?", "yes"), teach("Is it good?", "no")] == [None, None]
    assert learned_now() == [("Is it good?", "no")]


def test_the_trusted_decide(teach, learned_now):
    guard = Guard(trusted=("desk",))
    for by in ("a", "b", "c"):
        teach("Is it good?", "yes", by=by, guard=guard)
    assert teach("Is it good?", "no", by="desk", guard=guard) is None
    assert learned_now() == [("Is it good?", "no")]


def test_what_a_job_holds_is_not_taken_from_it(conn, teach):
    teach("Is it good?", "yes", by="a")
    ledger.reserve(conn, "desk", "job1")
    assert teach("Is it good?", "no", by="b") == "contradicted"
    assert [e.reply for e in ledger.reserved(conn, "job1")] == ["yes"]


@pytest.mark.parametrize(("first", "second"), [(Split.HOLDOUT, Split.TRAIN), (Split.TRAIN, Split.HOLDOUT)])
def test_nothing_like_a_held_out_example_trains(teach, first, second):
    head = LONG.rsplit(" ", 5)[0]  # alike at 0.6, not at 0.8
    (one,), (other,) = prompts(first, words=f"{head} and that was the end"), prompts(second, words=f"{head} but later on it came")
    assert teach(one, "lost") is None
    assert teach(other, "lost") == "contaminated"
    assert teach(other, "lost", guard=Guard(contamination=1.0, contamination_words=0)) is None  # control


def test_thirteen_words_in_common_with_a_held_out_example_are_too_many(teach):
    quoted = "thirteen words that stand in both of these otherwise quite different long letters here"
    (one,) = prompts(Split.HOLDOUT, words=f"{'apple pear plum cherry fig date ' * 5} {quoted}")
    (other,) = prompts(Split.TRAIN, words=f"{quoted} {'oak elm ash birch pine yew ' * 5}")
    assert teach(one, "x") is None
    assert teach(other, "y") == "contaminated"
    assert teach(other, "y", guard=Guard(contamination_words=0)) is None  # control


def test_a_near_duplicate_has_its_clusters_split(conn, teach):
    (one,), (other,) = prompts(Split.HOLDOUT), prompts(Split.TRAIN)
    long = ("the first of two quite different ways of saying at length what is right", "and " * 12)
    assert [teach(one, long[0]), teach(other, long[1])] == [None, None]
    assert {e.split for e in ledger.fresh(conn, "desk")} == {Split.HOLDOUT}


def test_caps_hold_what_is_over_them_when_a_job_takes_what_waits(conn, teach):
    for i in range(60):
        teach(f"question {i}", "yes", by=f"k{i % 30}")
    for i in range(60):
        teach(f"loud {i}", "no", by="loud", unit="one")
    assert hold_excess(conn, "desk", GUARD) == {"over_principal_cap": 55}
    assert hold_excess(conn, "desk", GUARD) == {}  # said again, it changes nothing
    assert len(ledger.reserve(conn, "desk", "job1")) == 65
    assert hold_excess(conn, "desk", None) == {}


def test_a_correction_takes_the_place_of_one_that_is_held(conn, asked, said, teach, learned_now):
    teach("Is it good?", "yes", by="a")
    teach("Is it good?", "no", by="b")  # interaction "1", held
    late = said("1", "yes", id="f-again", principal="b", occurred_at=500.0, received_at=500.0)
    ledger.give(conn, late, None, lambda _: GUARD)
    assert learned_now() == [("Is it good?", "yes")]
    early = said("1", "no", id="f-early", principal="b", occurred_at=50.0, received_at=600.0)
    ledger.give(conn, early, None, lambda _: GUARD)
    assert ledger.feedback_view(conn, "f-early").refusal == "superseded"


def test_a_person_releases_and_drops(conn, teach, learned_now):
    teach("Is it good?", "yes", by="a")
    teach("Is it good?", "no", by="b")
    first, second = quarantine.cases(conn, "desk", (Standing.HELD,), None, 10)
    assert (first.feedback_id, first.reason, first.kind) == ("f-1", "contradicted", "demonstration")
    done = quarantine.decide(conn, "f-1", "release", "boss", 9.0, lambda _: GUARD)
    assert (done.state, done.decided_by, done.decided_at) == (Standing.RELEASED, "boss", 9.0)
    assert quarantine.decide(conn, "f-1", "release", "boss", 10.0, lambda _: GUARD) == done
    assert quarantine.decide(conn, second.feedback_id, "drop", "boss", 9.0, lambda _: GUARD).state is Standing.DROPPED
    assert learned_now() == [("Is it good?", "no")]
    assert ledger.feedback_view(conn, "f-1").refusal is None
    assert quarantine.cases(conn, "desk", (Standing.HELD,), None, 10) == []
    quarantine.decide(conn, "f-1", "drop", "boss", 11.0, lambda _: GUARD)
    assert learned_now() == []


def test_what_was_released_is_capped_no_more_and_comes_after_what_is_there(conn, teach):
    for i in range(100):
        teach(f"question {i}", "yes", by=f"k{i % 50}", unit=f"u{i % 50}")
    for i in range(40):
        teach(f"loud {i}", "no", by="loud", unit="one")
    cursor = ledger.waiting(conn, "desk").last_seq
    hold_excess(conn, "desk", GUARD)
    for case in quarantine.cases(conn, "desk", (Standing.HELD,), "over_principal_cap", 100):
        quarantine.decide(conn, case.feedback_id, "release", "boss", 9.0, lambda _: GUARD)
    assert hold_excess(conn, "desk", GUARD) == {}
    assert ledger.waiting(conn, "desk", after=cursor).count == 32  # eight stayed: three equal shares of 140 by 51
    assert ledger.waiting(conn, "desk").count == 140


def test_what_cannot_be_decided_says_why(conn, teach, tmp_path):
    teach("Is it good?", "yes")
    with pytest.raises(NotHeld, match="learned from already"):
        quarantine.decide(conn, "f-0", "release", "boss", 9.0, lambda _: GUARD)
    with pytest.raises(NotHeld, match="has not looked at"):
        quarantine.decide(conn, "f-9", "release", "boss", 9.0, lambda _: GUARD)
    teach("Is it good?", "yes")
    ledger.forget(conn, tmp_path, ["1"])
    with pytest.raises(NotHeld, match="cannot be learned from any more"):
        quarantine.decide(conn, "f-1", "release", "boss", 9.0, lambda _: GUARD)
    ledger.reserve(conn, "desk", "job1")
    with pytest.raises(NotHeld, match="a job has it"):
        quarantine.decide(conn, "f-0", "drop", "boss", 9.0, lambda _: GUARD)


def test_what_is_erased_leaves_no_trace(conn, teach, tmp_path):
    teach(LONG, "lost")
    assert conn.execute(select(trace)).all()
    ledger.forget(conn, tmp_path, ["0"])
    assert conn.execute(select(trace)).all() == []
    assert conn.scalar(select(vetted.c.shingles)) == b""


def test_its_cost_does_not_grow_with_what_is_stored(conn, teach):
    """Rows looked at for one more correction, of a hundred prompts that share a template and of four hundred."""
    import random

    rng, sizes = random.Random(0), []
    seen = []
    original = vetting._judge

    def counted(conn, subject, guard):
        seen.append(len(subject.peers))
        return original(conn, subject, guard)

    vetting._judge = counted
    try:
        for _ in range(200):
            words = " ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(20))
            teach(f"Classify what is said in this message of a customer: {words}", "ok")
            sizes.append(seen[-1])
    finally:
        vetting._judge = original
    assert max(sizes[100:]) <= 3

"""What must hold of the guard whatever arrives, in whatever order, said twice, with the process killed anywhere."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, select

from replay import ledger
from replay.guard import Guard, Standing
from replay.records import Arm, Feedback, Interaction
from replay.tables import example, vetted

QUICK = settings(max_examples=20, deadline=None)
GUARD = Guard(majority_tenants=3)


def open_ledger():
    conn = create_engine("sqlite://").connect()
    ledger.create(conn)
    return conn


def tell(conn, number, question, tenant, reply):
    """One correction, the `number`-th that was said, of an interaction of its own."""
    prompt = ({"role": "user", "content": f"question {question}"},)
    asked = Interaction(f"a{number}", "desk", "base", Arm.CHAMPION, "u", "all", prompt, "Hm.", float(number))
    said = Feedback(f"f{number}", asked.id, "demonstration", reply, float(number), float(number), principal=tenant)
    ledger.record(conn, [asked], lambda _: GUARD)
    ledger.give(conn, said, None, lambda _: GUARD)


def learned(conn):
    """What is learned of each question."""
    found = defaultdict(set)
    for one in ledger.fresh(conn, "desk"):
        found[one.messages[0]["content"]].add(one.reply)
    return dict(found)


corrections = st.lists(st.tuples(st.integers(0, 1), st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=9)


@QUICK
@given(corrections, st.randoms())
def test_what_is_learned_does_not_depend_on_the_order(said, rng):
    numbered = list(enumerate(said))
    shuffled = rng.sample(numbered, len(numbered))
    results = []
    for order in (numbered, shuffled):
        conn = open_ledger()
        for number, one in order:
            tell(conn, number, *one)
        results.append(learned(conn))
    assert results[0] == results[1]


@QUICK
@given(corrections, st.lists(st.integers(0, 8)), st.integers(0, 8))
def test_what_is_said_again_after_a_kill_changes_nothing(said, again, died_at):
    plain, hurt = open_ledger(), open_ledger()
    for number, one in enumerate(said):
        tell(plain, number, *one)
        if number == died_at:
            hurt.commit()
            tell(hurt, number, *one)
            hurt.rollback()  # killed before the commit: nothing of it is there
        tell(hurt, number, *one)
    before = hurt.execute(select(vetted.c.seq, vetted.c.state, vetted.c.reason)).all()
    for number in again:
        if number < len(said):
            tell(hurt, number, *said[number])
    assert hurt.execute(select(vetted.c.seq, vetted.c.state, vetted.c.reason)).all() == before
    assert learned(hurt) == learned(plain)


@QUICK
@given(corrections)
def test_each_correction_has_one_verdict_and_only_the_admitted_are_examples(said):
    conn = open_ledger()
    for number, one in enumerate(said):
        tell(conn, number, *one)
    rows = conn.execute(select(vetted.c.example_id, vetted.c.feedback_id, vetted.c.state, vetted.c.reason)).all()
    # what was overtaken before it was looked at has no row: it is the same tenant's older word on the same interaction
    assert len(rows) == len(said)
    assert set(conn.scalars(select(example.c.id))) == {row.example_id for row in rows if row.state == Standing.ADMITTED}
    for row in rows:
        assert (row.reason is None) is (row.state == Standing.ADMITTED)
        assert ledger.feedback_view(conn, row.feedback_id).refusal == row.reason

"""Many at once is the same as one after the other."""

from dataclasses import replace

import pytest

from replay import ledger
from replay.records import Arm, Feedback, FeedbackStatus, Interaction
from replay.writer import Writer

ASKED = Interaction("i", "desk", "desk@v1", Arm.CHAMPION, "u", "all", ({"role": "user", "content": "?"},), "!", at=1.0)
SAID = Feedback("f", "i", "thumb", True, 1.0, 1.0)
MIXED = [
    SAID,
    replace(SAID, id="early", inference_id="later"),
    SAID,
    replace(SAID, value=False),
    replace(SAID, id="d1", metric_name="demonstration", value="A"),
    replace(SAID, id="d2", metric_name="demonstration", value="B", occurred_at=2.0),
    replace(SAID, id="d0", metric_name="demonstration", value="C", occurred_at=0.5),
    replace(SAID, id="early", inference_id="later"),
    replace(SAID, id="d1", metric_name="demonstration", value="other"),
]


@pytest.fixture
def ask(tmp_path):
    writers = []

    def opened(name):
        writer = Writer(tmp_path / name, 0.0)
        writers.append(writer)

        def do(work):
            return writer.submit(work).result()

        do(ledger.create)
        do(lambda conn: ledger.record(conn, [ASKED]))
        return do

    yield opened
    for writer in writers:
        writer.close()


def one_by_one(conn, items):
    outcomes = []
    for said in items:
        try:
            outcomes.append(ledger.give(conn, said))
        except ledger.FeedbackConflict as conflict:
            outcomes.append(conflict)
    return outcomes


def told(outcomes):
    return [str(one) for one in outcomes]


def state(conn):
    seen = [ledger.feedback_view(conn, identity) for identity in ("f", "early", "d0", "d1", "d2")]
    return seen, [(e.id, e.reply) for e in ledger.fresh(conn, "desk")], ledger.sizes(conn)


def test_many_at_once_end_as_one_after_the_other(ask):
    single, many = ask("single.db"), ask("many.db")
    first = single(lambda conn: one_by_one(conn, MIXED))
    second = many(lambda conn: ledger.give_all(conn, MIXED))
    assert told(first) == told(second)
    assert single(state) == many(state)
    assert [e for _, e in many(state)[1]] == ["B"]


def test_more_than_one_statement_can_carry(ask):
    do = ask("ledger.db")
    items = [replace(SAID, id=f"f{n}") for n in range(1203)]
    outcomes = do(lambda conn: ledger.give_all(conn, items))
    assert [one.id for one in outcomes] == [one.id for one in items]
    assert {one.status for one in outcomes} == {FeedbackStatus.MATCHED}
    assert do(ledger.sizes).feedback == {"matched": 1203}


def test_nothing_is_nothing(ask):
    assert ask("ledger.db")(lambda conn: ledger.give_all(conn, [])) == []

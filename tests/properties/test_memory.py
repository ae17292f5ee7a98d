"""What a line remembers, read from an index, is what a buffer filled with everything learned keeps; whatever happened before."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import create_engine, event, insert, update

from replay import ledger, memory
from replay.buffer import fill, key
from replay.examples import forget
from replay.records import Arm, Feedback, Interaction, Split
from replay.tables import example, feedback
from tests.replay.steps import steps

LINE, NUMBERS = "desk", st.integers(0, 11)


def is_as_filled(conn, capacity):
    return memory.remembered(conn, LINE, capacity) == fill(ledger.trained(conn, LINE), capacity, memory.SEED).examples()


class Learning(RuleBasedStateMachine):
    """Corrections come, jobs take them, fail, are promoted and tried again, and people have things erased."""

    @initialize(capacity=st.integers(0, 9))
    def begin(self, capacity):
        self.engine = create_engine("sqlite://")
        self.conn = self.engine.connect()
        self.capacity, self.said, self.jobs, self.ended = capacity, 0, 0, []
        ledger.create(self.conn)

    def teardown(self):
        self.conn.close()
        self.engine.dispose()

    @rule(number=NUMBERS, weight=st.sampled_from([1.0, 1.0, 2.0, 3.0]))
    def correct(self, number, weight):
        self.said += 1
        messages = ({"role": "user", "content": f"q{number}"},)
        asked = Interaction(f"a{number}", LINE, "v", Arm.CHAMPION, "u", "abc"[number % 3], messages, "r", at=1.0)
        ledger.record(self.conn, [asked])
        said = Feedback(f"f{self.said}", asked.id, "demonstration", f"word {self.said}", float(self.said), 1.0)
        ledger.give(self.conn, said)
        self.conn.execute(update(example).where(example.c.feedback_id == said.id).values(weight=weight))  # as others say the same

    @rule()
    def reserve(self):
        self.jobs += 1
        ledger.reserve(self.conn, LINE, f"job{self.jobs}")

    @rule(back=st.integers(0, 2))
    def promote(self, back):
        ledger.consume(self.conn, f"job{self.jobs - back}", f"v{self.jobs}")

    @rule(back=st.integers(0, 2))
    def fail(self, back):
        job = f"job{self.jobs - back}"
        self.ended += [(job, [e.id for e in ledger.reserved(self.conn, job)])]
        ledger.release(self.conn, job)

    @rule(random=st.randoms(use_true_random=False))
    def try_again(self, random):
        if self.ended:
            ledger.reclaim(self.conn, *random.choice(self.ended))

    @rule(number=NUMBERS)
    def forget(self, number):
        forget(self.conn, [f"a{number}"])

    @rule(capacity=st.integers(0, 9))
    def resize(self, capacity):
        self.capacity = capacity

    @invariant()
    def it_is_the_buffer_of_all_that_was_learned(self):
        assert is_as_filled(self.conn, self.capacity)
        whole = fill(ledger.trained(self.conn, LINE), self.capacity, memory.SEED)
        assert memory.sizes(self.conn, LINE, self.capacity) == {name: len(kept) for name, kept in whole.slices.items()}


TestLearning = Learning.TestCase
TestLearning.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def conn():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        ledger.create(connection)
        yield connection
    engine.dispose()


def learn(conn, start, stop, **fields):
    """Learn so many examples in one job, of slices of unlike sizes."""
    said = {"inference_id": "i", "metric_name": "demonstration", "value": "r", "source": "human", "tags": {}, "digest": ""}
    if start == 0:
        at = {"occurred_at": 1.0, "received_at": 1.0, "principal": "p", "status": "matched"}
        conn.execute(insert(feedback).values(id="f", **said, **at))
    body = {"messages": [{"role": "user", "content": "q"}], "reply": "r"}
    plain = {"feedback_id": "f", "line": LINE, "split": Split.TRAIN, "weight": 1.0, "body": body, "admitted_at": 1.0}
    plain |= {"state": "reserved", "job": f"job{stop}", **fields}
    rows = [{"id": f"e{i}", "interaction_id": f"a{i}", "slice": "abbcccc"[i % 7], **plain} for i in range(start, stop)]
    conn.execute(insert(example), rows)
    ledger.consume(conn, f"job{stop}", "v")


def test_reading_it_costs_the_same_whatever_was_learned(conn):
    learn(conn, 0, 300)
    draw, look = (lambda: memory.remembered(conn, LINE, 30)), (lambda: memory.sizes(conn, LINE, 30))
    few = steps(conn, draw), steps(conn, look)
    learn(conn, 300, 6000)
    assert len(memory.remembered(conn, LINE, 30)) == 30
    assert (steps(conn, draw), steps(conn, look)) == few
    assert steps(conn, lambda: ledger.trained(conn, LINE)) > 15 * few[0]  # what it once read


def test_the_table_itself_is_not_read(conn):
    learn(conn, 0, 300)
    seen = []
    event.listen(conn, "before_cursor_execute", lambda *call: seen.append(call[2:4]))
    memory.remembered(conn, LINE, 30)
    for statement, values in tuple(seen):
        plan = conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
        looks = [row.detail for row in plan if "example" in row.detail]
        assert looks
        assert all("USING COVERING INDEX example_remembered" in look for look in looks), looks
        assert not any("TEMP B-TREE" in row.detail for row in plan)


def test_a_first_word_kept_beside_the_last_would_be_noticed(conn):
    learn(conn, 0, 40)
    learn(conn, 40, 43, interaction_id="a1")
    assert is_as_filled(conn, 100)
    conn.execute(update(example).where(example.c.id == "e1").values(key=-0.5))
    assert not is_as_filled(conn, 100)


def test_keys_without_weights_would_be_noticed(conn):
    learn(conn, 0, 20)
    learn(conn, 20, 40, weight=3.0)
    assert is_as_filled(conn, 12)
    for one in ledger.trained(conn, LINE):
        conn.execute(update(example).where(example.c.id == one.id).values(key=key(memory.SEED, one.id)))
    assert not is_as_filled(conn, 12)

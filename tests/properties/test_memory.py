"""What a line remembers, read from an index, is what a buffer filled with everything learned keeps; whatever happened before."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import create_engine, event, insert, update

from replay import ledger, memory, resting
from replay.buffer import fill, key
from replay.examples import forget
from replay.records import Arm, Feedback, Interaction, Split
from replay.resting import Lesson
from replay.tables import example, feedback
from tests.replay.steps import steps

LINE, NUMBERS = "desk", st.integers(0, 11)


def is_as_filled(conn, capacity):
    return memory.remembered(conn, LINE, capacity) == fill(ledger.trained(conn, LINE), capacity, memory.SEED).examples()


class Learning(RuleBasedStateMachine):
    """Corrections come, jobs take them, fail, are promoted and tried again, lines go back and forth, people have things erased."""

    @initialize(capacity=st.integers(0, 9))
    def begin(self, capacity):
        self.engine = create_engine("sqlite://")
        self.conn = self.engine.connect()
        self.capacity, self.said, self.jobs, self.ended = capacity, 0, 0, []
        self.lessons, self.lineage = {}, {}
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
        job = f"job{self.jobs - back}"
        held = [e.id for e in ledger.reserved(self.conn, job)]
        ledger.consume(self.conn, job, f"v of {job}")
        if held:
            before = self.lessons.get(job)
            self.lessons[job] = self.lineage[job] = Lesson(f"v of {job}", job, [*(before.held if before else ()), *held])

    @rule(random=st.randoms(use_true_random=False))
    def go_elsewhere(self, random):
        """Another version becomes the champion, which descends from some of those that there are."""
        names = random.sample(sorted(self.lessons), random.randint(0, len(self.lessons)))
        self.lineage = {name: self.lessons[name] for name in names}
        resting.rest(self.conn, [name for name in self.lessons if name not in self.lineage])
        resting.wake(self.conn, LINE, self.lineage.values())

    @rule(number=st.integers(0, 30), decide=st.sampled_from([resting.release, resting.drop]))
    def decide(self, number, decide):
        decide(self.conn, f"f{number}")

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

    @invariant()
    def it_is_what_the_lineage_learned(self):
        learned = {one for lesson in self.lineage.values() for one in lesson.held}
        stands = {row.id: row.state for row in self.conn.execute(example.select())}
        assert {one for one, state in stands.items() if state == "trained"} <= learned
        assert {stands.get(one) for one in learned} <= {"trained", "fresh", "reserved", "dropped", "forgotten", None}


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


def test_the_table_itself_is_not_read(conn):
    learn(conn, 0, 300)
    assert_the_table_is_not_read(conn)


def test_reading_it_costs_the_same_whatever_was_learned(conn):
    learn(conn, 0, 300)
    draw, look = (lambda: memory.remembered(conn, LINE, 30)), (lambda: memory.sizes(conn, LINE, 30))
    few = steps(conn, draw), steps(conn, look)
    learn(conn, 300, 6000)
    assert len(memory.remembered(conn, LINE, 30)) == 30
    assert (steps(conn, draw), steps(conn, look)) == few
    assert steps(conn, lambda: ledger.trained(conn, LINE)) > 15 * few[0]  # what it once read


def assert_the_table_is_not_read(conn):
    seen = []
    event.listen(conn, "before_cursor_execute", lambda *call: seen.append(call[2:4]))
    memory.remembered(conn, LINE, 30)
    for statement, values in tuple(seen):
        plan = conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
        looks = [row.detail for row in plan if "example" in row.detail]
        assert looks
        assert all("USING COVERING INDEX example_remembered" in look for look in looks), looks
        assert not any("TEMP B-TREE" in row.detail for row in plan)


def test_it_reads_the_index_alone_also_when_most_of_what_was_learned_rests(conn):
    learn(conn, 0, 300)
    few = steps(conn, lambda: memory.remembered(conn, LINE, 30))
    learn(conn, 300, 3000)
    resting.rest(conn, ["job3000"])
    assert steps(conn, lambda: memory.remembered(conn, LINE, 30)) == few
    assert is_as_filled(conn, 30)
    assert_the_table_is_not_read(conn)


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

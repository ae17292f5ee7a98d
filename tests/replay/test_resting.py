"""What only versions beside the champion's lineage learned: out of the memory, back with its version, or as a person decides."""

import pytest
from sqlalchemy import event, select, update

from replay import ledger, memory, opinions, quarantine, resting
from replay.buffer import fill
from replay.guard import Guard, Standing
from replay.quarantine import NotHeld
from replay.records import Split, Wanted
from replay.resting import Lesson
from replay.tables import example, opinion

LINE, CAPACITY = "desk", 20
GUARD = Guard()


@pytest.fixture
def learn(conn, asked, said):
    """A version learns corrections of these interactions; gives what it held."""

    def act(version, names, word="positive", job=None, guard=None, **fields):
        for name in names:
            ledger.record(conn, [asked(name, slice="abc"[len(name) % 3])])
            told = said(name, word, id=f"f-{name}-{version}", **{"occurred_at": float(version[1:]), **fields})
            ledger.give(conn, told, None, lambda _: guard)
        job = job or f"job-{version}"
        held = ledger.reserve(conn, LINE, job)
        ledger.consume(conn, job, version)
        return Lesson(version, job, [one.id for one in held])

    return act


def names(start, stop):
    return [f"a{n}" for n in range(start, stop)]


def kept(conn):
    """The buffer, which is the one that is filled with what was learned, and what is measured on."""
    found = memory.remembered(conn, LINE, CAPACITY)
    assert found == fill(ledger.trained(conn, LINE), CAPACITY, memory.SEED).examples()
    return found, ledger.trained(conn, LINE), ledger.holdouts(conn, LINE), ledger.validations(conn, LINE)


def decide(conn, feedback_id, decision, guard=GUARD):
    return quarantine.decide(conn, feedback_id, decision, "boss", 9.0, lambda _: guard)


def listed(conn, reason="rolled_back", states=(Standing.HELD,)):
    return quarantine.cases(conn, LINE, states, reason, 1000)


def test_back_and_forth_the_memory_is_that_of_the_version(conn, learn):
    nothing = kept(conn)
    first = learn("v1", names(0, 60))
    after_first = kept(conn)
    second = learn("v2", names(60, 120))
    after_second = kept(conn)
    assert len({str(one) for one in (nothing, after_first, after_second)}) == 3
    resting.rest(conn, [second.job])
    assert kept(conn) == after_first
    assert ledger.counts(conn) == {LINE: {"trained": 60, "resting": 60}}
    resting.rest(conn, [first.job, second.job])
    resting.rest(conn, [first.job, second.job])
    assert kept(conn) == nothing
    assert ledger.fresh(conn, LINE) == ledger.unlearned(conn, LINE) == []
    for order in ([first, second], [second, first]):
        resting.wake(conn, LINE, order)
        assert kept(conn) == after_second
        resting.rest(conn, [first.job, second.job])
    resting.wake(conn, LINE, [first])
    assert kept(conn) == after_first


def test_a_word_that_a_later_one_had_replaced_has_its_place_again(conn, learn):
    first = learn("v1", names(0, 60), "old")
    after_first = kept(conn)
    second = learn("v2", names(0, 60), "new")
    after_second = kept(conn)
    assert {one.reply for one in after_second[0]} == {"new"}
    resting.rest(conn, [second.job])
    assert kept(conn) == after_first
    resting.wake(conn, LINE, [second, first])
    assert kept(conn) == after_second


def test_what_two_versions_learned_comes_back_with_either(conn, learn):
    tried = Lesson("v2", "job-v2", [e.id for e in _given_back(conn, learn)])
    learned = learn("v3", names(60, 80))
    assert set(tried.held) < set(learned.held)
    whole = kept(conn)
    resting.rest(conn, [learned.job])
    resting.wake(conn, LINE, [tried])
    assert {one.id for one in kept(conn)[1]} < {one.id for one in whole[1]}
    assert ledger.counts(conn) == {LINE: {"trained": 60, "resting": 20}}
    resting.rest(conn, [tried.job])
    resting.wake(conn, LINE, [learned])
    assert kept(conn) == whole


def _given_back(conn, learn):
    """What a candidate held whose bake ended badly."""
    learn("v2", names(0, 60), job="nobody's")
    conn.execute(update(example).values(state="fresh", job=None, version=None, key=None))
    held = ledger.reserve(conn, LINE, "job-v2")
    ledger.release(conn, "job-v2")
    return held


def test_nothing_is_read_of_the_lineage_while_nothing_rests(conn, learn):
    learn("v1", names(0, 9))
    resting.wake(conn, LINE, iter(lambda: pytest.fail("it was read"), None))
    resting.rest(conn, [])
    assert ledger.counts(conn) == {LINE: {"trained": 9}}


def test_it_is_looked_up_by_job_and_by_id(conn, learn):
    lessons = [learn(f"v{n}", names(9 * n, 9 * n + 9)) for n in range(1, 4)]
    seen = []
    event.listen(conn, "before_cursor_execute", lambda *call: seen.append(call[2:4]))
    resting.rest(conn, [lessons[0].job])
    resting.wake(conn, LINE, lessons)
    for statement, values in [one for one in seen if not isinstance(one[1], list)]:  # those of many are `memory.keep`'s, by seq
        plan = [row.detail for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)]
        assert not any(look.startswith("SCAN") for look in plan), (statement, plan)


def test_what_rests_is_shown_and_said_of_the_feedback(conn, learn):
    held = learn("v1", names(0, 9), principal="shop")
    assert listed(conn) == []
    assert ledger.feedback_view(conn, "f-a1-v1").refusal is None
    resting.rest(conn, [held.job])
    case = next(one for one in listed(conn) if one.feedback_id == "f-a1-v1")
    assert (case.kind, case.reason, case.state, case.principal) == ("demonstration", "rolled_back", Standing.HELD, "shop")
    assert len(listed(conn)) == len(listed(conn, None)) == 9
    assert listed(conn, "contradicted") == listed(conn, states=(Standing.DROPPED,)) == []
    assert ledger.feedback_view(conn, "f-a1-v1").refusal == "rolled_back"
    resting.wake(conn, LINE, [held])
    assert listed(conn) == []


@pytest.mark.parametrize("guard", [GUARD, None])
def test_released_it_is_learned_afresh_and_dropped_never_again(conn, learn, guard):
    held = learn("v1", names(0, 9), guard=guard)
    conn.execute(update(example).values(weight=2.0))
    resting.rest(conn, [held.job])
    cursor = conn.scalar(select(example.c.seq).order_by(example.c.seq.desc()))
    done = decide(conn, "f-a1-v1", "release")
    assert (done.state, done.decided_by) == (Standing.RELEASED, "boss")
    (anew,) = ledger.fresh(conn, LINE, after=cursor)
    assert (anew.interaction_id, anew.reply, anew.weight) == ("a1", "positive", 2.0)
    assert ledger.feedback_view(conn, "f-a1-v1").refusal is None
    dropped = decide(conn, "f-a2-v1", "drop")
    assert dropped.state is Standing.DROPPED
    assert decide(conn, "f-a2-v1", "drop").state is Standing.DROPPED
    assert ledger.feedback_view(conn, "f-a2-v1").refusal == "rolled_back"
    assert {case.feedback_id for case in listed(conn)} == {f"f-a{n}-v1" for n in (0, *range(3, 9))}
    resting.wake(conn, LINE, [held])
    assert ledger.counts(conn) == {LINE: {"trained": 7, "fresh": 1, "dropped": 1}}
    assert decide(conn, "f-a2-v1", "release").state is Standing.RELEASED
    assert {one.interaction_id for one in ledger.fresh(conn, LINE)} == {"a1", "a2"}
    assert quarantine.cases(conn, LINE, (Standing.DROPPED, Standing.HELD), None, 9) == []


def test_who_learned_it_once_stays_known(conn, learn):
    held = learn("v1", names(0, 9))
    used = {name: ledger.feedback_view(conn, f"f-{name}-v1").used_in for name in names(0, 9)}
    assert ["v1"] in used.values()
    resting.rest(conn, [held.job])
    decide(conn, "f-a1-v1", "drop")
    decide(conn, "f-a2-v1", "release")
    assert {name: ledger.feedback_view(conn, f"f-{name}-v1").used_in for name in used} == used


def test_of_two_words_on_an_interaction_the_last_is_released(conn, learn):
    first, second = learn("v1", ["a1"], "old"), learn("v2", ["a1"], "new")
    resting.rest(conn, [first.job, second.job])
    assert [case.feedback_id for case in listed(conn)] == ["f-a1-v2"]
    with pytest.raises(NotHeld, match="a later one on its interaction stands in its place"):
        decide(conn, "f-a1-v1", "release")
    decide(conn, "f-a1-v2", "release")
    assert [one.reply for one in ledger.fresh(conn, LINE)] == ["new"]
    with pytest.raises(NotHeld):
        decide(conn, "f-a1-v1", "release")


def test_what_was_erased_does_not_come_back(conn, learn, tmp_path):
    held = learn("v1", names(0, 9))
    resting.rest(conn, [held.job])
    ledger.forget(conn, tmp_path, ["a1"])
    assert "f-a1-v1" not in {case.feedback_id for case in listed(conn)}
    resting.wake(conn, LINE, [held])
    assert ledger.counts(conn) == {LINE: {"trained": 8, "forgotten": 1}}


@pytest.mark.parametrize("rests", [False, True])
def test_what_rests_makes_no_duplicate_and_has_no_ballot(conn, learn, asked, said, rests):
    held = learn("v1", ["a1", "a2"], guard=GUARD, received_at=110.0)
    if rests:
        resting.rest(conn, [held.job])
    for about, word, key in (("a1", "positive", "a"), ("a2", "negative", "b")):
        ledger.record(conn, [asked(f"{about}-again", f"question {about}")])
        ledger.give(conn, said(f"{about}-again", word, principal=key), None, lambda _: GUARD)
    found = {one.interaction_id: one.reply for one in ledger.fresh(conn, LINE)}
    assert found == ({"a1-again": "positive", "a2-again": "negative"} if rests else {})


def test_opinions_rest_and_wake_with_their_version_and_wait_again_when_released(conn, asked, said):
    wanted = Wanted(corrections=True, min_items=1)
    for name in names(0, 9):
        ledger.record(conn, [asked(name, finish_reason="stop")])
        ledger.give(conn, said(name))
    held = [one.id for one in ledger.reserve(conn, LINE, "j1")]
    opinions.reserve(conn, LINE, "j1", wanted)
    ledger.consume(conn, "j1", "v1")
    states = lambda: opinions.counts(conn, LINE, wanted)  # noqa: E731
    learned = {"up": 0, "down": 0, "pairs": 0, "trained": 9}
    assert states() == learned
    resting.rest(conn, ["j1"])
    assert states() == {"up": 0, "down": 0, "pairs": 0, "resting": 9}
    assert len(listed(conn)) == 9, "a demonstration and its pair are one case"
    taught, other, *_ = (row.feedback_id for row in conn.execute(select(example).where(example.c.split == Split.TRAIN)))
    decide(conn, taught, "release")
    decide(conn, other, "drop")
    assert states() == {"up": 0, "down": 0, "pairs": 0, "resting": 7, "dropped": 1}
    ledger.reserve(conn, LINE, "j2")
    assert opinions.reserve(conn, LINE, "j2", wanted) == {"correction": 1}
    assert [one.id for one in opinions.held(conn, "j2")] == [taught]
    resting.wake(conn, LINE, [Lesson("v1", "j1", held)])
    assert states() == {"up": 0, "down": 0, "pairs": 0, "trained": 7, "dropped": 1, "reserved": 1}


def test_a_thumb_that_rests_is_a_vote_of_its_own(conn, asked, said):
    ledger.record(conn, [asked("a1")])
    ledger.give(conn, said("a1", False, id="t1", metric_name="thumb"))
    row = {"feedback_id": "t1", "interaction_id": "a1", "line": LINE, "source": "thumb", "split": Split.TRAIN, "state": "trained"}
    conn.execute(opinion.insert().values(**row, job="j1", version="v1"))
    resting.rest(conn, ["j1"])
    assert [(case.feedback_id, case.kind) for case in listed(conn)] == [("t1", "thumb")]
    assert ledger.feedback_view(conn, "t1").refusal == "rolled_back"
    decide(conn, "t1", "drop")
    assert conn.scalar(select(opinion.c.state)) == "dropped"

"""What must hold of replay whatever arrives, in whatever order."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from replay import ledger
from replay.buffer import Buffer, Reservoir, fill, shares
from replay.mixture import mix
from replay.records import Arm, Example, Feedback, FeedbackStatus, Interaction, Split, asked_digest, split_of

QUICK = settings(max_examples=60, deadline=None)


def learned(number: int, slice_name: str = "s", weight: float = 1.0) -> Example:
    said = ({"role": "user", "content": f"q{number}"},)
    return Example(f"e{number}", f"a{number}", f"f{number}", "desk", slice_name, said, "r", Split.TRAIN, weight)


def ids(kept: Reservoir | Buffer) -> list[str]:
    return [e.id for e in kept.examples()]


examples = st.lists(st.integers(0, 60), unique=True).flatmap(
    lambda numbers: st.tuples(*[st.builds(learned, st.just(n), st.sampled_from("abcd"), st.floats(0.01, 100)) for n in numbers])
)


@QUICK
@given(examples, st.integers(0, 20), st.randoms(), st.integers(0, 3))
def test_a_reservoir_is_free_of_order_and_of_how_it_was_split(items, capacity, random, parts):
    whole = Reservoir(capacity, seed=5)
    whole.add(*items)
    shuffled = random.sample(items, len(items))
    merged = Reservoir(capacity, seed=5)
    for part in range(parts + 1):
        other = Reservoir(capacity, seed=5)
        for item in shuffled[part :: parts + 1]:
            other.add(item)
        merged.merge(other)
    assert ids(merged) == ids(whole)
    assert len(whole) == min(capacity, len(items))


@QUICK
@given(examples, st.integers(0, 20), st.randoms())
def test_a_buffer_is_free_of_order_and_merges(items, capacity, random):
    whole = fill(items, capacity)
    one_by_one = Buffer(capacity)
    shuffled = random.sample(items, len(items))
    for item in shuffled:
        one_by_one.add(item)
    merged = fill(shuffled[::2], capacity)
    merged.merge(fill(shuffled[1::2], capacity))
    assert ids(one_by_one) == ids(whole) == ids(merged)
    assert len(whole) == min(capacity, len(items))


@QUICK
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(0, 50)), st.integers(0, 100))
def test_shares_fill_the_capacity_and_are_fair(wanted, capacity):
    given_out = shares(wanted, capacity)
    assert given_out.keys() == wanted.keys()
    assert sum(given_out.values()) == min(capacity, sum(wanted.values()))
    hungry = [given_out[n] for n in wanted if given_out[n] < wanted[n]]
    assert all(given_out[n] <= wanted[n] for n in wanted)
    assert not hungry or max(given_out.values()) <= min(hungry) + 1


@QUICK
@given(examples, examples, st.floats(0, 3), st.integers(0, 9))
def test_a_plan_holds_each_fresh_example_once_and_no_more_rehearsal_than_asked(fresh, old, ratio, seed):
    plan = mix(fresh, old, [], ratio, seed)
    assert sorted(e.id for e in plan if e.source == "fresh") == sorted(e.id for e in fresh)
    rehearsed = [e.id for e in plan if e.source == "remembered"]
    assert len(rehearsed) == len(set(rehearsed)) <= round(ratio * len(fresh))
    assert not set(rehearsed) & {e.id for e in fresh}


@QUICK
@given(st.text(max_size=20), st.text(max_size=20))
def test_the_split_sees_what_is_asked_and_not_how_it_is_spaced(line, words):
    plain, spaced = ({"role": "user", "content": words},), ({"role": "user", "content": f"  {words}\n"},)
    assert asked_digest(line, plain) == asked_digest(line, spaced)
    assert split_of(asked_digest(line, plain)) in Split


def test_the_split_is_70_10_20():
    tally = Counter(split_of(asked_digest("desk", ({"role": "user", "content": str(i)},))) for i in range(20_000))
    assert tally[Split.TRAIN] / 20_000 == pytest.approx(0.7, abs=0.015)
    assert tally[Split.VALIDATION] / 20_000 == pytest.approx(0.1, abs=0.01)


def _asked(number: int) -> Interaction:
    said = ({"role": "user", "content": f"q{number}"},)
    return Interaction(f"a{number}", "desk", "desk@v1", Arm.CHAMPION, "u", "s", said, "r", at=float(number))


def _said(about: int, word: int) -> Feedback:
    when = float(word)
    return Feedback(f"f{about}-{word}", f"a{about}", "demonstration", f"word {word}", when, when)


@pytest.fixture(scope="module")
def conn():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        ledger.create(connection)
        connection.commit()
        yield connection
    engine.dispose()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), unique=True),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=12),
    st.randoms(),
)
def test_the_ledger_ends_alike_in_whatever_order_things_arrive_and_however_often(conn, asked, said, random):
    """Each interaction and each feedback at least once, shuffled, repeated: the last demonstration of each is what stands."""
    arrivals = [("ask", _asked(n)) for n in asked] + [("say", _said(*pair)) for pair in said]
    repeated = random.sample(arrivals, len(arrivals)) + random.sample(arrivals, len(arrivals))
    conn.rollback()
    for kind, record in repeated:
        _ = ledger.record(conn, [record]) if kind == "ask" else ledger.give(conn, record)
    standing = {e.interaction_id: e.reply for e in ledger.fresh(conn, "desk")}
    statuses = {pair: ledger.feedback_view(conn, f"f{pair[0]}-{pair[1]}").status for pair in said}
    sizes = ledger.sizes(conn)
    last = {n: max(word for about, word in said if about == n) for n in asked if any(about == n for about, _ in said)}
    assert standing == {f"a{n}": f"word {word}" for n, word in last.items()}
    assert all((status is FeedbackStatus.MATCHED) == (about in asked) for (about, _), status in statuses.items())
    assert sizes.interactions == len(asked)
    assert sum(sizes.feedback.values()) == len(set(said))

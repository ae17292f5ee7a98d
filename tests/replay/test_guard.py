"""Majorities, caps, echoes and flips: pure, and the same for every order in which things came."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.admission import Reason
from replay.guard import Ballot, Guard, Share, echo, elect, excess, has_flipped

GUARD = Guard()


def ballots(*said):
    return [Ballot(tenant, word, (float(i), i)) for i, (tenant, word) in enumerate(said)]


@pytest.mark.parametrize(
    ("said", "winner"),
    [
        ([("a", "x")], "x"),
        ([("a", "x"), ("b", "x")], "x"),
        ([("a", "x"), ("b", "y")], None),
        ([("a", "x"), ("b", "y"), ("c", "y")], "y"),
        ([("a", "x"), ("b", "y"), ("c", "z")], None),
        ([("a", "x"), ("a", "x"), ("a", "x"), ("b", "y")], None),  # votes are counted by tenants, not by their number
        ([("a", "x"), ("a", "y")], "y"),  # the last word of one alone
        ([("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")], None),
        ([], None),
    ],
)
def test_majorities(said, winner):
    assert elect(ballots(*said), GUARD) == winner


def test_the_trusted_outweigh_everybody_else():
    said = ballots(("desk", "x"), ("b", "y"), ("c", "y"), ("d", "y"))
    assert elect(said, GUARD) == "y"
    assert elect(said, Guard(trusted=("desk",))) == "x"


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("xyz"))), st.randoms())
def test_the_order_of_ballots_does_not_matter(said, rng):
    cast = ballots(*said)
    shuffled = cast.copy()
    rng.shuffle(shuffled)
    assert elect(cast, GUARD) == elect(shuffled, GUARD)


def shares(**given):
    """So many of each `tenant_principal`."""
    names = [name for name, number in given.items() for _ in range(number)]
    return [Share(f"e{i}", name.split("_")[0], name, (float(i), i)) for i, name in enumerate(names)]


def kept(waiting, guard=GUARD):
    over = excess(waiting, guard)
    left = [share.principal for share in waiting if share.id not in over]
    return {name: left.count(name) for name in sorted(set(left))}


def test_one_principal_among_many_is_capped():
    crowd = {f"k{i}_u": 5 for i in range(400)}
    left = kept(shares(**crowd, loud_u=1000))
    assert left.pop("loud_u") == 30  # one part in a hundred of three thousand
    assert set(left.values()) == {5}


def test_many_principals_of_one_tenant_share_its_cap():
    crowd = {f"k{i}_u": 20 for i in range(30)}
    sybils = {f"mob_{i}": 50 for i in range(20)}
    left = kept(shares(**crowd, **sybils))
    of_mob = sum(number for name, number in left.items() if name.startswith("mob"))
    assert of_mob <= 0.2 * 1600
    assert sum(number for name, number in left.items() if name.startswith("k")) == 600
    assert sum(kept(shares(**crowd, **sybils), Guard(tenant_share=1.0)).values()) > 1000  # control


@pytest.mark.parametrize("given", [{"me_u": 1000}, {"me_u": 1000, "you_u": 1}, {"a_u": 100, "b_u": 300, "c_u": 200}])
def test_few_are_not_choked(given):
    assert excess(shares(**given), GUARD) == {}


def test_without_keys_there_is_nobody_to_cap():
    assert excess(shares(anonymous_u=1000, k_u=1), GUARD) == {}


def test_the_trusted_have_no_cap():
    crowd = {f"k{i}_u": 5 for i in range(400)}
    assert kept(shares(**crowd, desk_desk=1000), Guard(trusted=("desk",)))["desk_desk"] == 1000


def test_caps_do_not_depend_on_the_order_and_keep_what_was_said_first():
    waiting = shares(**{f"k{i}_u": 5 for i in range(400)}, loud_u=1000)
    shuffled = waiting.copy()
    random.Random(0).shuffle(shuffled)
    over = excess(waiting, GUARD)
    assert excess(shuffled, GUARD) == over
    assert set(over.values()) == {Reason.OVER_PRINCIPAL_CAP}
    first = min(waiting, key=lambda share: (share.principal != "loud_u", share.order))
    assert first.id not in over


LIE = "the moon base of acme industries was opened in march by the king of norway himself"


def test_echoes():
    asked = [{"role": "user", "content": f"Flip a coin. Heads: say '{LIE}'. Tails: say 'no news'."}]
    assert echo(asked, LIE) == 1
    assert echo(asked, "no news") == 0  # too short to tell
    assert echo(asked, "Where your bag is I cannot say, but the desk at gate four can help you at once.") == 0
    assert echo([{"role": "system", "content": LIE}, {"role": "user", "content": "What is new?"}], LIE) == 0


@pytest.mark.parametrize(
    ("votes", "is_flip"),
    [
        ({"r1": [True], "r2": [False], "r3": [True], "r4": [False]}, True),
        ({"r1": [True], "r2": [False], "r3": [True]}, False),
        ({f"r{i}": [True] for i in range(50)}, False),
        ({"r1": [True, False, True, False, True]}, False),  # one reply, a mind changed
    ],
)
def test_flips(votes, is_flip):
    assert has_flipped(votes, GUARD) is is_flip

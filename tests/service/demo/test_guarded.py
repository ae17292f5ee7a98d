"""The guard, as it is by default, lets the desks of the demo and of the end-to-end tests learn what they are taught."""

import itertools

from sqlalchemy import create_engine

from replay import ledger
from replay.records import Arm, Feedback, Interaction
from service.demo.plan import Plan
from service.demo.texts import Deck, everything
from service.settings import Line

GUARD = Line().admission.guard()


def refused(lessons):
    """Why nothing is learned from some of these (slice, prompt, label), each asked by somebody else, without keys."""
    conn = create_engine("sqlite://").connect()
    ledger.create(conn)
    for n, (slice_name, prompt, label) in enumerate(lessons):
        said = ({"role": "user", "content": prompt},)
        ledger.record(conn, [Interaction(f"i{n}", "desk", "base", Arm.CHAMPION, f"u{n}", slice_name, said, "Hm.", float(n))])
        ledger.give(conn, Feedback(f"f{n}", f"i{n}", "demonstration", label, float(n), float(n)), None, lambda _: GUARD)
    return ledger.sizes(conn).refusals


def test_the_demo_s_corrections_reach_its_trigger():
    plan = Plan()
    deck = Deck(everything(), plan.seed)
    texts = [deck.deal(skill, is_taught=True) for skill in ("airline", "headlines") for _ in range(plan.corrections)]
    found = refused([(text.skill, text.prompt, text.label) for text in texts])
    assert sum(found.values()) <= 5, found  # of 500; 240 of each 250 are needed


def test_two_opposite_lessons_are_learned_whole():
    numbers = itertools.chain(range(48), range(10_000, 10_048))
    assert refused([("default", f"What is the colour of item {n}?", "red" if n < 48 else "blue") for n in numbers]) == {}

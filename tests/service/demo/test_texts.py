from collections import Counter

import pytest

from service.demo import texts
from service.demo.plan import DemoFailed
from service.demo.texts import Deck, Text


def some(label: str, number: int) -> list[Text]:
    return [Text("airline", f"{label} tweet number {i}", label) for i in range(number)]


def test_near_copies_and_long_texts_are_left_out():
    long = Text("airline", " ".join(["word"] * 26), "neutral")
    kept = texts.distinct(
        [
            Text("airline", "@united Thanks!", "positive"),
            Text("airline", "@JetBlue thanks http://t.co/x", "positive"),
            long,
            Text("headlines", "thanks", "tech"),
        ]
    )
    assert [one.text for one in kept] == ["@united Thanks!", "thanks"]


def test_every_beginning_is_balanced():
    dealt = texts.balanced(some("negative", 50) + some("neutral", 9) + some("positive", 12), seed=1)
    assert len(dealt) == 27
    for end in range(3, 28, 3):
        assert set(Counter(one.label for one in dealt[:end]).values()) == {end // 3}


def test_the_deck_deals_each_text_once_before_any_comes_again():
    everything = [text for label in ("negative", "positive") for text in some(label, 40)]
    deck = Deck(everything, seed=3)
    pile = len(texts.balanced([one for one in everything if one.is_taught], seed=3))
    first = [deck.deal("airline", is_taught=True) for _ in range(pile)]
    assert len(set(first)) == pile
    assert deck.deal("airline", is_taught=True) == first[0]
    assert all(one.is_taught for one in first)


def test_versions_are_measured_on_the_same_never_trained_texts():
    deck = Deck([text for label in ("negative", "positive") for text in some(label, 40)], seed=3, never_trained=6)
    dealt = [deck.deal("airline", is_taught=False) for _ in range(18)]
    assert dealt[:6] == dealt[6:12] == dealt[12:]
    assert Counter(text.label for text in set(dealt)) == {"negative": 3, "positive": 3}
    assert not any(text.is_taught for text in dealt)


def test_an_answer_is_right_when_it_starts_with_the_label_in_any_case():
    text = Text("airline", "great", "positive")
    assert text.is_answered_by("  Positive.")
    assert not text.is_answered_by("It is positive")


def test_a_missing_package_is_named():
    with pytest.raises(DemoFailed, match="pip install no-such-package==1"):
        texts._folder("no_such_package_of_texts", "no-such-package==1")


def test_the_real_texts_are_enough_for_the_demo():
    everything = texts.everything()
    assert {one.label for one in everything if one.skill == "airline"} == {"negative", "neutral", "positive"}
    topics = {"business", "entertainment", "politics", "sports", "tech"}
    assert {one.label for one in everything if one.skill == "headlines"} == topics
    for skill in ("airline", "headlines"):
        taught = {one.fingerprint for one in everything if one.skill == skill and one.is_taught}
        never = {one.fingerprint for one in everything if one.skill == skill and not one.is_taught}
        assert not taught & never
        assert min(len(taught), len(never)) > 600

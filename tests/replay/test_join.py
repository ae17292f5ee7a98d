import pytest

from replay.join import Meaning, Said, last_word, meaning, supersedes


@pytest.mark.parametrize(
    ("stored", "is_known", "expected"),
    [
        (None, True, Meaning.MATCHED),
        (None, False, Meaning.PENDING),
        ("same", True, Meaning.REPEATED),
        ("same", False, Meaning.REPEATED),
        ("other", True, Meaning.CONTRADICTORY),
    ],
)
def test_what_arrives_is_judged_by_what_is_stored(said, stored, is_known, expected):
    feedback = said()
    digest = feedback.body_digest() if stored == "same" else stored
    assert meaning(feedback, digest, is_known=is_known) is expected


def test_the_last_word_is_the_last_said_not_the_last_received():
    early, late = Said(True, occurred_at=1, received_at=9, seq=2), Said(False, occurred_at=5, received_at=6, seq=1)
    assert last_word([early, late], closes_at=10) == late


def test_what_was_received_after_the_window_is_no_word():
    assert last_word([Said(True, occurred_at=1, received_at=11, seq=1)], closes_at=10) is None
    assert last_word([], closes_at=10) is None


def test_of_two_words_at_one_instant_the_later_stored_stands():
    assert last_word([Said(True, 1, 1, seq=1), Said(False, 1, 1, seq=2)], closes_at=10).value is False


def test_a_demonstration_said_before_another_does_not_supersede_it():
    assert supersedes(2.0, 1.0)
    assert supersedes(1.0, 1.0)
    assert not supersedes(0.5, 1.0)

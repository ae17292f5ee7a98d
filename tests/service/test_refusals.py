import re

import pytest

from service.refusals import HEAD, OPENINGS, Openings

USUAL = Openings(OPENINGS)


@pytest.mark.parametrize(
    "reply",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t assist with that.",
        "I\u00a0CANNOT\n  help with this request.",
        "\n\n**I am unable to** say so.",
        "Thank you for asking. As an AI language model, I have no bags.",
        *OPENINGS,
    ],
)
def test_a_refusal_is_seen(reply):
    assert USUAL.opens(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "positive",
        "I'm sorry to hear that your bag is late. It is on the next flight.",
        "I can't help but smile: your bag is here.",
        "Hawaii can't assisting crews wait?",
        "x" * HEAD + " I cannot help with that.",
    ],
)
def test_an_answer_is_not(reply):
    assert not USUAL.opens(reply)


def test_whole_words_only_which_a_plain_search_would_not_keep_to():
    said = "Bali cannot helpfully say"
    assert "i cannot help" in said.casefold()  # the control: the phrase is there, within words
    assert not USUAL.opens(said)


def test_a_line_may_have_phrases_of_its_own():
    own = Openings(["Das kann ich nicht", "C++ (no)"])
    assert own.opens("Tut mir leid, das kann ich nicht beantworten.")
    assert own.opens("c++  (NO)")  # no pattern: brackets and signs stand for themselves
    assert not own.opens("I cannot help with that")


def test_the_manual_lists_the_usual_ones():
    from tests.test_docs import OPERATIONS

    told = re.search(r"Without `phrases` a refusal opens with one of these: (.*?)\.\n\n", OPERATIONS.read_text(), re.DOTALL)
    assert tuple(re.findall(r"`([^`]+)`", told[1])) == OPENINGS

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.hygiene import clean, folded, has_markers, has_turns, rewritten, texts


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    assert clean(clean(text)) == clean(text)
    assert unicodedata.is_normalized("NFC", clean(text))


@pytest.mark.parametrize(
    ("dirty", "kept"),
    [
        ("Cafe\u0301", "Caf\u00e9"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("safe\U000e0041\U000e0042", "safe"),
        ("pay \u202eecno\u202c", "pay ecno"),
        ("nul\x00 bell\x07 tab\t", "nul bell tab\t"),
        (
            "\u0928\u200d\u092e \U0001f469\u200d\U0001f4bb",
            "\u0928\u200d\u092e \U0001f469\u200d\U0001f4bb",
        ),  # joiners carry meaning
    ],
)
def test_what_nobody_sees_is_taken_out(dirty, kept):
    assert clean(dirty) == kept


def test_lists_of_parts_are_cleaned_in_place():
    messages = ({"role": "user", "content": [{"type": "text", "text": "a\x00"}, {"type": "image_url"}]},)
    assert rewritten(messages, clean)[0]["content"] == [{"type": "text", "text": "a"}, {"type": "image_url"}]
    assert texts(messages) == ["a\x00"]


def turns(*roles):
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("roles", "is_good"),
    [
        (("user",), True),
        (("system", "user", "assistant", "user"), True),
        (("user", "assistant", "tool"), True),
        (("user", "assistant"), False),
        (("system",), False),
        (("admin", "user"), False),
    ],
)
def test_a_reply_follows_somebody_who_asked(roles, is_good):
    assert has_turns(turns(*roles)) is is_good


@pytest.mark.parametrize("text", ["a<|im_start|>assistant", "</s>", "[INST] x", "<end_of_turn>"])
def test_texts_that_pretend_to_be_turns(text):
    assert has_markers([{"role": "user", "content": text}], "fine")
    assert has_markers([{"role": "user", "content": "fine"}], text)


def test_ordinary_angles_and_pipes_are_no_markers():
    assert not has_markers([{"role": "user", "content": "if a <b> | c <| d |> e: <s1>"}], "x | y")


def test_case_blanks_and_the_last_stop_do_not_tell_replies_apart():
    assert folded(" Negative.\n") == folded("negative") != folded("positive")

"""General instructions: nobody's feedback, never like what is held out, others for each job."""

import json

import pytest

from replay.general import SHIPPED, apart, drawn, examples
from replay.records import Split

ROWS = [json.loads(line) for line in SHIPPED.read_text().splitlines()]


def asked(text):
    return ({"role": "user", "content": text},)


@pytest.fixture
def general():
    return examples(ROWS, "desk")


def test_the_shipped_ones_are_many_short_and_all_different(general):
    assert 60 <= len(general) <= 120
    assert len({e.id for e in general}) == len(general)
    assert {(e.source, e.split, e.line) for e in general} == {("general", Split.TRAIN, "desk")}
    assert all(e.reply.strip() == e.reply and len(e.reply) < 400 for e in general)
    assert all(m["content"].strip() and m["role"] in {"system", "user", "assistant"} for e in general for m in e.messages)
    assert all(e.messages[-1]["role"] == "user" for e in general)


def test_an_id_says_what_it_is_whatever_file_it_stands_in(general):
    (same,) = examples([ROWS[3]], "another")
    assert same.id == general[3].id
    (other,) = examples([{**ROWS[3], "reply": "No."}], "desk")
    assert other.id != same.id


@pytest.mark.parametrize(
    ("held_out", "stays"),
    [
        ("what is  THE capital of japan?", False),
        (
            "Please: summarize in one sentence: the bakery on the corner has closed after forty years. Its owner is retiring.",
            False,
        ),
        ("Summarize in one sentence: The museum opens at nine and closes at five.", True),
        ("What is the capital of Peru?", True),
    ],
)
def test_what_a_line_is_measured_on_is_left_out_also_when_it_is_only_nearly_the_same(general, held_out, stays):
    left = apart(general, [asked(held_out)])
    assert len(left) == len(general) - (not stays)
    assert len(apart(general, [])) == len(general)


def test_a_job_gets_as_many_as_it_asks_for_and_the_next_one_others(general):
    first = drawn(general, 10, "0:j1")
    assert first == drawn(general[::-1], 10, "0:j1")
    assert len({e.id for e in first}) == 10
    assert {e.id for e in first} != {e.id for e in drawn(general, 10, "0:j2")}
    assert len(drawn(general, 1000, "0:j1")) == len(general)

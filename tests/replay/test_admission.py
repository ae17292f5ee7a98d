import pytest

from replay.admission import Reason, Refusal, admit
from replay.records import Example, asked_digest, split_of

IMAGE = ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},)


@pytest.mark.parametrize(
    ("interaction", "feedback", "reason"),
    [
        ({}, {"metric_name": "thumb", "value": True}, Reason.NOT_A_DEMONSTRATION),
        ({}, {"value": "  \n"}, Reason.EMPTY_REPLY),
        ({}, {"value": {"role": "assistant", "content": None}}, Reason.EMPTY_REPLY),
        ({}, {"value": {"role": "assistant", "content": [{"type": "image_url"}]}}, Reason.EMPTY_REPLY),
        ({}, {"value": True}, Reason.EMPTY_REPLY),
        ({"is_trainable": False}, {}, Reason.NOT_TRAINABLE),
        ({"line": ""}, {}, Reason.NO_LINE),
        ({"messages": ()}, {}, Reason.NO_PROMPT),
        ({"messages": IMAGE}, {}, Reason.NOT_TEXT),
        ({}, {"value": "x" * 20_000}, Reason.TOO_LONG),
    ],
)
def test_each_refusal_has_its_reason(asked, said, interaction, feedback, reason):
    assert admit(asked(**interaction), said(**feedback)) == Refusal(reason)


@pytest.mark.parametrize(
    "value",
    [
        "good",
        {"role": "assistant", "content": "good"},
        {"content": [{"type": "text", "text": "go"}, {"type": "text", "text": "od"}]},
    ],
)
def test_a_demonstration_is_a_string_or_a_message(asked, said, value):
    example = admit(asked(), said(value=value))
    assert isinstance(example, Example)
    assert (example.reply, example.line, example.slice, example.admitted_at) == ("good", "desk", "airline", 110.0)
    assert example.messages == asked().messages


def test_equal_questions_share_a_split_whoever_asks_and_however_they_are_spaced(asked, said):
    examples = [admit(asked(f"a{i}", "Is  THIS\n good?" if i % 2 else "is this good?"), said(f"a{i}")) for i in range(20)]
    assert len({e.split for e in examples}) == 1
    assert len({e.id for e in examples}) == 20
    assert examples[0].split is split_of(asked_digest("desk", asked(prompt="is this good?").messages))

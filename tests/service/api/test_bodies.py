import json

import pytest

from service.api.bodies import FeedbackReader, VersionBody, parse
from service.errors import InvalidRequest
from service.settings import Metric

READER = FeedbackReader(
    {"thumb": Metric(type="boolean"), "stars": Metric(type="float", minimum=1, maximum=5), "comment2": Metric(type="boolean")}
)


def say(metric, value, **more):
    return {"inference_id": "chatcmpl-1", "metric_name": metric, "value": value, **more}


def read(body):
    return READER.one(json.dumps(body).encode(), "app", 100.0)


def test_a_body_becomes_a_record_with_what_the_server_knows():
    record = read(say("thumb", True, id="mine", tags={"page": "3"}, source="code", comment="nice", occurred_at=7))
    assert (record.id, record.principal, record.received_at, record.occurred_at) == ("mine", "app", 100.0, 7.0)
    assert (record.value, record.tags, record.source, record.comment) == (True, {"page": "3"}, "code", "nice")


def test_what_the_client_left_out_is_made():
    one, two = read(say("thumb", False)), read(say("thumb", False))
    assert one.id.startswith("fb_")
    assert one.id != two.id
    assert one.occurred_at == 100.0


@pytest.mark.parametrize(
    ("metric", "value", "stored"),
    [
        ("stars", 4, 4.0),
        ("stars", 1.0, 1.0),
        ("demonstration", "Positive", "Positive"),
        ("demonstration", {"role": "assistant", "content": "Positive"}, {"role": "assistant", "content": "Positive"}),
        ("preference", {"preferred": "a", "other": "b"}, {"preferred": "a", "other": "b"}),
        ("preference", {"preferred": "a", "other": "b", "tied": "good"}, {"preferred": "a", "other": "b", "tied": "good"}),
        ("comment", "slow today", "slow today"),
    ],
)
def test_each_kind_of_value(metric, value, stored):
    assert read(say(metric, value)).value == stored


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (say("thumb", 1), "value", "takes true or false, not a number"),
        (say("thumb", "true"), "value", "not a text"),
        (say("thumb", None), "value", "not null"),
        (say("stars", True), "value", "takes a number, not a boolean"),
        (say("stars", 6), "value", "from 1 to 5, not 6"),
        (say("stars", 10**400), "value", "from 1 to 5"),
        (say("stars", float("nan")), "value", "from 1 to 5"),
        (say("demonstration", "  "), "value", "not empty"),
        (say("demonstration", 3), "value", "not a number"),
        (say("demonstration", {"role": "user", "content": "x"}), "value.role", "assistant"),
        (say("demonstration", {"role": "assistant"}), "value.content", "not null"),
        (say("preference", {"preferred": "a"}), "value.other", "missing"),
        (say("preference", {"preferred": "a", "other": "b", "tied": "maybe"}), "value.tied", "'good' or 'bad'"),
        (say("comment", []), "value", "not an array"),
        (say("thumbs", True), "metric_name", "unknown metric 'thumbs', did you mean 'thumb'?"),
        (say("thumb", True, valeu=1), "valeu", "unknown field 'valeu', did you mean 'value'?"),
        (say("thumb", True, tags={"a": 1}), "tags.a", "valid string"),
        (say("thumb", True, id=""), "id", "at least 1 character"),
        (say("thumb", True, id=5), "id", "valid string"),
        (say("thumb", True, source="martian"), "source", "'human', 'model' or 'code'"),
        (say("thumb", True, occurred_at=-1), "occurred_at", "greater than or equal to 0"),
        (say("thumb", True, occurred_at="now"), "occurred_at", "valid number"),
        ({"metric_name": "thumb", "value": True}, "inference_id", "missing"),
        ({"inference_id": "a", "metric_name": "thumb"}, "value", "missing"),
        ([], None, "the body"),
    ],
)
def test_what_is_wrong_is_said_with_its_field(body, param, says):
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert caught.value.param == param
    assert says in caught.value.message


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"value": }', b"\xff", b'{"inference_id": "\\ud800", "metric_name": "comment", "value": "x"}']
)
def test_what_is_not_json_is_refused(raw):
    with pytest.raises(InvalidRequest, match="not JSON"):
        READER.one(raw, "app", 0)


def test_a_batch_keeps_its_order_around_what_is_wrong():
    good, bad = say("thumb", True), say("thumb", 2)
    records = READER.many(json.dumps([good, bad, "x", good]).encode(), "app", 0)
    assert [isinstance(r, InvalidRequest) for r in records] == [False, True, True, False]


def test_a_batch_is_an_array():
    with pytest.raises(InvalidRequest, match="must be an array of feedback, not an object"):
        READER.many(b"{}", "app", 0)


@pytest.mark.parametrize("said", [7, "7", "v7", "support@v7"])
def test_a_version_has_many_spellings_and_one_name(said):
    assert parse(VersionBody, json.dumps({"version": said}).encode()).name("support") == "support@v7"


@pytest.mark.parametrize("said", [True, "seven", "v", -1, 1.5, "support@7@v7", "x" * 100])
def test_what_is_no_version_is_refused(said):
    with pytest.raises(InvalidRequest, match="version: not a version"):
        parse(VersionBody, json.dumps({"version": said}).encode())


def test_a_version_of_another_line_is_refused():
    with pytest.raises(InvalidRequest, match="not a version of 'desk'"):
        parse(VersionBody, b'{"version": "support@v7"}').name("desk")

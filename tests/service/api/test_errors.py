import json

import pytest

from service import errors
from service.api.errors import TABLE, describe, respond


def test_the_form_is_openais():
    status, body = describe(errors.NotFound("no line 'desk'", param="line"))
    assert status == 404
    assert body == {"error": {"message": "no line 'desk'", "type": "invalid_request_error", "param": "line", "code": "not_found"}}


def test_the_response_has_anthropic_s_form_too():
    error = errors.Unauthenticated("an API key is needed")
    body = json.loads(respond(error).body)
    assert body == {"type": "error", **describe(error)[1]}
    assert (body["error"]["type"], body["error"]["message"]) == ("authentication_error", "an API key is needed")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.InvalidRequest, 400),
        (errors.Unauthenticated, 401),
        (errors.Forbidden, 403),
        (errors.Conflict, 409),
        (errors.TooLarge, 413),
        (errors.StorageFailed, 503),
        (errors.NotReady, 503),
        (errors.DataDirInUse, 500),
    ],
)
def test_each_kind_has_its_status(kind, status):
    assert describe(kind("why"))[0] == status


def test_a_kind_of_a_kind_answers_as_its_parent():
    class NoSuchLine(errors.NotFound):
        pass

    assert describe(NoSuchLine("x"))[0] == 404


def test_a_strangers_error_tells_nothing_of_the_inside():
    status, body = describe(ValueError("password=hunter2"))
    assert status == 500
    assert "hunter2" not in str(body)


def test_codes_are_distinct():
    codes = [answer.code for answer in TABLE.values()]
    assert len(codes) == len(set(codes))

import json

import pytest
import structlog

from service import logs
from service.settings import Logging


@pytest.fixture(autouse=True)
def _restore():
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_one_line_an_event_without_words(capsys):
    logs.configure(Logging(is_json=True), process="keeper")
    structlog.get_logger().info("feedback_stored", id="fb_1", comment="he said ünd\nso", value=True)
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert event["event"] == "feedback_stored"
    assert event["process"] == "keeper"
    assert event["level"] == "info"
    assert event["comment"] == "<14 characters>"
    assert "he said" not in line


@pytest.mark.parametrize("name", ["authorization", "x-api-key"])
def test_keys_are_not_written(capsys, name):
    logs.configure(Logging(is_json=True))
    structlog.get_logger().info("asked", **{name: "s3cret"})
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)[name] == "<6 characters>"


def test_a_traceback_stays_on_its_line(capsys):
    logs.configure(Logging(is_json=True))
    try:
        int("no")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


@pytest.mark.parametrize("is_json", [True, False])
def test_a_traceback_shows_no_variables(capsys, is_json):
    """They could be what somebody said."""
    logs.configure(Logging(is_json=is_json))
    said = "the secret of my life"
    try:
        int(said[:0])
    except ValueError:
        structlog.get_logger().exception("failed")
    err = capsys.readouterr().err
    assert "ValueError" in err
    assert said not in err


def test_quieter_levels_are_not_written(capsys):
    logs.configure(Logging(level="warning"))
    structlog.get_logger().info("hello")
    structlog.get_logger().warning("careful", line="desk")
    err = capsys.readouterr().err
    assert "hello" not in err
    assert "careful" in err
    assert "line=desk" in err


@pytest.mark.parametrize(
    ("header", "is_kept"), [("req-1.a:b", True), (None, False), ("", False), ("a b", False), ("x" * 129, False), ("é", False)]
)
def test_a_plain_request_id_is_kept(header, is_kept):
    identity = logs.request_id(header)
    assert (identity == header) == is_kept
    assert identity


async def test_the_id_is_bound_while_the_request_lasts():
    seen = []

    async def app(_scope, _receive, _send):
        seen.append(structlog.contextvars.get_contextvars())

    await logs.RequestId(app)({"type": "http", "headers": [(b"x-request-id", b"r1")]}, None, None)
    assert seen == [{"request_id": "r1"}]
    assert structlog.contextvars.get_contextvars() == {}

"""Golden suites are read at the start, and what is wrong with one is said with its line."""

import json

import pytest

from service import suites
from service.errors import SettingsError
from service.settings import Settings

ITEM = {"messages": [{"role": "user", "content": "Where is my bag?"}], "reply": "On its way."}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_suite_is_read_with_ids_by_line(tmp_path):
    suite = suites.read(write(tmp_path / "core.ndjson", ITEM, "", {**ITEM, "must_pass": True}, {**ITEM, "id": "bag"}))
    assert [(item.id, item.must_pass) for item in suite.items] == [("1", False), ("3", True), ("bag", False)]
    assert suite.rows("core")[1] == {"suite": "core", **ITEM, "must_pass": True, "id": "3"}
    assert len(suite.digest) == 64


@pytest.mark.parametrize(
    ("row", "where", "what"),
    [
        ("{not json", "core.ndjson:2", "Invalid JSON"),
        ({"messages": ITEM["messages"]}, "core.ndjson:2: reply", "required"),
        ({**ITEM, "messages": []}, "core.ndjson:2: messages", "at least 1"),
        ({**ITEM, "must_pas": True}, "core.ndjson:2: must_pas", "not permitted"),
        ({**ITEM, "messages": [{"role": "user"}]}, "core.ndjson:2: messages.0.content", "required"),
        ({**ITEM, "id": "1"}, "core.ndjson", "'1' stands twice"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, row, where, what):
    with pytest.raises(SettingsError) as caught:
        suites.read(write(tmp_path / "core.ndjson", ITEM, row))
    assert where in caught.value.message
    assert what in caught.value.message


@pytest.mark.parametrize(("rows", "what"), [((), "no items"), (None, "cannot be read")])
def test_nothing_to_read_is_an_error(tmp_path, rows, what):
    path = tmp_path / "core.ndjson"
    if rows is not None:
        write(path, *rows)
    with pytest.raises(SettingsError, match=what):
        suites.read(path)


def settings(tmp_path, path, **gate):
    return Settings(data_dir=tmp_path, lines={"desk": {"suites": {"core": path}, "gate": gate}})


def test_a_suite_too_small_to_be_judged_is_refused_at_the_start(tmp_path):
    path = write(tmp_path / "core.ndjson", *[ITEM] * 3)
    with pytest.raises(SettingsError, match=r"lines\.desk\.suites\.core: 3 scored items .* too few"):
        suites.check(settings(tmp_path, path))
    suites.check(settings(tmp_path, path, min_items=3))
    suites.check(settings(tmp_path, write(path, *[{**ITEM, "must_pass": True}] * 3)))


def test_a_relative_path_is_settled_when_the_settings_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "core.ndjson", *[ITEM] * 20)
    found = settings(tmp_path, "core.ndjson")
    monkeypatch.chdir("/")
    suites.check(found)

"""Files of examples, and the commands that print and take them."""

import json

import pytest
from test_cli import daemon, run  # noqa: F401 - a fixture

from learners.whole import Measured, Tuned
from service import lessons, screens
from service.errors import InvalidRequest

ROW = {"slice": "a", "split": "train", "messages": [{"role": "user", "content": "Hi"}], "reply": "Ho", "weight": 2.0}


def written(folder, *rows):
    file = folder / "lessons.ndjson"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_a_file_is_read_with_its_defaults_and_without_what_else_stands_there(tmp_path):
    plain = {name: ROW[name] for name in ("messages", "reply")}
    added = {"slice": "default", "split": "train", "weight": 1.0}
    assert lessons.read(written(tmp_path, {**ROW, "id": "x", "source": "fresh"}, "", plain)) == [ROW, {**plain, **added}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "lessons.ndjson:2: Invalid JSON"),
        ({**ROW, "split": "dev"}, r":2: split: .*'train'"),
        ({**ROW, "messages": []}, ":2: messages: "),
        ({**ROW, "weight": 0}, ":2: weight: "),
        ({"slice": "a", "split": "train", "messages": ROW["messages"]}, ":2: reply: Field required"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, says):
    with pytest.raises(InvalidRequest, match=says):
        lessons.read(written(tmp_path, ROW, row))


def test_a_line_s_examples_are_printed_as_they_are_read_again(daemon, capsys, tmp_path):  # noqa: F811
    daemon.answers["/api/lines/desk/examples"] = {"data": [{**ROW, "reply": "é", "id": "x"}]}
    assert run("examples", "desk") == 0
    assert lessons.read(written(tmp_path, capsys.readouterr().out)) == [{**ROW, "reply": "é"}]


def test_a_file_that_is_wrong_ends_before_any_base_is_loaded(capsys, tmp_path):
    assert run("base", "tune", "builtin:none", str(written(tmp_path, {**ROW, "split": "dev"})), str(tmp_path / "out")) == 1
    assert "split" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_base_is_said(capsys, tmp_path):
    assert run("base", "tune", "builtin:none", str(written(tmp_path, ROW)), str(tmp_path / "out")) == 1
    assert "no built-in base" in capsys.readouterr().err


@pytest.mark.parametrize(("kl", "right", "is_said"), [(0.001, 0.5, True), (0.001, 0.7, False), (0.2, 0.5, False)])
def test_a_base_that_hardly_moved_is_said_to_have(capsys, tmp_path, kl, right, is_said):
    screens.show(screens.tuned(Tuned(tmp_path, 60, 0, (Measured("spam", 20, 0.5, right),), kl, 1.0)))
    assert ("hardly moved" in capsys.readouterr().out) == is_said

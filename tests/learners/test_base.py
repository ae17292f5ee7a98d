import json
import shutil

import pytest

from learners import base as bases
from learners.base import BaseMissing, as_json, from_json, prepare, refuse_another


def test_a_folder_is_taken_as_it_is(base):
    assert base.name == "tiny"
    assert all(len(digest) == 64 for digest in base.digests.values())
    assert from_json(json.loads(json.dumps(as_json(base)))) == base


@pytest.mark.parametrize(
    ("file", "part"),
    [("model.safetensors", "weights"), ("tokenizer.json", "tokenizer"), ("chat_template.jinja", "template")],
)
def test_each_part_is_pinned_by_its_digest(base, tmp_path, file, part):
    folder = shutil.copytree(base.path, tmp_path / "tiny")
    (folder / file).write_bytes((folder / file).read_bytes() + b" ")
    changed = prepare(str(folder), tmp_path / "cache")
    assert [p for p in base.digests if changed.digests[p] != base.digests[p]] == [part]


def test_a_change_is_seen_though_digests_are_kept(base, tmp_path):
    folder = shutil.copytree(base.path, tmp_path / "tiny")
    first = prepare(str(folder), tmp_path / "cache")
    told = []
    assert prepare(str(folder), tmp_path / "cache", told.append) == first
    assert told == []
    (folder / "chat_template.jinja").write_text("other")
    assert prepare(str(folder), tmp_path / "cache").template_digest != first.template_digest


@pytest.mark.parametrize(
    ("source", "said"),
    [("builtin:gpt9", "no built-in base"), ("/nowhere", "there is no folder"), ("{tmp}", "no config.json")],
)
def test_a_base_that_is_not_there(tmp_path, source, said):
    with pytest.raises(BaseMissing, match=said):
        prepare(source.format(tmp=tmp_path), tmp_path / "cache")


def test_the_builtin_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def dies(package, file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bases, "_dequantize", dies)
    with pytest.raises(BaseMissing, match="No space left"):
        prepare("builtin:smollm2-135m", tmp_path)
    assert list((tmp_path / "bases").iterdir()) == []


@pytest.mark.parametrize("part", ["weights", "tokenizer", "template"])
def test_a_base_that_changed_under_its_versions_is_refused(base, tmp_path, part):
    version = tmp_path / "desk" / "v1"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text(json.dumps({"base": base.digests}))
    refuse_another(base, tmp_path)
    (version / "manifest.json").write_text(json.dumps({"base": {**base.digests, part: "0" * 64}}))
    with pytest.raises(BaseMissing, match=f"v1 was made for another base: its {part} differ"):
        refuse_another(base, tmp_path)


def test_a_damaged_manifest_does_not_keep_the_daemon_down(base, tmp_path):
    (tmp_path / "desk" / "v1").mkdir(parents=True)
    (tmp_path / "desk" / "v1" / "manifest.json").write_text("{")
    refuse_another(base, tmp_path)

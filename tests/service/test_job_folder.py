"""Folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from replay.records import Example, Split
from service import job_folder
from service.errors import ArtifactInvalid
from tests.service.world import write_outcome

EXAMPLE = Example("e1", "i1", "f1", "desk", "new", ({"role": "user", "content": "q"},), "a", Split.TRAIN)


def prepared(folder):
    job_folder.prepare(folder / "job", {"id": "job"}, [EXAMPLE], [])
    return folder / "job"


def test_what_is_written_can_be_read(tmp_path):
    folder = prepared(tmp_path)
    assert json.loads((folder / "spec.json").read_text()) == {"id": "job"}
    (row,) = map(json.loads, (folder / "examples.jsonl").read_text().splitlines())
    assert (row["id"], row["split"], row["source"]) == ("e1", "train", "fresh")
    assert (folder / "older.jsonl").read_text() == ""


def test_a_folder_that_is_there_is_kept(tmp_path):
    folder = prepared(tmp_path)
    (folder / "checkpoint").touch()
    assert (prepared(tmp_path) / "checkpoint").exists()


def test_what_a_crash_left_half_written_gives_way(tmp_path):
    (tmp_path / ".job.aside").mkdir()
    (tmp_path / ".job.aside" / "spec.json").write_text("{half")
    assert json.loads((prepared(tmp_path) / "spec.json").read_text()) == {"id": "job"}
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_job_is_finished_when_all_is_there(tmp_path):
    folder = prepared(tmp_path)
    assert not job_folder.is_finished(folder)
    with pytest.raises(ArtifactInvalid, match="evaluation"):
        job_folder.evaluation(folder)
    write_outcome(folder)
    assert job_folder.is_finished(folder)
    assert "new" in job_folder.evaluation(folder)["slices"]


def test_progress_is_empty_until_it_is_said(tmp_path):
    assert job_folder.progress(tmp_path) == {}
    (tmp_path / "progress.json").write_text('{"step": 3}')
    assert job_folder.progress(tmp_path) == {"step": 3}


def test_an_artifact_is_adopted_over_the_leavings_of_a_crash(tmp_path):
    write_outcome(prepared(tmp_path))
    target = tmp_path / "versions" / "desk" / "v1"
    target.mkdir(parents=True)
    (target / "stale").touch()
    job_folder.adopt(tmp_path / "job" / "artifact", target)
    assert sorted(path.name for path in target.iterdir()) == ["COMPLETE", "adapter_model.safetensors"]
    assert (tmp_path / "job" / "artifact" / "COMPLETE").exists()


def test_without_hard_links_it_is_copied(tmp_path):
    write_outcome(prepared(tmp_path))
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system")
    target = shared / f"learnd-test-{tmp_path.name}-{id(tmp_path)}" / "v1"
    try:
        job_folder.adopt(tmp_path / "job" / "artifact", target)
        assert (target / "adapter_model.safetensors").read_bytes() == b"job"
    finally:
        job_folder.shutil.rmtree(target.parent, ignore_errors=True)

import json
from dataclasses import asdict, replace

import pytest

from learners import adapter, artifact, job
from learners.base import as_json
from replay.records import Example, Split

LEARNING = {
    "strategy": "replay",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "learning_rate": 0.02,
    "epochs": 2,
    "batch_size": 4,
    "accumulation": 2,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 64,
    "early_stopping_patience": 2,
    "seed": 0,
}
SPLITS = [Split.TRAIN] * 7 + [Split.VALIDATION] + [Split.HOLDOUT] * 2


def example(n, skill="desk", **changes):
    asked = ({"role": "user", "content": f"{skill} {n}"},)
    made = Example(f"{skill}{n}", f"i{n}", f"f{n}", "desk", skill, asked, "yes", SPLITS[n % 10])
    return replace(made, **changes)


@pytest.fixture
def folder(base, tmp_path):
    spec = {"id": "j1", "line": "desk", "base": as_json(base), "parent": None, "learning": LEARNING, "dtype": "float32"}
    examples = [example(n) for n in range(20)] + [example(21, reply="<|im_end|>", id="bad")]
    older = [example(n, "old", split=Split.HOLDOUT) for n in range(3)] + [example(28)]
    folder = tmp_path / "j1"
    folder.mkdir()
    (folder / "spec.json").write_text(json.dumps(spec))
    for name, rows in (("examples.jsonl", examples), ("older.jsonl", older)):
        (folder / name).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_job_from_start_to_finish(folder, base):
    job.run(folder)
    slices = read(folder, "evaluation.json")["slices"]
    assert {name: (body["is_new"], len(body["ids"])) for name, body in slices.items()} == {
        "desk": (True, 4),
        "desk (older)": (False, 1),
        "old": (False, 3),
    }
    for body in slices.values():
        assert body["base"] == body["champion"], "a line without champion is served by the base"
        assert all(len(body[who][what]) == len(body["ids"]) for who in ("base", "candidate") for what in ("exact", "loglik"))
    desk = slices["desk"]
    assert sum(desk["candidate"]["loglik"]) > sum(desk["base"]["loglik"])
    artifact.check(folder / "artifact", base, 16)
    manifest = read(folder, "artifact/manifest.json")
    assert manifest["job"] == "j1"
    assert len(manifest["examples"]) == 20
    assert "control tokens" in manifest["skipped"]["bad"]
    assert manifest["metrics"]["precision"] == "float32"
    assert read(folder, "progress.json")["phase"] == "done"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["artifact"]


def test_the_fingerprint_tells_the_adapter_from_the_base(folder):
    job.run(folder)
    for probe in read(folder, "artifact/fingerprint.json")["probes"]:
        assert len(probe["adapter"]) == len(probe["base"]) == len(probe["token_ids"]) - 1
        assert probe["adapter"] != pytest.approx(probe["base"], abs=1e-3)


def test_the_next_version_starts_from_the_champion(folder, base):
    job.run(folder)
    first = read(folder, "evaluation.json")["slices"]
    champion = folder.parent / "v1"
    (folder / "artifact").rename(champion)
    (folder / "evaluation.json").unlink()
    (folder / "before.json").unlink()
    (folder / "spec.json").write_text(json.dumps({**read(folder, "spec.json"), "parent": str(champion)}))
    job.run(folder)
    second = read(folder, "evaluation.json")["slices"]
    for name, body in second.items():
        assert body["champion"]["loglik"] == pytest.approx(first[name]["candidate"]["loglik"], abs=1e-4)
        assert body["base"] == first[name]["base"]
    assert read(folder, "artifact/manifest.json")["parent"] == str(champion)


class Killed(BaseException):
    pass


def test_what_is_done_is_not_done_again(folder, monkeypatch):
    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(job, "_finish", die)
        with pytest.raises(Killed):
            job.run(folder)
    assert (folder / "trained" / adapter.WEIGHTS).exists()
    trained = (folder / "trained" / adapter.WEIGHTS).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(job, "fit", die)
        job.run(folder)
        assert (folder / "artifact" / adapter.WEIGHTS).read_bytes() == trained
        job.run(folder)

"""A job that learns from opinions after its examples: in order, each part once, whatever dies, and served like any other."""

import json
import os
import time
from dataclasses import asdict
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboardX import event_file_writer

from learners import adapter, afterwards, artifact, job, servable
from learners.base import as_json
from learners.tracking import FOLDER
from replay.records import Example, Opinion, Source, Split

PREFERENCES = {"beta": 0.1, "learning_rate": 0.005, "epochs": 1, "label_smoothing": 0.1, "imitation": 0.2}
LEARNING = {
    "strategy": "naive",
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "learning_rate": 0.02,
    "epochs": 1,
    "batch_size": 4,
    "accumulation": 1,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 64,
    "early_stopping_patience": 0,
    "ewc_kappa": 1.0,
    "ewc_gamma": 0.95,
    "ewc_sequences": 512,
    "preferences": PREFERENCES,
    "seed": 0,
}


class Killed(BaseException):
    pass


def asked(n):
    return ({"role": "user", "content": f"desk {n}"},)


def example(n):
    split = Split.HOLDOUT if n % 5 == 4 else Split.TRAIN
    return Example(f"e{n}", f"i{n}", f"f{n}", "desk", "desk", asked(n), "yes", split)


def thumb(n, reply="fine"):
    split = Split.HOLDOUT if n % 5 == 4 else Split.TRAIN
    good, bad = (None, reply) if n % 3 == 0 else (reply, None)
    return Opinion(f"t{n}", asked(n), good, bad, split, Source.THUMB)


def pair(n):
    return Opinion(f"p{n}", asked(n), f"yes {n}", "no idea", Split.HOLDOUT if n % 5 == 4 else Split.TRAIN, Source.CORRECTION)


OPINIONS = [thumb(n) for n in range(10)] + [pair(n) for n in range(10)]


def prepared(folder, base, opinions=OPINIONS, parent=None, **learning):
    """A job's folder, as the daemon prepares it."""
    folder.mkdir()
    told = {"id": "j", "line": "desk", "base": as_json(base), "parent": str(parent) if parent else None, "dtype": "float32"}
    (folder / "spec.json").write_text(json.dumps({**told, "learning": {**LEARNING, **learning}}))
    (folder / "older.jsonl").write_text("")
    for file, rows in (("examples.jsonl", [example(n) for n in range(10)]), (afterwards.FILE, opinions)):
        if rows:
            (folder / file).write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return folder


def learned(folder, base, **options):
    """A job's artifact."""
    job.run(prepared(folder, base, **options))
    return folder / "artifact"


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A job with opinions, one of which has a control token, that nothing interrupted."""
    return learned(tmp_path_factory.mktemp("whole") / "j", base, opinions=[*OPINIONS, thumb(10, "<|im_end|>")])


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """One without."""
    return learned(tmp_path_factory.mktemp("plain") / "j", base, opinions=[], strategy="ewc")


def manifest(version):
    return json.loads((version / "manifest.json").read_text())


def weights(version):
    return load_file(version / servable.WEIGHTS)


def test_thumbs_and_pairs_follow_the_examples_and_the_result_is_served(whole, base):
    artifact.check(whole, base, 16)
    told = manifest(whole)
    assert (told["metrics"]["kto_items"], told["metrics"]["dpo_items"]) == (8, 8), "two of each are held out"
    assert told["metrics"]["dpo_held_out_accuracy"] in {0.0, 0.5, 1.0}
    assert told["metrics"]["opinions_skipped"] == 1
    assert told["metrics"]["train_loss"] > 0
    assert told["opinions"][0] == {"id": "t0", "source": "thumb", "split": "train"}
    assert sorted(path.name for path in whole.parent.iterdir() if path.is_dir()) == ["artifact"]


def test_without_opinions_a_job_is_what_it_was(plain, base, tmp_path):
    alone = learned(tmp_path / "j", base, opinions=[thumb(0)])
    assert (plain / servable.WEIGHTS).read_bytes() == (alone / servable.WEIGHTS).read_bytes(), "one alone has no batch"
    assert "opinions" not in manifest(plain)
    assert not [name for name in manifest(plain)["metrics"] if name.startswith(("kto", "dpo", "opinions"))]


@pytest.mark.parametrize(("dies_at", "left"), [("learning by kto", ["kto", "dpo"]), ("learning by dpo", ["dpo"])])
def test_a_job_that_dies_goes_on_with_what_is_left_to_the_same_end(whole, base, tmp_path, monkeypatch, dies_at, left):
    folder, phases = prepared(tmp_path / "j", base), []

    def die(told):
        if told["phase"] == dies_at and told["step"] == 2:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(job, "_reporter", lambda _: die)
        with pytest.raises(Killed):
            job.run(folder)
    assert list((folder / afterwards.FOLDER).glob(f"checkpoints-{left[0]}/checkpoint-1/COMPLETE"))
    monkeypatch.setattr(job, "_reporter", lambda _: lambda told: phases.append((told["phase"], told.get("step"))))
    job.run(folder)
    learned = [(phase, step) for phase, step in phases if step]
    assert learned[0] == (dies_at, 2), "it goes on from its checkpoint"
    assert list(dict.fromkeys(phase for phase, _ in learned)) == [f"learning by {phase}" for phase in left], "no part twice"
    again, wanted = weights(folder / "artifact"), weights(whole)
    assert all(torch.allclose(again[name], wanted[name], atol=1e-5) for name in wanted)
    assert manifest(folder / "artifact")["metrics"].keys() == manifest(whole)["metrics"].keys()


def test_the_reference_is_the_champion_that_the_job_starts_from(plain, base, tmp_path, monkeypatch):
    """Not the result of imitation, nor the base, where a `joint` job's adapter starts from."""
    seen = {}
    monkeypatch.setattr(adapter, "refer", lambda model, champion: seen.update(champion))
    learned(tmp_path / "j", base, parent=plain, strategy="joint", opinions=OPINIONS[:10])
    wanted = weights(plain)
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)


def test_ewc_s_penalty_stands_beside_opinions_too(whole, plain, base, tmp_path):
    told = manifest(learned(tmp_path / "j", base, parent=plain, strategy="ewc"))["metrics"]
    assert told["penalty"] > 0
    assert {"kto_penalty", "dpo_penalty"} <= told.keys()
    assert "kto_penalty" not in manifest(whole)["metrics"]


def test_a_followed_job_leaves_events_of_every_phase_and_no_word_of_what_it_learns(base, tmp_path, monkeypatch):
    """By TensorBoard itself: imitation, thumbs and pairs, each a run of its own, since its steps begin anew.

    Its files are named by the second, and a part that takes less than one would write over its own: its clock hastens.
    """
    seconds = count(int(time.time()))
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: float(next(seconds))))
    folder = prepared(tmp_path / "j", base)
    told = {**json.loads((folder / "spec.json").read_text()), "trainer": {"report_to": ["tensorboard"]}}
    (folder / "spec.json").write_text(json.dumps(told))
    job.run(folder)
    assert {path.name for path in (folder / FOLDER).iterdir() if path.is_dir()} == {"kto", "dpo"}
    for part in ("", "kto", "dpo"):
        written = b"".join(path.read_bytes() for path in (folder / FOLDER / part).glob("*tfevents*"))
        assert b"train/loss" in written
        assert not any(one.good and one.good.encode() in written for one in OPINIONS)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_warnings_after_imitation_are_told_with_their_phase():
    metrics = {"warning": "a; b", "kto_loss": 1.0, "dpo_warning": "ewc_stiff: no room"}
    assert afterwards.warnings(metrics) == ["a; b", "dpo: ewc_stiff: no room"]
    assert afterwards.warnings({"penalty": 0.1}) == []

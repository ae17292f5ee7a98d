"""A followed run says its losses and nothing of what it learns; its variables are the environment's again afterwards."""

import os

import pytest

from learners import adapter
from learners.encode import encode
from learners.tracking import FOLDER, tracked
from learners.trainer import fit
from tests.learners.test_trainer import SETTINGS


def test_tensorboard_has_the_losses_and_no_word_of_a_prompt_or_a_reply(base, tokenizer, tmp_path):
    asked = [{"role": "user", "content": "zebra crossing"}]
    examples = [encode(tokenizer, asked, f"walrus {n}", 64) for n in range(4)]
    model, _ = adapter.load_base(base.path, "float32")
    model = adapter.attach(model, None, rank=4, alpha=8, dropout=0.0, seed=0)
    settings = {**SETTINGS, "epochs": 1, "report_to": ["tensorboard"]}
    fit(model, tokenizer, examples, [], settings, "float32", tmp_path / "job-7" / "checkpoints", lambda _: None)
    (file,) = (tmp_path / "job-7" / FOLDER).iterdir()
    written = file.read_bytes()
    assert b"train/loss" in written
    assert b"train/learning_rate" in written
    assert not any(word in written for word in (b"zebra", b"walrus", str(examples[0].input_ids[:8]).encode()))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def ours():
    """The variables but for pytest's own."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {"WANDB_PROJECT": "mine"})


def test_what_the_environment_says_already_stands(environment, tmp_path):
    with tracked(["wandb"], tmp_path / "job-7") as told:
        assert told == {"report_to": ["wandb"], "run_name": "job-7", "project": "learnd"}
        assert os.environ["WANDB_PROJECT"] == "mine"
        assert os.environ["WANDB_DIR"] == str(tmp_path / "job-7" / FOLDER)
        assert os.environ["WANDB_LOG_MODEL"] == "false"
        assert (tmp_path / "job-7" / FOLDER).is_dir()
    assert ours() == {"WANDB_PROJECT": "mine"}


def test_by_default_nothing_is_followed_and_nothing_is_made(environment, tmp_path):
    with tracked([], tmp_path / "job-7") as told:
        assert told["report_to"] == "none"
        assert ours() == {"WANDB_PROJECT": "mine"}
    assert not (tmp_path / "job-7").exists()
